"""Who may use how much: requests and tokens per minute and day, and requests at once, for each tenant.

Requests and tokens are counted in sliding windows (``limits_windows.py``). Tokens are charged at admission as
if everything that was asked for were generated, and settled when the request is over. Nothing is charged to
a request that is refused, here or later.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stoker import (
    Middleware,
    RateLimitError,
    Request,
    RequestRecord,
    ServerContext,
    TenantConfig,
    UnavailableError,
)
from stoker_plugins.limits_counters import Change, Counters, CountersError, make_counters
from stoker_plugins.limits_options import LimitsOptions
from stoker_plugins.limits_windows import Window, check, counter_keys, limits_of, rate_limit_headers

__all__ = ["Limits"]

logger = logging.getLogger("stoker.limits")

_TICKET = "limits.ticket"  # in Request.metadata
_UNKNOWN_WAIT_S = 1.0  # for a slot to fall free, before any request has ended
_MIN_WAIT_S = 0.05
_MEMORY = 0.9  # weight of the past in the mean duration of requests
_LOG_EVERY_S = 60.0


class _Charge(NamedTuple):
    """What a request was charged: the unit, how much, and where."""

    unit: str
    change: Change
    window_ends_s: float


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request that was let in."""

    tenant: str
    started_s: float
    charges: list[_Charge] = field(default_factory=list)


