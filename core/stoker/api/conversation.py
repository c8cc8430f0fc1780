"""The messages and tools of a chat request, checked and brought into the form that chat templates want."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from stoker.api.request_schemas import (
    ChatMessage,
    ContentPart,
    ToolCallParam,
    ToolChoiceParam,
    ToolParam,
)
from stoker.errors import InvalidRequestError
from stoker.interfaces import Tool, ToolChoice

__all__ = ["check_text", "join_parts", "read_messages", "read_tool_choice", "read_tools"]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_MODES = ("none", "auto", "required")


def _invalid(message: str, param: str, code: str = "invalid_value") -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code=code)


def _missing(param: str, why: str = "") -> InvalidRequestError:
    return _invalid(f"{param!r} is missing{why}", param, "missing_required_parameter")


def check_text(text: str, where: str, *, empty: bool = True) -> str:
    """The text, if it may stand in a prompt.

    Raises:
        InvalidRequestError: It holds a NUL character, or nothing where something has to be.
    """
    if not text and not empty:
        raise _invalid(f"{where!r} is empty", where)
    if "\0" in text:
        raise _invalid(f"{where!r} holds a NUL character; remove it", where)
    return text


# --------------------------------------------------------------------------- messages


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """A conversation as chat templates want it: contents are texts, roles are known, calls are well-formed.

    Arguments of calls stay the JSON text that came.

    Raises:
        InvalidRequestError: A message is malformed; names it by its index.
    """
    called: set[str] = set()
    return [_message(message, f"messages.{i}", called) for i, message in enumerate(messages)]


def _message(message: ChatMessage, where: str, called: set[str]) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        raise _invalid(
            f"unknown role {message.role[:50]!r}; use one of {', '.join(_ROLES)}", f"{where}.role"
        )
    result: dict[str, Any] = {"role": role, "content": _content(message, where)}
    if message.name is not None:
        result["name"] = check_text(message.name, f"{where}.name")
    if role == "assistant":
        if message.reasoning_content:
            result["reasoning_content"] = check_text(
                message.reasoning_content, f"{where}.reasoning_content"
            )
        if message.tool_calls:
            result["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls.{i}", called)
                for i, call in enumerate(message.tool_calls)
            ]
    elif message.tool_calls:
        raise _invalid(
            f"'{where}.tool_calls': only an assistant's message may have tool calls",
            f"{where}.tool_calls",
        )
    if role == "tool":
        result["tool_call_id"] = _answered_call(message, where, called)
    elif message.tool_call_id is not None:
        raise _invalid(
            f"'{where}.tool_call_id': only a message of the role 'tool' may have one",
            f"{where}.tool_call_id",
        )
    return result


def _tool_call(call: ToolCallParam, where: str, called: set[str]) -> dict[str, Any]:
    if call.type != "function":
        raise _invalid(
            f"tool calls of type {call.type[:50]!r} are not supported; only 'function' is",
            f"{where}.type",
        )
    if call.function is None:
        raise _missing(f"{where}.function")
    name, arguments = call.function.name, call.function.arguments
    at = f"{where}.function.arguments"
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(
            f"{at!r} is not the text of a JSON object: {str(error)[:200] or 'nested too deeply'}",
            at,
        ) from None
    if not isinstance(value, dict):
        raise _invalid(f"{at!r} is not the text of a JSON object", at)
    called.add(call.id)
    return {
        "id": check_text(call.id, f"{where}.id"),
        "type": "function",
        "function": {
            "name": check_text(name, f"{where}.function.name"),
            "arguments": check_text(arguments, at),
        },
    }


def _answered_call(message: ChatMessage, where: str, called: set[str]) -> str:
    at = f"{where}.tool_call_id"
    if message.tool_call_id is None:
        raise _missing(at, "; say which call this is the result of")
    if message.tool_call_id not in called:
        raise _invalid(
            f"{at!r} is {message.tool_call_id[:64]!r}, but no assistant message before it has a tool "
            "call of that id",
            at,
        )
    return check_text(message.tool_call_id, at)


def _content(message: ChatMessage, where: str) -> str:
    content = message.content
    if content is None and message.role == "assistant":
        return check_text(message.refusal or "", f"{where}.refusal")
    where = f"{where}.content"
    if isinstance(content, str):
        return check_text(content, where)
    if content is None:
        raise _missing(where, "; only an assistant's content may be null")
    return join_parts(content, where, refusals=message.role == "assistant")


def join_parts(parts: Sequence[ContentPart], where: str, *, refusals: bool = False) -> str:
    """The text of content parts.

    Args:
        parts: The parts.
        where: The field they came in.
        refusals: Whether parts of type ``refusal`` may be among them.

    Raises:
        InvalidRequestError: One of them is no text.
    """
    texts = []
    for i, part in enumerate(parts):
        kind = "refusal" if refusals and part.type == "refusal" else "text"
        if part.type != kind:
            raise _invalid(
                f"content parts of type {part.type[:50]!r} are not supported by this model; only 'text' is",
                f"{where}.{i}",
            )
        text = part.refusal if kind == "refusal" else part.text
        if text is None:
            raise _missing(f"{where}.{i}.{kind}")
        texts.append(check_text(text, f"{where}.{i}.{kind}"))
    return "\n".join(texts)


# --------------------------------------------------------------------------- tools


def read_tools(tools: Sequence[ToolParam] | None) -> list[Tool]:
    """The functions that the model may call.

    Raises:
        InvalidRequestError: One of them is malformed, or two have one name.
    """
    found: dict[str, Tool] = {}
    for i, param in enumerate(tools or ()):
        where = f"tools.{i}"
        if param.type != "function":
            raise _invalid(
                f"tools of type {param.type[:50]!r} are not supported; only 'function' is",
                f"{where}.type",
            )
        if param.function is None:
            raise _missing(f"{where}.function")
        tool = _tool(param, where)
        if tool.name in found:
            raise _invalid(
                f"two tools are called {tool.name!r}; give each a name of its own",
                f"{where}.function.name",
            )
        found[tool.name] = tool
    return list(found.values())


def _tool(param: ToolParam, where: str) -> Tool:
    function = param.function
    if function is None:
        raise _missing(f"{where}.function")
    if _TOOL_NAME.fullmatch(function.name) is None:
        raise _invalid(
            f"'{where}.function.name' is {function.name[:64]!r}; use letters, digits, '_' and '-'",
            f"{where}.function.name",
        )
    parameters = function.parameters or {}
    kind = parameters.get("type", "object")
    if kind != "object":
        raise _invalid(
            f"'{where}.function.parameters' describes no object: its 'type' has to be 'object'",
            f"{where}.function.parameters",
        )
    return Tool(
        name=function.name,
        description=check_text(function.description or "", f"{where}.function.description"),
        parameters=parameters,
        strict=bool(function.strict),
    )


def read_tool_choice(
    choice: str | ToolChoiceParam | None, tools: Sequence[Tool], *, parallel: bool | None
) -> ToolChoice:
    """Whether the model has to call a tool, and which it may.

    Raises:
        InvalidRequestError: There are no such tools.
    """
    names: tuple[str, ...] = ()
    if choice is None:
        mode = "auto" if tools else "none"
    elif isinstance(choice, str):
        mode = choice
    else:
        mode, names = _chosen(choice)
        if choice.type == "function":
            parallel = False  # that one, once
    if mode not in _MODES:
        raise _invalid(
            f"'tool_choice' is {mode[:50]!r}; use {', '.join(_MODES)}, or name a function",
            "tool_choice",
        )
    if mode == "required" and not tools:
        raise _invalid(
            "'tool_choice' asks for a tool call, but there are no 'tools'", "tool_choice"
        )
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise _invalid(
                f"'tool_choice' names {name[:64]!r}, which is none of 'tools'", "tool_choice"
            )
    if not tools:
        mode = "none"
    return msgspec.convert(
        {"mode": mode, "names": names, "parallel": parallel is not False}, ToolChoice
    )


def _chosen(choice: ToolChoiceParam) -> tuple[str, tuple[str, ...]]:
    if choice.type == "function":
        if choice.function is None:
            raise _missing("tool_choice.function")
        return "required", (choice.function.name,)
    if choice.type == "allowed_tools":
        allowed = choice.allowed_tools
        if allowed is None:
            raise _missing("tool_choice.allowed_tools")
        names = []
        for i, tool in enumerate(allowed.tools):
            if tool.function is None:
                raise _missing(f"tool_choice.allowed_tools.tools.{i}.function")
            names.append(tool.function.name)
        if allowed.mode not in _MODES[1:]:
            raise _invalid(
                f"'tool_choice.allowed_tools.mode' is {allowed.mode[:50]!r}; use auto or required",
                "tool_choice.allowed_tools.mode",
            )
        return allowed.mode, tuple(names)
    raise _invalid(
        f"'tool_choice.type' is {choice.type[:50]!r}; use function or allowed_tools",
        "tool_choice.type",
    )
