"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence

from stoker import PolicyContext, SchedulingPolicy, SequenceView
from stoker_plugins.policies.options import FcfsOptions
from stoker_plugins.policies.views import by_arrival, still_waiting

__all__ = ["FirstComeFirstServed"]


class FirstComeFirstServed(SchedulingPolicy):
    """Admit in order of arrival; when KV runs out, the latest arrival yields.

    A request whose KV does not fit is passed by later ones that do, until ``max_passed`` of them did or it
    has waited for ``max_wait_s``. From then on all wait for it, and it fits at the latest when those that
    run have ended: nothing starves.

    Args:
        options: See ``FcfsOptions``.
    """

    heeds_priority = False

    def __init__(self, options: FcfsOptions | None = None) -> None:
        self.options = options or FcfsOptions()

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Oldest first; sequences of one request in their order."""
        return sorted(waiting, key=by_arrival)

    def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
        """Until enough have passed it, or it has waited for long enough."""
        waited_s = context.now_s - blocked.waiting_since_s
        return blocked.num_passed < self.options.max_passed and waited_s < self.options.max_wait_s

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """Whether it was simply next, or passed others."""
        passed = sum(by_arrival(view) < by_arrival(admitted) for view in still_waiting(context))
        return f"arrival order, past {passed} that did not fit" if passed else "arrival order"
