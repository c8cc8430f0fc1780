"""Earliest deadline first, and no promise that cannot be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from stoker import (
    EngineSnapshot,
    InvalidRequestError,
    Middleware,
    PolicyContext,
    RateLimitError,
    Request,
    SchedulingPolicy,
    SequenceView,
    ServerContext,
    StepCost,
)
from stoker.forecast import Forecast
from stoker_plugins.policies.options import DeadlineOptions
from stoker_plugins.policies.views import by_arrival, pending, seconds_left

__all__ = ["DeadlineAdmission", "EarliestDeadlineFirst"]

_MIN_RETRY_S = 0.1
_MAX_ROUNDS = 8  # of looking for the moment at which a refused request would be accepted


class EarliestDeadlineFirst(SchedulingPolicy):
    """The earliest deadline first, in the queue, among victims and among the prompts of a step.

    A request without a deadline is ordered as if it had one ``default_deadline_s`` after its arrival, so only
    what arrives before that can get ahead of it, and it does not starve. What cannot make its deadline
    any more by the measured costs comes last, so that it costs nobody else theirs; when the deadline has
    passed, the core ends it.

    Args:
        options: See ``DeadlineOptions``.
    """

    heeds_priority = False

    def __init__(self, options: DeadlineOptions | None = None) -> None:
        self.options = options or DeadlineOptions()

    def due_s(self, deadline_s: float | None, arrival_s: float) -> float:
        """When something is due: its deadline, or the one it is ordered by."""
        return arrival_s + self.options.default_deadline_s if deadline_s is None else deadline_s

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Earliest deadline first; those that are too late anyway last."""
        return sorted(waiting, key=lambda view: self._key(view, context))

    def preemption_order(
        self, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Those that are too late anyway first, then the latest deadline."""
        return sorted(running, key=lambda view: self._key(view, context), reverse=True)

    def victims(
        self, candidate: SequenceView, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Later deadlines that can wait for the candidate to end, if that cannot wait for a lane.

        Nobody without a deadline of its own takes a lane, nor anybody while costs are unknown.
        """
        if not self.options.preempt or candidate.deadline_s is None or context.cost == StepCost():
            return ()
        needs_s = self.options.slack * seconds_left(candidate, context)
        spare_s = candidate.deadline_s - context.now_s - needs_s
        next_end_s = min((seconds_left(view, context) for view in running), default=0.0)
        if spare_s < 0 or next_end_s * self.options.slack <= spare_s:
            return ()
        due_s = candidate.deadline_s
        chosen = [
            view
            for view in running
            if self.due_s(view.deadline_s, view.arrival_s) > due_s
            and self._can_wait(view, needs_s, context)
        ]
        return sorted(chosen, key=lambda view: self._key(view, context), reverse=True)

    def prefill_shares(
        self, prefilling: Sequence[SequenceView], budget: int, context: PolicyContext
    ) -> Mapping[int, int]:
        """One prompt after the other, earliest deadline first."""
        tokens: dict[int, int] = {}
        for view in sorted(prefilling, key=lambda view: self._key(view, context)):
            tokens[view.sequence_id] = min(pending(view), budget)
            budget -= tokens[view.sequence_id]
        return tokens

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """How long it has until its deadline."""
        if admitted.deadline_s is None:
            left_s = self.due_s(None, admitted.arrival_s) - context.now_s
            return f"no deadline, ordered as if due in {left_s:.1f} s"
        left_s = admitted.deadline_s - context.now_s
        if self._is_too_late(admitted, context):
            return f"due in {left_s:.1f} s, which it will miss; a lane was idle"
        return f"earliest deadline, due in {left_s:.1f} s"

    def _key(self, view: SequenceView, context: PolicyContext) -> tuple[bool, float, float, int]:
        due_s = self.due_s(view.deadline_s, view.arrival_s)
        return self._is_too_late(view, context), due_s, *by_arrival(view)

    def _is_too_late(self, view: SequenceView, context: PolicyContext) -> bool:
        """Whether it would miss its deadline even if it had a lane from now on."""
        if view.deadline_s is None:
            return False
        return context.now_s + seconds_left(view, context) > view.deadline_s

    def _can_wait(self, view: SequenceView, seconds: float, context: PolicyContext) -> bool:
        """Whether it could lose its lane for so long, compute its tokens again, and still be in time."""
        if view.deadline_s is None:
            return True
        again_s = view.num_computed_tokens * context.cost.prefill_s
        needs_s = seconds + self.options.slack * (seconds_left(view, context) + again_s)
        return context.now_s + needs_s <= view.deadline_s


class DeadlineAdmission(Middleware):
    """Refuses what would miss its deadline, for models that the policy ``deadline`` schedules.

    Args:
        context: The server.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def on_request(self, request: Request) -> Request:
        """Let it pass if it will probably be done in time.

        Raises:
            RateLimitError: ``deadline_unreachable``: too much is due before it; with the time after which
                the same request would be accepted.
            InvalidRequestError: ``deadline_unreachable``: it would take too long even if nothing else ran.
        """
        policy = self._context.policy(request.model)
        if request.deadline_s is None or not isinstance(policy, EarliestDeadlineFirst):
            return request
        if not policy.options.admission:
            return request
        snapshot = self._context.snapshot(request.model)
        left_s = request.deadline_s - snapshot.now_s
        late_s = self._late_by_s(request, snapshot, policy)
        if late_s <= 0 or left_s <= 0:  # what is overdue already ends in the queue, as ever
            return request
        idle = msgspec.structs.replace(snapshot, waiting=(), running=())
        if self._late_by_s(request, idle, policy) > 0:
            needs_s = _seconds_needed(request, idle, [])
            raise InvalidRequestError(
                f"the request takes about {needs_s:.1f} s on this machine even if nothing else runs, "
                f"and its deadline is in {left_s:.1f} s: raise timeout, or lower max_tokens",
                param="timeout",
                code="deadline_unreachable",
            )
        # If it comes later, it is due later, and more of what waits now is due before it.
        retry_s = late_s
        for _ in range(_MAX_ROUNDS):
            then_s = self._late_by_s(request, snapshot, policy, retry_s)
            if then_s <= retry_s:
                break
            retry_s = then_s
        raise RateLimitError(
            f"the request would be done about {late_s:.1f} s after its deadline, which is in "
            f"{left_s:.1f} s: raise timeout, or retry later",
            code="deadline_unreachable",
            retry_after_s=max(_MIN_RETRY_S, retry_s),
        )

    @staticmethod
    def _late_by_s(
        request: Request,
        snapshot: EngineSnapshot,
        policy: EarliestDeadlineFirst,
        delay_s: float = 0.0,
    ) -> float:
        """By how many seconds it would be late, slack and all, behind what is due ``delay_s`` after it."""
        if request.deadline_s is None:
            return 0.0
        due_s = request.deadline_s + delay_s
        ahead = [
            other
            for other in snapshot.waiting
            if other is not request and policy.due_s(other.deadline_s, other.arrival_s) <= due_s
        ]
        allowed_s = (request.deadline_s - snapshot.now_s) / policy.options.slack
        return _seconds_needed(request, snapshot, ahead) - allowed_s


def _seconds_needed(request: Request, snapshot: EngineSnapshot, ahead: list[Request]) -> float:
    """Seconds until the last sequence of a request would be done, behind those ahead."""
    if request.n > 1:
        ahead = [*ahead, msgspec.structs.replace(request, n=request.n - 1)]
    forecast = Forecast(snapshot, ahead)
    return forecast.time_to_finish(len(request.prompt_token_ids), request.sampling.max_tokens)
