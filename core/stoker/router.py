"""The router: normalises a request, finds its model, applies admission, tracks its life. Executes nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from stoker.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from stoker.types import Delta, Request, RequestRecord, SamplingParams

if TYPE_CHECKING:
    from stoker.chat_template import ChatTemplate
    from stoker.config import AdmissionConfig
    from stoker.engine.client import EngineClient, RequestStream
    from stoker.interfaces import LoadSnapshot, Middleware, ServedModel

__all__ = ["Call", "Generation", "Health", "RoutedModel", "Router"]

logger = logging.getLogger("stoker.router")

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
        priority: Lower runs first.
        timeout_s: Give up after so many seconds.
        endpoint: ``"chat"`` or ``"completion"``.
        headers: The HTTP headers, lower-case names, without secrets.
        tenant: Who pays.
    """

    request_id: str
    model: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    timeout_s: float | None = None
    endpoint: str = "completion"
    headers: Mapping[str, str] = {}
    tenant: str = "anonymous"


class Health(msgspec.Struct, kw_only=True):
    """The body of ``/health``.

    Attributes:
        status: ``ok``, ``draining``, or ``stalled`` when the loop shows no heartbeat.
        uptime_seconds: Since the router was made.
        total_requests: Requests accepted so far.
        cache_hit_rate: Share of prompt tokens that did not have to be computed.
        memory_usage_mb: Resident memory of this process.
    """

    status: str
    uptime_seconds: float
    total_requests: int
    cache_hit_rate: float
    memory_usage_mb: float


@dataclass(slots=True)
class RoutedModel:
    """A served model and the ways into it.

    Attributes:
        served: What the API shows.
        client: The engine's asyncio side.
        template: Its chat template.
        heartbeat_s: When the loop of its device last came round.
    """

    served: ServedModel
    client: EngineClient
    template: ChatTemplate
    heartbeat_s: Callable[[], float]


