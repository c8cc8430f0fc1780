"""Who leaves the queue: the policy's order, within reservations, lanes and KV memory.

::

    for each candidate, those below their reservation first, else in the policy's order:
        is there a lane for it, or one that a borrower or a victim gives up?   else stop
        does its KV fit?   else it is blocked, and others may pass it as long as the policy lets them
        is another one computing what it begins with? then it waits for that; the next one is asked
        does the policy want it to start now?   else the next one is asked
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from stoker.engine.sequence import Sequence

if TYPE_CHECKING:
    from stoker.config import SchedulerConfig
    from stoker.engine.scheduler import Scheduler
    from stoker.interfaces import PolicyContext
    from stoker.types import SequenceView

__all__ = ["Admission"]

_MAX_BLOCKED = 32  # candidates that did not fit; after so many the rest waits for the next step


class _Answer(enum.Enum):
    STARTED = enum.auto()
    BLOCKED = enum.auto()  # its KV does not fit now
    HELD_BACK = enum.auto()  # a reservation, the policy or a prefix in flight keeps it waiting
    NO_LANE = enum.auto()


class Admission:
    """Admits waiting sequences of a scheduler.

    Args:
        scheduler: Whose queue this is.
        config: Whether reservations are lent.
    """

    def __init__(self, scheduler: Scheduler, config: SchedulerConfig) -> None:
        self._scheduler = scheduler
        self._lends = config.lend_reserved
        self._policy_name = config.policy
        self._views: tuple[SequenceView, ...] = ()
        self._context: PolicyContext | None = None

    def admit(self) -> None:
        """Start every sequence that can start now."""
        scheduler = self._scheduler
        policy = scheduler.policy
        has_reservations = bool(scheduler.reservations.holders())
        if not (scheduler.lanes.num_free or policy.may_preempt or has_reservations):
            return
        self._views = scheduler.waiting_views()
        self._context = None
        order = policy.admission_order(self._views, self._now())
        if has_reservations:
            self._admit_reserved(order)
        self._admit_in_order(order)
        self._views = ()
        self._context = None

    def _admit_in_order(self, order: Items[SequenceView]) -> None:
        scheduler = self._scheduler
        blocked: list[Sequence] = []
        for view in order:
            sequence = scheduler.waiting.get(view.sequence_id)
            if sequence is None:
                continue  # started within its reservation
            if not all(scheduler.policy.may_pass(b.view, self._now()) for b in blocked):
                break
            answer = self._try(sequence)
            if answer is _Answer.STARTED:
                for passed in blocked:
                    passed.num_passed += 1
                    passed.view = passed.snapshot()
            elif answer is _Answer.BLOCKED and len(blocked) < _MAX_BLOCKED:
                blocked.append(sequence)
            elif answer is not _Answer.HELD_BACK:
                break

    def _now(self) -> PolicyContext:
        """The policy's context; made again after something was started or preempted."""
        if self._context is None:
            self._context = self._scheduler.context(self._views)
        return self._context

    # ------------------------------------------------------------------ reservations

    def _admit_reserved(self, order: Items[SequenceView]) -> None:
        """Start those whose tenant is below its reservation, taking back what others borrowed."""
        scheduler = self._scheduler
        for view in order:
            sequence = scheduler.waiting[view.sequence_id]
            running = list(scheduler.running.values())
            if not scheduler.reservations.is_entitled(running, sequence):
                continue
            if not self._is_within_reach(running, sequence):
                continue
            if scheduler.in_flight.must_wait(sequence):
                continue
            while not (scheduler.lanes.num_free and self._fits(sequence)):
                if not self._reclaim_for(sequence):
                    break
            else:
                self._start(sequence, "its tenant's reservation")

    def _reclaim_for(self, candidate: Sequence) -> bool:
        """Preempt a borrower: a sequence outside its own tenant's reservation."""
        scheduler = self._scheduler
        running = list(scheduler.running.values())
        own = candidate.request.tenant
        borrowers = self._borrowers(running, own)
        if not borrowers:
            return False
        views = [s.snapshot() for s in borrowers]
        victim = scheduler.policy.preemption_order(views, self._now())[0]
        self._preempt(scheduler.running[victim.sequence_id], "reservation")
        return True

    def _borrowers(self, running: list[Sequence], own: str) -> list[Sequence]:
        """Running sequences of other tenants that stand outside their tenant's reservation."""
        is_protected = self._scheduler.reservations.is_protected
        return [s for s in running if s.request.tenant != own and not is_protected(running, s)]

    def _is_within_reach(self, running: list[Sequence], candidate: Sequence) -> bool:
        """Whether the candidate could start if all borrowers yielded: for nothing they need not."""
        borrowers = set(self._borrowers(running, candidate.request.tenant))
        staying = [s for s in running if s not in borrowers]
        if not staying:
            return True
        lanes = self._scheduler.lanes
        tokens = sum(s.num_tokens for s in staying) + candidate.num_tokens
        return len(staying) < lanes.num_lanes and tokens < lanes.capacity_tokens

    def _spare(self, candidate: Sequence) -> tuple[int, int]:
        """Lanes and KV tokens that are kept free for others."""
        if self._lends:
            return 0, 0
        scheduler = self._scheduler
        return scheduler.reservations.unclaimed(
            scheduler.running.values(), candidate.request.tenant
        )

    # ------------------------------------------------------------------ one candidate

    def _try(self, sequence: Sequence) -> _Answer:
        scheduler = self._scheduler
        spare_lanes, spare_tokens = self._spare(sequence)
        if scheduler.in_flight.must_wait(sequence):
            return _Answer.HELD_BACK
        no_lane = _Answer.NO_LANE
        if spare_lanes and scheduler.lanes.num_free:
            no_lane = _Answer.HELD_BACK  # there are lanes, if not for this one
        missing_lanes = spare_lanes + 1 - scheduler.lanes.num_free
        needs_lane = missing_lanes > 0
        if needs_lane and not scheduler.policy.may_preempt:
            return no_lane
        if scheduler.running and not scheduler.policy.admits(sequence.view, self._now()):
            return _Answer.HELD_BACK
        if needs_lane or not self._fits(sequence, spare_tokens):
            yielding = self._make_way(sequence, missing_lanes, spare_tokens)
            if yielding is None:
                # If victims would free a lane, then KV is what is missing.
                return (
                    no_lane if needs_lane and not self._victims_for(sequence) else _Answer.BLOCKED
                )
            for victim in yielding:
                self._preempt(victim, "policy")
        view = sequence.view
        reason = scheduler.policy.explain(view, self._now()) if view.admitted_s is None else ""
        self._start(sequence, f"{self._policy_name}: {reason}" if reason else self._policy_name)
        return _Answer.STARTED

    def _start(self, sequence: Sequence, rule: str) -> None:
        self._scheduler.start(sequence, rule)
        self._context = None

    def _preempt(self, sequence: Sequence, reason: str) -> None:
        self._scheduler.preempt(sequence, reason)
        self._context = None

    def _fits(
        self, candidate: Sequence, spare_tokens: int = 0, without: Items[Sequence] = ()
    ) -> bool:
        """Whether KV has room for all tokens that the running sequences and the candidate have so far.

        Without this, sequences that do not fit together would take each other's lane for ever before
        any of them got a token; with it, every preemption is paid for by at least one new token.
        """
        scheduler = self._scheduler
        if len(scheduler.running) == len(without):
            return True
        reserved = sum(sequence.num_tokens for sequence in scheduler.running.values())
        reserved -= sum(sequence.num_tokens for sequence in without)
        capacity = scheduler.lanes.capacity_tokens - spare_tokens
        return reserved + candidate.num_tokens < capacity

    def _make_way(
        self, candidate: Sequence, missing_lanes: int, spare_tokens: int
    ) -> list[Sequence] | None:
        """As many of the policy's victims as the candidate needs to start; ``None`` if all are too few.

        Nobody is preempted for one that could not start even then.
        """
        yielding: list[Sequence] = []
        for victim in self._victims_for(candidate):
            yielding.append(victim)
            if len(yielding) >= missing_lanes and self._fits(candidate, spare_tokens, yielding):
                return yielding
        return None

    def _victims_for(self, candidate: Sequence) -> list[Sequence]:
        """The running sequences that the policy lets yield to the candidate, best victim first.

        Who lost a lane before may lose the next one only after it got a token: otherwise two sequences
        could take one lane from each other for ever.
        """
        scheduler = self._scheduler
        if not scheduler.policy.may_preempt:
            return []
        running = list(scheduler.running.values())
        reserved = bool(scheduler.reservations.holders())
        victims: list[Sequence] = []
        for view in scheduler.policy.victims(
            candidate.snapshot(), [s.snapshot() for s in running], self._now()
        ):
            victim = scheduler.running[view.sequence_id]
            if victim in victims:
                continue
            if victim.num_preemptions and victim.num_output <= victim.output_at_admission:
                continue
            if reserved and scheduler.reservations.is_protected(running, victim):
                continue
            victims.append(victim)
        return victims
