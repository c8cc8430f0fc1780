"""The engine's side of the second tier: snapshots out of lanes and back, timed, and never at others' cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker.engine.retention import Kept
    from stoker.engine.transfers import TransferCosts
    from stoker.interfaces import CacheEntry, Runtime, SnapshotStore, StoredPrefix

__all__ = ["SecondTier"]

logger = logging.getLogger("stoker.cache")

_EXPIRE_EVERY_S = 1.0
_MAX_PATIENCE_S = 2.0  # for the disk, while nothing else is to be done
_MEMORY = 64.0  # about how many snapshots are remembered when the chance of their use is estimated
_PRIOR_WEIGHT, _PRIOR = 4.0, 0.5
_TRY_EVERY = 16  # of what does not seem worth it, or nobody would notice when it is again

T = TypeVar("T")


class SecondTier:
    """Saves what is evicted and brings it back.

    Args:
        runtime: Makes and takes snapshots.
        store: Keeps them; ``None`` for no second tier.
        costs: Told what it costs, and asked whether that pays.
        clock: Monotonic seconds.

    Attributes:
        num_errors: How often the store or a snapshot failed.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: SnapshotStore | None,
        costs: TransferCosts,
        clock: Callable[[], float],
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._costs = costs
        self._clock = clock
        self._expired_s = clock()
        self._num_made = 0.0  # lately
        self._num_used = 0.0
        self._num_declined = 0
        self.num_errors = 0

    def entries(self) -> list[CacheEntry]:
        """What is stored; from any thread."""
        return [] if self._store is None else self._guarded("entries", self._store.entries, [])

    def match(
        self, tokens: NDArray[np.int32], scope: str, *, may_wait: bool = False
    ) -> StoredPrefix | None:
        """The snapshot that saves a prompt the most, if it is in memory; if it is on disk, reading begins.

        Args:
            tokens: The prompt.
            scope: Its scope.
            may_wait: Wait for the disk, for no longer than it takes to compute what is read: nobody else is
                held up by that.
        """
        store = self._store
        if store is None:
            return None
        found = self._find(store, tokens, scope)
        if found is None or found.tier == "host":
            return found
        key = found.key
        prefill_s = self._costs.prefill_s * found.num_shared
        patience_s = min(prefill_s, _MAX_PATIENCE_S) if may_wait else 0.0
        is_ready = self._guarded("is_ready", lambda: store.is_ready(key, patience_s), False)
        return found if is_ready else None

    def prefetch(self, tokens: NDArray[np.int32], scope: str) -> None:
        """Begin to read what a request that was just queued will want from disk."""
        self.match(tokens, scope)

    def _find(
        self, store: SnapshotStore, tokens: NDArray[np.int32], scope: str
    ) -> StoredPrefix | None:
        return self._guarded("match", lambda: store.match(tokens, scope), None)

    def save(self, lane: int, kept: Kept, num_elsewhere: int) -> bool:
        """Store what a lane keeps, if that is worth its while; whether it is there afterwards.

        Args:
            lane: The lane.
            kept: What it keeps.
            num_elsewhere: How many of its first tokens another lane holds, too.
        """
        store, tokens = self._store, kept.tokens
        if store is None:
            return False
        if not self._costs.is_worth_storing(
            len(tokens), len(tokens) - num_elsewhere, self._chance()
        ):
            if not self._costs.is_worth_storing(len(tokens), len(tokens) - num_elsewhere):
                return False
            self._num_declined += 1
            if self._num_declined % _TRY_EVERY:
                return False
        there = self._find(store, tokens, kept.scope)
        if there is not None and there.num_shared >= len(tokens):
            return True
        return self._guarded("put", lambda: self._save(store, lane, kept), False)

    def _chance(self) -> float:
        """How often a snapshot of lately was restored: conversations go on, single questions do not."""
        return (self._num_used + _PRIOR_WEIGHT * _PRIOR) / (self._num_made + _PRIOR_WEIGHT)

    def _save(self, store: SnapshotStore, lane: int, kept: Kept) -> bool:
        started_s = self._clock()
        snapshot = self._runtime.snapshot(lane)
        self._costs.snapshot.observe(len(kept.tokens), self._clock() - started_s)
        fade = 1.0 - 1.0 / _MEMORY
        self._num_made = fade * self._num_made + 1.0
        self._num_used *= fade
        worth_s = self._costs.prefill_s * len(kept.tokens)
        return bool(
            store.put(kept.tokens, kept.scope, kept.tenant, snapshot, worth_s, kept.num_block)
        )

    def fetch(self, stored: StoredPrefix) -> bytes | None:
        """A snapshot's bytes, before anything is evicted for it: that could drop just this one."""
        store = self._store
        if store is None:
            return None
        return self._guarded("get", lambda: store.get(stored.key), None)

    def restore(self, lane: int, stored: StoredPrefix, snapshot: bytes) -> int:
        """Bring a snapshot into an empty lane.

        Returns:
            Tokens that the lane holds now; 0 if it failed (whatever is in the lane then is not to be used).
        """
        return self._guarded("restore", lambda: self._restore(lane, stored, snapshot), 0)

    def _restore(self, lane: int, stored: StoredPrefix, snapshot: bytes) -> int:
        started_s = self._clock()
        held = int(self._runtime.restore(lane, snapshot))
        if held != stored.num_tokens:
            raise ValueError(f"a snapshot of {stored.num_tokens} tokens restored {held}")
        self._costs.restore.observe(held, self._clock() - started_s)
        self._num_used += 1.0
        return held

    def clear(self) -> int:
        """Drop everything; returns how many snapshots that were."""
        return 0 if self._store is None else self._guarded("clear", self._store.clear, 0)

    def expire(self) -> None:
        """Let the store drop what is too old, now and then."""
        store, now_s = self._store, self._clock()
        if store is not None and now_s - self._expired_s >= _EXPIRE_EVERY_S:
            self._expired_s = now_s
            self._guarded("evict", lambda: store.evict(now_s), 0)

    def _guarded(self, what: str, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except Exception:
            self.num_errors += 1
            if self.num_errors == 1 or self.num_errors % 1000 == 0:
                logger.exception("snapshot store: %s failed (%d failures)", what, self.num_errors)
            return otherwise
