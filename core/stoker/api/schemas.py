"""The bodies of requests and answers, as structs: what is decoded, encoded, and shown in the OpenAPI schema.

Ranges stand in the types, so that the decoder checks them and the schema states them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stoker.history import RequestStatus
from stoker.types import SequenceTrace

__all__ = [
    "CancelledRequest",
    "ChatChoice",
    "ChatCompletion",
    "ChatMessage",
    "ChatRequest",
    "Completion",
    "CompletionChoice",
    "CompletionRequest",
    "ContentPart",
    "Engine",
    "EngineList",
    "ErrorBody",
    "ErrorDetail",
    "GenerationRequest",
    "Model",
    "ModelList",
    "PromptTokensDetails",
    "Readiness",
    "RequestDetails",
    "RequestList",
    "RequestSummary",
    "ResponseMessage",
    "StreamOptions",
    "UsageBody",
]

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1

Penalty = Annotated[float, Meta(ge=-2, le=2)]
PositiveInt = Annotated[int, Meta(ge=1, le=_INT32)]


# --------------------------------------------------------------------------- requests


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a streamed answer.

    Attributes:
        include_usage: Send one more chunk with the token counts before the end.
    """

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chat and text completions share; ``null`` means the default.

    Attributes:
        model: A served model's id; by default the first served model.
        n: How many answers.
        stop: Up to 4 strings that end the answer; they are not part of it.
        max_tokens: Most tokens to generate; by default up to the context length.
        stream: Answer with server-sent events.
        stream_options: Options of a streamed answer.
        ignore_eos: Go on after an end token.
        temperature: 0 always takes the likeliest token.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_k: Keep the k likeliest tokens; 0 or -1 is off.
        min_p: Drop tokens less likely than this share of the likeliest one.
        repetition_penalty: Makes tokens of prompt and output less likely; 1 is off.
        presence_penalty: Subtracted once from each token seen in the output.
        frequency_penalty: Subtracted from a token for each time it was seen in the output.
        logit_bias: Added to the logits of tokens: token ids to -100..100.
        seed: Makes the draws reproducible.
        priority: Lower runs first, under a policy that knows priorities.
        timeout: Give up after so many seconds.
        cache_salt: Only requests with the same salt reuse each other's KV.
        user: Accepted and not used.
    """

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=_INT32)] | None = None
    stop: str | list[str] | None = None
    max_tokens: PositiveInt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    priority: Annotated[int, Meta(ge=-_INT32, le=_INT32)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    user: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; only ``text`` is served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation.

    Attributes:
        role: ``system``, ``developer`` (the same), ``user``, ``assistant`` or ``tool``.
        content: Text, or parts of type ``text``; an assistant's may be ``null``.
        name: Handed to the chat template.
        tool_call_id: Handed to the chat template.
    """

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: Text, token ids, or a list of either: one answer (or ``n``) for each.
    """

    prompt: str | list[str | int | list[int]]


# --------------------------------------------------------------------------- answers


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """``cached_tokens``: prompt tokens that did not have to be computed."""

    cached_tokens: int


class UsageBody(msgspec.Struct, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ResponseMessage(msgspec.Struct, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the ``n`` answers."""

    index: int
    message: ResponseMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer; ``index`` is the prompt's index times ``n``, plus which of its ``n`` answers."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody


class Model(msgspec.Struct, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stoker"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """The served models, the default first."""

    object: Literal["list"] = "list"
    data: list[Model]


class Engine(msgspec.Struct, kw_only=True):
    """A served model, in the words of the deprecated engines API."""

    id: str
    object: Literal["engine"] = "engine"
    created: int
    owner: str = "stoker"
    ready: bool


class EngineList(msgspec.Struct, kw_only=True):
    """The served models, in the words of the deprecated engines API."""

    object: Literal["list"] = "list"
    data: list[Engine]


class RequestSummary(msgspec.Struct, kw_only=True):
    """A request of yours.

    Attributes:
        id: The `x-request-id` of its answer.
        created: When it came, in seconds since 1970.
        model: The model that was asked for.
        status: `waiting` (no lane yet), `running`, `finished`, `cancelled` (through the API), `failed`
            (with an error) or `aborted` (its client went away).
    """

    id: str
    object: Literal["request"] = "request"
    created: int
    model: str
    status: RequestStatus


class RequestList(msgspec.Struct, kw_only=True):
    """Your requests, at most 100: those that run, then the last ones that ended; the latest first."""

    object: Literal["list"] = "list"
    data: list[RequestSummary]


class RequestDetails(RequestSummary, kw_only=True):
    """What became of a request, and why.

    Attributes:
        tenant: Whose it is.
        policy: The scheduling policy that decided.
        num_sequences: How many answers were asked for.
        sequences: What the scheduler did with each; of an ended request, with the first 16.
    """

    tenant: str
    policy: str
    num_sequences: int
    sequences: list[SequenceTrace]


class CancelledRequest(msgspec.Struct, kw_only=True):
    """The answer of a cancellation.

    Attributes:
        id: The request.
        cancelled: Whether anything of it still ran; `false` if it had ended already.
    """

    id: str
    object: Literal["request.cancelled"] = "request.cancelled"
    cancelled: bool


class Readiness(msgspec.Struct, kw_only=True):
    """The body of ``/ready``.

    Attributes:
        ready: Whether requests should be sent here.
        status: That of ``/health``, or ``warming``: requests are taken, but the warm-up is not over.
    """

    ready: bool
    status: str


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong.

    Attributes:
        message: For people.
        type: OpenAI's kind of error.
        param: The request field at fault.
        code: For programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail
