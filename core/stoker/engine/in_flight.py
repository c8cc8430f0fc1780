"""Prefixes that somebody is computing right now: who begins the same way waits for them, and copies them.

When many requests with one long prefix arrive together, nothing of it is in any lane yet; without this each
would compute all of it. Here the first one starts, and the others stay in the queue until it has computed
what they share. Nobody waits for what does not move, or for longer than doing it alone would take; an idle
engine never waits, since there is always one that computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.engine.prefix_tree import PrefixTree
from stoker.engine.sequence import SequenceStatus

if TYPE_CHECKING:
    from stoker.engine.scheduler import Scheduler
    from stoker.engine.sequence import Sequence

__all__ = ["InFlightPrefixes"]

_MIN_GAIN = 32  # tokens that must be saved
_MIN_RATIO = 1.5  # and so many times as many as could be reused at once
_MAX_STILL = 4  # looks in a row that may find no progress
_MAX_WAITS = 4  # others that one may wait for, one after another
_PATIENCE = 1.5  # times as long as it would take to do it alone


@dataclass(slots=True)
class _Wait:
    """Somebody who waits.

    Attributes:
        leader: For whom.
        num_tokens: How many tokens the leader must have computed.
        since_s: Since when.
        limit_s: When it gives up.
        seen: What the leader had computed at the last look.
        num_still: Looks since then without progress.
        num_waits: Leaders so far.
    """

    leader: Sequence
    num_tokens: int
    since_s: float
    limit_s: float
    seen: int
    num_still: int = 0
    num_waits: int = 1


class InFlightPrefixes:
    """Who waits for whose prefix, of one scheduler.

    Args:
        scheduler: Whose queue this is.
        is_on: Whether anybody waits at all.
    """

    def __init__(self, scheduler: Scheduler, *, is_on: bool) -> None:
        self._scheduler = scheduler
        self._is_on = is_on and scheduler.lanes.copies
        self._tree = PrefixTree()
        self._leaders: dict[int, Sequence] = {}
        self._waits: dict[int, _Wait] = {}

    def started(self, sequence: Sequence) -> None:
        """A sequence got a lane: what it is about to compute can be waited for."""
        if not self._is_on:
            return
        wait = self._waits.pop(sequence.sequence_id, None)
        if wait is not None:
            self._end_wait(sequence, wait)
        if sequence.num_pending >= _MIN_GAIN:
            self._leaders[sequence.sequence_id] = sequence
            scope = self._scheduler.lanes.retention.scope_of(sequence.request)
            self._tree.insert(sequence.sequence_id, scope, sequence.tokens[: sequence.num_tokens])

    def look_around(self) -> None:
        """Forget who does not prefill any more, and who does not wait; before admission."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        for key, leader in list(self._leaders.items()):
            if key not in running or leader.status is not SequenceStatus.PREFILL:
                del self._leaders[key]
                self._tree.remove(key)
        for key in [key for key in self._waits if key not in waiting]:
            del self._waits[key]

    def must_wait(self, candidate: Sequence) -> bool:
        """Whether a waiting sequence had better wait for what another one computes."""
        if not self._leaders:
            return False
        wait = self._waits.get(candidate.sequence_id)
        if wait is not None:
            if wait.leader.sequence_id in self._leaders:
                return self._goes_on(wait)
            if wait.num_waits >= _MAX_WAITS:
                return False
        found = self._find(candidate, 1 if wait is None else wait.num_waits + 1)
        if found is None:
            return False
        if wait is not None:
            found.since_s = wait.since_s
        self._waits[candidate.sequence_id] = found
        return True

    def _goes_on(self, wait: _Wait) -> bool:
        """Whether somebody still waits for the same leader."""
        computed = wait.leader.num_computed
        wait.num_still = 0 if computed > wait.seen else wait.num_still + 1
        wait.seen = computed
        return (
            computed < wait.num_tokens
            and wait.num_still <= _MAX_STILL
            and self._scheduler.clock() < wait.limit_s
        )

    def _find(self, candidate: Sequence, num_waits: int) -> _Wait | None:
        """The leader who will have the most to share, if that is worth waiting for."""
        lanes = self._scheduler.lanes
        blocks = lanes.blocks
        scope = lanes.retention.scope_of(candidate.request)
        shared = self._tree.match(scope, candidate.tokens[: blocks.reusable(candidate)])
        own = blocks.boundary(candidate.num_prompt)
        best, leader = 0, None
        for key, num_shared in shared.items():
            other = self._leaders[key]
            usable = blocks.usable(num_shared, blocks.boundary(other.num_prompt), own)
            if usable > best and usable > other.num_computed:
                best, leader = usable, other
        if leader is None or best < _MIN_GAIN:
            return None
        now = lanes.reusable(candidate)
        if best - now < _MIN_GAIN or best < _MIN_RATIO * now:
            return None
        if best - now <= lanes.costs.copy_tokens(leader.num_tokens):
            return None
        now_s = self._scheduler.clock()
        return _Wait(
            leader=leader,
            num_tokens=best,
            since_s=now_s,
            limit_s=now_s + _PATIENCE * self._alone_s(best - now),
            seen=leader.num_computed,
            num_waits=num_waits,
        )

    def _alone_s(self, num_tokens: int) -> float:
        """How long a sequence would take to compute so many tokens itself, beside those that prefill now."""
        scheduler = self._scheduler
        cost = scheduler.costs.cost
        if cost.prefill_s <= 0:
            return float("inf")  # nothing is known: as long as there is progress
        num_decodes = len(scheduler.running) - len(self._leaders)
        budget = scheduler.prefill_budget(num_decodes, is_mixed=num_decodes > 0)
        budget = max(1, budget)
        seconds = cost.step_s(budget, num_decodes) * max(1.0, num_tokens / budget)
        return seconds * (1 + len(self._leaders))

    def _end_wait(self, sequence: Sequence, wait: _Wait) -> None:
        waited_s = self._scheduler.clock() - wait.since_s
        sequence.facts.shared_wait_s += waited_s
        lanes = self._scheduler.lanes
        lanes.num_shared_waits += 1
        lanes.shared_wait_s += waited_s
