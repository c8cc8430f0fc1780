"""Least frequently used, with ageing: what is found the least goes first, and old fame fades.

Plain LFU never lets go of what was popular once. Here a prefix's hits lose half their weight with every
half-life that passes without another one: LFU with exponential decay, as in LRFU (Lee et al. 2001) but by
the clock and from what an entry shows, so that the order needs no state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stoker import CacheEntry, EvictionStrategy
from stoker_plugins.evictions.options import LfuOptions

__all__ = ["LeastFrequentlyUsed"]


class LeastFrequentlyUsed(EvictionStrategy):
    """By hits, faded by the time since the last one; of those that are equal, LRU.

    Args:
        options: How quickly fame fades.
    """

    def __init__(self, options: LfuOptions | None = None) -> None:
        self._half_life_s = (options or LfuOptions()).half_life_s

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
        """The least frequently used first."""
        return sorted(
            entries,
            key=lambda entry: (
                self._log_frequency(entry, now_s),
                entry.last_used_s,
                entry.created_s,
                entry.entry_id,
            ),
        )

    def _log_frequency(self, entry: CacheEntry, now_s: float) -> float:
        """Base-2 logarithm of the faded count: it does not run out of digits after a thousand half-lives.

        Being kept counts as the first use, or all that is new would go before it could be found.
        """
        frequency = math.log2(1 + entry.num_hits)
        if not self._half_life_s:
            return frequency
        return frequency - max(0.0, now_s - entry.last_used_s) / self._half_life_s
