"""Responses and their items, as structs: what is encoded, stored, and shown in the schema.

What is ``UNSET`` is left out.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from stoker.api.answer_schemas import ChatTokenLogprob
from stoker.api.responses.request_schemas import ResponseTool

__all__ = [
    "DeletedResponse",
    "FailureDetails",
    "FunctionCallItem",
    "FunctionOutputItem",
    "IncompleteDetails",
    "InputTokens",
    "Item",
    "ItemList",
    "ItemStatus",
    "MessageItem",
    "MessagePart",
    "ReasoningItem",
    "ReasoningText",
    "ResponseObject",
    "ResponseStatus",
    "ResponseUsage",
    "SummaryText",
]

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class MessagePart(msgspec.Struct, kw_only=True):
    """A part of a message; one of type ``output_text`` has ``annotations`` and ``logprobs``."""

    type: Literal["input_text", "output_text", "refusal"]
    text: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    annotations: list[dict[str, Any]] | UnsetType = UNSET
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """A message."""

    id: str
    role: Literal["user", "assistant", "system", "developer"]
    status: ItemStatus = "completed"
    content: list[MessagePart]


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function: ``arguments`` is the text of a JSON object."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus = "completed"


class FunctionOutputItem(
    msgspec.Struct, kw_only=True, tag_field="type", tag="function_call_output"
):
    """What a call came to."""

    id: str
    call_id: str
    output: str | list[MessagePart]
    status: ItemStatus = "completed"


class SummaryText(msgspec.Struct, kw_only=True):
    """A part of a summary of reasoning."""

    type: Literal["summary_text"] = "summary_text"
    text: str


class ReasoningText(msgspec.Struct, kw_only=True):
    """A part of reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered: all of it, in ``content``."""

    id: str
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    status: ItemStatus = "completed"


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


class FailureDetails(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """``cached_tokens``: input tokens that did not have to be computed."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """``reasoning_tokens``: those of reasoning items."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response.

    Attributes:
        id: By which it can be asked for and followed, if it is stored.
        object: ``response``.
        created_at: Seconds since 1970.
        completed_at: The same; of a completed response.
        status: Where it stands.
        background: Whether it runs without a client.
        error: Why it failed.
        incomplete_details: Why it is not whole.
        model: The model's id.
        output: What the model said, called and thought.
        usage: Token counts, once it is over.
        instructions: As the request had it; and so all that follow.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    background: bool = False
    error: FailureDetails | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str = ""
    output: list[Item] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, str | None] = {}
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float = 1.0
    text: dict[str, Any] = {}
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[ResponseTool] = []
    top_logprobs: int = 0
    top_p: float = 1.0
    truncation: str = "disabled"
    usage: ResponseUsage | UnsetType = UNSET
    user: str | UnsetType = UNSET
    metadata: dict[str, str] = {}


class DeletedResponse(msgspec.Struct, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    """Items that a response was made from; ``first_id`` and ``last_id`` are empty if there are none."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


class InputTokens(msgspec.Struct, kw_only=True):
    """How many tokens a response's prompt would have."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
