"""Priority scheduling for stoker: lower runs first, waiting makes you more urgent, the urgent may preempt.

The reference third-party policy: one struct of options, one class, one hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

import stoker

__all__ = ["Options", "Priority"]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[plugins.priority]``.

    Attributes:
        ageing_s: Seconds of waiting that make up for one level of priority, so that nothing starves.
        preempt: Whether a request may take the lane of a less urgent one.
        preempt_margin: Levels by which it must be more urgent: a lane that is lost costs a prefill.
    """

    ageing_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    preempt: bool = True
    preempt_margin: Annotated[int, msgspec.Meta(ge=1)] = 1


class Priority(stoker.SchedulingPolicy):
    """Lowest (priority - time since arrival / ageing_s) first.

    A running sequence ages too, from its arrival, so two requests never change their order. Hence nothing
    starves: only what arrives within (P - Q) * ageing_s seconds of a request of priority P gets ahead of
    it, if Q is the most urgent priority there is. And nobody preempts in a circle: a lane only ever goes
    to a request that stands higher in that order by the margin.

    Args:
        options: See ``Options``.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def _rank(self, view: stoker.SequenceView, now_s: float) -> tuple[float, float, int]:
        age_s = now_s - view.arrival_s
        return view.priority - age_s / self.options.ageing_s, view.arrival_s, view.sequence_id

    def admission_order(
        self, waiting: Sequence[stoker.SequenceView], context: stoker.PolicyContext
    ) -> Sequence[stoker.SequenceView]:
        """Most urgent first."""
        return sorted(waiting, key=lambda view: self._rank(view, context.now_s))

    def preemption_order(
        self, running: Sequence[stoker.SequenceView], context: stoker.PolicyContext
    ) -> Sequence[stoker.SequenceView]:
        """Least urgent first."""
        return sorted(running, key=lambda view: self._rank(view, context.now_s), reverse=True)

    def victims(
        self,
        candidate: stoker.SequenceView,
        running: Sequence[stoker.SequenceView],
        context: stoker.PolicyContext,
    ) -> Sequence[stoker.SequenceView]:
        """Those that are less urgent than the candidate by the margin, least urgent first."""
        if not self.options.preempt:
            return ()
        limit = self._rank(candidate, context.now_s)[0] + self.options.preempt_margin
        order = self.preemption_order(running, context)
        return [view for view in order if self._rank(view, context.now_s)[0] >= limit]

    def explain(self, admitted: stoker.SequenceView, context: stoker.PolicyContext) -> str:
        """Its priority, and what waiting added."""
        levels = (context.now_s - admitted.arrival_s) / self.options.ageing_s
        return f"priority {admitted.priority}, raised by {levels:.1f} levels of waiting"


@stoker.hookimpl
def stoker_register_policies() -> list[stoker.PolicyInfo]:
    """Tell stoker about the policy."""
    return [
        stoker.PolicyInfo(
            api_version=1,
            name="priority",
            summary="Most urgent first, with ageing and preemption",
            factory=Priority,
            options=Options,
        )
    ]