class Limits(Middleware):
    """Holds tenants to their limits (``[[tenants]]``) and the server to ``max_concurrent_requests``.

    Args:
        context: The server; tenants are looked up at every request, since they may change.
        options: ``[plugins.limits]``.
        counters: Where usage is counted; by default what the options name.
        clock: Monotonic seconds.

    Attributes:
        num_storage_errors: How often a shared storage did not answer.
    """

    def __init__(
        self,
        context: ServerContext,
        options: LimitsOptions | None = None,
        *,
        counters: Counters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._options = options or LimitsOptions()
        self._counters = counters or make_counters(
            self._options.storage, self._options.storage_timeout_s
        )
        self._clock = clock
        # Requests that run or wait, oldest first (dicts keep their order).
        self._inside: dict[_Ticket, None] = {}
        self._of_tenant: dict[str, dict[_Ticket, None]] = {}
        self._mean_s = 0.0
        self.num_storage_errors = 0
        self._next_log_s = -math.inf

    async def on_request(self, request: Request) -> Request:
        """Let it pass and charge it, or raise ``RateLimitError``."""
        tenant = self._context.tenant(request.tenant)
        ticket = self._enter(tenant)
        try:
            await self._charge(request, tenant, ticket)
        except BaseException:
            self._leave(ticket)
            raise
        request.metadata[_TICKET] = ticket
        return request

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        """Free its place, and settle what it was charged with what it took."""
        ticket: _Ticket | None = request.metadata.pop(_TICKET, None)
        if ticket is None:
            return
        self._leave(ticket)
        if records:
            taken_s = self._clock() - ticket.started_s
            mean_s = self._mean_s
            self._mean_s = mean_s * _MEMORY + taken_s * (1 - _MEMORY) if mean_s else taken_s
        await self._settle(ticket.charges, _used(records))

    # ------------------------------------------------------------------ requests at once

    def _enter(self, tenant: TenantConfig) -> _Ticket:
        own = self._of_tenant.get(tenant.name, {})
        if tenant.max_concurrent_requests and len(own) >= tenant.max_concurrent_requests:
            raise RateLimitError(
                f"tenant {tenant.name!r} has {len(own)} requests under way, of at most "
                f"{tenant.max_concurrent_requests} at once; wait for one of them to end",
                code="concurrency_limit_exceeded",
                retry_after_s=self._until_one_ends_s(own),
            )
        most = self._context.config.admission.max_concurrent_requests
        if most and len(self._inside) >= most:
            raise RateLimitError(
                f"the server has {len(self._inside)} requests under way, of at most {most}; "
                "retry later",
                code="concurrency_limit_exceeded",
                retry_after_s=self._until_one_ends_s(self._inside),
            )
        ticket = _Ticket(tenant.name, self._clock())
        self._inside[ticket] = None
        self._of_tenant.setdefault(tenant.name, {})[ticket] = None
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        del self._inside[ticket]
        own = self._of_tenant[ticket.tenant]
        del own[ticket]
        if not own:
            del self._of_tenant[ticket.tenant]

    def _until_one_ends_s(self, tickets: Mapping[_Ticket, None]) -> float:
        """When the oldest should be done, if it takes as long as requests did lately."""
        if not self._mean_s:
            return _UNKNOWN_WAIT_S
        oldest = next(iter(tickets))
        left_s = oldest.started_s + self._mean_s - self._clock()
        # One that takes longer than others tells nothing; then ends are spread evenly over a duration.
        return max(left_s if left_s > 0 else self._mean_s / len(tickets), _MIN_WAIT_S)

    # ------------------------------------------------------------------ requests and tokens by time

    async def _charge(self, request: Request, tenant: TenantConfig, ticket: _Ticket) -> None:
        limits = limits_of(tenant)
        if not limits:
            return
        costs = [1 if limit.unit == "requests" else self._estimate(request) for limit in limits]
        now_s = self._counters.clock()
        keys = [counter_keys(tenant.name, limit, now_s) for limit in limits]
        try:
            counts = await self._counters.get([key for pair in keys for key in pair])
            windows = [
                Window(
                    limit.most,
                    limit.period_s,
                    now_s % limit.period_s,
                    max(0, counts[2 * i]),
                    max(0, counts[2 * i + 1]),
                )
                for i, limit in enumerate(limits)
            ]
            check(tenant.name, limits, windows, costs)
            changes = [
                Change(current, cost, 2 * limit.period_s)
                for limit, (_, current), cost in zip(limits, keys, costs, strict=True)
            ]
            values = await self._counters.add(changes)
        except CountersError as error:
            self._storage_failed(error)
            return
        charges = [
            _Charge(limit.unit, change, now_s - now_s % limit.period_s + limit.period_s)
            for limit, change in zip(limits, changes, strict=True)
        ]
        after = [w._replace(current=max(0, v)) for w, v in zip(windows, values, strict=True)]
        if any(window.used > window.limit + 1e-6 for window in after):
            # Another server charged the same tenant since we looked: take it back and ask again.
            await self._settle(charges, None)
            before = [w._replace(current=w.current - c) for w, c in zip(after, costs, strict=True)]
            check(tenant.name, limits, before, costs)
        ticket.charges = charges
        request.response_headers.update(rate_limit_headers(limits, after))

    def _estimate(self, request: Request) -> int:
        """Tokens of a request if all that was asked for is generated."""
        asked = request.sampling.max_tokens
        wanted = self._options.default_output_tokens if asked is None else asked
        return len(request.prompt_token_ids) + request.n * wanted

    async def _settle(self, charges: Sequence[_Charge], used: Mapping[str, int] | None) -> None:
        """Turn charges into what was used; ``None`` gives all back."""
        now_s = self._counters.clock()
        changes: list[Change] = []
        for unit, change, ends_s in charges:
            period_s = change.expire_s / 2
            true = 0 if used is None else used[unit]
            if (
                true != change.amount and now_s < ends_s + period_s
            ):  # else it does not count any more
                changes.append(change._replace(amount=true - change.amount))
        if changes:
            try:
                await self._counters.add(changes)
            except CountersError as error:
                self._count_failure(error)

    # ------------------------------------------------------------------ failures

    def _storage_failed(self, error: CountersError) -> None:
        self._count_failure(error)
        if self._options.on_storage_error == "refuse":
            raise UnavailableError(
                "limits cannot be checked because their storage does not answer; retry later",
                code="limits_unavailable",
                retry_after_s=_UNKNOWN_WAIT_S,
            ) from error

    def _count_failure(self, error: CountersError) -> None:
        self.num_storage_errors += 1
        now_s = self._clock()
        if now_s >= self._next_log_s:
            self._next_log_s = now_s + _LOG_EVERY_S
            logger.error(
                "the storage of limits does not answer (%s; %d times so far); requests are %s",
                error,
                self.num_storage_errors,
                "let pass" if self._options.on_storage_error == "allow" else "refused",
            )


def _used(records: Sequence[RequestRecord]) -> Mapping[str, int] | None:
    """What a request took, by unit; nothing at all if it never reached the engine."""
    if not records:
        return None
    generated = sum(record.completion_tokens for record in records)
    # What ended in the queue was not computed. Cached prompt tokens are prompt tokens.
    started = any(
        record.completion_tokens
        or record.trace is None
        or record.trace.computed_tokens + record.trace.cached_tokens
        for record in records
    )
    return {
        "requests": 1,
        "tokens": generated + (records[0].prompt_tokens if started else 0),
    }
