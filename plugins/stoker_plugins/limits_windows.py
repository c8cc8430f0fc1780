"""A tenant's limits and how much of them was used lately, in sliding windows.

A sliding-window counter keeps two numbers for each limit: what was used in the current window and in the one
before, which counts for the part of it that the last ``period`` still covers. So a day's tokens need no more
memory than a minute's requests, and what was charged can be given back to the window it was charged in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stoker import RateLimitError, TenantConfig

__all__ = [
    "Limit",
    "Window",
    "check",
    "counter_keys",
    "duration",
    "limits_of",
    "rate_limit_headers",
]

_MINUTE_S, _DAY_S = 60.0, 86400.0
_ROUNDING = 1e-6


class Limit(NamedTuple):
    """One of a tenant's limits.

    Attributes:
        key: Its part in the names of counters.
        words: What people call it.
        unit: ``requests`` or ``tokens``.
        most: How many of them.
        period_s: In so many seconds.
    """

    key: str
    words: str
    unit: str
    most: int
    period_s: float


def limits_of(tenant: TenantConfig) -> list[Limit]:
    """The limits that are set for a tenant."""
    everything = [
        Limit("rpm", "requests per minute", "requests", tenant.requests_per_minute, _MINUTE_S),
        Limit("tpm", "tokens per minute", "tokens", tenant.tokens_per_minute, _MINUTE_S),
        Limit("tpd", "tokens per day", "tokens", tenant.tokens_per_day, _DAY_S),
    ]
    return [limit for limit in everything if limit.most]


class Window(NamedTuple):
    """A limit's state at a moment.

    Attributes:
        limit: Most that may be used in a period.
        period_s: Length of the period.
        into_s: How much of the current window has passed.
        previous: What was used in the window before.
        current: What was used in this window.
    """

    limit: int
    period_s: float
    into_s: float
    previous: int
    current: int

    @property
    def used(self) -> float:
        """What counts as used in the last period."""
        return self.previous * (1 - self.into_s / self.period_s) + self.current

    @property
    def remaining(self) -> int:
        """What may still be used now."""
        return max(0, math.floor(self.limit - self.used + _ROUNDING))

    @property
    def reset_s(self) -> float:
        """Seconds until nothing counts as used any more, if nothing is."""
        if self.current:
            return 2 * self.period_s - self.into_s
        return self.period_s - self.into_s if self.previous else 0.0

    def wait_s(self, cost: int) -> float:
        """Seconds until ``cost`` could be used if nothing else is; ``inf`` if it exceeds the limit."""
        if cost > self.limit:
            return math.inf
        if self.used + cost <= self.limit + _ROUNDING:
            return 0.0
        room = self.limit - cost - self.current
        if room >= 0:  # when enough of the previous window has slid out
            return self.period_s * (1 - room / self.previous) - self.into_s
        # ... and of this one, once that is the previous one
        share = (self.limit - cost) / self.current
        return self.period_s - self.into_s + self.period_s * (1 - share)


def counter_keys(tenant: str, limit: Limit, now_s: float) -> tuple[str, str]:
    """Names of the counters of the previous and of the current window."""
    index = int(now_s // limit.period_s)
    return f"{tenant}/{limit.key}/{index - 1}", f"{tenant}/{limit.key}/{index}"


def check(
    tenant: str, limits: Sequence[Limit], windows: Sequence[Window], costs: Sequence[int]
) -> None:
    """Raise ``RateLimitError`` unless every limit has room."""
    waits = [window.wait_s(cost) for window, cost in zip(windows, costs, strict=True)]
    wait_s = max(waits)
    if wait_s <= 0:
        return
    at = waits.index(wait_s)
    limit, cost = limits[at], costs[at]
    headers = rate_limit_headers(limits, windows)
    if math.isinf(wait_s):
        raise RateLimitError(
            f"the request is too large for tenant {tenant!r}: it may take {cost} tokens (prompt and "
            f"requested tokens), and the limit is {limit.most} {limit.words}; lower max_tokens or n, "
            "or shorten the prompt",
            code="request_too_large_for_limit",
            headers=headers | {"x-should-retry": "false"},  # which OpenAI's clients obey
        )
    raise RateLimitError(
        f"tenant {tenant!r} has reached its limit of {limit.most} {limit.words}: "
        f"{math.ceil(windows[at].used)} used, {cost} requested; try again in {duration(wait_s)}",
        retry_after_s=wait_s,
        headers=headers,
    )


def rate_limit_headers(limits: Sequence[Limit], windows: Sequence[Window]) -> dict[str, str]:
    """OpenAI's ``x-ratelimit-*``; of the limits of one unit the one with the least left."""
    headers: dict[str, str] = {}
    least: dict[str, int] = {}
    for limit, window in zip(limits, windows, strict=True):
        unit = limit.unit
        if window.remaining >= least.get(unit, window.remaining + 1):
            continue
        least[unit] = window.remaining
        headers[f"x-ratelimit-limit-{unit}"] = str(limit.most)
        headers[f"x-ratelimit-remaining-{unit}"] = str(window.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = duration(window.reset_s)
    return headers


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it, rounded up to milliseconds: ``120ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
