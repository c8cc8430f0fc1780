"""Finished answers, bounded in bytes and time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Literal

import msgspec
from cachetools import Cache, FIFOCache, LFUCache, LRUCache

from stoker import FinishReason

__all__ = ["AnswerStore", "StoredAnswer", "StoredSequence"]

_ORDERS: dict[str, type[Cache[bytes, StoredAnswer]]] = {
    "lru": LRUCache,
    "lfu": LFUCache,
    "fifo": FIFOCache,
}
_OVERHEAD_BYTES = 1100
"""What an answer costs beside its texts: its key, its structs, its places in several dictionaries, and
with ``lfu`` a counter of its own if no other was asked for as often. A test measures it."""
_SEQUENCE_BYTES = 120


class StoredSequence(msgspec.Struct, frozen=True, gc=False):
    """One of the ``n`` sequences of an answer."""

    text: str
    finish_reason: FinishReason
    completion_tokens: int
    stop: str | int | None = None


class StoredAnswer(msgspec.Struct, frozen=True):
    """A finished answer; ``sequences`` by index."""

    sequences: tuple[StoredSequence, ...]
    stored_s: float

    @property
    def size_bytes(self) -> int:
        """Memory that it takes in a store, key and bookkeeping included."""
        texts = sum(
            sys.getsizeof(sequence.text) + sys.getsizeof(sequence.stop)
            for sequence in self.sequences
        )
        return _OVERHEAD_BYTES + _SEQUENCE_BYTES * len(self.sequences) + texts


class AnswerStore:
    """Keeps answers until they are too old, or others need their room.

    Which one goes is up to ``cachetools``; it knows no age limit for all its orders, so that is kept here.

    Args:
        max_bytes: Most bytes of all answers together.
        ttl_s: Seconds for which an answer is kept.
        eviction: Who goes when there is no room.
        clock: Monotonic seconds.

    Attributes:
        evictions: Answers that went, by reason: ``capacity`` or ``expired``.
    """

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        eviction: Literal["lru", "lfu", "fifo"],
        clock: Callable[[], float],
    ) -> None:
        self._cache = _ORDERS[eviction](max_bytes, getsizeof=lambda answer: answer.size_bytes)
        self._ttl_s = ttl_s
        self._clock = clock
        self._oldest_first: dict[bytes, float] = {}  # when each was stored
        self.evictions: Counter[str] = Counter(capacity=0, expired=0)

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def size_bytes(self) -> int:
        """Bytes of all answers together."""
        return int(self._cache.currsize)

    def get(self, key: bytes) -> StoredAnswer | None:
        """The answer stored under a key, if there is one that is not too old."""
        self.expire()
        return self._cache.get(key)

    def put(self, key: bytes, sequences: tuple[StoredSequence, ...]) -> bool:
        """Store an answer instead of what was there; returns whether it could ever fit."""
        self.expire()
        self._remove(key)
        answer = StoredAnswer(sequences, self._clock())
        size = answer.size_bytes
        if size > self._cache.maxsize:
            return False
        while self._cache.currsize + size > self._cache.maxsize:
            evicted, _ = self._cache.popitem()
            del self._oldest_first[evicted]
            self.evictions["capacity"] += 1
        self._cache[key] = answer
        self._oldest_first[key] = answer.stored_s
        return True

    def expire(self) -> None:
        """Remove what is too old."""
        oldest_s = self._clock() - self._ttl_s
        while self._oldest_first:
            key, stored_s = next(iter(self._oldest_first.items()))
            if stored_s > oldest_s:
                return
            self._remove(key)
            self.evictions["expired"] += 1

    def _remove(self, key: bytes) -> None:
        if self._oldest_first.pop(key, None) is not None:
            del self._cache[key]
