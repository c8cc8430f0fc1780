"""Requests to Anthropic's API into what chat completions are made of: a ``ChatRequest``, and its ``Call``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stoker.api.conversation import check_text
from stoker.api.messages_history import read_history
from stoker.api.messages_schemas import (
    CacheControl,
    InputBlock,
    InputMessage,
    JsonOutputFormat,
    MessagesMetadata,
    MessagesPrompt,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    OutputConfig,
    ResultBlock,
    ThinkingConfig,
)
from stoker.api.parameters import KnownFields
from stoker.api.request_schemas import (
    ChatRequest,
    FunctionDefinition,
    NamedFunction,
    ToolChoiceParam,
    ToolParam,
)
from stoker.api.shapes import schema_spec
from stoker.api.validation import chat_calls
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.grammar import GrammarSpec
from stoker.router import Call

__all__ = ["COUNT_FIELDS", "MESSAGES_FIELDS", "messages_call"]

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING: dict[str, dict[str, Any]] = {
    "enabled": {"enable_thinking": True},
    "disabled": {"enable_thinking": False},
    "adaptive": {},
}
_DISPLAYS = ("summarized", "omitted")
# Templates know three efforts.
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_TIERS = ("auto", "standard_only")

# --------------------------------------------------------------------------- the fields that are served

_CACHE = KnownFields.of(CacheControl)
_RESULT = KnownFields.of(
    ResultBlock, within={"cache_control": _CACHE}, unsupported=("citations", "source")
)
_BLOCK = KnownFields.of(
    InputBlock,
    also=("caller",),  # who called a tool: a label on what is over
    within={"content": _RESULT, "cache_control": _CACHE},
    unsupported=("citations", "source", "title", "context", "toolset_name"),
)
_FORMAT = KnownFields.of(JsonOutputFormat)
_WITHIN = {
    "messages": KnownFields.of(InputMessage, within={"content": _BLOCK}),
    "system": _RESULT,
    "tools": KnownFields.of(
        MessagesTool,
        within={"cache_control": _CACHE},
        unsupported=("allowed_callers", "defer_loading", "input_examples"),
    ),
    "tool_choice": KnownFields.of(MessagesToolChoice),
    "thinking": KnownFields.of(ThinkingConfig, unsupported=("budget_tokens",)),
    "output_config": KnownFields.of(
        OutputConfig, within={"format": _FORMAT}, unsupported=("task_budget",)
    ),
    "output_format": _FORMAT,
    "cache_control": _CACHE,
}
_ELSEWHERE = (
    *("container", "context_management", "diagnostics", "fallbacks", "inference_geo"),
    *("mcp_servers", "user_profile_id", "workspace_id"),
)

COUNT_FIELDS = KnownFields.of(MessagesPrompt, within=_WITHIN, unsupported=_ELSEWHERE)
"""What ``/v1/messages/count_tokens`` serves."""

MESSAGES_FIELDS = KnownFields.of(
    MessagesRequest,
    within={**_WITHIN, "metadata": KnownFields.of(MessagesMetadata)},
    unsupported=_ELSEWHERE,
)
"""What ``/v1/messages`` serves."""


# --------------------------------------------------------------------------- the call


def messages_call(
    body: MessagesPrompt, config: Config, model: str, request_id: str, headers: Mapping[str, str]
) -> Call:
    """The call that a request asks for.

    Args:
        body: The request; if it is only to be counted, without what says how to generate.
        config: Limits.
        model: The default model.
        request_id: Its id.
        headers: What middleware may see.

    Raises:
        InvalidRequestError: Something is wrong with it.
    """
    if body.speed not in {None, "standard"}:
        raise _invalid("'speed' is not served; leave it out, or send 'standard'", "speed")
    messages = read_history(body)
    tools = _tools(body.tools or ())
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(body.tool_choice, tools),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        chat_template_kwargs=_template_options(body),
        continue_final_message=messages[-1].role == "assistant",
    )
    if isinstance(body, MessagesRequest):
        _add_sampling(chat, body)
    (call,) = chat_calls(chat, config, model, request_id, headers)
    call.grammar = _grammar(body)
    call.fits_context = True
    if isinstance(body, MessagesRequest) and body.stop_sequences:
        # OpenAI's four are no limit here.
        stop = tuple(dict.fromkeys(body.stop_sequences))
        call.sampling = msgspec.structs.replace(call.sampling, stop=stop)
    return call


def _add_sampling(chat: ChatRequest, body: MessagesRequest) -> None:
    if body.service_tier not in {None, *_TIERS}:
        raise _one_of("service_tier", body.service_tier, _TIERS)
    chat.max_tokens = body.max_tokens
    chat.temperature = body.temperature
    chat.top_p = body.top_p
    chat.top_k = body.top_k
    chat.stream = body.stream
    if body.metadata is not None:
        chat.user = body.metadata.user_id


def _template_options(body: MessagesPrompt) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.thinking is not None:
        kind, display = body.thinking.type, body.thinking.display
        if kind not in _THINKING:
            raise _one_of("thinking.type", kind, _THINKING)
        if display not in {None, *_DISPLAYS}:
            raise _one_of("thinking.display", display, _DISPLAYS)
        options |= _THINKING[kind]
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        if effort not in _EFFORTS:
            raise _one_of("output_config.effort", effort, _EFFORTS)
        options["reasoning_effort"] = _EFFORTS[effort]
    return options


def _grammar(body: MessagesPrompt) -> GrammarSpec | None:
    """What the answer must look like.

    Raises:
        InvalidRequestError: It is said twice, or wrongly.
    """
    given = {"output_format": body.output_format}
    if body.output_config is not None:
        given["output_config.format"] = body.output_config.format
    wanted = [(at, form) for at, form in given.items() if form is not None]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise _invalid(
            "'output_config.format' and 'output_format' both say what the answer must look like; send "
            "the first one",
            "output_format",
        )
    ((at, form),) = wanted
    if form.type != "json_schema":
        raise _one_of(f"{at}.type", form.type, ("json_schema",))
    if form.schema_ is None:
        raise _missing(f"{at}.schema")
    return schema_spec(form.schema_, f"{at}.schema", strict=True)


# --------------------------------------------------------------------------- tools


def _tools(tools: Sequence[MessagesTool]) -> list[ToolParam]:
    names: set[str] = set()
    result = []
    for i, tool in enumerate(tools):
        where = f"tools.{i}"
        if tool.type not in {None, "custom"}:
            raise _invalid(
                f"tools of type {str(tool.type)[:50]!r} are not supported: there is nobody here to run them; "
                "only tools of your own are, of type 'custom' and with an 'input_schema'",
                f"{where}.type",
            )
        if _TOOL_NAME.fullmatch(tool.name) is None:
            raise _invalid(
                f"'{where}.name' is {tool.name[:64]!r}; use letters, digits, '_' and '-'",
                f"{where}.name",
            )
        if tool.name in names:
            raise _invalid(
                f"two tools are called {tool.name!r}; give each a name of its own", f"{where}.name"
            )
        names.add(tool.name)
        result.append(ToolParam(type="function", function=_function(tool, where)))
    return result


def _function(tool: MessagesTool, where: str) -> FunctionDefinition:
    if tool.input_schema is None:
        raise _missing(f"{where}.input_schema")
    if tool.input_schema.get("type", "object") != "object":
        raise _invalid(
            f"'{where}.input_schema' describes no object: its 'type' has to be 'object'",
            f"{where}.input_schema.type",
        )
    return FunctionDefinition(
        name=tool.name,
        description=check_text(tool.description or "", f"{where}.description"),
        parameters=tool.input_schema,
        strict=tool.strict,
    )


def _tool_choice(
    choice: MessagesToolChoice | None, tools: Sequence[ToolParam]
) -> str | ToolChoiceParam | None:
    if choice is None:
        return None
    if choice.type in _CHOICES:
        if choice.name is not None:
            raise _invalid(
                "'tool_choice.name' is only allowed when 'tool_choice.type' is 'tool'",
                "tool_choice.name",
            )
        return _CHOICES[choice.type]
    if choice.type != "tool":
        raise _one_of("tool_choice.type", choice.type, (*_CHOICES, "tool"))
    if choice.name is None:
        raise _missing("tool_choice.name")
    if not any(tool.function and tool.function.name == choice.name for tool in tools):
        raise _invalid(
            f"'tool_choice.name' is {choice.name[:64]!r}, which is none of 'tools'",
            "tool_choice.name",
        )
    return ToolChoiceParam(type="function", function=NamedFunction(name=choice.name))


# --------------------------------------------------------------------------- errors


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


def _one_of(param: str, given: str | None, known: Sequence[str] | Mapping[str, Any]) -> Exception:
    return _invalid(f"{param!r} is {str(given)[:50]!r}; use {' or '.join(known)}", param)


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param!r} is missing", param=param, code="missing_required_parameter"
    )
