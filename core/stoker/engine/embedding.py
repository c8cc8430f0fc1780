"""Embeddings in the loop: bounded batches of many requests' inputs, in turn with the steps of generation.

A model's embedder is a member of its device's loop as its engine is: the loop shares time between them, and a
turn of the embedder is one batch of about as many tokens as a step may prefill now. So a large job holds up
running streams by one such batch at a time, and what several requests ask for is computed together.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.engine.embedding_jobs import EmbeddingJob, EmbeddingQueue, EmbeddingStream, Part
from stoker.errors import DeadlineError, EngineError, StokerError
from stoker.tenants import Tenants
from stoker.types import Delta, FinishReason, Request, ScheduledTokens, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.client import RequestStream
    from stoker.engine.loop import EngineLoop
    from stoker.engine.model_engine import ModelEngine, Outbox
    from stoker.interfaces import EmbeddingInfo, Runtime

__all__ = ["EmbeddingEngine"]

logger = logging.getLogger("stoker.engine")

_NO_SEQUENCE = -1


@dataclass(slots=True)
class _Batch:
    """What is computed together.

    Attributes:
        parts: The job and the index of each input.
        pieces: What computes it, piece by piece.
    """

    parts: list[Part]
    pieces: Iterator[NDArray[Any] | None] = field(default_factory=lambda: iter(()))

    def inputs(self) -> list[Any]:
        """The token sequences."""
        return [job.request.inputs[index] for job, index in self.parts]

    def close(self) -> None:
        """Compute no more of it."""
        close = getattr(
            self.pieces, "close", None
        )  # generators have one; other iterators need none
        if close is not None:
            close()


class EmbeddingEngine:
    """The part of a model's loop that embeds.

    ``post`` runs on the event loop's thread, all else on the thread of the loop.

    Args:
        engine: The same model's engine: whose token budget, queue and observers these requests share.
        tenants: Weights.
        clock: Monotonic seconds.

    Attributes:
        model: The served model's id.
        weight: Share of the device's time.
        num_batches: Batches computed so far.
        num_failures: Calls of the runtime that failed so far.
    """

    def __init__(
        self,
        engine: ModelEngine,
        tenants: Tenants | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.model = engine.model
        self.weight = engine.weight
        self.num_batches = 0
        self.num_failures = 0
        self._engine = engine
        self._runtime: Runtime = engine.runtime
        self._clock = clock or engine.clock
        self._jobs: dict[RequestStream, EmbeddingJob] = {}
        self._queue = EmbeddingQueue(tenants or Tenants())
        self._alone: deque[Part] = deque()  # what a failed batch held
        self._batch: _Batch | None = None

    @property
    def info(self) -> EmbeddingInfo:
        """How the model embeds.

        Raises:
            EngineError: The runtime says that it embeds, but not how.
        """
        embedding = self._runtime.info.embedding
        if embedding is None:
            raise EngineError(
                f"{self.model}: the runtime has embed but RuntimeInfo.embedding is not set"
            )
        return embedding

    # ------------------------------------------------------------------ in and out

    def post(self, request: Request, loop: EngineLoop) -> EmbeddingStream:
        """Put a request into the loop's inbox.

        Raises:
            UnavailableError: The loop has ended.
        """
        stream = EmbeddingStream(request, loop, self.info.width)
        self.count_submitted(request)
        try:
            loop.post_submit(self, stream)
        except BaseException:
            self.count_withdrawn(request)
            raise
        return stream

    def count_submitted(self, request: Request) -> None:
        """Count a request as waiting: in the model's one queue, for what bounds that."""
        self._engine.count_submitted(request)

    def count_withdrawn(self, request: Request) -> None:
        """Count it as waiting no more."""
        self._engine.count_withdrawn(request)

    def submit(self, stream: RequestStream) -> None:
        """Queue a request.

        Raises:
            TypeError: It is not one that ``post`` has made.
        """
        if not isinstance(stream, EmbeddingStream):
            raise TypeError(f"{type(stream).__name__} has no room for vectors")
        job = EmbeddingJob(stream, ahead=len(self._jobs))
        stream.job = job
        self._jobs[stream] = job
        self._queue.add(job)

    def abort(self, stream: RequestStream, outbox: Outbox) -> None:
        """End a request whose reader has gone."""
        if (job := self._jobs.get(stream)) is not None:
            self._finish(job, FinishReason.ABORT, outbox)

    def cancel(self, stream: RequestStream, error: Exception, outbox: Outbox) -> None:
        """End a request with an error that its reader is told."""
        if (job := self._jobs.get(stream)) is not None:
            self._finish(job, FinishReason.ERROR, outbox, error)

    def abort_all(self, error: Exception, outbox: Outbox) -> None:
        """End every request with an error."""
        for job in list(self._jobs.values()):
            self._finish(job, FinishReason.ERROR, outbox, error)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._jobs)

    # ------------------------------------------------------------------ one step

    def step(self, outbox: Outbox) -> None:
        """Compute one batch, or one piece of a long input; vectors go to their streams."""
        started_s = self._clock()
        self._expire(started_s, outbox)
        budget = self._budget()
        batch = self._batch or self._next_batch(budget, started_s)
        if batch is None:
            return
        try:
            if self._batch is None:
                self.num_batches += 1
                batch.pieces = self._runtime.embed_in_pieces(batch.inputs(), budget)
                self._batch = batch
            vectors = next(batch.pieces)
            if vectors is None:
                return
            self._check(vectors, len(batch.parts))
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything; others must go on
            self._batch = None
            self._failed(batch, error, outbox)
            return
        self._batch = None
        batch.close()
        self._deliver(batch, vectors, outbox)
        scheduled = [
            ScheduledTokens(job.request.tenant, len(tokens), 0, 0, _NO_SEQUENCE)
            for (job, _), tokens in zip(batch.parts, batch.inputs(), strict=True)
        ]
        engine = self._engine
        engine.reporter.embedded(scheduled, started_s, engine.num_runtime_errors)

    def _budget(self) -> int:
        """Most tokens of a batch: as many as a step may prefill beside what decodes now."""
        scheduler = self._engine.scheduler
        num_running = len(scheduler.running)
        return max(1, scheduler.prefill_budget(num_running, is_mixed=bool(num_running)))

    def _next_batch(self, budget: int, now_s: float) -> _Batch | None:
        parts: list[Part] = []
        while self._alone and not parts:
            parts = [part for part in [self._alone.popleft()] if not part[0].is_over]
        parts = parts or self._queue.take(self.info.max_inputs, budget)
        for job in {id(job): job for job, _ in parts}.values():
            job.num_batches += 1
            if job.started_s is None:
                job.started_s = now_s
            if job.is_taken:
                self._waits_no_more(job)
        return _Batch(parts) if parts else None

    def _waits_no_more(self, job: EmbeddingJob) -> None:
        # Only now: of what is half done the rest waits, and counts for the bounds of the queue.
        if job.is_counted:
            job.is_counted = False
            self.count_withdrawn(job.request)

    def _check(self, vectors: NDArray[Any], num_inputs: int) -> None:
        wanted = (num_inputs, self.info.width)
        if np.shape(vectors) != wanted:
            raise EngineError(
                f"the runtime returned vectors of shape {np.shape(vectors)}, not {wanted}"
            )

    def _deliver(self, batch: _Batch, vectors: NDArray[Any], outbox: Outbox) -> None:
        finite = np.isfinite(vectors).all(axis=1)
        for row, (job, index) in enumerate(batch.parts):
            if job.is_over:
                continue
            if not finite[row]:
                self._fail(job, index, EngineError("its vector is not finite"), outbox)
                continue
            job.stream.vectors[index] = vectors[row]
            job.num_done += 1
            job.done_tokens += len(job.request.inputs[index])
            if job.num_done == len(job.request.inputs):
                self._finish(job, FinishReason.STOP, outbox)

    def _failed(self, batch: _Batch, error: Exception, outbox: Outbox) -> None:
        """Find out whose fault it was: each input of a failed batch is computed once more, alone."""
        self.num_failures += 1
        logger.error("model %s: embedding failed: %r", self.model, error, exc_info=error)
        if len(batch.parts) > 1:
            self._alone.extend(batch.parts)
            return
        ((job, index),) = batch.parts
        if not job.is_over:
            self._fail(job, index, error, outbox)

    def _fail(self, job: EmbeddingJob, index: int, error: Exception, outbox: Outbox) -> None:
        if not isinstance(error, StokerError):
            error = EngineError(f"the model's runtime failed: {type(error).__name__}")
        elif isinstance(error, EngineError):
            error = EngineError(f"input {index} could not be embedded: {error}")
        self._finish(job, FinishReason.ERROR, outbox, error)

    def _finish(
        self,
        job: EmbeddingJob,
        reason: FinishReason,
        outbox: Outbox,
        error: Exception | None = None,
    ) -> None:
        """End a request: let go of it, deliver its delta, tell the observers."""
        now_s = self._clock()
        job.finish_reason, job.error, job.ended_s = reason, error, now_s
        self._forget(job)
        record = job.record(now_s)
        job.stream.records.append(record)
        usage = Usage(prompt_tokens=record.prompt_tokens)
        outbox.append((job.stream, Delta(finish_reason=reason, error=error, usage=usage)))
        self._engine.reporter.finished(record)

    def _forget(self, job: EmbeddingJob) -> None:
        """Take an ended job out of the queue, and drop the batch if nobody waits for it any more."""
        del self._jobs[job.stream]
        self._queue.remove(job)
        self._waits_no_more(job)
        batch = self._batch
        if batch is not None and all(part.is_over for part, _ in batch.parts):
            self._batch = None
            batch.close()

    def _expire(self, now_s: float, outbox: Outbox) -> None:
        for job in list(self._jobs.values()):
            request = job.request
            limits = [
                request.deadline_s,
                request.queue_deadline_s if job.started_s is None else None,
            ]
            if all(limit is None or now_s <= limit for limit in limits):
                continue
            where = "in the queue" if job.started_s is None else "while it was embedded"
            error = DeadlineError(
                f"the request's time ran out {where}, after {now_s - request.arrival_s:.1f} s, with "
                f"{job.num_done} of {len(request.inputs)} inputs embedded; raise its timeout, send fewer "
                "inputs, or retry when the server is less busy"
            )
            self._finish(job, FinishReason.ERROR, outbox, error)
