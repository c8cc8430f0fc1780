"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence

from stoker import PolicyContext, SchedulingPolicy, SequenceView

__all__ = ["FirstComeFirstServed"]


class FirstComeFirstServed(SchedulingPolicy):
    """Admit in order of arrival; when KV runs out, the latest arrival yields."""

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Oldest first; sequences of one request in their order."""
        return sorted(waiting, key=lambda view: (view.arrival_s, view.sequence_id))
