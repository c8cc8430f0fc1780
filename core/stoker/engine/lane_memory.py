"""What each lane of a runtime holds, and how that is freed: for room, by limits, by age.

Running requests win over everything that is only kept. Among what is kept, pinned prefixes go last, and what
is within a tenant's floor just before them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.exactness import ExactBlocks
from stoker.engine.prefix_tree import PrefixTree
from stoker.engine.retention import Kept, Retention
from stoker.engine.second_tier import SecondTier
from stoker.engine.sequence import NO_LANE
from stoker.engine.transfers import TransferCosts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.config import CacheConfig
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import EvictionStrategy, Runtime, SnapshotStore
    from stoker.tenants import Tenants

__all__ = ["LaneMemory"]

logger = logging.getLogger("stoker.engine")


class LaneMemory:
    """The KV of one runtime's lanes.

    Args:
        runtime: The runtime whose KV this accounts for.
        config: KV reuse.
        tenants: For the floors of their prefixes.
        eviction: Which prefix goes first; the least recently used if ``None``.
        store: Where evicted prefixes go; nowhere if ``None``.
        clock: Monotonic seconds.

    Attributes:
        blocks: Where prompts may be cut.
        costs: What moving KV costs.
        retention: What idle lanes keep.
        num_lanes: Lanes of the runtime.
        capacity_tokens: KV tokens that it can hold.
        num_errors: How often the runtime failed to free or move KV.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: CacheConfig,
        tenants: Tenants,
        eviction: EvictionStrategy | None,
        store: SnapshotStore | None,
        clock: Callable[[], float],
    ) -> None:
        info = runtime.info
        can = info.capabilities
        self._runtime = runtime
        self._clock = clock
        self._prefix_reuse = config.prefix_reuse
        self._insert_every = config.insert_every
        self.num_lanes = info.num_lanes
        self.capacity_tokens = info.kv_capacity_tokens
        self.blocks = _blocks(runtime, config)
        self.costs = TransferCosts(shares_kv=can.shares_kv)
        self.retention = Retention(config, info, tenants, eviction, clock)
        keeps_snapshots = config.prefix_reuse and can.snapshot
        self._tier = SecondTier(runtime, store if keeps_snapshots else None, self.costs, clock)
        self._tree = PrefixTree()
        self._owner: list[Sequence | None] = [None] * self.num_lanes
        # Idle lanes, in the order in which they fell idle: dicts keep insertion order.
        self._idle: dict[int, None] = dict.fromkeys(range(self.num_lanes))
        # Idle lanes that the runtime failed to free: nobody knows what they hold until that succeeds.
        self._unknown: set[int] = set()
        self.num_errors = 0

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
        return self.retention.num_tokens

    def pin(self, tokens: Iterable[int]) -> None:
        """Keep the KV of a prefix of the public scope once it was computed; from any thread."""
        self.retention.pins.append(np.fromiter(tokens, np.int32))

    # ------------------------------------------------------------------ what lanes hold

    def _follow_busy(self) -> None:
        """Let the tree know what busy lanes have computed: prompts at once, texts now and then."""
        for lane, owner in enumerate(self._owner):
            if owner is None:
                continue
            known, computed = self._tree.depth(lane), owner.num_computed
            new_prompt = known < min(computed, owner.num_prompt)
            if new_prompt or computed - known >= self._insert_every:
                scope = self.retention.scope_of(owner.request)
                self._tree.extend(lane, scope, owner.tokens[:computed])

    def _boundary(self, lane: int) -> int:
        """How many of a lane's first tokens were computed as whole blocks."""
        owner = self._owner[lane]
        if owner is not None:
            return self.blocks.boundary(owner.num_prompt)
        kept = self.retention.kept.get(lane)
        return 0 if kept is None else kept.num_block

    def _busy(self) -> list[tuple[str, NDArray[np.int32]]]:
        """What busy lanes hold; only wanted where something is pinned."""
        if not self.retention.pins:
            return []
        scope_of = self.retention.scope_of
        return [(scope_of(o.request), o.tokens[: o.num_computed]) for o in self._owner if o]

    def _held(self, lane: int) -> int:
        owner = self._owner[lane]
        return len(self.retention.kept[lane].tokens) if owner is None else owner.num_computed

    # ------------------------------------------------------------------ eviction

    def make_room(self, num_tokens: int) -> bool:
        """Evict what idle lanes keep until ``num_tokens`` more fit.

        Running requests win over pins and floors: those only go last.

        Returns:
            Whether they fit now.
        """
        return self._make_room_for(num_tokens)

    def _make_room_for(self, num_tokens: int, spared: int = NO_LANE) -> bool:
        room = self.capacity_tokens - num_tokens - self.used_tokens
        if self.retained_tokens <= room:
            return True
        protection = self.retention.order(self._busy())
        for shrinks in (True, False):
            for lane, pin in protection.items():
                kept = self.retention.kept.get(lane)
                if kept is None or lane == spared:
                    continue
                self._evict(lane, "capacity", pin if shrinks and pin > 0 else 0)
                if self.retained_tokens <= room:
                    return True
        return False

    def _enforce_limits(self) -> None:
        """Evict what is above ``max_tokens`` and ``max_bytes``, but for pins and floors."""
        while reason := self.retention.excess():
            order = self.retention.order(self._busy())
            lane = next((lane for lane, protection in order.items() if not protection), None)
            if lane is None:
                return
            self._evict(lane, reason)

    def expire(self) -> None:
        """Drop what nobody has used for longer than the time to live."""
        for lane in self.retention.expired():
            self._evict(lane, "ttl")
        self._tier.expire()

    def evict_all(self) -> bool:
        """Evict what idle lanes keep, pins only if there is nothing else; whether that freed anything."""
        protection = self.retention.order(self._busy())
        plain = [lane for lane, pin in protection.items() if pin <= 0]
        lanes = [*(plain or protection), *self._unknown]
        return sum([self._evict(lane, "no_room") for lane in lanes]) > 0

    def clear(self) -> int:
        """Drop what idle lanes and the store keep, but for pinned prefixes; how many prefixes that were."""
        protection = self.retention.order(self._busy())
        before = self.retention.kept.keys() | set()
        for lane, pin in protection.items():
            self._evict(lane, "cleared", max(pin, 0))
        return len(before - self.retention.kept.keys()) + self._tier.clear()

    def recover(self) -> None:
        """Try again to free the lanes that the runtime failed to free."""
        for lane in list(self._unknown):
            self._evict(lane, "failure")

    def _evict(self, lane: int, reason: str, num_kept: int = 0) -> bool:
        """Empty an idle lane, or keep its first tokens only; returns whether the runtime did it."""
        kept = self.retention.kept.get(lane)
        if kept is None:
            return self._truncate(lane, 0) is not None
        if num_kept >= len(kept.tokens):
            return True
        self._give_up(lane, kept, reason, num_kept)
        self._forget(lane)
        left = self._truncate(lane, num_kept)
        if left:
            kept.tokens = kept.tokens[:left].copy()
            kept.num_block = min(kept.num_block, left)
            self.retention.kept[lane] = kept
            self._tree.insert(lane, kept.scope, kept.tokens)
        return left is not None

    def _give_up(self, lane: int, kept: Kept, reason: str, num_kept: int) -> None:
        """Note an eviction, and save what is lost if that is worth while; before the lane is cut."""
        stored = False
        if reason not in ("ttl", "cleared"):
            holders = self._tree.match(kept.scope, kept.tokens)
            elsewhere = max((n for at, n in holders.items() if at != lane), default=0)
            stored = elsewhere < len(kept.tokens) and self._tier.save(lane, kept, elsewhere)
        pin = self.retention.order(self._busy()).get(lane, 0) if self.retention.pins else 0
        self.retention.count(
            kept, reason, len(kept.tokens) - num_kept, stored=stored, pin=pin > num_kept
        )

    def _forget(self, lane: int) -> None:
        self.retention.kept.pop(lane, None)
        self._tree.remove(lane)

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
            self._forget(lane)
            if self.num_errors == 1 or self.num_errors % 1000 == 0:
                logger.exception(
                    "the runtime failed to free lane %d (%d failures so far)", lane, self.num_errors
                )
            return None
        self._unknown.discard(lane)
        return kept


def _blocks(runtime: Runtime, config: CacheConfig) -> ExactBlocks:
    """The rule that prompts are cut by."""
    info = runtime.info
    block = (info.capabilities.exact_block or 1) if config.exact else 1
    whole_tail = info.capabilities.exact_tail == "whole"
    if block + whole_tail > max(1 + whole_tail, info.max_step_tokens - info.num_lanes):
        logger.warning(
            "exact prefix reuse of %s needs steps of at least %d tokens, and they have %d: the text of "
            "a prompt may depend on whether its prefix was cached; raise scheduler.max_num_batched_tokens",
            info.name,
            block + whole_tail + info.num_lanes,
            info.max_step_tokens,
        )
        block = 1
    return ExactBlocks(block, info.capabilities.exact_from, whole_tail=whole_tail)
