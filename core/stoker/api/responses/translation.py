"""A request for a response as a chat request, and errors of that in the words of this."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from stoker.api.request_schemas import (
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    ResponseFormat,
    ToolChoiceParam,
    ToolChoiceTool,
    ToolParam,
)
from stoker.api.responses.items import Turn
from stoker.api.responses.parameters import LOGPROBS
from stoker.api.responses.request_schemas import (
    InputTokensRequest,
    ResponseRequest,
    ResponseTextFormat,
    ResponseTool,
    ResponseToolChoice,
)
from stoker.api.validation import chat_calls
from stoker.config import Config
from stoker.errors import InvalidRequestError, RequestError
from stoker.router import Call

__all__ = [
    "check_options",
    "check_truncation",
    "echoed",
    "in_own_words",
    "to_call",
    "wants_logprobs",
]

# What both have under one name.
_SAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *(
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "structured_outputs",
        "priority",
        "timeout",
    ),
    *(
        "chat_template_kwargs",
        "cache_salt",
        "service_tier",
        "metadata",
        "user",
        "safety_identifier",
    ),
    "parallel_tool_calls",
)
_MESSAGE = re.compile(r"messages\.(\d+)(?:\.tool_calls\.(\d+))?((?:\.\w+)*)")
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.allowed_tools": "tool_choice",
}
# As a field's name stands in a message, in quotes, or alone; one is named in prose, too.
_WORDS = re.compile(
    r"(?:(?<=')|^)(" + "|".join(map(re.escape, _RENAMED)) + r")(?=['.]|$)|\b(max_tokens)\b"
)
_TOOL = re.compile(r"\b(tools\.\d+|tool_choice(?:\.tools\.\d+)?)\.function\b")


def wants_logprobs(body: ResponseRequest) -> bool:
    """Whether the response tells log-probabilities."""
    return body.top_logprobs is not None or LOGPROBS in (body.include or ())


def check_truncation(body: ResponseRequest | InputTokensRequest) -> None:
    """Refuse a ``truncation`` that there is not.

    Raises:
        InvalidRequestError: There is none of this name.
    """
    if body.truncation not in {None, "auto", "disabled"}:
        raise _invalid(
            f"'truncation' is {body.truncation[:50]!r}; use auto or disabled", "truncation"
        )


def check_options(body: ResponseRequest) -> None:
    """Refuse options that contradict each other.

    Raises:
        InvalidRequestError: They do.
    """
    check_truncation(body)
    if body.background and body.store is False:
        raise _invalid(
            "'background' needs 'store': a response that nobody waits for is asked for later",
            "background",
        )
    if body.stream_options is not None and not body.stream:
        raise _invalid("'stream_options' is only allowed when 'stream' is true", "stream_options")
    if not body.input and body.previous_response_id is None:
        raise InvalidRequestError(
            "'input' is missing; send a text, items, or a 'previous_response_id'",
            param="input",
            code="missing_required_parameter",
        )


def to_call(
    body: ResponseRequest | InputTokensRequest,
    turns: Sequence[Turn],
    config: Config,
    model: str,
    request_id: str,
    headers: Mapping[str, str],
) -> Call:
    """The call that a request for a response asks for.

    Args:
        body: The request.
        turns: Its conversation, without its instructions.
        config: For limits.
        model: The default model.
        request_id: Its id.
        headers: What middleware may see.

    Raises:
        InvalidRequestError: Something is wrong with it; says so in the words of chat requests.
    """
    chat = ChatRequest(messages=[turn.message for turn in turns])
    if body.instructions:
        chat.messages.insert(0, ChatMessage(role="system", content=body.instructions))
    for name in _SAME:
        if hasattr(body, name):
            setattr(chat, name, getattr(body, name))
    if isinstance(body, ResponseRequest):
        chat.max_completion_tokens = body.max_output_tokens
        if wants_logprobs(body):
            chat.logprobs, chat.top_logprobs = True, body.top_logprobs or 0
    if body.tools:
        chat.tools = [_tool(tool, i) for i, tool in enumerate(body.tools)]
    chat.tool_choice = _choice(body.tool_choice)
    if body.reasoning is not None:
        chat.reasoning_effort = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        chat.response_format = _format(body.text.format)
    (call,) = chat_calls(chat, config, model, request_id, headers)
    if call.grammar is not None:
        param = _renamed(call.grammar.param, turns, has_instructions=False)
        call.grammar = msgspec.structs.replace(call.grammar, param=param)
    return call


def _tool(tool: ResponseTool, index: int) -> ToolParam:
    where = f"tools.{index}"
    if tool.type != "function":
        raise InvalidRequestError(
            f"tools of type {tool.type[:50]!r} are not supported; only 'function' is",
            param=f"{where}.type",
            code="unsupported_value",
        )
    if tool.name is None:
        raise _missing(f"{where}.name")
    function = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return ToolParam(type="function", function=function)


def _choice(choice: str | ResponseToolChoice | None) -> str | ToolChoiceParam | None:
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type == "function":
        if choice.name is None:
            raise _missing("tool_choice.name")
        return ToolChoiceParam(type="function", function=NamedFunction(name=choice.name))
    if choice.type != "allowed_tools":
        raise _invalid(
            f"'tool_choice.type' is {choice.type[:50]!r}; use function or allowed_tools",
            "tool_choice.type",
        )
    if choice.tools is None:
        raise _missing("tool_choice.tools")
    tools = []
    for i, tool in enumerate(choice.tools):
        if tool.type != "function" or tool.name is None:
            raise _invalid(f"'tool_choice.tools.{i}' names no function", f"tool_choice.tools.{i}")
        tools.append(ToolChoiceTool(type="function", function=NamedFunction(name=tool.name)))
    allowed = AllowedTools(mode=choice.mode or "auto", tools=tools)
    return ToolChoiceParam(type="allowed_tools", allowed_tools=allowed)


def _format(wanted: ResponseTextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.schema_ is None:
        raise _missing("text.format.schema")
    schema = JsonSchemaFormat(
        name=wanted.name,
        description=wanted.description,
        schema_=wanted.schema_,
        strict=wanted.strict,
    )
    return ResponseFormat(type="json_schema", json_schema=schema)


# --------------------------------------------------------------------------- errors


@contextlib.contextmanager
def in_own_words(turns: Sequence[Turn], *, has_instructions: bool) -> Iterator[None]:
    """Errors that leave name the fields of a request for a response, not of the chat that it became.

    Args:
        turns: The conversation.
        has_instructions: Whether a message with the instructions comes before.

    Raises:
        RequestError: The error, in other words.
    """
    try:
        yield
    except RequestError as error:
        error.message = _renamed(error.message, turns, has_instructions=has_instructions)
        error.args = (error.message,)
        if error.param is not None:
            error.param = _renamed(error.param, turns, has_instructions=has_instructions)
        raise


def _renamed(text: str, turns: Sequence[Turn], *, has_instructions: bool) -> str:
    def place(match: re.Match[str]) -> str:
        index = int(match[1]) - has_instructions
        if index < 0:
            return "instructions"
        if index >= len(turns):
            return match[0]
        return _place(turns[index], match[2], match[3])

    return _TOOL.sub(r"\1", _WORDS.sub(lambda m: _RENAMED[m[1] or m[2]], _MESSAGE.sub(place, text)))


def _place(turn: Turn, call: str | None, rest: str) -> str:
    """Where something of a message came from; what is of a response before, only that."""
    if call is not None and int(call) < len(turn.calls):
        origin, rest = (
            turn.calls[int(call)],
            rest.replace(".function", "").replace(".id", ".call_id"),
        )
    else:
        origin = turn.origin
        rest = rest.replace(".tool_call_id", ".call_id")
        if turn.message.role == "tool":
            rest = rest.replace(".content", ".output")
    return origin + rest if origin.startswith("input.") else origin


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param!r} is missing", param=param, code="missing_required_parameter"
    )


def echoed(value: Any) -> Any:
    """A part of a request as the response gives it back: without what was not sent."""
    plain = msgspec.to_builtins(value)
    return {k: v for k, v in plain.items() if v is not None} if isinstance(plain, dict) else plain
