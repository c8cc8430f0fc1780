"""Calls a policy and checks what it returns: a bad policy costs a counter, never the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Views
from typing import TYPE_CHECKING

from stoker.interfaces import PolicyContext, SchedulingPolicy

if TYPE_CHECKING:
    from stoker.engine.sequence import Sequence
    from stoker.types import SequenceView, StepRecord

__all__ = ["PolicyGuard"]

logger = logging.getLogger("stoker.scheduler")


class PolicyGuard:
    """A policy whose answers are valid.

    Args:
        policy: The plugin's object.

    Attributes:
        may_preempt: Whether the policy ever names victims for a newcomer.
        wants_records: Whether the policy accounts for steps.
        num_errors: How often the policy raised or returned nonsense.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        kind = type(policy)
        self.may_preempt = kind.victims is not SchedulingPolicy.victims
        self._shares_prefill = kind.prefill_shares is not SchedulingPolicy.prefill_shares
        self.wants_records = kind.on_step is not SchedulingPolicy.on_step
        self.num_errors = 0

    def admission_order(
        self, waiting: list[SequenceView], context: PolicyContext
    ) -> Views[SequenceView]:
        """A permutation of ``waiting``; arrival order if the policy fails."""
        try:
            order = list(self._policy.admission_order(tuple(waiting), context))
            self._check_permutation(order, waiting)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; the loop must go on
            self._failed("admission_order", error)
            return sorted(waiting, key=_by_arrival)
        return order

    def preemption_order(
        self, running: list[SequenceView], context: PolicyContext
    ) -> Views[SequenceView]:
        """A permutation of ``running``; latest arrival first if the policy fails."""
        try:
            order = list(self._policy.preemption_order(tuple(running), context))
            self._check_permutation(order, running)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("preemption_order", error)
            return sorted(running, key=_by_arrival, reverse=True)
        return order

    def victims(
        self, candidate: SequenceView, running: list[SequenceView], context: PolicyContext
    ) -> Views[SequenceView]:
        """Some of ``running``; nobody if the policy fails."""
        try:
            chosen = list(self._policy.victims(candidate, tuple(running), context))
            known = {view.sequence_id for view in running}
            if any(view.sequence_id not in known for view in chosen):
                raise ValueError("returned a sequence that is not running")
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("victims", error)
            return ()
        return chosen

    def prefill_shares(
        self, prefilling: list[Sequence], budget: int, context: Callable[[], PolicyContext]
    ) -> Mapping[int, int] | None:
        """Tokens for every prefilling sequence, within the budget; ``None`` for even shares."""
        if not self._shares_prefill:
            return None
        try:
            views = tuple(sequence.snapshot() for sequence in prefilling)
            shares = self._policy.prefill_shares(views, budget, context())
            if shares is None:
                return None
            checked = {
                s.sequence_id: min(int(shares.get(s.sequence_id, 0)), s.num_pending)
                for s in prefilling
            }
            total = sum(checked.values())
            if not 0 < total <= budget or min(checked.values()) < 0:
                raise ValueError(f"shares add up to {total} of a budget of {budget} tokens")
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("prefill_shares", error)
            return None
        return checked

    def on_step(self, record: StepRecord) -> None:
        """Let the policy account for a step."""
        if not self.wants_records:
            return
        try:
            self._policy.on_step(record)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("on_step", error)

    @staticmethod
    def _check_permutation(order: list[SequenceView], given: list[SequenceView]) -> None:
        if len(order) != len(given) or {v.sequence_id for v in order} != {
            v.sequence_id for v in given
        }:
            raise ValueError("did not return a permutation of the sequences it was given")

    def _failed(self, method: str, error: Exception) -> None:
        self.num_errors += 1
        if self.num_errors == 1 or self.num_errors % 1000 == 0:
            name = type(self._policy).__name__
            logger.error(
                "policy %s.%s failed (%d times so far), falling back to arrival order: %r",
                name,
                method,
                self.num_errors,
                error,
            )


def _by_arrival(view: SequenceView) -> tuple[float, int]:
    return view.arrival_s, view.sequence_id
