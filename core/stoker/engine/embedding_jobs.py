"""What is to be embedded: requests with many inputs each, and whose input is next.

Requests of the lowest ``priority`` come first; among those the tenant that had the fewest tokens for its
weight (as in fair queueing); within a tenant each request in turn.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.client import RequestStream
from stoker.errors import RequestError, StokerError
from stoker.tenants import Tenants
from stoker.types import FinishReason, Request, RequestRecord, SequenceTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.loop import EngineLoop

__all__ = ["EmbeddingJob", "EmbeddingQueue", "EmbeddingStream", "Part"]


class EmbeddingStream(RequestStream):
    """A request whose inputs are embedded: one delta, its last, when all vectors are there.

    Args:
        request: The request.
        loop: The engine loop to tell about an abort.
        width: Numbers of a vector.

    Attributes:
        vectors: ``float32[len(request.inputs), width]``, as the runtime pooled them; complete when the last
            delta says so.
        job: What the engine knows of it.
    """

    __slots__ = ("job", "vectors")

    def __init__(self, request: Request, loop: EngineLoop, width: int) -> None:
        super().__init__(request, loop)
        self.vectors: NDArray[np.float32] = np.zeros((len(request.inputs), width), np.float32)
        self.job: EmbeddingJob | None = None

    def traces(self) -> list[SequenceTrace]:
        """What has happened to it so far; from any thread."""
        if self.job is None:
            return super().traces()
        return [self.job.trace(self._loop.clock())]


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """A request's inputs on their way through the embedder.

    Attributes:
        stream: Where the vectors go.
        ahead: Requests that waited when it arrived.
        num_taken: Inputs that have gone into a batch.
        num_done: Inputs whose vectors are there.
        done_tokens: Their tokens.
        num_batches: Batches that held inputs of it.
        started_s: When its first input went into a batch.
        ended_s: When it ended.
        finish_reason: Why it ended.
        error: What it ended with.
        is_counted: Whether it counts as waiting.
    """

    stream: EmbeddingStream
    ahead: int = 0
    num_taken: int = 0
    num_done: int = 0
    done_tokens: int = 0
    num_batches: int = 0
    started_s: float | None = None
    ended_s: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    is_counted: bool = True

    @property
    def request(self) -> Request:
        """The request."""
        return self.stream.request

    @property
    def is_taken(self) -> bool:
        """Whether all of its inputs have gone into batches."""
        return self.num_taken == len(self.request.inputs)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def trace(self, now_s: float) -> SequenceTrace:
        """What happened to it so far, in the words of sequences: ``prefill`` once it is being computed."""
        arrival_s = self.request.arrival_s
        end_s = now_s if self.ended_s is None else self.ended_s
        status = "waiting" if self.started_s is None else "prefill"
        return SequenceTrace(
            status=status if self.finish_reason is None else "finished",
            queue_s=(end_s if self.started_s is None else self.started_s) - arrival_s,
            total_s=end_s - arrival_s,
            waiting_ahead=self.ahead,
            prompt_tokens=len(self.request.prompt_token_ids),
            computed_tokens=self.done_tokens,
            num_prefill_steps=self.num_batches,
            admitted_by="" if self.started_s is None else "turn of the embedder",
            finish_reason=self.finish_reason,
            error=self._error_for_its_owner(),
        )

    def _error_for_its_owner(self) -> str | None:
        # What was not raised on purpose may tell what no client should know.
        if self.error is None or isinstance(self.error, StokerError):
            return None if self.error is None else str(self.error)
        return "internal error"

    def record(self, now_s: float) -> RequestRecord:
        """What observers are told at its end."""
        trace = self.trace(now_s)
        error = self.error
        return RequestRecord(
            request_id=self.request.request_id,
            model=self.request.model,
            tenant=self.request.tenant,
            finish_reason=self.finish_reason or FinishReason.ABORT,
            prompt_tokens=trace.prompt_tokens,
            cached_tokens=0,
            completion_tokens=0,
            queue_s=trace.queue_s,
            time_to_first_token_s=None,
            total_s=trace.total_s,
            num_preemptions=0,
            error=None if error is None else str(error),
            error_code=error.code if isinstance(error, RequestError) else None,
            trace=trace,
        )


Part = tuple[EmbeddingJob, int]
"""A job and the index of one of its inputs."""


class EmbeddingQueue:
    """The jobs that have inputs which nobody has taken yet.

    Args:
        tenants: Weights.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        # By priority and tenant, the next job first.
        self._queues: dict[tuple[int, str], deque[EmbeddingJob]] = {}
        self._served: dict[str, float] = {}  # tokens / weight, of the tenants in the queue
        self._num_jobs: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, job: EmbeddingJob) -> None:
        """Queue a job."""
        tenant = job.request.tenant
        if tenant not in self._served:
            # Who was away has not saved anything up.
            self._served[tenant] = min(self._served.values(), default=0.0)
        self._num_jobs[tenant] += 1
        self._queues.setdefault((job.request.priority, tenant), deque()).append(job)

    def take(self, max_inputs: int, max_tokens: int) -> list[Part]:
        """The inputs that are next: as many as fit, but at least one if there is any.

        Args:
            max_inputs: Most inputs.
            max_tokens: Most tokens, unless the first input has more.
        """
        parts: list[Part] = []
        total = 0
        while self._queues and len(parts) < max_inputs:
            key = min(self._queues, key=lambda key: (key[0], self._served[key[1]]))
            job = self._queues[key][0]
            num_tokens = len(job.request.inputs[job.num_taken])
            if parts and total + num_tokens > max_tokens:
                break
            parts.append((job, job.num_taken))
            job.num_taken += 1
            total += num_tokens
            self._served[key[1]] += num_tokens / self._tenants.get(key[1]).weight
            self._queues[key].rotate(-1)
            if job.is_taken:
                self.remove(job)
        return parts

    def remove(self, job: EmbeddingJob) -> None:
        """Forget a job; does nothing if it is not here."""
        tenant = job.request.tenant
        key = (job.request.priority, tenant)
        queue = self._queues.get(key, ())
        if not queue or job not in queue:
            return
        queue.remove(job)
        if not queue:
            del self._queues[key]
        self._num_jobs[tenant] -= 1
        if not self._num_jobs[tenant]:
            del self._num_jobs[tenant], self._served[tenant]
