"""Which requests run, and how the last ones went: what can be cancelled, and what can be explained.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from stoker.types import FinishReason, SequenceTrace

if TYPE_CHECKING:
    from stoker.errors import RequestError
    from stoker.interfaces import DeltaStream

__all__ = ["History", "RequestStatus", "TrackedRequest"]

_MAX_KEPT = 16  # traces of one ended request; a request may have hundreds of sequences

RequestStatus = Literal["waiting", "running", "finished", "cancelled", "failed", "aborted"]

_Key = tuple[str, str]  # tenant, request id: each tenant has ids of its own


class TrackedRequest:
    """One API request, from its arrival until it is forgotten.

    Args:
        request_id: The ``x-request-id`` of its answer; the client may have chosen it, even twice.
        tenant: Whose it is.
        model: The served model's id.
        endpoint: ``"chat"`` or ``"completion"``.
        created: Arrival, in seconds since 1970.

    Attributes:
        num_sequences: Sequences of all its generations.
        is_cancelled: Whether somebody cancelled it through the API.
        is_over: Whether nothing of it runs any more.
    """

    __slots__ = (
        "_ended_as",
        "_num_open",
        "_streams",
        "_traces",
        "created",
        "endpoint",
        "is_cancelled",
        "is_over",
        "model",
        "num_sequences",
        "request_id",
        "tenant",
    )

    def __init__(
        self, request_id: str, tenant: str, model: str, endpoint: str, created: int
    ) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.model = model
        self.endpoint = endpoint
        self.created = created
        self.num_sequences = 0
        self.is_cancelled = False
        self.is_over = False
        self._streams: list[DeltaStream] = []
        self._traces: list[SequenceTrace] = []
        self._ended_as: RequestStatus = "aborted"
        self._num_open = 1  # whoever starts it; each of its generations adds one

    def add(self, stream: DeltaStream) -> None:
        """Take in one of its generations."""
        self._streams.append(stream)
        self._num_open += 1
        self.num_sequences += stream.request.n

    def cancel(self, error: RequestError) -> None:
        """End what runs of it; its reader gets ``error``."""
        self.is_cancelled = True
        for stream in self._streams:
            stream.cancel(error)

    def traces(self) -> list[SequenceTrace]:
        """What the scheduler did with its sequences so far; of an ended one, the first 16."""
        if self.is_over:
            return self._traces
        return [trace for stream in self._streams for trace in stream.traces()]

    def status(self) -> RequestStatus:
        """``waiting`` (no lane yet), ``running``, ``finished``, ``cancelled``, ``failed`` or ``aborted``."""
        return self._ended_as if self.is_over else self._status_of(self.traces())

    def _status_of(self, traces: list[SequenceTrace]) -> RequestStatus:
        statuses = {trace.status for trace in traces}
        if statuses == {"finished"} and len(traces) == self.num_sequences:
            return self._ending(traces)
        return "running" if statuses - {"waiting"} else "waiting"

    def _ending(self, traces: list[SequenceTrace]) -> RequestStatus:
        reasons = {trace.finish_reason for trace in traces}
        if FinishReason.ERROR in reasons:
            return "cancelled" if self.is_cancelled else "failed"
        return "aborted" if FinishReason.ABORT in reasons else "finished"

    def release(self) -> bool:
        """Let go of it, once for its start and once for each generation; returns whether that was the last.

        Then only what is worth remembering is kept, and prompts and texts are let go of.
        """
        self._num_open -= 1
        if self._num_open:
            return False
        traces = self.traces()
        self._ended_as = self._ending(traces)
        self._traces = traces[:_MAX_KEPT]
        self._streams = []
        self.is_over = True
        return True


class History:
    """The requests that run, and the last ones that ended.

    Args:
        limit: How many ended requests are remembered, of all tenants.
    """

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self._running: dict[_Key, list[TrackedRequest]] = {}
        self._ended: OrderedDict[_Key, TrackedRequest] = OrderedDict()

    def begin(self, tracked: TrackedRequest) -> None:
        """A request has arrived."""
        self._running.setdefault(_key(tracked), []).append(tracked)

    def release(self, tracked: TrackedRequest) -> None:
        """A part of a request is over; with its last part it becomes one of the ended ones.

        It is forgotten at once if it never started anything.
        """
        if not tracked.release():
            return
        key = _key(tracked)
        running = self._running[key]
        running.remove(tracked)
        if not running:
            del self._running[key]
        if not tracked.num_sequences or self.limit <= 0:
            return
        self._ended.pop(key, None)  # an id that was used again stands for its latest request
        self._ended[key] = tracked
        while len(self._ended) > self.limit:
            self._ended.popitem(last=False)

    def running(self, tenant: str, request_id: str) -> list[TrackedRequest]:
        """What runs under an id of a tenant."""
        return list(self._running.get((tenant, request_id), ()))

    def find(self, tenant: str, request_id: str) -> TrackedRequest | None:
        """The latest request under an id of a tenant, running or ended."""
        running = self._running.get((tenant, request_id))
        return running[-1] if running else self._ended.get((tenant, request_id))

    def recent(self, tenant: str, limit: int) -> list[TrackedRequest]:
        """A tenant's requests, at most ``limit``: those that run first, then the ended ones; latest first."""
        found: list[TrackedRequest] = []
        for tracked in self._latest_first():
            if len(found) >= limit:
                break
            if tracked.tenant == tenant:
                found.append(tracked)
        return found

    def _latest_first(self) -> Iterator[TrackedRequest]:
        for running in reversed(self._running.values()):
            yield from reversed(running)
        yield from reversed(self._ended.values())


def _key(tracked: TrackedRequest) -> _Key:
    return tracked.tenant, tracked.request_id
