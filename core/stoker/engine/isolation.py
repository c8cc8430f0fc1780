"""After a failed step: find out whose fault it was, so that nobody else pays for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.engine.plan import Plan
from stoker.errors import EngineError

if TYPE_CHECKING:
    from stoker.engine.model_engine import Outbox
    from stoker.engine.scheduler import Scheduler
    from stoker.engine.sequence import Sequence

__all__ = ["FailureIsolation"]


class FailureIsolation:
    """Runs the sequences of a failed step one by one.

    Args:
        scheduler: Whose sequences they are.
        compute: Runs a plan and updates its sequences; comes back here if that fails, too.
        fail: Ends a sequence with an error.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        compute: Callable[[Plan, list[float], Outbox], float],
        fail: Callable[[Sequence, Exception, Outbox], None],
    ) -> None:
        self._scheduler = scheduler
        self._compute = compute
        self._fail = fail

    def run_alone(self, plan: Plan, error: Exception, gaps: list[float], outbox: Outbox) -> None:
        """Let each sequence of a plan that failed do its part alone, without drafts.

        Args:
            plan: What failed.
            error: How; what a sequence that was alone already ends with.
            gaps: See ``StepRecord.token_gaps_s``.
            outbox: Where deltas go.
        """
        sequences = plan.sequences()
        if len(sequences) == 1 and not plan.drafts:
            self._fail(sequences[0], error, outbox)
            return
        counts = {sequence.sequence_id: count for sequence, count in plan.prefills}
        for sequence in sequences:
            # One of those before it may have needed its lane's room.
            if sequence.sequence_id in self._scheduler.running:
                self._retry(sequence, counts.get(sequence.sequence_id), gaps, outbox)

    def _retry(
        self, sequence: Sequence, count: int | None, gaps: list[float], outbox: Outbox
    ) -> None:
        """Do alone what a sequence should have done in a step that failed.

        Args:
            sequence: One that runs.
            count: How many of its tokens to prefill; ``None`` if it was to decode.
            gaps: See ``run_alone``.
            outbox: Where deltas go.
        """
        running = self._scheduler.running
        known = sequence.num_computed
        try:
            self._scheduler.lanes.rewind(sequence)
        except EngineError as failure:
            self._fail(sequence, failure, outbox)
            return
        if sequence.num_computed < known and sequence.failed_at != sequence.num_output:
            # The lane could not be brought back, only emptied: compute it again, in its turn.
            sequence.failed_at = sequence.num_output
            self._scheduler.preempt(sequence, "failure")
            return
        # If it got no token since that happened to it last, the next shared step might fail, too: catch up
        # alone, or neither the culprit nor the others would ever get anywhere.
        while sequence.num_computed < known and sequence.sequence_id in running:
            chunk = min(known - sequence.num_computed, self._scheduler.token_budget)
            chunk = self._scheduler.lanes.blocks.piece(sequence, chunk)
            self._compute(Plan(prefills=[(sequence, chunk)]), gaps, outbox)
        if sequence.sequence_id in running:
            alone = (
                Plan(decodes=[sequence]) if count is None else Plan(prefills=[(sequence, count)])
            )
            self._compute(alone, gaps, outbox)
