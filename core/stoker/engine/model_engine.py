"""One model's part of the loop: plan, run, sample, update. The only place where batches are computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

from stoker.config import SpeculationConfig
from stoker.engine import sampler
from stoker.engine.advance import Advance, advance
from stoker.engine.costs import OutputModel
from stoker.engine.deltas import delta_of, last_delta, progress
from stoker.engine.device_sampling import DeviceSampling
from stoker.engine.intake import Intake
from stoker.engine.isolation import FailureIsolation
from stoker.engine.lanes import LanePool
from stoker.engine.logprobs import LogprobTeller
from stoker.engine.masks import GrammarMasks
from stoker.engine.plan import Plan
from stoker.engine.readers import ReaderLimits, SlowReaders
from stoker.engine.reporting import Reporter
from stoker.engine.scheduler import Scheduler
from stoker.engine.scoring import max_scored_rows, rows_to_sample
from stoker.engine.sequence import Sequence, SequenceStatus
from stoker.engine.speculation import Speculator
from stoker.engine.waiting import WaitingTable
from stoker.errors import DeadlineError, EngineError, RequestError
from stoker.interfaces import EngineSnapshot, LoadSnapshot, TenantLoad
from stoker.tenants import Tenants
from stoker.types import Delta, FinishReason, Request, StepOutput, TokenLogprob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker.config import CacheConfig, SchedulerConfig
    from stoker.engine.client import RequestStream
    from stoker.engine.drafters import Drafter
    from stoker.interfaces import (
        EvictionStrategy,
        Observer,
        Runtime,
        SchedulingPolicy,
        SnapshotStore,
    )

__all__ = ["ModelEngine"]

logger = logging.getLogger("stoker.engine")

Outbox = list[tuple["RequestStream", Delta]]


class ModelEngine:
    """A runtime with its scheduler and its sequences. Everything but ``count_submitted``,
    ``count_withdrawn``, ``load``, ``tenant_load`` and ``snapshot`` runs on the thread of its loop.

    Args:
        model: The served model's id.
        runtime: Computes.
        policy: Orders.
        scheduler_config: Token budgets.
        cache_config: KV reuse.
        observers: Told of steps and ends.
        clock: Monotonic seconds.
        tenants: Weights and reservations.
        weight: Share of the device's time, against its other models.
        reader_limits: What a reader that does not read may cost.
        eviction: Which kept prefix goes first; the least recently used if ``None``.
        store: Where evicted KV goes; nowhere if ``None``. The engine does not close it.
        drafter: Guesses tokens for speculative decoding; without one there is none.
        speculation: How much it guesses.
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
        tenants: Tenants | None = None,
        weight: float = 1.0,
        reader_limits: ReaderLimits | None = None,
        eviction: EvictionStrategy | None = None,
        store: SnapshotStore | None = None,
        drafter: Drafter | None = None,
        speculation: SpeculationConfig | None = None,
    ) -> None:
        info = runtime.info
        self.model = model
        self.weight = weight
        self.runtime = runtime
        self.clock = clock
        self.max_total_tokens = min(info.context_length, info.kv_capacity_tokens)
        tenants = tenants or Tenants()
        lanes = LanePool(
            runtime, cache_config, tenants=tenants, eviction=eviction, store=store, clock=clock
        )
        self.scheduler = Scheduler(
            model,
            policy,
            lanes,
            scheduler_config,
            info.max_step_tokens,
            clock,
            tenants,
            share_in_flight=cache_config.share_in_flight,
        )
        self.scheduler.max_scored_rows = max_scored_rows(info.vocab_size)
        self.policy = policy
        self._readers = SlowReaders(self.scheduler, reader_limits or ReaderLimits())
        self.speculator: Speculator | None = None
        # What a lane cannot take back it must not be given on trust.
        if drafter is not None and info.capabilities.truncation == "any":
            self.speculator = Speculator(
                model, drafter, speculation or SpeculationConfig(), info, self.scheduler, clock
            )
        self._isolation = FailureIsolation(self.scheduler, self._compute, self._fail)
        self._waiting = WaitingTable()
        self._outputs = OutputModel()
        self.reporter = Reporter(self.scheduler, observers, clock)
        self._intake = Intake(runtime, self.max_total_tokens)
        self._logprobs = LogprobTeller(self._intake.names)
        self._masks = GrammarMasks(info)
        self._device: DeviceSampling | None = None
        if info.capabilities.samples:
            self._device = DeviceSampling(runtime, self._masks, self._logprobs)
        self._sequences: dict[RequestStream, list[Sequence]] = {}
        self._num_failures = 0
        self._step_started_s: float | None = None

    # ------------------------------------------------------------------ in and out

    def count_submitted(self, request: Request) -> None:
        """Count a request as waiting from the moment it is posted; on the submitting thread."""
        self._waiting.add(request)

    def count_withdrawn(self, request: Request) -> None:
        """Take that back: the request could not be posted."""
        self._waiting.remove(request, request.n)

    def load(self) -> LoadSnapshot:
        """How busy the model is; from any thread."""
        lanes = self.scheduler.lanes
        return LoadSnapshot(
            num_running=len(self.scheduler.running),
            num_waiting=self._waiting.num_sequences,
            waiting_tokens=self._waiting.num_tokens,
            tokens_per_s=self.reporter.tokens_per_s,
            kv_tokens_used=lanes.used_tokens,
            kv_tokens_retained=lanes.retained_tokens,
            kv_tokens_capacity=lanes.capacity_tokens,
            num_paused=len(self.scheduler.paused),
            num_free_lanes=lanes.num_free,
        )

    def tenant_load(self, tenant: str) -> TenantLoad:
        """How much of the queue a tenant takes; from any thread."""
        return self._waiting.tenant(tenant)

    def snapshot(self) -> EngineSnapshot:
        """What the model is doing, in detail; from any thread."""
        scheduler = self.scheduler
        now_s, started_s = self.clock(), self._step_started_s
        # One call in C: no other thread can change the dict in the middle of it.
        running = list(scheduler.running.values())
        return EngineSnapshot(
            now_s=now_s,
            num_lanes=scheduler.lanes.num_lanes,
            waiting=self._waiting.requests(),
            running=[sequence.snapshot() for sequence in running],
            cost=scheduler.costs.cost,
            output_ratio=self._outputs.ratio,
            mean_output_tokens=self._outputs.mean_tokens,
            max_prefill_tokens=scheduler.prefill_budget(len(running), is_mixed=bool(running)),
            kv_tokens_capacity=scheduler.lanes.capacity_tokens,
            prompt_ratio=self._outputs.prompt_ratio,
            elapsed_s=0.0 if started_s is None else max(0.0, now_s - started_s),
        )

    def submit(self, stream: RequestStream) -> None:
        """Turn a request into sequences and queue them."""
        request = stream.request
        sequences = self._intake.sequences(stream)
        ahead = self._waiting.ahead_of(request)
        for sequence in sequences:
            facts = sequence.facts
            facts.waiting_ahead = ahead.sequences
            facts.waiting_ahead_own = ahead.own
            facts.waiting_ahead_tokens = ahead.tokens
            facts.running_at_arrival = len(self.scheduler.running)
            sequence.expected_output = self._outputs.expect(
                request.sampling.max_tokens, sequence.max_tokens
            )
            sequence.view = sequence.snapshot()
        stream.sequences = tuple(sequences)
        self._sequences[stream] = sequences
        self._logprobs.num_asking += len(sequences) * (request.sampling.logprobs is not None)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, stream: RequestStream, outbox: Outbox) -> None:
        """End a request whose reader has gone; its last deltas tell that it is over."""
        for sequence in self._sequences.get(stream, ())[:]:
            self._finish(sequence, FinishReason.ABORT, outbox)

    def cancel(self, stream: RequestStream, error: Exception, outbox: Outbox) -> None:
        """End a request with an error that its reader is told."""
        for sequence in self._sequences.get(stream, ())[:]:
            self._finish(sequence, FinishReason.ERROR, outbox, error)

    def abort_all(self, error: Exception, outbox: Outbox) -> None:
        """End every request with an error."""
        for sequences in list(self._sequences.values()):
            for sequence in sequences[:]:
                sequence.num_computed = 0  # nobody knows any more what is in its lane
                self._finish(sequence, FinishReason.ERROR, outbox, error)

    @property
    def num_observer_errors(self) -> int:
        """How often an observer failed so far."""
        return self.reporter.num_observer_errors

    @property
    def num_runtime_errors(self) -> int:
        """How often the runtime failed so far, in a step or in freeing KV."""
        return self._num_failures + self.scheduler.lanes.num_errors

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do. Sequences that wait for their readers are no work."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def look_after_readers(self, outbox: Outbox) -> None:
        """Let paused sequences go on whose readers read again, and drop those that do not."""
        if not self.scheduler.paused:
            return
        for sequence, error in self._readers.check():
            self._finish(sequence, FinishReason.ERROR, outbox, error)
        self._expire(self.clock(), outbox)

    # ------------------------------------------------------------------ one step

    def step(self, outbox: Outbox) -> None:
        """Plan one step, run it, sample from it, update the sequences; deltas go to ``outbox``."""
        started_s = self.clock()
        self._expire(started_s, outbox)
        plan = self.scheduler.schedule()
        self._count_admitted()
        for sequence in self.scheduler.hopeless():
            stuck = EngineError("the model's runtime cannot free any KV memory")
            self._fail(sequence, stuck, outbox)
        plan = self.scheduler.make_room(plan)
        if not plan:
            return
        if self.speculator is not None:
            self.speculator.draft(plan)
        scheduled = self.reporter.describe(plan)
        gaps: list[float] = []
        before = len(outbox)
        plan_tokens = (plan.num_prefill_tokens, len(plan.decodes))
        self._step_started_s = started_s
        runtime_s = self._compute(plan, gaps, outbox)
        self._step_started_s = None
        self._readers.pause_slow()
        self.reporter.step(
            plan_tokens=plan_tokens,
            started_s=started_s,
            runtime_s=runtime_s,
            num_generated=sum(delta.num_tokens for _, delta in outbox[before:]),
            gaps=gaps,
            scheduled=scheduled,
            num_runtime_errors=self.num_runtime_errors,
            speculator=self.speculator,
        )

    def _count_admitted(self) -> None:
        for sequence in self.scheduler.take_admitted():
            self._waiting.remove(sequence.request)

    def _compute(self, plan: Plan, gaps: list[float], outbox: Outbox) -> float:
        """Run a plan and update its sequences; returns the seconds inside the runtime."""
        started_s = self.clock()
        try:
            output = self._run(plan)
            if output is None:
                return self.clock() - started_s
            sampled, device = plan.sampled(), self._device
            if device is not None and sampled and not plan.num_scored_rows:
                tokens, entries = device.sample(output, sampled, plan)
                runtime_s = self.clock() - started_s  # a device may only now be done with the step
            else:
                logits = output.logits
                runtime_s = self.clock() - started_s
                logits = rows_to_sample(
                    logits, len(sampled), plan, self.runtime.info.vocab_size, self._logprobs
                )
                tokens = self._sample(logits, sampled, plan) if sampled else []
                entries = self._logprobs.of_step(logits, sampled, tokens, plan)
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything; others must go on
            self._isolate(plan, error, gaps, outbox)
            return self.clock() - started_s
        self._update(plan, sampled, tokens, entries, gaps, outbox)
        return runtime_s

    def _sample(
        self, logits: NDArray[np.float32], sampled: list[Sequence], plan: Plan
    ) -> list[list[int]]:
        logits = self._masks.apply(logits, sampled, plan.drafts)
        if plan.drafts:
            return sampler.verify(logits, sampled, plan.drafts)
        return [[token] for token in sampler.sample(logits, sampled)]

    def _run(self, plan: Plan) -> StepOutput | None:
        """What a plan's step gives; ``None`` if the KV memory cannot hold it now."""
        while plan:
            output = self.runtime.step(plan.step_input())
            if not output.no_room:
                return output
            if plan.drafts and self.speculator is not None:
                self.speculator.take_back(plan)
                continue
            if self.scheduler.no_room(plan) is None:
                sequence = plan.sequences()[0]
                raise EngineError(
                    f"the KV memory cannot hold {sequence.num_tokens} tokens of a single request"
                )
        return None

    def _isolate(self, plan: Plan, error: Exception, gaps: list[float], outbox: Outbox) -> None:
        self._num_failures += 1
        logger.error("model %s: a step failed: %r", self.model, error, exc_info=error)
        self._isolation.run_alone(plan, error, gaps, outbox)
        if plan.drafts and self.speculator is not None:
            self.speculator.take_back(plan)

    def _fail(
        self, sequence: Sequence, error: Exception, outbox: Outbox, done: Advance | None = None
    ) -> None:
        """End a sequence that could not be computed."""
        # What is in its lane is not to be trusted.
        sequence.num_computed = 0
        if not isinstance(error, EngineError | RequestError):
            error = EngineError(f"the model's runtime failed: {type(error).__name__}")
        self._finish(sequence, FinishReason.ERROR, outbox, error, done)

    def _update(
        self,
        plan: Plan,
        sampled: list[Sequence],
        tokens: list[list[int]],
        entries: Mapping[int, list[TokenLogprob]],
        gaps: list[float],
        outbox: Outbox,
    ) -> None:
        for sequence in plan.decodes:
            sequence.num_computed += 1
            sequence.num_known = sequence.num_computed
            sequence.num_deferred = 0
            sequence.facts.num_decode_steps += 1
        for sequence, count in plan.prefills:
            facts = sequence.facts
            facts.recomputed_tokens += sequence.scheduled(count).recomputed
            facts.num_prefill_steps += 1
            sequence.num_computed += count
            sequence.num_known = max(sequence.num_known, sequence.num_computed)
            if sequence.max_tokens == 0 or sequence.request.wants_progress:
                self._prefilled(sequence, outbox)
        now_s = self.clock()
        for sequence, found in zip(sampled, tokens, strict=True):
            told = entries.get(sequence.sequence_id) if entries else None
            done = advance(sequence, found, self.runtime.info.end_token_ids, told)
            if done.num_tokens:
                if sequence.status is SequenceStatus.PREFILL:
                    sequence.move_to(SequenceStatus.DECODE)
                if sequence.last_token_s is None:
                    sequence.first_token_s = now_s
                else:
                    gaps.append(now_s - sequence.last_token_s)
                sequence.last_token_s = now_s
            spec = self.speculator
            has_lane = spec is None or spec.settle(sequence, found, done, plan)
            self._deliver(sequence, done, outbox)
            if not has_lane and sequence.status is SequenceStatus.DECODE:
                self.scheduler.preempt(sequence, "failure")

    def _prefilled(self, sequence: Sequence, outbox: Outbox) -> None:
        """More of a prompt was computed: tell how far it is, or end what generates nothing."""
        if sequence.num_pending and sequence.request.wants_progress and not sequence.num_output:
            stream = sequence.stream
            outbox.append((stream, progress(sequence)))
            stream.num_sent += 1
        elif not sequence.num_pending and sequence.max_tokens == 0:
            self._finish(sequence, FinishReason.LENGTH, outbox)

    def _deliver(self, sequence: Sequence, done: Advance, outbox: Outbox) -> None:
        """Hand over what a step added to a sequence, and end it if that was the last."""
        error = done.error
        if error is not None:
            if not isinstance(error, EngineError | RequestError):
                logger.error("model %s: a token has no text", self.model, exc_info=error)
                self._num_failures += 1
            self._fail(sequence, error, outbox, done)
        elif done.reason is not None:
            self._finish(sequence, done.reason, outbox, done=done)
        else:
            stream = sequence.stream
            if sequence.ledger is None:  # nearly always: no call for each token
                delta = Delta(index=sequence.index, text=done.text, num_tokens=done.num_tokens)
            else:
                delta = delta_of(sequence, sequence.ledger, done)
            outbox.append((stream, delta))
            stream.num_sent += 1
            if stream.num_sent - stream.num_read > self._readers.max_unread:
                self._readers.is_slow(sequence)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        outbox: Outbox,
        error: Exception | None = None,
        done: Advance | None = None,
    ) -> None:
        """End a sequence: free its lane, deliver its last delta, tell the observers."""
        delta = last_delta(sequence, reason, error, done or Advance())
        reason = delta.finish_reason or reason
        if sequence.sampling.logprobs is not None:
            self._logprobs.num_asking -= 1
        if sequence.admitted_s is None:
            self._waiting.remove(sequence.request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            if sequence.max_tokens:
                self._outputs.observe(sequence.num_output, sequence.sampling.max_tokens)
            self._outputs.observe_prompt(sequence.num_prompt, sequence.num_cached)
        self.scheduler.remove(sequence)
        self._readers.forget(sequence)
        if self.speculator is not None:
            self.speculator.forget(sequence)
        sequence.move_to(SequenceStatus.FINISHED)
        sequence.finish_reason = reason
        sequence.ended_s = self.clock()
        sequence.error = error
        record = sequence.record()
        stream = sequence.stream
        stream.records.append(record)
        siblings = self._sequences[stream]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[stream]
        outbox.append((stream, delta))
        self.reporter.finished(record)

    def _expire(self, now_s: float, outbox: Outbox) -> None:
        for sequence in self.scheduler.expired(now_s):
            where = "in the queue" if sequence.admitted_s is None else "while it was generated"
            waited = now_s - sequence.request.arrival_s
            error = DeadlineError(
                f"the request's time ran out {where}, after {waited:.1f} s; "
                "raise its timeout, or retry when the server is less busy"
            )
            self._finish(sequence, FinishReason.ERROR, outbox, error)
