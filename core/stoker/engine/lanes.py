"""Which lane holds whose KV. A lane that falls idle keeps its KV until somebody needs the room.

The next request takes over the idle lane whose tokens agree with its own prompt the longest, unless that
would throw away much more than it saves. If a busy lane agrees with it for longer, that prefix is copied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.sequence import NO_LANE
from stoker.errors import EngineError
from stoker.interfaces import CacheEntry, CacheStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.interfaces import EvictionStrategy, Runtime, SnapshotStore

__all__ = ["LanePool", "common_prefix"]

logger = logging.getLogger("stoker.engine")

_EMPTY = np.empty(0, np.int32)

# What a retained token that is given up is worth against a token saved now.
_LOSS = 0.1
# What each lane between a newcomer and the busy lanes costs, and the most that distance may cost, in
# tokens of prefill: a scattered batch is computed in pieces for as long as the newcomer generates.
_GAP_TOKENS = 16
# Fewer tokens are not copied from a busy lane, nor fewer than this part of what that lane holds: runtimes
# that cannot share KV copy all of it.
_MIN_COPIED = 16
_COPY_COST = 0.01
_MAX_GAP_TOKENS = 64


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n


class LanePool:
    """The lanes of one runtime: who runs in them, and what idle ones retain.

    Args:
        runtime: The runtime whose KV this accounts for.
        prefix_reuse: Whether idle lanes keep their KV for later requests.

    Attributes:
        num_errors: How often the runtime failed to free or copy KV.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        prefix_reuse: bool = True,
        eviction: EvictionStrategy | None = None,
        store: SnapshotStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._eviction = eviction
        self._store = store
        self._clock = clock
        self._pins: list[NDArray[np.int32]] = []
        self._runtime = runtime
        self._prefix_reuse = prefix_reuse
        self._copies = prefix_reuse and runtime.info.capabilities.copy_prefix
        self._lane_locality = runtime.info.capabilities.lane_locality
        self.num_lanes = runtime.info.num_lanes
        self.capacity_tokens = runtime.info.kv_capacity_tokens
        self._owner: list[Sequence | None] = [None] * self.num_lanes
        self._retained: list[NDArray[np.int32]] = [_EMPTY] * self.num_lanes
        # Idle lanes, least recently used first: dicts keep insertion order.
        self._idle: dict[int, None] = dict.fromkeys(range(self.num_lanes))
        # Idle lanes that the runtime failed to free: nobody knows what they hold until that succeeds.
        self._unknown: set[int] = set()
        self.num_errors = 0
        self.num_queries = 0
        self.num_hits = 0
        self.query_tokens = 0
        self.hit_tokens = 0

    def stats(self) -> CacheStats:
        """Counters; from any thread."""
        return CacheStats(
            num_queries=self.num_queries,
            num_hits=self.num_hits,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            retained_tokens=self.retained_tokens,
        )

    def entries(self) -> list[CacheEntry]:
        """What idle lanes keep; from any thread."""
        return [
            CacheEntry(
                entry_id=lane,
                tier="lane",
                tenant="",
                salt="",
                num_tokens=len(held),
                num_bytes=0,
                created_s=0.0,
                last_used_s=0.0,
            )
            for lane, held in enumerate(self._retained)
            if len(held)
        ]

    def pin(self, tokens: Iterable[int]) -> None:
        """Keep the KV of a prefix once it was computed."""
        self._pins.append(np.fromiter(tokens, np.int32))

    @property
    def num_free(self) -> int:
        """Lanes without a running sequence that the next one may have."""
        return len(self._idle) - len(self._unknown)

    @property
    def used_tokens(self) -> int:
        """KV tokens of running sequences."""
        return sum(owner.num_computed for owner in self._owner if owner is not None)

    @property
    def retained_tokens(self) -> int:
        """KV tokens that idle lanes keep for reuse."""
        return sum(map(len, self._retained))

    def acquire(self, sequence: Sequence) -> None:
        """Give a sequence the idle lane that saves it the most work.

        Sets the sequence's ``lane``, ``num_computed`` and ``num_cached``. There must be a free lane.

        Raises:
            EngineError: The runtime can free none of the idle lanes.
        """
        tokens = sequence.tokens[: sequence.num_tokens]
        kept = None
        while kept is None:
            if not self.num_free:
                raise EngineError("the model's runtime failed to free the KV of a lane")
            lane, shared = self._best_lane(tokens)
            # The last token must be computed even if its KV is there: its logits are not.
            kept = self._truncate(lane, min(shared, sequence.num_tokens - 1))
            if kept is not None:
                kept = self._copy_longer(lane, kept, tokens)
        del self._idle[lane]
        self._retained[lane] = _EMPTY
        self._owner[lane] = sequence
        sequence.lane = lane
        sequence.num_computed = kept
        sequence.num_known = max(sequence.num_known, kept)
        if sequence.num_preemptions == 0:
            sequence.num_cached = kept
            self.num_queries += 1
            self.num_hits += kept > 0
            self.query_tokens += sequence.num_prompt
            self.hit_tokens += kept

    def _best_lane(self, tokens: NDArray[np.int32]) -> tuple[int, int]:
        """The idle lane that is worth the most to a newcomer, and how much of its prompt it holds.

        Worth is counted in tokens: those that need not be computed, less a part of those that are lost
        to whoever might have come back for them, less what a distant lane costs the batch. Without a
        longer common prefix that leaves an empty lane near the busy ones, or else an old one.
        """
        best = (float("-inf"), -1, 0)
        busy = [lane for lane, owner in enumerate(self._owner) if owner is not None]
        for age, lane in enumerate(self._idle):  # the oldest first
            if lane in self._unknown:
                continue
            held = self._retained[lane]
            shared = common_prefix(held, tokens)
            recency = (age + 1) / len(self._idle)
            worth = shared - _LOSS * recency * (len(held) - shared)
            if self._lane_locality and busy:
                gap = min(abs(lane - other) for other in busy) - 1
                worth -= min(gap * _GAP_TOKENS, _MAX_GAP_TOKENS)
            if (worth, -lane) > (best[0], -best[1]):
                best = (worth, lane, shared)
        return best[1], best[2]

    def _copy_longer(self, lane: int, kept: int, tokens: NDArray[np.int32]) -> int | None:
        """Copy a longer prefix from a busy lane, if there is one and that is worth while.

        Returns:
            Tokens that the lane holds now; ``None`` if the runtime failed and the lane cannot be used.
        """
        if not self._copies:
            return kept
        best = (0, 0, NO_LANE)
        for source, owner in enumerate(self._owner):
            if owner is not None:
                shared = common_prefix(owner.tokens[: owner.num_computed], tokens[:-1])
                best = max(best, (shared, -owner.num_computed, source))
        shared, minus_length, source = best
        if shared - kept < max(_MIN_COPIED, -minus_length * _COPY_COST):
            return kept
        try:
            self._runtime.copy_prefix(source, lane, shared)
        except Exception:
            # A copy only saves time: the lane is made empty, and what it held is computed again.
            self.num_errors += 1
            logger.exception("the runtime failed to copy %d tokens of lane %d", shared, source)
            return self._truncate(lane, 0)
        return shared

    def release(self, sequence: Sequence) -> None:
        """Take the lane from a sequence; its computed KV stays for reuse."""
        lane = sequence.lane
        if lane == NO_LANE:
            return
        held = sequence.tokens[: sequence.num_computed].copy() if self._prefix_reuse else _EMPTY
        self._owner[lane] = None
        self._idle[lane] = None
        self._retained[lane] = held
        if not len(held):
            self._evict(lane)
        sequence.lane = NO_LANE
        sequence.num_computed = 0

    def rewind(self, sequence: Sequence) -> None:
        """Bring a lane in an unknown state back to what the sequence knows to be computed.

        Raises:
            EngineError: The runtime cannot.
        """
        kept = self._truncate(sequence.lane, sequence.num_computed)
        if kept is None:
            self._unknown.discard(sequence.lane)  # it is not idle yet
            raise EngineError("the model's runtime failed to bring a lane back after a failed step")
        sequence.num_computed = kept

    def make_room(self, num_tokens: int) -> bool:
        """Evict what idle lanes retain, oldest first, until ``num_tokens`` more fit.

        Returns:
            Whether they fit now.
        """
        missing = self.used_tokens + self.retained_tokens + num_tokens - self.capacity_tokens
        for lane in list(self._idle):
            if missing <= 0:
                break
            held = len(self._retained[lane])
            if held and self._evict(lane):
                missing -= held
        return missing <= 0

    def evict_all(self) -> bool:
        """Evict everything that idle lanes retain; returns whether that freed anything."""
        lanes = [lane for lane in self._idle if len(self._retained[lane]) or lane in self._unknown]
        return sum(map(self._evict, lanes)) > 0

    def recover(self) -> None:
        """Try again to free the lanes that the runtime failed to free."""
        for lane in list(self._unknown):
            self._evict(lane)

    def _evict(self, lane: int) -> bool:
        """Empty an idle lane; returns whether the runtime did it."""
        self._retained[lane] = _EMPTY
        return self._truncate(lane, 0) is not None

    def _truncate(self, lane: int, num_tokens: int) -> int | None:
        """Keep so many tokens of a lane or fewer; ``None`` if the runtime failed."""
        try:
            kept = int(self._runtime.truncate(lane, num_tokens))
            if not 0 <= kept <= num_tokens:
                raise ValueError(f"truncate({lane}, {num_tokens}) kept {kept} tokens")
        except Exception:
            # Whatever it is, it must not cost those in other lanes anything.
            self.num_errors += 1
            self._unknown.add(lane)
            self._retained[lane] = _EMPTY
            if self.num_errors == 1 or self.num_errors % 1000 == 0:
                logger.exception(
                    "the runtime failed to free lane %d (%d failures so far)", lane, self.num_errors
                )
            return None
        self._unknown.discard(lane)
        return kept
