"""Eviction: a strategy's answers, checked, and a record of who went and why."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence

from stoker.interfaces import CacheEntry, Eviction, EvictionStrategy

__all__ = ["EvictionLedger", "GuardedStrategy", "LeastRecentlyUsed"]

logger = logging.getLogger("stoker.cache")

_MAX_RECENT = 256


class LeastRecentlyUsed(EvictionStrategy):
    """What every other strategy falls back to."""

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
        """By last use."""
        return sorted(entries, key=lambda entry: (entry.last_used_s, entry.entry_id))


class GuardedStrategy:
    """Asks a strategy, and falls back to the least recently used where it raises or returns nonsense.

    Args:
        strategy: Who orders; ``None`` for the fall-back alone.

    Attributes:
        num_errors: How often it failed.
    """

    def __init__(self, strategy: EvictionStrategy | None = None) -> None:
        self._fallback = LeastRecentlyUsed()
        self._strategy = strategy or self._fallback
        self.num_errors = 0

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> list[int]:
        """Ids of all entries, the first to be evicted first."""
        if len(entries) < 2:
            return [entry.entry_id for entry in entries]
        entries = tuple(entries)
        try:
            answer = itertools.islice(self._strategy.order(entries, now_s), len(entries) + 1)
            ids = [entry.entry_id for entry in answer]
            if sorted(ids) != sorted(entry.entry_id for entry in entries):
                raise ValueError("did not return all of the entries it was given, each once")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
            self.num_errors += 1
            if self.num_errors == 1 or self.num_errors % 1000 == 0:
                logger.error(
                    "eviction strategy %s failed (%d failures so far), falling back to the least "
                    "recently used: %r",
                    type(self._strategy).__name__,
                    self.num_errors,
                    error,
                )
            ids = [entry.entry_id for entry in self._fallback.order(entries, now_s)]
        return ids


class EvictionLedger:
    """Counts what was given up. Written by one thread, read by any.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._recent: deque[Eviction] = deque(maxlen=_MAX_RECENT)

    def count(self, entry: CacheEntry, reason: str, *, stored: bool) -> None:
        """Note that an entry left its tier.

        Args:
            entry: As it was.
            reason: See ``Eviction``.
            stored: Whether it is still kept in another tier.
        """
        now_s = self._clock()
        self._counts[reason] += 1
        self._tokens[reason] += entry.num_tokens
        self._recent.append(
            Eviction(
                at_s=now_s,
                reason=reason,
                tier=entry.tier,
                tenant=entry.tenant,
                num_tokens=entry.num_tokens,
                num_bytes=entry.num_bytes,
                age_s=now_s - entry.last_used_s,
                num_hits=entry.num_hits,
                stored=stored,
            )
        )

    @property
    def counts(self) -> dict[str, int]:
        """Evictions by reason."""
        return dict(self._counts)

    @property
    def tokens(self) -> dict[str, int]:
        """Their tokens by reason."""
        return dict(self._tokens)

    @property
    def recent(self) -> tuple[Eviction, ...]:
        """The last evictions, oldest first."""
        return tuple(self._recent)
