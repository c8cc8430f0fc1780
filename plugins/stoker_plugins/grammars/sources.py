"""From what was asked for to a grammar in llguidance's own notation, with what can be checked beforehand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from stoker import InvalidRequestError
from stoker_plugins.grammars.bounds import MAX_STRING, check_expression, check_lark, check_schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

    from stoker import GrammarSpec
    from stoker_plugins.grammars.options import LlguidanceOptions

__all__ = ["source_of"]

_OPENING, _CLOSING = b"[{(", b"]})"


def source_of(spec: GrammarSpec, options: LlguidanceOptions) -> str:
    """The grammar that a spec stands for, not compiled yet.

    Args:
        spec: What was asked for.
        options: Limits.

    Raises:
        InvalidRequestError: It is malformed or too large.
    """
    _check_size(spec, options)
    match spec.kind:
        case "json_object":
            return _from_schema({"type": "object"}, spec, options)
        case "json_schema":
            return _from_schema(_decoded(spec), spec, options)
        case "regex":
            _refuse(check_expression(spec.text), spec)
            # \d and \w are ASCII, as in the patterns of JSON schemas; in Rust they are not.
            return LLMatcher.grammar_from_regex(regex_to_lark(spec.text, "dw"))
        case "choice":
            return LLMatcher.grammar_from_lark(_from_choices(spec))
        case "gbnf":
            return LLMatcher.grammar_from_lark(_from_gbnf(spec))
        case "lark":
            _refuse(check_lark(spec.text), spec)
            return LLMatcher.grammar_from_lark(spec.text)


def _refuse(reason: str | None, spec: GrammarSpec) -> None:
    if reason is not None:
        raise InvalidRequestError(f"{spec.param} is too large: {reason}", param=spec.param)


def _decoded(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.text)
    except ValueError as error:
        raise InvalidRequestError(f"{spec.param} is not JSON: {error}", param=spec.param) from None


def _check_size(spec: GrammarSpec, options: LlguidanceOptions) -> None:
    data = spec.text.encode("utf-8", "replace")
    if len(data) > options.max_bytes:
        raise InvalidRequestError(
            f"{spec.param} is {len(data):,} bytes long; at most {options.max_bytes:,} are accepted here",
            param=spec.param,
        )
    depth = deepest = 0
    for byte in data:
        if byte in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif byte in _CLOSING:
            depth -= 1
    if deepest > options.max_depth:
        raise InvalidRequestError(
            f"{spec.param} nests brackets {deepest:,} deep; at most {options.max_depth} are accepted here",
            param=spec.param,
        )


def _from_schema(schema: Any, spec: GrammarSpec, options: LlguidanceOptions) -> str:
    if schema is True:
        schema = {}
    if schema is False:
        reason = "nothing can satisfy the schema false"
        raise InvalidRequestError(f"{spec.param} cannot be used: {reason}", param=spec.param)
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            f"{spec.param} is not a JSON schema: it must be an object", param=spec.param
        )
    _refuse(check_schema(schema), spec)
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema),
            overrides={**_layout(options), "lenient": not spec.strict},
        )
    except ValueError as error:
        raise InvalidRequestError(
            f"{spec.param} is not a JSON schema: {error}", param=spec.param
        ) from None


def _layout(options: LlguidanceOptions) -> JsonCompileOptions:
    layout: JsonCompileOptions = {
        "item_separator": options.item_separator,
        "key_separator": options.key_separator,
        "whitespace_flexible": False,
    }
    if options.whitespace:
        layout["whitespace_pattern"] = options.whitespace
    return layout


def _from_choices(spec: GrammarSpec) -> str:
    choices = _decoded(spec)
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise InvalidRequestError(f"{spec.param} must be a list of strings", param=spec.param)
    if not any(choices):
        raise InvalidRequestError(
            f"{spec.param} must hold at least one string that is not empty", param=spec.param
        )
    if (longest := max(map(len, choices))) > MAX_STRING:
        reason = f"a string of {longest:,} characters; at most {MAX_STRING:,} are accepted here"
        _refuse(reason, spec)
    # One terminal: as alternatives of a rule, ten thousand would be ten thousand states of the parser.
    quoted = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(choices))
    return "start: CHOICE\nCHOICE: " + " | ".join(quoted)


def _from_gbnf(spec: GrammarSpec) -> str:
    try:
        return any_to_lark(spec.text)
    except GbnfToLarkError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # noqa: BLE001 - the converter raises plain exceptions for some mistakes
        reason = str(error)
    raise InvalidRequestError(f"{spec.param} is not a GBNF grammar: {reason}", param=spec.param)
