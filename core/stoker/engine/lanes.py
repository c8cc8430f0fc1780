"""Which lane holds whose KV. A lane that falls idle keeps its KV until somebody needs the room.

A newcomer's prompt is looked up in a tree of what all lanes hold, idle ones and busy ones
(``prefix_tree.py``); ``ways.py`` says how it comes by what is found there, ``lane_memory.py`` and
``retention.py`` what is kept and what goes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.config import CacheConfig
from stoker.engine.lane_memory import LaneMemory
from stoker.engine.prefix_tree import common_prefix
from stoker.engine.retention import Kept
from stoker.engine.sequence import NO_LANE
from stoker.engine.ways import Choice, IdleLane, Source, Way, choose, restoring
from stoker.errors import EngineError
from stoker.interfaces import CacheEntry, CacheStats
from stoker.tenants import Tenants

if TYPE_CHECKING:
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import EvictionStrategy, Runtime, SnapshotStore, StoredPrefix

__all__ = ["LanePool"]

logger = logging.getLogger("stoker.engine")

_MIN_COUNTED = 16  # a takeover that loses fewer tokens is no eviction


class LanePool(LaneMemory):
    """The lanes of one runtime: who runs in them, and what idle ones keep.

    Args:
        runtime: The runtime whose KV this accounts for.
        config: KV reuse.
        tenants: For the floors of their prefixes.
        eviction: Which prefix goes first; the least recently used if ``None``.
        store: Where evicted prefixes go; nowhere if ``None``.
        clock: Monotonic seconds.

    Attributes:
        copies: Whether prefixes can be copied between lanes.
        num_queries: Requests that were looked up.
        query_tokens: Their prompt tokens.
        num_shared_waits: Sequences that waited for another one to compute the prefix they share.
        shared_wait_s: How long, together.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: CacheConfig | None = None,
        *,
        tenants: Tenants | None = None,
        eviction: EvictionStrategy | None = None,
        store: SnapshotStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or CacheConfig()
        super().__init__(runtime, config, tenants or Tenants(), eviction, store, clock)
        can = runtime.info.capabilities
        self._lane_locality = can.lane_locality
        self._shares_kv = can.shares_kv
        self._resets = can.truncation == "reset"
        self.copies = config.prefix_reuse and can.copy_prefix
        # What was known of the prefix that a busy lane began with: when it was first kept, and its hits.
        self._history: dict[int, tuple[float, int]] = {}
        self.num_queries = 0
        self.query_tokens = 0
        self._hits: Counter[str] = Counter()
        self._hit_tokens: Counter[str] = Counter()
        self.num_shared_waits = 0
        self.shared_wait_s = 0.0

    # ------------------------------------------------------------------ figures

    @property
    def num_hits(self) -> int:
        """Requests that found something."""
        return sum(list(self._hits.values()))

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that did not have to be computed."""
        return sum(list(self._hit_tokens.values()))

    def stats(self) -> CacheStats:
        """What became of the cache so far; from any thread."""
        retention, costs = self.retention, self.costs
        entries = self.entries()
        lanes = [entry for entry in entries if entry.tier == "lane"]
        return CacheStats(
            num_queries=self.num_queries,
            num_hits=self.num_hits,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            hits_by_way=dict(self._hits),
            hit_tokens_by_way=dict(self._hit_tokens),
            evictions=dict(retention.evictions),
            evicted_tokens=dict(retention.evicted_tokens),
            num_entries=len(lanes),
            num_pinned=sum(entry.pinned for entry in lanes),
            retained_tokens=sum(entry.num_tokens for entry in lanes),
            retained_bytes=sum(entry.num_bytes for entry in lanes),
            num_shared_waits=self.num_shared_waits,
            shared_wait_s=self.shared_wait_s,
            num_pins_evicted=retention.num_pins_evicted,
            num_strategy_errors=retention.num_strategy_errors,
            num_store_errors=self._tier.num_errors,
            prefill_s_per_token=costs.prefill_s,
            copy_s_per_token=costs.copy.value,
            restore_s_per_token=costs.restore.value,
            snapshot_s_per_token=costs.snapshot.value,
            recent=tuple(retention.recent.copy()),
        )

    def entries(self) -> list[CacheEntry]:
        """What idle lanes and the store keep; from any thread."""
        return self.retention.entries() + self._tier.entries()

    # ------------------------------------------------------------------ looking up

    def reusable(self, sequence: Sequence) -> int:
        """How many tokens of a waiting sequence the lanes could give it now."""
        found = self._look_up(sequence)
        if not self.copies:
            found = {lane: usable for lane, usable in found.items() if lane in self._idle}
        return max(found.values(), default=0)

    def _look_up(self, sequence: Sequence) -> dict[int, int]:
        """For each lane that shares a prefix with a sequence, how much of that it can go on from.

        The last token must be computed even if its KV is there: its logits are not.
        """
        if not self._prefix_reuse:
            return {}
        self._follow_busy()
        tokens = sequence.tokens[: self.blocks.reusable(sequence)]
        scope = self.retention.scope_of(sequence.request)
        shared = self._tree.match(scope, tokens)
        own = self.blocks.boundary(sequence.num_prompt)
        usable = {
            lane: self.blocks.usable(n, self._boundary(lane), own) for lane, n in shared.items()
        }
        return {lane: n for lane, n in usable.items() if n}

    def _look_up_pins(self, sequence: Sequence) -> dict[int, int]:
        """The same for pinned prefixes, which are everybody's, if only to copy: they are configuration."""
        public = self.retention.public_scope
        if not self.retention.pins or self.retention.scope_of(sequence.request) == public:
            return {}
        tokens = sequence.tokens[: self.blocks.reusable(sequence)]
        own = self.blocks.boundary(sequence.num_prompt)
        found: dict[int, int] = {}
        for pin in self.retention.pins:
            same = common_prefix(pin, tokens)
            for lane, shared in self._tree.match(public, pin).items():
                usable = self.blocks.usable(same, self._boundary(lane), own)
                if shared == len(pin) and usable > found.get(lane, 0):
                    found[lane] = usable
        return found

    def prefetch(self, sequence: Sequence) -> None:
        """Begin to bring what a sequence that was just queued will want from disk into memory."""
        scope = self.retention.scope_of(sequence.request)
        self._tier.prefetch(sequence.tokens[: self.blocks.reusable(sequence)], scope)

    # ------------------------------------------------------------------ acquire

    def acquire(self, sequence: Sequence) -> None:
        """Give a sequence an idle lane, with as much of its KV as is worth while.

        Sets the sequence's ``lane``, ``num_computed`` and ``num_cached``. There must be a free lane.

        Raises:
            EngineError: The runtime can free none of the idle lanes.
        """
        self.expire()
        kept = None
        while kept is None:
            if not self.num_free:
                raise EngineError("the model's runtime failed to free the KV of a lane")
            choice = self._choose(sequence)
            kept = self._carry_out(choice, sequence)
        lane = choice.lane
        del self._idle[lane]
        self._owner[lane] = sequence
        scope = self.retention.scope_of(sequence.request)
        self._tree.insert(lane, scope, sequence.tokens[: kept if self._prefix_reuse else 0])
        sequence.lane = lane
        sequence.num_computed = kept
        sequence.num_known = max(sequence.num_known, kept)
        if sequence.num_preemptions == 0:
            sequence.num_cached = kept
            self.num_queries += 1
            self.query_tokens += sequence.num_prompt
            if kept:
                sequence.facts.cached_by = choice.way.value
                self._hits[choice.way.value] += 1
                self._hit_tokens[choice.way.value] += kept

    def _choose(self, sequence: Sequence) -> Choice:
        """The way that is worth the most."""
        found = self._look_up(sequence)
        scope = self.retention.scope_of(sequence.request)
        tokens = sequence.tokens[: self.blocks.reusable(sequence)]
        protection = self.retention.order(self._busy())
        rank = {lane: i for i, lane in enumerate(protection, 1)}
        busy = [lane for lane, owner in enumerate(self._owner) if owner is not None]
        idle: list[IdleLane] = []
        for lane in self._idle:
            if lane in self._unknown:
                continue
            gap = 0
            if self._lane_locality and busy:
                gap = min(abs(lane - other) for other in busy) - 1
            kept = self.retention.kept.get(lane)
            if kept is None:
                idle.append(IdleLane(lane, gap=gap))
                continue
            same = common_prefix(kept.tokens, tokens) if kept.scope == scope else 0
            idle.append(
                IdleLane(
                    lane,
                    len(kept.tokens),
                    same,
                    found.get(lane, 0),
                    rank[lane] / len(rank),
                    protection[lane],
                    gap,
                )
            )
        sources: list[Source] = []
        if self.copies:
            sources = [
                Source(lane, self._held(lane), usable)
                for lane, usable in (found | self._look_up_pins(sequence)).items()
                if lane not in self._unknown
            ]
        best = choose(idle, sources, self.costs, shares_kv=self._shares_kv)
        nothing_runs = len(self._idle) == self.num_lanes
        if (stored := self._tier.match(tokens, scope, may_wait=nothing_runs)) is not None:
            own = self.blocks.boundary(sequence.num_prompt)
            usable = self.blocks.usable(stored.num_shared, stored.num_block_tokens, own)
            # Memory that can only be reset has no use for a part of a snapshot.
            if usable == stored.num_tokens or not self._resets:
                best = restoring(best, idle, stored, usable, self.costs)
        return best

    def _carry_out(self, choice: Choice, sequence: Sequence) -> int | None:
        """Bring KV into the chosen lane.

        Returns:
            Tokens that it holds now; ``None`` if the runtime failed and the lane cannot be used.
        """
        lane, wanted = choice.lane, choice.num_tokens
        self._history.pop(lane, None)
        if choice.stored is not None and choice.way is Way.RESTORE:
            kept = self._restore(choice.stored, lane, wanted)
        elif choice.way in (Way.NONE, Way.TAKEOVER):
            kept = self._take_over(lane, wanted, sequence)
        elif not self._evict(lane, "takeover"):
            return None
        else:
            kept = self._copy(choice.source, lane, wanted)
        # Less than was asked for may be a length that this sequence cannot go on from.
        while kept and kept != (legal := self.blocks.kept(kept, sequence)):
            kept = self._truncate(lane, legal)
        return kept

    def _take_over(self, lane: int, wanted: int, sequence: Sequence) -> int | None:
        kept = self.retention.kept.get(lane)
        if kept is not None:
            shared = common_prefix(kept.tokens, sequence.tokens[: sequence.num_tokens])
            shared = shared if wanted else 0
            if len(kept.tokens) - shared >= _MIN_COUNTED:
                self._give_up(lane, kept, "takeover", shared)
            if wanted:
                self._history[lane] = (kept.created_s, kept.num_hits + 1)
            self._forget(lane)
        return self._truncate(lane, wanted)

    def _copy(self, source: int, lane: int, num_tokens: int) -> int | None:
        """Copy a prefix into an empty lane."""
        kept = self.retention.kept.get(source)
        if not self._shares_kv and not self._make_room_for(num_tokens, spared=source):
            return 0
        started_s = self._clock()
        try:
            self._runtime.copy_prefix(source, lane, num_tokens)
        except Exception:
            # A copy only saves time: the lane is made empty, and what it held is computed again.
            self.num_errors += 1
            logger.exception("the runtime failed to copy %d tokens of lane %d", num_tokens, source)
            return self._truncate(lane, 0)
        self.costs.copy.observe(self._held(source), self._clock() - started_s)
        if kept is not None:
            kept.num_hits += 1
            kept.last_used_s = self._clock()
        return num_tokens

    def _restore(self, stored: StoredPrefix, lane: int, wanted: int) -> int | None:
        """Bring a snapshot into a lane, and cut it."""
        snapshot = self._tier.fetch(stored)
        if not self._evict(lane, "takeover"):
            return None
        if snapshot is None or not self._make_room_for(stored.num_tokens):
            return 0
        held = self._tier.restore(lane, stored, snapshot)
        # Whatever a restore that failed has left is freed.
        return self._truncate(lane, wanted if held >= wanted else 0)

    # ------------------------------------------------------------------ release

    def release(self, sequence: Sequence) -> None:
        """Take the lane from a sequence; its computed KV stays for reuse."""
        lane = sequence.lane
        if lane == NO_LANE:
            return
        wanted = sequence.num_computed if self._prefix_reuse else 0
        self._owner[lane] = None
        self._idle[lane] = None
        created_s, num_hits = self._history.pop(lane, (self._clock(), 0))
        sequence.lane = NO_LANE
        sequence.num_computed = 0
        # While a failed step is looked into, a lane may hold more than is known of it.
        num_held = self._truncate(lane, wanted)
        if not num_held or num_held < self._tree.depth(lane):
            self._tree.remove(lane)
        if not num_held:
            return
        kept = Kept(
            tokens=sequence.tokens[:num_held].copy(),
            scope=self.retention.scope_of(sequence.request),
            tenant=sequence.request.tenant,
            num_block=min(self.blocks.boundary(sequence.num_prompt), num_held),
            created_s=created_s,
            last_used_s=self._clock(),
            num_hits=num_hits,
        )
        self.retention.kept[lane] = kept
        self._tree.extend(lane, kept.scope, kept.tokens)
        self._enforce_limits()

    def rewind(self, sequence: Sequence) -> None:
        """Bring a lane in an unknown state back to what the sequence knows to be computed.

        Raises:
            EngineError: The runtime cannot.
        """
        lane = sequence.lane
        kept = self._truncate(lane, sequence.num_computed)
        while kept and kept != (legal := self.blocks.kept(kept, sequence)):
            kept = self._truncate(lane, legal)
        if kept is None:
            self._unknown.discard(lane)  # it is not idle yet
            raise EngineError("the model's runtime failed to bring a lane back after a failed step")
        sequence.num_computed = kept
        if kept < self._tree.depth(lane):
            scope = self.retention.scope_of(sequence.request)
            self._tree.insert(lane, scope, sequence.tokens[:kept])
