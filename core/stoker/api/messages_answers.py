"""The bodies of the answers of Anthropic's API, as structs: what is encoded and shown in the schema."""

from typing import Literal

import msgspec

__all__ = [
    "ContentBlock",
    "CountedTokens",
    "Message",
    "MessageUsage",
    "MessagesError",
    "MessagesErrorBody",
    "MessagesErrorDetails",
    "MessagesModel",
    "MessagesModelList",
    "StopReason",
    "TextBlock",
    "ThinkingBlock",
    "ToolUseBlock",
]

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]
ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "billing_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "timeout_error",
    "api_error",
    "overloaded_error",
]


class TextBlock(msgspec.Struct, kw_only=True, tag="text", tag_field="type"):
    """Some text."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag="thinking", tag_field="type"):
    """What the model thought. Nothing is signed here, so that the signature is empty."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag="tool_use", tag_field="type"):
    """A tool call."""

    id: str
    name: str
    input: dict[str, msgspec.Raw]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(msgspec.Struct, kw_only=True):
    """``thinking_tokens``: those of the generated tokens that are thinking."""

    thinking_tokens: int = 0


class MessageUsage(msgspec.Struct, kw_only=True):
    """Token counts.

    Attributes:
        input_tokens: Prompt tokens that had to be computed.
        cache_creation_input_tokens: Always 0: keeping a prefix costs nothing.
        cache_read_input_tokens: Prompt tokens that were in the cache.
        output_tokens: Generated tokens.
        output_tokens_details: What those were.
        service_tier: The only one.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    output_tokens_details: ThinkingTokens = msgspec.field(default_factory=ThinkingTokens)
    service_tier: Literal["standard"] = "standard"


class Message(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/messages``.

    Attributes:
        id: Its id.
        role: Whose message it is.
        content: What the model said.
        model: Which model.
        stop_reason: Why it ended.
        stop_sequence: Which of the stop sequences ended it.
        usage: Token counts.
    """

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class CountedTokens(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class MessagesModel(msgspec.Struct, kw_only=True):
    """A served model, as Anthropic's API tells it."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class MessagesModelList(msgspec.Struct, kw_only=True):
    """Served models, the default first, as Anthropic's API lists them."""

    data: list[MessagesModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class MessagesErrorDetails(msgspec.Struct, kw_only=True):
    """For programs.

    Attributes:
        error_code: What it is, more exactly.
        param: The request field at fault.
    """

    error_code: str | None = None
    param: str | None = None


class MessagesError(msgspec.Struct, kw_only=True):
    """What went wrong."""

    type: ErrorType
    message: str
    details: MessagesErrorDetails | None = None


class MessagesErrorBody(msgspec.Struct, kw_only=True):
    """The body of every answer of Anthropic's API that is not a success."""

    type: Literal["error"] = "error"
    error: MessagesError
    request_id: str
