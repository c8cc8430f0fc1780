"""From what was asked for to a grammar in llguidance's own notation, with what can be checked beforehand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from stoker import InvalidRequestError

if TYPE_CHECKING:
    from stoker import GrammarSpec
    from stoker_plugins.grammars.options import LlguidanceOptions

__all__ = ["source_of"]

_OPENING, _CLOSING = b"[{(", b"]})"
_ANY_OBJECT = '{"type": "object"}'


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
            return _from_schema(_ANY_OBJECT, spec, options)
        case "json_schema":
            return _from_schema(spec.text, spec, options)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "choice":
            return LLMatcher.grammar_from_lark(_from_choices(spec))
        case "gbnf":
            return LLMatcher.grammar_from_lark(_from_gbnf(spec))
        case "lark":
            return LLMatcher.grammar_from_lark(spec.text)


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


def _from_schema(schema: str, spec: GrammarSpec, options: LlguidanceOptions) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={"whitespace_pattern": options.whitespace, "lenient": not spec.strict},
        )
    except ValueError as error:
        raise InvalidRequestError(
            f"{spec.param} is not a JSON schema: {error}", param=spec.param
        ) from None


def _from_choices(spec: GrammarSpec) -> str:
    try:
        choices = json.loads(spec.text)
    except ValueError as error:
        raise InvalidRequestError(f"{spec.param} is not JSON: {error}", param=spec.param) from None
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise InvalidRequestError(f"{spec.param} must be a list of strings", param=spec.param)
    if not any(choices):
        raise InvalidRequestError(
            f"{spec.param} must hold at least one string that is not empty", param=spec.param
        )
    # Sorted out first: of two that are the same the parser would follow both.
    quoted = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(choices))
    return "start: " + " | ".join(quoted)


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
