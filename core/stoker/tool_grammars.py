"""What outputs with tool calls must look like: a format's grammar, with schemas as strict as can be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stoker.calls import Call
from stoker.errors import InvalidRequestError
from stoker.grammar import GrammarSpec
from stoker.interfaces import Tool, ToolChoice, ToolFormat

__all__ = ["looser_grammars", "strict_schemas", "tool_grammar"]

_ANY_OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": True}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_GUIDANCE = "x-guidance"  # where llguidance reads how to take a schema


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    call: Call,
    special_tokens: Mapping[str, int],
    *,
    constrains: bool,
) -> GrammarSpec | None:
    """The grammar of outputs with calls, each by its tool's whole schema; ``None`` if they are free.

    Where a response format is asked for, too, the output is calls or what that describes.

    Args:
        form: How the model writes calls.
        tools: The tools it is told of.
        call: What is asked for.
        special_tokens: The model's control tokens by their text.
        constrains: Whether outputs can be made to follow a grammar at all.

    Raises:
        InvalidRequestError: There has to be a call, and nothing that makes sure of it.
    """
    exact = [_with_guidance(tool, {}) for tool in tools]
    text = ""
    if constrains:
        text = _grammar(form, exact, call.tool_choice, call.grammar, special_tokens)
    if text:
        return GrammarSpec(kind="lark", text=text, param="tools")
    if call.tool_choice.mode == "required":
        why = "by this model's tool format"
        if not constrains:
            why = "here: structured outputs are switched off (server.grammar = none)"
        raise InvalidRequestError(
            f"no tool call can be made sure of {why}; use the tool_choice 'auto'",
            param="tool_choice",
        )
    if call.grammar is not None:
        raise _not_together(call.grammar)
    return None


def looser_grammars(
    form: ToolFormat, tools: Sequence[Tool], call: Call, special_tokens: Mapping[str, int]
) -> Sequence[GrammarSpec]:
    """The same, but of tools that are not strict what the compiler knows of the schema, or any object."""
    if all(tool.strict for tool in tools):
        return ()
    lenient = [_with_guidance(tool, {"lenient": not tool.strict}) for tool in tools]
    free = [_with_any_arguments(tool) for tool in tools]
    texts = [
        _grammar(form, v, call.tool_choice, call.grammar, special_tokens) for v in (lenient, free)
    ]
    return [GrammarSpec(kind="lark", text=text, param="tools") for text in texts]


def strict_schemas(tools: Sequence[Tool]) -> Sequence[GrammarSpec]:
    """The schemas that have to be enforced, each by itself."""
    return tuple(
        GrammarSpec(
            kind="json_schema",
            text=json.dumps(tool.parameters),
            param=f"tools.{i}.function.parameters",
        )
        for i, tool in enumerate(tools)
        if tool.strict
    )


def _with_guidance(tool: Tool, guidance: Mapping[str, Any]) -> Tool:
    """The tool, its schema with these hints for the compiler and none of the client's."""
    parameters = {key: item for key, item in tool.parameters.items() if key != _GUIDANCE}
    if parameters and guidance:
        parameters[_GUIDANCE] = guidance
    return msgspec.structs.replace(tool, parameters=parameters)


def _with_any_arguments(tool: Tool) -> Tool:
    if tool.strict:
        return _with_guidance(tool, {})
    return msgspec.structs.replace(tool, parameters=_ANY_OBJECT)


def _grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    answer: GrammarSpec | None,
    special: Mapping[str, int],
) -> str:
    if answer is None or choice.mode == "required":
        return form.grammar(tools, choice, special)
    calls = form.grammar(tools, msgspec.structs.replace(choice, mode="required"), special)
    if not calls:
        return ""
    calls = re.sub(r"^start:", "tool_calls:", calls, count=1, flags=re.MULTILINE)
    return f"start: tool_calls | answer\nanswer: {_rule(answer)}\n{calls}"


def _rule(spec: GrammarSpec) -> str:
    """What a rule of a Lark grammar says to describe the same.

    Raises:
        InvalidRequestError: It cannot.
    """
    if spec.kind == "json_object":
        return f"%json {json.dumps({'type': 'object', _GUIDANCE: _COMPACT})}"
    if spec.kind == "json_schema":
        schema = json.loads(spec.text)
        if not isinstance(schema, dict):
            return f"%json {spec.text}"
        return (
            f"%json {json.dumps({**schema, _GUIDANCE: {**_COMPACT, 'lenient': not spec.strict}})}"
        )
    if spec.kind == "choice":
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(spec.text))
    raise _not_together(spec)


def _not_together(spec: GrammarSpec) -> InvalidRequestError:
    return InvalidRequestError(
        f"{spec.param!r} cannot be combined with tools that the model may or may not call; leave one of "
        "them out, or use the tool_choice 'required'",
        param=spec.param,
    )
