"""From what the API hands over to what the engine executes: tokens, checks, deadlines. Executes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from stoker.errors import ContextLengthError, InvalidRequestError
from stoker.fill_in import fill_in_prompt
from stoker.grammar import GrammarSpec
from stoker.interfaces import Tool, ToolChoice
from stoker.structured import GrammarService
from stoker.types import Request, SamplingParams

if TYPE_CHECKING:
    from stoker.chat_template import ChatTemplate
    from stoker.config import AdmissionConfig
    from stoker.engine.client import EngineClient
    from stoker.interfaces import ServedModel, ToolFormat
    from stoker.reasoning import ReasoningMarks
    from stoker.thoughts import ThoughtTokens

__all__ = [
    "Call",
    "RoutedModel",
    "check_generates",
    "check_length",
    "encode_prediction",
    "encode_prompt",
    "make_request",
]

_OFF_THREAD_CHARS = 20_000  # tokenizing more than this would hold up the event loop


class Call(msgspec.Struct, kw_only=True):
    """What the API hands over: validated as far as that goes without knowing the model.

    Attributes:
        request_id: Unique.
        model: The model that was asked for.
        messages: A conversation; exactly one of ``messages`` and ``prompt`` is given.
        prompt: Text or token ids to continue.
        sampling: How to choose tokens.
        n: How many sequences.
        priority: Lower runs first; ``None`` if nobody asked for one.
        timeout_s: Give up after so many seconds.
        endpoint: ``"chat"`` or ``"completion"``.
        headers: The HTTP headers, lower-case names, without secrets.
        tenant: Who pays.
        cache_salt: Only requests with the same salt reuse each other's KV.
        group: The id under which an API request of several calls can be asked for and cancelled; by
            default ``request_id``.
        tools: The functions that the model may call.
        tool_choice: Whether it has to.
        template_options: More names for the chat template (``chat_template_kwargs``).
        add_generation_prompt: Whether the prompt ends with the beginning of an answer.
        continue_final_message: Whether the answer goes on where the last message, an assistant's, ends.
        grammar: What the output must look like.
        prediction: What the output will probably look like.
        suffix: What follows the gap that the output is to fill.
        user: Who asks, in the tenant's own words.
        metadata: Free for middleware to read.
        wants_token_ids: Whether deltas carry token ids.
        wants_progress: Whether deltas without text tell how far the prompt is.
        fits_context: Whether a ``max_tokens`` beyond the end of the context means as many as fit.
    """

    request_id: str
    model: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    sampling: SamplingParams
    n: int = 1
    priority: int | None = None
    timeout_s: float | None = None
    endpoint: str = "completion"
    headers: Mapping[str, str] = {}
    tenant: str = "anonymous"
    cache_salt: str = ""
    group: str = ""
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = ToolChoice()
    template_options: Mapping[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    grammar: GrammarSpec | None = None
    prediction: str = ""
    suffix: str | None = None
    user: str = ""
    metadata: Mapping[str, str] = {}
    wants_token_ids: bool = False
    wants_progress: bool = False
    fits_context: bool = False

    @property
    def prompt_field(self) -> str:
        """The request field that the prompt came in, for error messages."""
        return "prompt" if self.messages is None else "messages"


@dataclass(slots=True)
class RoutedModel:
    """A served model and the ways into it.

    Attributes:
        served: What the API shows.
        client: The engine's asyncio side.
        template: Its chat template.
        heartbeat_s: When the loop of its device last came round.
        grammars: Compiles what outputs must look like.
        tool_format: How it writes tool calls; ``None`` if it has no tools.
        reasoning: What it writes around its reasoning; ``None`` if that is not told apart.
        thoughts: What of its vocabulary matters to that.
    """

    served: ServedModel
    client: EngineClient
    template: ChatTemplate
    heartbeat_s: Callable[[], float]
    grammars: GrammarService = field(default_factory=GrammarService)
    tool_format: ToolFormat | None = None
    reasoning: ReasoningMarks | None = None
    thoughts: ThoughtTokens | None = None

    @property
    def constrains(self) -> bool:
        """Whether outputs can be made to follow a grammar."""
        return self.grammars.is_on


async def encode_prompt(routed: RoutedModel, call: Call) -> list[int]:
    """The call's prompt as token ids."""
    if call.messages is not None:
        if _size(call.messages) < _OFF_THREAD_CHARS:
            return routed.template.encode(call.messages)
        return await asyncio.to_thread(routed.template.encode, call.messages)
    if call.suffix is not None:
        return fill_in_prompt(routed.client.tokenizer, call.prompt or "", call.suffix)
    if isinstance(call.prompt, list):
        return call.prompt
    # A completion's prompt is the developer's own: who renders a template on the client's side
    # means the control tokens in it. Text of others belongs into messages.
    text = call.prompt or ""
    encode = routed.client.tokenizer.encode
    if len(text) < _OFF_THREAD_CHARS:
        return encode(text, add_special=True, parse_special=True)
    return await asyncio.to_thread(encode, text, add_special=True, parse_special=True)


