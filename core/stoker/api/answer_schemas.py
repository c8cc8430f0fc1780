"""The bodies of the generating endpoints' answers, as structs: what is encoded and shown in the schema.

What is ``UNSET`` is left out.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "ChatChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionTokensDetails",
    "FunctionCall",
    "PromptTokensDetails",
    "ResponseMessage",
    "Timings",
    "ToolCall",
    "TopLogprob",
    "UsageBody",
]

FinishName = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """``cached_tokens``: prompt tokens that did not have to be computed."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    """What the generated tokens were.

    Attributes:
        reasoning_tokens: Those of ``reasoning_content``.
        accepted_prediction_tokens: Those that the request's ``prediction`` had right and that saved time.
        rejected_prediction_tokens: Tokens of the ``prediction`` that were tried and were wrong.
    """

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageBody(msgspec.Struct, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(msgspec.Struct, kw_only=True):
    """How long an answer took, in llama-server's words; of several answers, the slowest of each.

    Attributes:
        cache_n: Prompt tokens that did not have to be computed.
        prompt_n: Prompt tokens that were.
        prompt_ms: From admission to the first token.
        prompt_per_token_ms: ``prompt_ms`` for each of them.
        prompt_per_second: Those per second.
        predicted_n: Tokens generated.
        predicted_ms: From the first token to the last.
        predicted_per_token_ms: ``predicted_ms`` for each token after the first.
        predicted_per_second: Those per second.
        queue_ms: From arrival to admission.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float


# --------------------------------------------------------------------------- chat


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token that could have been, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob, kw_only=True):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """The log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob] | None
    refusal: None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """A call: ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ResponseMessage(msgspec.Struct, kw_only=True):
    """What the model said: text, calls, or both; and what it thought first."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the ``n`` answers."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    service_tier: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


# --------------------------------------------------------------------------- text


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """The log-probabilities of a text's tokens; ``null`` for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer; ``index`` is the prompt's index times ``n``, plus which of its ``n`` answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody
    service_tier: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
