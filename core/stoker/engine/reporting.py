"""Tells policies and observers what a step did, and learns from it what steps cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

from stoker.engine.plan import Plan
from stoker.engine.speculation import StepDrafts
from stoker.types import RequestRecord, ScheduledTokens, StepRecord

if TYPE_CHECKING:
    from stoker.engine.scheduler import Scheduler
    from stoker.engine.speculation import Speculator
    from stoker.interfaces import Observer

__all__ = ["Reporter"]

logger = logging.getLogger("stoker.engine")

_NO_DRAFTS = StepDrafts()
_RATE_MEMORY = 0.9  # weight of the past in the running mean of tokens per second


class Reporter:
    """The records of one model; on the engine's thread.

    Args:
        scheduler: What is told of.
        observers: Who is told, beside the policy.
        clock: Monotonic seconds.

    Attributes:
        tokens_per_s: Tokens computed per second, lately.
        num_observer_errors: How often an observer failed.
    """

    def __init__(
        self, scheduler: Scheduler, observers: Rows[Observer], clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._observers = tuple(observers)
        self._clock = clock
        self.tokens_per_s = 0.0
        self.num_observer_errors = 0
        # What the last record told of totals that are kept elsewhere.
        self._told_preemptions = 0
        self._told_policy_s = 0.0
        self._num_drafter_errors = 0

    def describe(self, plan: Plan) -> Rows[ScheduledTokens]:
        """What a plan computes for whom; nothing if nobody wants to know."""
        if not self._is_wanted:
            return ()
        # A decode is never a second time. (Thousands of steps a second: no call for each of its tokens.)
        decodes = [ScheduledTokens(s.request.tenant, 0, 1, 0, s.sequence_id) for s in plan.decodes]
        return decodes + [sequence.scheduled(count) for sequence, count in plan.prefills]

    @property
    def _is_wanted(self) -> bool:
        return bool(self._observers) or self._scheduler.policy.wants_records

    def step(
        self,
        *,
        plan_tokens: tuple[int, int],
        started_s: float,
        runtime_s: float,
        num_generated: int,
        gaps: Rows[float],
        scheduled: Rows[ScheduledTokens],
        num_runtime_errors: int,
        speculator: Speculator | None = None,
    ) -> None:
        """A step ran.

        Args:
            plan_tokens: Prompt tokens and decodes of its plan.
            started_s: When it began.
            runtime_s: Seconds inside the runtime.
            num_generated: Tokens sampled.
            gaps: See ``StepRecord.token_gaps_s``.
            scheduled: What ``describe`` said of its plan.
            num_runtime_errors: How often the runtime failed so far.
            speculator: Whose drafts were in it, if any.
        """
        scheduler = self._scheduler
        duration_s = self._clock() - started_s
        drafts = _NO_DRAFTS if speculator is None else speculator.step
        plain_s = duration_s if speculator is None else speculator.measure(*plan_tokens, duration_s)
        scheduler.costs.observe(*plan_tokens, plain_s)
        num_accepted = sum(drafts.accepted.values())
        rate = (sum(plan_tokens) + num_accepted) / max(duration_s, 1e-9)
        past = self.tokens_per_s
        self.tokens_per_s = rate if not past else past * _RATE_MEMORY + rate * (1 - _RATE_MEMORY)
        if not self._is_wanted:
            return
        policy = scheduler.policy
        # Since the last record: a step in which everybody had to yield leaves none.
        num_preemptions = scheduler.num_preemptions - self._told_preemptions
        self._told_preemptions = scheduler.num_preemptions
        if num_accepted:
            # What a tenant got of a step are its accepted tokens, too.
            extra = drafts.accepted
            scheduled = [
                item._replace(decode=item.decode + extra.get(item.sequence_id, 0))
                for item in scheduled
            ]
        policy_s, self._told_policy_s = policy.spent_s - self._told_policy_s, policy.spent_s
        if speculator is not None:
            self._num_drafter_errors = speculator.num_errors
        self._tell_step(
            StepRecord(
                **self._totals(num_runtime_errors),
                started_s=started_s,
                duration_s=duration_s,
                runtime_s=runtime_s,
                num_prefill_tokens=plan_tokens[0],
                num_decode_tokens=plan_tokens[1],
                num_generated_tokens=num_generated,
                num_preemptions=num_preemptions,
                token_gaps_s=gaps,
                scheduled=scheduled,
                num_recomputed_tokens=sum(item.recomputed for item in scheduled),
                policy_s=policy_s,
                num_drafts=drafts.num_drafts,
                num_draft_tokens=drafts.num_draft_tokens,
                num_accepted_tokens=num_accepted,
                accepted_per_position=drafts.accepted_per_position,
            )
        )

    def embedded(
        self, scheduled: Rows[ScheduledTokens], started_s: float, num_runtime_errors: int
    ) -> None:
        """A batch of inputs was embedded, in a step that did nothing else.

        Args:
            scheduled: The tokens of each input.
            started_s: When it began.
            num_runtime_errors: How often the runtime failed so far.
        """
        if not self._is_wanted:
            return
        duration_s = self._clock() - started_s
        self._tell_step(
            StepRecord(
                **self._totals(num_runtime_errors),
                started_s=started_s,
                duration_s=duration_s,
                runtime_s=duration_s,
                num_prefill_tokens=sum(item.prefill for item in scheduled),
                num_decode_tokens=0,
                num_generated_tokens=0,
                num_preemptions=0,
                scheduled=scheduled,
            )
        )

    def _totals(self, num_runtime_errors: int) -> dict[str, Any]:
        """The fields of a record that tell how things stand, or what happened since the start."""
        scheduler = self._scheduler
        return {
            "model": scheduler.model,
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "num_paused": len(scheduler.paused),
            "num_cache_queries": scheduler.lanes.query_tokens,
            "num_cache_hits": scheduler.lanes.hit_tokens,
            "num_policy_errors": scheduler.policy.num_errors,
            "num_slow_policy_calls": scheduler.policy.num_slow_calls,
            "num_runtime_errors": num_runtime_errors,
            "num_observer_errors": self.num_observer_errors,
            "num_drafter_errors": self._num_drafter_errors,
        }

    def _tell_step(self, record: StepRecord) -> None:
        self._scheduler.policy.on_step(record)
        self._tell(lambda observer: observer.on_step(record))

    def finished(self, record: RequestRecord) -> None:
        """A sequence ended."""
        self._tell(lambda observer: observer.on_finish(record))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                what(observer)
            except (Exception, SystemExit) as failure:  # noqa: BLE001 - a plugin may raise anything
                self.num_observer_errors += 1
                if self.num_observer_errors == 1 or self.num_observer_errors % 1000 == 0:
                    logger.error("observer %s failed: %r", type(observer).__name__, failure)