class Generation:
    """One running request.

    Args:
        request: As the engine sees it.
        model: The model that serves it.
        stream: Its deltas.
        on_end: Awaited once when the last delta was read or the reader left.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        stream: RequestStream,
        on_end: Callable[[Generation], Awaitable[None]],
    ) -> None:
        self.request = request
        self.model = model
        self.stream = stream
        self._on_end = on_end

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield non-empty batches of deltas of any of the request's sequences until all have ended."""
        try:
            async for batch in self.stream:
                yield batch
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop it; may be called twice, and after the end."""
        self.stream.abort()
        on_end, self._on_end = self._on_end, _nothing
        if on_end is not _nothing:
            task = asyncio.ensure_future(on_end(self))
            _ending.add(task)
            task.add_done_callback(_ending.discard)


_ending: set[asyncio.Future[None]] = set()  # keeps the tasks alive until they are done


async def _nothing(_: Generation) -> None:
    return


@dataclass(slots=True)
class Router:
    """Sends requests to models.

    Args:
        routed: The served models, the default first.
        middleware: Sees every request, in this order.
        admission: Timeouts.
        clock: Monotonic seconds; the same as the engine's.
        stalled_after_s: Without a heartbeat for so long, a loop counts as stalled.

    Attributes:
        draining: Whether new requests are refused.
        num_accepted: Requests accepted so far.
        num_active: Requests that run or wait.
        idle: Set while there are none.
    """

    routed: Sequence[RoutedModel]
    middleware: Sequence[Middleware]
    admission: AdmissionConfig
    clock: Callable[[], float] = time.monotonic
    stalled_after_s: float = 120.0
    draining: bool = False
    num_accepted: int = 0
    num_active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._started_s = self.clock()
        self.idle.set()

    # ------------------------------------------------------------------ facts

    def models(self) -> Sequence[ServedModel]:
        """The served models, in configured order."""
        return [routed.served for routed in self.routed]

    def find(self, model: str) -> ServedModel:
        """A served model by its id.

        Raises:
            ModelNotFoundError: There is none.
        """
        return self._find(model).served

    def _find(self, model: str) -> RoutedModel:
        for routed in self.routed:
            if routed.served.model_id == model:
                return routed
        names = ", ".join(routed.served.model_id for routed in self.routed)
        raise ModelNotFoundError(
            f"the model {model[:200]!r} is not served here; served: {names}", param="model"
        )

    def load(self, model: str) -> LoadSnapshot:
        """How busy a model is."""
        return self._find(model).client.load()

    @property
    def uptime_s(self) -> float:
        """Seconds since the router was made."""
        return self.clock() - self._started_s

    def health(self) -> Health:
        """Whether the loops turn, and some figures."""
        now_s = self.clock()
        stalled = any(now_s - r.heartbeat_s() > self.stalled_after_s for r in self.routed)
        counts = [routed.client.cache_counts() for routed in self.routed]
        looked_up = sum(count[0] for count in counts)
        return Health(
            status="stalled" if stalled else "draining" if self.draining else "ok",
            uptime_seconds=round(self.uptime_s, 3),
            total_requests=self.num_accepted,
            cache_hit_rate=sum(count[1] for count in counts) / looked_up if looked_up else 0.0,
            memory_usage_mb=round(psutil.Process().memory_info().rss / 2**20, 1),
        )

    def ready(self) -> bool:
        """Whether new requests are taken."""
        return not self.draining and self.health().status == "ok"

    # ------------------------------------------------------------------ requests

    async def generate(self, call: Call) -> Generation:
        """Check a call against its model and start it.

        Raises:
            RequestError: It cannot be served; nothing was started.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down; send the request elsewhere")
        routed = self._find(call.model)
        prompt = await self._prompt(routed, call)
        field_name = "messages" if call.messages is not None else "prompt"
        request = self._request(routed, call, prompt, field_name)
        request = await self._admit(request)
        try:
            # Middleware may have changed what was asked for.
            _check_length(routed, request.sampling, len(request.prompt_token_ids), field_name)
            stream = routed.client.submit(request)
        except BaseException:
            await self._tell(self.middleware, request, ())
            raise
        self.num_accepted += 1
        self.num_active += 1
        self.idle.clear()
        return Generation(request, routed.served, stream, self._ended)

    async def _admit(self, request: Request) -> Request:
        """The request as the middleware leaves it; who let it pass learns of it if another refuses."""
        passed: list[Middleware] = []
        try:
            for middleware in self.middleware:
                request = await middleware.on_request(request)
                passed.append(middleware)
        except BaseException:
            await self._tell(passed, request, ())
            raise
        return request

    async def _ended(self, generation: Generation) -> None:
        await generation.stream.wait_until_over()
        self.num_active -= 1
        if not self.num_active:
            self.idle.set()
        records = tuple(generation.stream.records)
        await self._tell(self.middleware, generation.request, records)

    @staticmethod
    async def _tell(
        passed: Sequence[Middleware], request: Request, records: Sequence[RequestRecord]
    ) -> None:
        for middleware in passed:
            try:
                await middleware.on_finish(request, records)
            except Exception:
                logger.exception("middleware %s.on_finish failed", type(middleware).__name__)

    async def _prompt(self, routed: RoutedModel, call: Call) -> list[int]:
        """The call's prompt as token ids."""
        if call.messages is not None:
            size = sum(len(str(message.get("content") or "")) for message in call.messages)
            if size < _OFF_THREAD_CHARS:
                return routed.template.encode(call.messages)
            return await asyncio.to_thread(routed.template.encode, call.messages)
        if isinstance(call.prompt, list):
            return call.prompt
        # A completion's prompt is the developer's own: who renders a template on the client's side
        # means the control tokens in it. Text of others belongs into messages.
        text = call.prompt or ""
        encode = routed.client.tokenizer.encode
        if len(text) < _OFF_THREAD_CHARS:
            return encode(text, add_special=True, parse_special=True)
        return await asyncio.to_thread(encode, text, add_special=True, parse_special=True)

    def _request(
        self, routed: RoutedModel, call: Call, prompt: list[int], field_name: str
    ) -> Request:
        info = routed.client.info
        if not prompt:
            raise InvalidRequestError(
                "the prompt is empty; send at least one token", param=field_name
            )
        for token in prompt if isinstance(call.prompt, list) else ():
            if not 0 <= token < info.vocab_size:
                raise InvalidRequestError(
                    f"token id {token} is not in the vocabulary of {info.vocab_size} tokens",
                    param=field_name,
                )
        for token in call.sampling.logit_bias:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names token id {token}, which is not in the vocabulary of "
                    f"{info.vocab_size} tokens",
                    param="logit_bias",
                )
        _check_length(routed, call.sampling, len(prompt), field_name)
        now_s = self.clock()
        timeouts = [t for t in (call.timeout_s, self.admission.request_timeout_s) if t]
        queue_timeout_s = self.admission.queue_timeout_s
        return Request(
            request_id=call.request_id,
            model=routed.served.model_id,
            prompt_token_ids=prompt,
            sampling=call.sampling,
            n=call.n,
            priority=call.priority,
            tenant=call.tenant,
            arrival_s=now_s,
            queue_deadline_s=now_s + queue_timeout_s if queue_timeout_s else None,
            deadline_s=now_s + min(timeouts) if timeouts else None,
            endpoint=call.endpoint,
            headers=call.headers,
            metadata={},
        )


def _check_length(
    routed: RoutedModel, sampling: SamplingParams, num_prompt: int, field_name: str
) -> None:
    limit = routed.client.max_total_tokens
    wanted = sampling.max_tokens or 0
    if num_prompt + max(wanted, 1) <= limit:
        return
    asked = f" and {wanted} tokens were requested" if wanted else ""
    raise ContextLengthError(
        f"this model's context holds {limit} tokens, but the prompt has {num_prompt}{asked}; "
        "shorten the prompt or lower max_tokens",
        param=field_name if num_prompt >= limit or not wanted else "max_tokens",
    )
