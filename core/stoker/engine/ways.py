"""How a newcomer comes by KV: take over an idle lane, copy from another one, or restore a snapshot.

Everything is counted in tokens of prefill: what need not be computed, less what the transfer costs by
measurement, less a part of what is lost to whoever might have come back for it, less what a distant lane
costs the batch for as long as the newcomer generates.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.engine.sequence import NO_LANE

if TYPE_CHECKING:
    from stoker.engine.transfers import TransferCosts
    from stoker.interfaces import StoredPrefix

__all__ = ["Choice", "IdleLane", "Source", "Way", "choose", "restoring"]

# What a kept token that is given up is worth against a token saved now; more, if it is protected.
_LOSS = 0.1
_FLOOR_LOSS = 100.0
_PIN_LOSS = 1e9
# What each lane between a newcomer and the busy lanes costs, and the most that distance may cost: a scattered
# batch is computed in pieces.
_GAP_TOKENS = 16
_MAX_GAP_TOKENS = 64


class Way(enum.StrEnum):
    """How a newcomer came by the KV that it did not compute."""

    NONE = "none"
    TAKEOVER = "takeover"
    SHARE = "share"
    COPY = "copy"
    RESTORE = "restore"


@dataclass(slots=True, frozen=True)
class IdleLane:
    """A lane that a newcomer could have.

    Attributes:
        lane: Which.
        held: Tokens that it keeps.
        shared: Of those, tokens that begin the newcomer's prompt.
        usable: Of those, tokens that the newcomer can go on from.
        recency: Its place in the order of eviction, above 0 (goes first) to 1.
        protection: See ``Retention.order``.
        gap: Lanes between it and the next busy one.
    """

    lane: int
    held: int = 0
    shared: int = 0
    usable: int = 0
    recency: float = 0.0
    protection: int = 0
    gap: int = 0

    def loss(self, kept: int) -> float:
        """What it costs if only the first ``kept`` tokens stay."""
        lost = self.held - kept
        if self.protection > kept:
            return _PIN_LOSS
        weight = _FLOOR_LOSS if self.protection < 0 else _LOSS * self.recency
        return lost * weight

    @property
    def distance(self) -> float:
        """What its place costs."""
        return min(self.gap * _GAP_TOKENS, _MAX_GAP_TOKENS)


@dataclass(slots=True, frozen=True)
class Source:
    """A lane that a prefix could be copied from.

    Attributes:
        lane: Which.
        held: Tokens that it holds.
        usable: Of those, tokens that the newcomer can go on from.
    """

    lane: int
    held: int
    usable: int


@dataclass(slots=True, frozen=True)
class Choice:
    """What to do for a newcomer.

    Attributes:
        worth: In tokens of prefill.
        lane: The idle lane that it gets.
        way: How KV comes into it.
        num_tokens: How much of it.
        source: Where from, for a copy.
        stored: Which snapshot, for a restore.
    """

    worth: float
    lane: int
    way: Way = Way.NONE
    num_tokens: int = 0
    source: int = NO_LANE
    stored: StoredPrefix | None = None


def choose(
    idle: Items[IdleLane], sources: Items[Source], costs: TransferCosts, *, shares_kv: bool = False
) -> Choice:
    """The best way, without the second tier.

    Args:
        idle: The lanes to have; at least one.
        sources: Where copies can come from.
        costs: What transfers cost.
        shares_kv: Whether a copy is a share.
    """
    best = Choice(float("-inf"), NO_LANE)
    for lane in idle:
        worth = lane.usable - lane.loss(lane.shared) - lane.distance
        if (worth, -lane.lane) > (best.worth, -best.lane):
            way = Way.TAKEOVER if lane.usable else Way.NONE
            best = Choice(worth, lane.lane, way, lane.usable)
    way = Way.SHARE if shares_kv else Way.COPY
    for source in sources:
        target = _emptied(idle, source.lane)
        if target is None:
            continue
        cost = costs.copy_tokens(source.held) + target.loss(0) + target.distance
        worth = source.usable - cost
        if worth > best.worth and source.usable > best.num_tokens:
            best = Choice(worth, target.lane, way, source.usable, source.lane)
        elif worth > best.worth and best.way is Way.TAKEOVER and source.lane == best.lane:
            # As much as by taking over, but both stay.
            best = Choice(worth, target.lane, way, source.usable, source.lane)
    return best


def restoring(
    best: Choice, idle: Items[IdleLane], stored: StoredPrefix, usable: int, costs: TransferCosts
) -> Choice:
    """A restore, if that is worth more than ``best``.

    Args:
        best: The best way without it.
        idle: The lanes to have.
        stored: The snapshot.
        usable: Tokens of it that the newcomer can go on from.
        costs: What transfers cost.
    """
    target = _emptied(idle, NO_LANE)
    if target is None:
        return best
    cost = costs.restore_tokens(stored.num_tokens) + target.loss(0) + target.distance
    if usable - cost <= best.worth:
        return best
    return Choice(usable - cost, target.lane, Way.RESTORE, usable, stored=stored)


def _emptied(idle: Items[IdleLane], source: int) -> IdleLane | None:
    """The idle lane that is the cheapest to empty, but for the source."""
    others = [lane for lane in idle if lane.lane != source]
    return min(others, key=lambda lane: (lane.loss(0) + lane.distance, lane.lane), default=None)
