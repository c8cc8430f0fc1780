"""One model's part of the loop: plan, run, sample, update. The only place where batches are computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

from stoker.engine import sampler
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.lanes import LanePool
from stoker.engine.scheduler import Plan, Scheduler
from stoker.engine.sequence import Sequence, SequenceStatus
from stoker.errors import DeadlineError, EngineError
from stoker.interfaces import LoadSnapshot
from stoker.types import Delta, FinishReason, Request, StepRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker.config import CacheConfig, SchedulerConfig
    from stoker.engine.client import RequestStream
    from stoker.interfaces import Observer, Runtime, SchedulingPolicy

__all__ = ["ModelEngine"]

logger = logging.getLogger("stoker.engine")

Outbox = list[tuple["RequestStream", Delta]]

_RATE_MEMORY = 0.9  # weight of the past in the running mean of tokens per second


class ModelEngine:
    """A runtime with its scheduler and its sequences. Everything but ``count_submitted`` and ``load``
    runs on the thread of its loop.

    Args:
        model: The served model's id.
        runtime: Computes.
        policy: Orders.
        scheduler_config: Token budgets.
        cache_config: KV reuse.
        observers: Told of steps and ends.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        model: str,
        runtime: Runtime,
        policy: SchedulingPolicy,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        observers: Rows[Observer],
        clock: Callable[[], float],
    ) -> None:
        info = runtime.info
        self.model = model
        self.runtime = runtime
        self.clock = clock
        self.max_total_tokens = min(info.context_length, info.kv_capacity_tokens)
        lanes = LanePool(runtime, prefix_reuse=cache_config.prefix_reuse)
        self.scheduler = Scheduler(
            model, policy, lanes, scheduler_config, info.max_step_tokens, clock
        )
        self._observers = tuple(observers)
        self._token_text = TokenText(runtime.tokenizer.token_bytes)
        self._sequences: dict[RequestStream, list[Sequence]] = {}
        self.num_observer_errors = 0
        self.num_runtime_errors = 0
        self._tokens_per_s = 0.0
        # Each counter has one writer: the submitting thread, or the loop's.
        self._submitted = [0, 0]
        self._dequeued = [0, 0]

    # ------------------------------------------------------------------ in and out

    def count_submitted(self, request: Request) -> None:
        """Count a request as waiting from the moment it is posted; on the submitting thread."""
        self._submitted[0] += request.n
        self._submitted[1] += request.n * _cost(request)

    def load(self) -> LoadSnapshot:
        """How busy the model is; from any thread."""
        lanes = self.scheduler.lanes
        return LoadSnapshot(
            num_running=len(self.scheduler.running),
            num_waiting=max(0, self._submitted[0] - self._dequeued[0]),
            waiting_tokens=max(0, self._submitted[1] - self._dequeued[1]),
            tokens_per_s=self._tokens_per_s,
            kv_tokens_used=lanes.used_tokens,
            kv_tokens_retained=lanes.retained_tokens,
            kv_tokens_capacity=lanes.capacity_tokens,
        )

    def submit(self, stream: RequestStream) -> None:
        """Turn a request into sequences and queue them."""
        request = stream.request
        sequences = [
            Sequence(
                request,
                index,
                stream,
                Detokenizer(self._token_text, request.sampling.stop),
                self.max_total_tokens,
            )
            for index in range(request.n)
        ]
        self._sequences[stream] = sequences
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, stream: RequestStream, outbox: Outbox) -> None:
        """End a request whose reader has gone; its last deltas tell that it is over."""
        for sequence in self._sequences.get(stream, ())[:]:
            self._finish(sequence, FinishReason.ABORT, outbox)

    def abort_all(self, error: Exception, outbox: Outbox) -> None:
        """End every request with an error."""
        for sequences in list(self._sequences.values()):
            for sequence in sequences[:]:
                self._finish(sequence, FinishReason.ERROR, outbox, error)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    # ------------------------------------------------------------------ one step

    def step(self, outbox: Outbox) -> None:
        """Plan one step, run it, sample from it, update the sequences; deltas go to ``outbox``."""
        started_s = self.clock()
        self._expire(started_s, outbox)
        preemptions = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        self._count_admitted()
        plan = self.scheduler.make_room(plan)
        if not plan:
            return
        wanted = self._observers or self.scheduler.policy.wants_records
        scheduled = self._describe(plan) if wanted else ()
        gaps: list[float] = []
        before = len(outbox)
        runtime_s = self._compute(plan, gaps, outbox)
        self._report(
            plan_tokens=(plan.num_prefill_tokens, len(plan.decodes)),
            started_s=started_s,
            runtime_s=runtime_s,
            num_generated=sum(delta.num_tokens for _, delta in outbox[before:]),
            gaps=gaps,
            scheduled=scheduled,
            num_preemptions=self.scheduler.num_preemptions - preemptions,
        )

    def _count_admitted(self) -> None:
        for sequence in self.scheduler.take_admitted():
            self._count_dequeued(sequence)

    def _count_dequeued(self, sequence: Sequence) -> None:
        self._dequeued[0] += 1
        self._dequeued[1] += _cost(sequence.request)

    def _compute(self, plan: Plan, gaps: list[float], outbox: Outbox) -> float:
        """Run a plan and update its sequences; returns the seconds inside the runtime."""
        started_s = self.clock()
        try:
            logits = self._run(plan)
            if logits is None:
                return self.clock() - started_s
            sampled = plan.sampled()
            runtime_s = self.clock() - started_s
            tokens = sampler.sample(logits, sampled) if sampled else []
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything; others must go on
            self._isolate(plan, error, gaps, outbox)
            return self.clock() - started_s
        self._update(plan, sampled, tokens, gaps, outbox)
        return runtime_s

    def _run(self, plan: Plan) -> NDArray[np.float32] | None:
        """Logits of a plan; ``None`` if the KV memory cannot hold it now."""
        while plan:
            output = self.runtime.step(plan.step_input())
            if not output.no_room:
                return output.logits
            if self.scheduler.no_room(plan) is None:
                sequence = plan.sequences()[0]
                raise EngineError(
                    f"the KV memory cannot hold {sequence.num_tokens} tokens of a single request"
                )
        return None

    def _isolate(self, plan: Plan, error: Exception, gaps: list[float], outbox: Outbox) -> None:
        """After a failed step, find out whose fault it was: run its sequences one by one."""
        self.num_runtime_errors += 1
        logger.error("model %s: a step failed: %r", self.model, error, exc_info=error)
        sequences = plan.sequences()
        if len(sequences) == 1:
            failure = error
            if not isinstance(error, EngineError):
                failure = EngineError(f"the model's runtime failed: {type(error).__name__}")
            self._finish(sequences[0], FinishReason.ERROR, outbox, failure)
            return
        counts = {sequence.sequence_id: count for sequence, count in plan.prefills}
        for sequence in sequences:
            known = sequence.num_computed
            try:
                self.scheduler.lanes.rewind(sequence)
            except Exception as cause:  # noqa: BLE001 - as in _compute
                self._isolate(Plan(decodes=[sequence]), cause, gaps, outbox)
                continue
            if sequence.num_computed < known:
                # The lane could not be brought back: compute it again from the start.
                self.scheduler.preempt(sequence)
                continue
            count = counts.get(sequence.sequence_id)
            alone = (
                Plan(decodes=[sequence]) if count is None else Plan(prefills=[(sequence, count)])
            )
            self._compute(alone, gaps, outbox)

    def _update(
        self,
        plan: Plan,
        sampled: list[Sequence],
        tokens: list[int],
        gaps: list[float],
        outbox: Outbox,
    ) -> None:
        for sequence in plan.decodes:
            sequence.num_computed += 1
        for sequence, count in plan.prefills:
            sequence.num_computed += count
        now_s = self.clock()
        for sequence, token in zip(sampled, tokens, strict=True):
            if token == sampler.NOT_FINITE:
                failure = EngineError("the model produced logits that are not finite")
                self._finish(sequence, FinishReason.ERROR, outbox, failure)
                continue
            if sequence.status is SequenceStatus.PREFILL:
                sequence.move_to(SequenceStatus.DECODE)
            if sequence.last_token_s is None:
                sequence.first_token_s = now_s
            else:
                gaps.append(now_s - sequence.last_token_s)
            sequence.last_token_s = now_s
            self._take(sequence, token, outbox)

    def _take(self, sequence: Sequence, token: int, outbox: Outbox) -> None:
        """Add a sampled token to its sequence, and end it if that was the last."""
        sequence.append(token)
        is_end = token in self.runtime.info.end_token_ids
        if is_end and not sequence.sampling.ignore_eos:
            self._finish(sequence, FinishReason.STOP, outbox, num_tokens=1)
            return
        text = sequence.detokenizer.push(token)
        if sequence.detokenizer.stopped:
            self._finish(sequence, FinishReason.STOP, outbox, text=text, num_tokens=1)
        elif sequence.num_output >= sequence.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, outbox, text=text, num_tokens=1)
        else:
            outbox.append((sequence.stream, Delta(index=sequence.index, text=text, num_tokens=1)))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        outbox: Outbox,
        error: Exception | None = None,
        *,
        text: str = "",
        num_tokens: int = 0,
    ) -> None:
        """End a sequence: free its lane, deliver its last delta, tell the observers."""
        tail = sequence.detokenizer.finish()
        if sequence.detokenizer.stopped and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP
        if sequence.admitted_s is None:
            self._count_dequeued(sequence)
        if reason is FinishReason.ERROR:
            # What a failed step left in the lane is not to be trusted.
            sequence.num_computed = 0
        self.scheduler.remove(sequence)
        sequence.move_to(SequenceStatus.FINISHED)
        sequence.finish_reason = reason
        record = sequence.record(self.clock(), None if error is None else str(error))
        stream = sequence.stream
        stream.records.append(record)
        siblings = self._sequences[stream]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[stream]
        delta = Delta(
            index=sequence.index,
            text=text + tail,
            num_tokens=num_tokens,
            finish_reason=reason,
            error=error,
            usage=sequence.usage(),
        )
        outbox.append((stream, delta))
        for observer in self._observers:
            try:
                observer.on_finish(record)
            except Exception as failure:  # noqa: BLE001 - a plugin may raise anything
                self._observer_failed(observer, failure)

    def _expire(self, now_s: float, outbox: Outbox) -> None:
        for sequence in self.scheduler.expired(now_s):
            where = "in the queue" if sequence.admitted_s is None else "while it was generated"
            waited = now_s - sequence.request.arrival_s
            error = DeadlineError(
                f"the request's time ran out {where}, after {waited:.1f} s; "
                "raise its timeout, or retry when the server is less busy"
            )
            self._finish(sequence, FinishReason.ERROR, outbox, error)

    # ------------------------------------------------------------------ reporting

    @staticmethod
    def _describe(plan: Plan) -> list[tuple[str, int, int]]:
        decodes = [(s.request.tenant, 0, 1) for s in plan.decodes]
        return decodes + [(s.request.tenant, count, 0) for s, count in plan.prefills]

    def _report(
        self,
        *,
        plan_tokens: tuple[int, int],
        started_s: float,
        runtime_s: float,
        num_generated: int,
        gaps: list[float],
        scheduled: Rows[tuple[str, int, int]],
        num_preemptions: int,
    ) -> None:
        duration_s = self.clock() - started_s
        rate = sum(plan_tokens) / max(duration_s, 1e-9)
        past = self._tokens_per_s
        self._tokens_per_s = rate if not past else past * _RATE_MEMORY + rate * (1 - _RATE_MEMORY)
        if not self._observers and not self.scheduler.policy.wants_records:
            return
        lanes = self.scheduler.lanes
        record = StepRecord(
            model=self.model,
            started_s=started_s,
            duration_s=duration_s,
            runtime_s=runtime_s,
            num_prefill_tokens=plan_tokens[0],
            num_decode_tokens=plan_tokens[1],
            num_generated_tokens=num_generated,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=num_preemptions,
            num_cache_queries=lanes.query_tokens,
            num_cache_hits=lanes.hit_tokens,
            num_policy_errors=self.scheduler.policy.num_errors,
            num_runtime_errors=self.num_runtime_errors,
            token_gaps_s=gaps,
            scheduled=scheduled,
        )
        self.scheduler.policy.on_step(record)
        for observer in self._observers:
            try:
                observer.on_step(record)
            except Exception as failure:  # noqa: BLE001 - a plugin may raise anything
                self._observer_failed(observer, failure)

    def _observer_failed(self, observer: Observer, failure: Exception) -> None:
        self.num_observer_errors += 1
        if self.num_observer_errors == 1 or self.num_observer_errors % 1000 == 0:
            logger.error("observer %s failed: %r", type(observer).__name__, failure)


def _cost(request: Request) -> int:
    """Tokens one sequence of a request may take: what queue bounds count."""
    return len(request.prompt_token_ids) + (request.sampling.max_tokens or 0)
