"""First in, first out: what was kept first goes first, however often it was found since."""

from __future__ import annotations

from collections.abc import Sequence

from stoker import CacheEntry, EvictionStrategy

__all__ = ["FirstInFirstOut"]


class FirstInFirstOut(EvictionStrategy):
    """By the time an entry was made; hits do not matter."""

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
        """The oldest first."""
        return sorted(entries, key=lambda entry: (entry.created_s, entry.entry_id))
