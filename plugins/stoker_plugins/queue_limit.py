"""Backpressure: a bounded queue. What does not fit is refused at once, with the time after which it would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from stoker import EngineSnapshot, LoadSnapshot, Middleware, RateLimitError, Request, ServerContext
from stoker.forecast import Forecast

__all__ = ["QueueLimit"]

_UNKNOWN_WAIT_S = 1.0  # as long as no step was measured
_MIN_WAIT_S = 0.05
# Under overload there are many refusals for each admission: for so long they share a snapshot of the queue.
_FRESH_S = 0.05


class _Outlook(NamedTuple):
    """A model's queue, and how it will shrink."""

    taken_s: float
    snapshot: EngineSnapshot
    forecast: Forecast


class _Bound(NamedTuple):
    """A bound of the queue, of a model or of one tenant's part of it.

    Attributes:
        unit: ``requests`` (sequences) or ``tokens``.
        waiting: How many wait.
        new: How many more the request would add.
        most: How many may wait; 0 for any number.
        tenant: Whose; ``None`` for all.
        free: How many more wait only until the next step, because there are lanes for them.
    """

    unit: str
    waiting: int
    new: int
    most: int
    tenant: str | None = None
    free: int = 0

    @property
    def whose(self) -> str:
        """Whose requests are meant, in words."""
        return "" if self.tenant is None else f" of tenant {self.tenant!r}"


class QueueLimit(Middleware):
    """Refuses what would overfill a model's queue: ``[admission] max_queue_*``, and those of a tenant.

    A request that is larger than a bound by itself may still wait alone, or it could never run.

    Args:
        context: The server, for its configuration and the queues.
        clock: Monotonic seconds.
    """

    def __init__(self, context: ServerContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._outlooks: dict[str, _Outlook] = {}

    async def on_request(self, request: Request) -> Request:
        """Let it pass, or raise ``RateLimitError`` with the time until there is room for it."""
        self._check_bounds(request)
        self._check_time(request)
        return request

    def _check_bounds(self, request: Request) -> None:
        load = self._context.load(request.model)
        if load.num_waiting + request.n <= load.num_free_lanes:
            return  # whatever waits was posted since the last step, and will not after the next one
        full = [
            bound
            for bound in self._bounds(request, load)
            if bound.most and bound.waiting and bound.waiting + bound.new > bound.most
        ]
        if full:
            what = "; ".join(
                f"{bound.waiting} {bound.unit}{bound.whose} are waiting, of at most {bound.most}"
                for bound in full
            )
            raise RateLimitError(
                f"the queue is full: {what}; retry later",
                code="queue_full",
                retry_after_s=max(self._until_room_s(request.model, bound) for bound in full),
            )

    def _bounds(self, request: Request, load: LoadSnapshot) -> Iterator[_Bound]:
        tokens = request.n * _tokens(request)
        admission = self._context.config.admission
        free = min(load.num_waiting, load.num_free_lanes)
        waiting = load.num_waiting - free
        yield _Bound("requests", waiting, request.n, admission.max_queue_requests, free=free)
        yield _Bound("tokens", load.waiting_tokens, tokens, admission.max_queue_tokens)
        tenant = self._context.tenant(request.tenant)
        if tenant.max_queue_requests or tenant.max_queue_tokens:
            own = self._context.tenant_load(request.model, request.tenant)
            name = request.tenant
            yield _Bound("requests", own.num_waiting, request.n, tenant.max_queue_requests, name)
            yield _Bound("tokens", own.waiting_tokens, tokens, tenant.max_queue_tokens, name)

    def _check_time(self, request: Request) -> None:
        longest_s = self._context.config.admission.max_queue_s
        if not longest_s:
            return
        position = self._context.load(request.model).num_waiting + request.n - 1
        wait_s = self._outlook(request.model).forecast.time_to_admit(position)
        if wait_s > longest_s:
            raise RateLimitError(
                f"the queue is too slow: this request would wait about {wait_s:.1f} s, and at most "
                f"{longest_s:g} s are allowed; retry later",
                code="queue_too_slow",
                retry_after_s=max(wait_s - longest_s, _MIN_WAIT_S),
            )

    # ------------------------------------------------------------------ forecasts

    def _outlook(self, model: str) -> _Outlook:
        now_s = self._clock()
        found = self._outlooks.get(model)
        if found is None or now_s - found.taken_s > _FRESH_S:
            snapshot = self._context.snapshot(model)
            found = _Outlook(now_s, snapshot, Forecast(snapshot))
            self._outlooks[model] = found
        return found

    def _until_room_s(self, model: str, bound: _Bound) -> float:
        """Seconds until so much has left the queue that the request fits into a bound."""
        outlook = self._outlook(model)
        if not outlook.forecast.is_known:
            return _UNKNOWN_WAIT_S
        excess = bound.free + min(bound.waiting, bound.waiting + bound.new - bound.most)
        position = 0
        for request in outlook.snapshot.waiting:
            if bound.tenant in (None, request.tenant):
                each = 1 if bound.unit == "requests" else max(1, _tokens(request))
                needed = -(-excess // each)
                if needed <= request.n:
                    position += needed
                    break
                excess -= each * request.n
            position += request.n
        wait_s = outlook.forecast.time_to_admit(max(0, position - 1))
        return max(wait_s - (self._clock() - outlook.taken_s), _MIN_WAIT_S)


def _tokens(request: Request) -> int:
    """Tokens that one sequence of a request may take: what queue bounds count."""
    return len(request.prompt_token_ids) + (request.sampling.max_tokens or 0)
