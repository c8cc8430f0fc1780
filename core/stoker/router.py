"""The router: gives a request its model, applies admission, tracks its life. Executes nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import psutil

from stoker.calls import (
    Call,
    RoutedModel,
    check_length,
    encode_prediction,
    make_request,
)
from stoker.conversation import Conversation, read_conversation, render_conversation
from stoker.embeddings import EmbedCall, embedding_request
from stoker.errors import (
    ModelNotFoundError,
    RequestCancelledError,
    RequestError,
    RequestNotFoundError,
    UnavailableError,
)
from stoker.generation import Generation
from stoker.history import History, TrackedRequest
from stoker.interfaces import Middleware
from stoker.logs import CURRENT_REQUEST
from stoker.tenants import Tenants
from stoker.types import Request, RequestRecord

if TYPE_CHECKING:
    from stoker.config import AdmissionConfig
    from stoker.interfaces import (
        CacheEntry,
        CacheReport,
        DeltaStream,
        EngineSnapshot,
        LoadSnapshot,
        Observer,
        SchedulingPolicy,
        ServedModel,
        TenantLoad,
        Tokenizer,
    )

__all__ = [
    "WARNING_HEADER",
    "Call",
    "Generation",
    "Health",
    "RoutedModel",
    "Router",
    "add_warning",
]

logger = logging.getLogger("stoker.router")

WARNING_HEADER = "x-stoker-warning"


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
class Router:
    """Sends requests to models.

    Args:
        routed: The served models, the default first.
        middleware: Sees every request, in this order.
        admission: Timeouts.
        observers: Told of what is refused.
        tenants: Priority ceilings.
        history: Remembers the requests.
        clock: Monotonic seconds; the same as the engine's.
        stalled_after_s: Without a heartbeat for so long, a loop counts as stalled.

    Attributes:
        draining: Whether new requests are refused.
        is_warm: Tells whether the warm-up is over.
        num_accepted: Requests accepted so far.
        num_active: Requests that run or wait.
        idle: Set while there are none.
    """

    routed: Sequence[RoutedModel]
    middleware: Sequence[Middleware]
    admission: AdmissionConfig
    observers: Sequence[Observer] = ()
    tenants: Tenants = field(default_factory=Tenants)
    history: History = field(default_factory=History)
    clock: Callable[[], float] = time.monotonic
    stalled_after_s: float = 120.0
    draining: bool = False
    is_warm: Callable[[], bool] = lambda: True
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

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        """How much of a model's queue a tenant takes."""
        return self._find(model).client.tenant_load(tenant)

    def snapshot(self, model: str) -> EngineSnapshot:
        """What a model is doing now."""
        return self._find(model).client.snapshot()

    def cache(self, model: str) -> CacheReport:
        """What became of a model's prefix cache."""
        return self._find(model).client.cache_report()

    def cache_entries(self, model: str) -> list[CacheEntry]:
        """The prefixes that a model keeps."""
        return self._find(model).client.cache_entries()

    async def clear_cache(self, model: str) -> int:
        """Drop the prefixes that a model keeps, but for pinned ones; returns how many that were."""
        return await self._find(model).client.clear_cache()

    def policy(self, model: str) -> SchedulingPolicy:
        """The policy that schedules a model."""
        return self._find(model).client.policy

    def tokenizer(self, model: str) -> Tokenizer:
        """A model's tokenizer; safe to use from any thread."""
        return self._find(model).client.tokenizer

    async def encode(self, call: Call) -> list[int]:
        """The tokens of the prompt that a call would have."""
        return (await read_conversation(self._find(call.model), call)).token_ids

    async def render(self, call: Call) -> str:
        """The text of the prompt that a call with messages would have."""
        return await render_conversation(self._find(call.model), call)

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
        """Whether new requests should come here: none are refused, and the caches are warm."""
        return self.readiness() == "ok"

    def readiness(self) -> str:
        """The status of ``/health``, or ``warming`` while what is configured to be computed first is not."""
        status = self.health().status
        return "warming" if status == "ok" and not self.is_warm() else status

    # ------------------------------------------------------------------ requests

    async def generate(self, call: Call) -> Generation:
        """Start a single call.

        Raises:
            RequestError: It cannot be served; nothing was started.
        """
        (generation,) = await self.start([call])
        return generation

    async def start(self, calls: Sequence[Call]) -> list[Generation]:
        """Check an API request's calls against their model and start all of them, or none.

        Args:
            calls: At least one, for one model.

        Raises:
            RequestError: One of them cannot be served; those before it were aborted.
        """
        tracked = self._track(calls[0])
        generations: list[Generation] = []
        try:
            for call in calls:
                generations.append(await self._start(call, tracked))  # noqa: PERF401 - see below
        except BaseException as error:
            # What has started must be known here, which a comprehension would not tell.
            for generation in generations:
                generation.abort()
            if isinstance(error, Exception):
                self._count_refused(calls[0], error)
            raise
        finally:
            self.history.release(tracked)
        return generations

    def _track(self, call: Call) -> TrackedRequest:
        tracked = TrackedRequest(
            call.group or call.request_id,
            call.tenant,
            call.model,
            call.endpoint,
            int(time.time()),  # noqa: TID251 - a timestamp in a body
        )
        self.history.begin(tracked)
        return tracked

    async def _start(self, call: Call, tracked: TrackedRequest) -> Generation:
        if self.draining:
            raise UnavailableError("the server is shutting down; send the request elsewhere")
        routed = self._find(call.model)
        priority, warning = self._priority(call)
        request, conversation = await self._make_request(routed, call, priority)
        request = await self._admit(request)
        if warning:
            add_warning(request.response_headers, warning)
        try:
            if tracked.is_cancelled:
                raise _cancelled()
            # Middleware may have changed what was asked for.
            if not request.inputs:
                num_prompt = len(request.prompt_token_ids)
                check_length(routed, request.sampling, num_prompt, call.prompt_field)
            if conversation is not None:
                request.grammar, unsupported = await conversation.compile(routed.grammars)
                for what in unsupported:
                    add_warning(request.response_headers, what)
            stream = self._submit(routed, request)
        except BaseException:
            await self._tell(self.middleware, request, ())
            raise
        tracked.add(stream)
        self.num_accepted += 1
        self.num_active += 1
        self.idle.clear()
        parser = None if conversation is None else conversation.new_parser
        return Generation(request, routed.served, stream, tracked, self._ended, parser)

    async def _make_request(
        self, routed: RoutedModel, call: Call, priority: int
    ) -> tuple[Request, Conversation | None]:
        now_s, admission = self.clock(), self.admission
        if isinstance(call, EmbedCall):
            request = await embedding_request(
                routed, call, priority=priority, now_s=now_s, admission=admission
            )
            return request, None
        conversation = await read_conversation(routed, call)
        request = make_request(
            routed,
            call,
            conversation.token_ids,
            priority=priority,
            now_s=now_s,
            admission=admission,
            shown_tokens=conversation.shown_tokens,
        )
        request.predicted_token_ids = await encode_prediction(routed, call)
        return request, conversation

    def _submit(self, routed: RoutedModel, request: Request) -> DeltaStream:
        """Hand it to the engine, through the middleware that wants to stand between."""
        if request.inputs:
            return routed.client.embed(request)  # what stands between knows deltas, not vectors
        forward: Callable[[Request], DeltaStream] = routed.client.submit
        for middleware in reversed(self.middleware):
            if type(middleware).submit is not Middleware.submit:
                forward = partial(middleware.submit, forward=forward)
        return forward(request)

    def _priority(self, call: Call) -> tuple[int, str]:
        """The priority that the call's tenant may have, and a warning if it asked for a better one."""
        context = CURRENT_REQUEST.get()
        if context is not None and context.priority is not None:
            return context.priority, ""
        asked = call.priority or 0
        ceiling = self.tenants.get(call.tenant).priority_ceiling
        if ceiling is None or asked >= ceiling:
            # Embeddings are ordered by priority whatever the policy is.
            if asked and not isinstance(call, EmbedCall):
                return asked, self._unheeded(call)
            return asked, ""
        if call.priority is None:
            return ceiling, ""
        return ceiling, f"priority {asked} lowered to {ceiling}, the most urgent of this tenant"

    def _unheeded(self, call: Call) -> str:
        if self.policy(call.model).heeds_priority:
            return ""
        return "priority and service_tier have no effect under this scheduling policy"

    def _count_refused(self, call: Call, error: Exception) -> None:
        served = [r.served.model_id for r in self.routed if r.served.model_id == call.model]
        code = "internal_error"
        if isinstance(error, RequestError):
            code = error.code or error.error_type
        for observer in self.observers:
            try:
                # What a client calls a model must not become a label: there is no end to names.
                observer.on_refuse(served[0] if served else "", call.tenant, code)
            except Exception:
                logger.exception("observer %s.on_refuse failed", type(observer).__name__)

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Cancel what a tenant runs under an id, wherever it is; returns whether anything ran.

        Its readers get a ``RequestCancelledError``.

        Raises:
            RequestNotFoundError: The tenant has no such request, running or remembered.
        """
        self.tracked(request_id, tenant)
        running = [
            tracked
            for tracked in self.history.running(tenant, request_id)
            if tracked.status() in {"waiting", "running"}
        ]
        for tracked in running:
            tracked.cancel(_cancelled())
        return bool(running)

    def tracked(self, request_id: str, tenant: str) -> TrackedRequest:
        """A tenant's latest request under an id.

        Raises:
            RequestNotFoundError: The tenant has no such request, running or remembered.
        """
        found = self.history.find(tenant, request_id)
        if found is None:
            raise RequestNotFoundError(
                f"no request {request_id[:200]!r} runs or is remembered; its id is the x-request-id "
                "of its answer"
            )
        return found

    async def _admit(self, request: Request) -> Request:
        """The request as the middleware leaves it; who let it pass learns of it if another refuses."""
        passed: list[Middleware] = []
        try:
            for middleware in self.middleware:
                edited = await middleware.on_request(request)
                _check_edited(middleware, edited)
                request = edited
                passed.append(middleware)
        except BaseException:
            await self._tell(passed, request, ())
            raise
        return request

    async def _ended(self, generation: Generation) -> None:
        await generation.stream.wait_until_over()
        self.history.release(generation.tracked)
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


def _check_edited(middleware: Middleware, request: object) -> None:
    """Refuse what the engine cannot execute; whoever passed it on is named in the log.

    Raises:
        TypeError: It is no request.
        ValueError: It has no prompt, or asks for no sequence.
    """
    name = type(middleware).__name__
    if not isinstance(request, Request):
        raise TypeError(f"{name}.on_request returned {type(request).__name__}, not a Request")
    if not len(request.prompt_token_ids) or request.n < 1:
        raise ValueError(f"{name}.on_request returned a request without a prompt or with n < 1")


def add_warning(headers: dict[str, str], warning: str) -> None:
    """Add to the warnings that an answer's headers carry already."""
    before = headers.get(WARNING_HEADER)
    headers[WARNING_HEADER] = f"{before}, {warning}" if before else warning


def _cancelled() -> RequestCancelledError:
    return RequestCancelledError("the request was cancelled through the API")