def _size(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(str(message.get("content") or "")) for message in messages)


async def encode_prediction(routed: RoutedModel, call: Call) -> list[int]:
    """What the call's output will probably be, as token ids."""
    text = call.prediction
    if not text:
        return []
    encode = partial(routed.client.tokenizer.encode, add_special=False, parse_special=False)
    return encode(text) if len(text) < _OFF_THREAD_CHARS else await asyncio.to_thread(encode, text)


def make_request(
    routed: RoutedModel,
    call: Call,
    prompt: list[int],
    *,
    priority: int,
    now_s: float,
    admission: AdmissionConfig,
    shown_tokens: Mapping[int, str] = {},
) -> Request:
    """The request that a call stands for.

    Args:
        routed: Its model.
        call: The call.
        prompt: Its prompt's token ids.
        priority: Lower runs first.
        now_s: Its arrival.
        admission: Timeouts.
        shown_tokens: Control tokens that are part of the output's text.

    Raises:
        InvalidRequestError: The model cannot serve it.
    """
    _check_tokens(routed.client.info.vocab_size, call, prompt)
    sampling = _fitted(routed, call, len(prompt))
    check_length(routed, sampling, len(prompt), call.prompt_field)
    timeouts = [t for t in (call.timeout_s, admission.request_timeout_s) if t]
    queue_timeout_s = admission.queue_timeout_s
    return Request(
        request_id=call.request_id,
        model=routed.served.model_id,
        prompt_token_ids=prompt,
        sampling=sampling,
        n=call.n,
        priority=priority,
        tenant=call.tenant,
        arrival_s=now_s,
        queue_deadline_s=now_s + queue_timeout_s if queue_timeout_s else None,
        deadline_s=now_s + min(timeouts) if timeouts else None,
        cache_salt=call.cache_salt,
        endpoint=call.endpoint,
        headers=call.headers,
        user=call.user,
        metadata=dict(call.metadata),
        response_headers={},
        wants_token_ids=call.wants_token_ids,
        wants_progress=call.wants_progress,
        shown_tokens=shown_tokens,
    )


def _fitted(routed: RoutedModel, call: Call, num_prompt: int) -> SamplingParams:
    """The call's sampling; if it is to fit into the context, without tokens that could not."""
    room = routed.client.max_total_tokens - num_prompt
    wanted = call.sampling.max_tokens
    if not call.fits_context or wanted is None or not 0 < room < wanted:
        return call.sampling
    return msgspec.structs.replace(call.sampling, max_tokens=room)


def _check_tokens(vocab_size: int, call: Call, prompt: Sequence[int]) -> None:
    if not prompt:
        raise InvalidRequestError(
            "the prompt is empty; send at least one token", param=call.prompt_field
        )
    for token in prompt if isinstance(call.prompt, list) else ():
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"token id {token} is not in the vocabulary of {vocab_size} tokens",
                param=call.prompt_field,
            )
    if (largest := max(prompt)) >= vocab_size:
        raise InvalidRequestError(
            f"the prompt's text has a token ({largest}) that the model does not know: its tokenizer has more "
            f"tokens than its vocabulary of {vocab_size}",
            param=call.prompt_field,
        )
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(call.sampling, name):
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"{name} names token id {token}, which is not in the vocabulary of "
                    f"{vocab_size} tokens",
                    param=name,
                )


def check_generates(routed: RoutedModel) -> None:
    """Refuse a prompt for a model that cannot go on with it.

    Raises:
        InvalidRequestError: The model only embeds.
    """
    if not routed.client.info.capabilities.generates:
        raise InvalidRequestError(
            f"the model {routed.served.model_id!r} only makes embeddings, it does not write text; "
            "send it to /v1/embeddings or /v1/rerank, or use another model",
            param="model",
            code="generation_not_supported",
        )


def check_length(
    routed: RoutedModel, sampling: SamplingParams, num_prompt: int, field_name: str
) -> None:
    """Refuse what does not fit into the model's context.

    Raises:
        ContextLengthError: It does not fit.
    """
    limit = routed.client.max_total_tokens
    wanted = sampling.max_tokens or 0
    # Who wants no token at all, only the prompt's scores, needs no room for one.
    if num_prompt + (1 if sampling.max_tokens is None else wanted) <= limit:
        return
    asked = f" and {wanted} tokens were requested" if wanted else ""
    raise ContextLengthError(
        f"this model's context holds {limit} tokens, but the prompt has {num_prompt}{asked}; "
        "shorten the prompt or lower max_tokens",
        param=field_name if num_prompt >= limit or not wanted else "max_tokens",
    )
