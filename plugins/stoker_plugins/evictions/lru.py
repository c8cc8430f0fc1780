"""Least recently used: what nobody has asked for the longest goes first."""

from __future__ import annotations

from collections.abc import Sequence

from stoker import CacheEntry, EvictionStrategy

__all__ = ["LeastRecentlyUsed"]


class LeastRecentlyUsed(EvictionStrategy):
    """By the time of the last use; of those that are equal, the older one goes first."""

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
        """The least recently used first."""
        return sorted(
            entries, key=lambda entry: (entry.last_used_s, entry.created_s, entry.entry_id)
        )
