"""The central loop: one thread per device, one step at a time, for every model on that device.

::

    drain the inbox -> ask the scheduler for a plan -> runtime.step -> sample -> update -> publish

The first and the last happen here; what lies between is ``ModelEngine.step``. With several models on a
device, those that have work share its time by their weights (stride scheduling, Waldspurger and Weihl 1995):
the one that had the least time for its weight is next, and what one leaves idle is the others'. What a model
embeds takes turns with what it generates in the same way, as if it were another model's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from stoker.engine.client import RequestStream, deliver
from stoker.errors import UnavailableError
from stoker.types import Delta, FinishReason

if TYPE_CHECKING:
    from stoker.engine.embedding import EmbeddingEngine
    from stoker.engine.model_engine import ModelEngine, Outbox
    from stoker.errors import RequestError

__all__ = ["EngineLoop"]

logger = logging.getLogger("stoker.engine")

_SHUTDOWN = "the server is shutting down; send the request elsewhere"
T = TypeVar("T")
Member: TypeAlias = "ModelEngine | EmbeddingEngine"

_IDLE_WAIT_S = 1.0  # how long an idle loop sleeps before it shows a heartbeat


class EngineLoop:
    """Drives the engines of one device.

    Args:
        device: The device's name, for the thread and the logs.
        clock: Monotonic seconds.

    Attributes:
        engines: What generates, one for each model.
        embedders: What embeds, one for each model that can.
        heartbeat_s: When the loop last came round; what liveness is judged by.
    """

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device = device
        self.engines: list[ModelEngine] = []
        self.embedders: list[EmbeddingEngine] = []
        self.heartbeat_s = clock()
        self.clock = clock
        # What to do, given where to put deltas.
        self._inbox: deque[Callable[[Outbox], None]] = deque()
        self._ready: list[Member] = []  # those that had work in the last step
        self._device_time: dict[Member, float] = {}  # of those: seconds / weight
        self._ahead: dict[
            Member, float
        ] = {}  # of the others: what they had more than others when they left
        self._wake = threading.Event()
        self._stopping = False
        self._closed = False  # nothing may enter the inbox any more; under the lock
        self._num_paused = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=self._run, name=f"stoker-loop-{self.device}", daemon=True
        )
        self._thread.start()

    def stop(self, timeout_s: float = 60.0) -> bool:
        """End every request with an error, then the thread; returns whether it ended in time."""
        self._stopping = True
        self._wake.set()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def post_submit(self, engine: Member, stream: RequestStream) -> None:
        """Hand a request to the loop.

        Raises:
            UnavailableError: The loop has ended, or is about to.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError(_SHUTDOWN, code="server_shutdown")
            self._inbox.append(lambda outbox: self._submit(engine, stream, outbox))
        self._wake.set()

    def post_abort(self, stream: RequestStream) -> None:
        """Tell the loop that a request's reader has gone."""
        self._inbox.append(lambda outbox: self._end(stream, None, outbox))
        self._wake.set()

    def post_cancel(self, stream: RequestStream, error: RequestError) -> None:
        """Tell the loop to end a request with an error."""
        self._inbox.append(lambda outbox: self._end(stream, error, outbox))
        self._wake.set()

    def post_call(self, action: Callable[[], T]) -> Future[T]:
        """Have something done on the loop's thread, between two steps.

        Raises:
            UnavailableError: The loop has ended, or is about to.
        """
        future: Future[T] = Future()

        def run(_: Outbox) -> None:
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                future.set_exception(error)

        with self._lock:
            if self._closed:
                raise UnavailableError(_SHUTDOWN, code="server_shutdown")
            self._inbox.append(run)
        self._wake.set()
        return future

    def reader_moved(self) -> None:
        """Tell the loop that a reader has read, if that may matter to it."""
        if self._num_paused:
            self._wake.set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------ the loop's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.heartbeat_s = self.clock()
                if not self.step():
                    self._wake.wait(_IDLE_WAIT_S)
                    self._wake.clear()
        except BaseException:
            # Nobody must wait for a loop that is gone, and health must tell at once.
            logger.critical("the loop of %s died", self.device, exc_info=True)
            self.heartbeat_s = float("-inf")
        finally:
            self._close()

    def _close(self) -> None:
        """Let nothing enter any more, and end what is there."""
        with self._lock:
            self._closed = True
        self._drain_inbox()
        for member in self._members():
            self._end_all(member, UnavailableError(_SHUTDOWN, code="server_shutdown"))

    def _end_all(self, engine: Member, error: Exception) -> None:
        """End every request of a model with an error."""
        outbox: Outbox = []
        try:
            engine.abort_all(error, outbox)
        except Exception:
            # Whatever state this model is in, the thread must live for the others.
            logger.exception("model %s: its requests could not be ended", engine.model)
        self._publish(outbox)

    def step(self) -> bool:
        """One step of the model whose turn it is; returns whether there was work."""
        self._drain_inbox()
        self._look_after_readers()
        ready = [member for member in self._members() if member.has_work]
        if ready != self._ready:
            self._change_over(ready)
        if not ready:
            for engine in self.engines:
                self._attempt(engine, partial(_tidy, engine))
            return False
        member = min(ready, key=self._device_time.__getitem__)
        started_s = self.clock()
        self._attempt(member, member.step)
        spent_s = self.clock() - started_s
        self._device_time[member] += spent_s / member.weight
        return True

    def _members(self) -> list[Member]:
        return [*self.engines, *self.embedders]

    def _change_over(self, ready: list[Member]) -> None:
        """Let members come and go: nobody saves time up; what one had while others were idle is forgotten.

        Who leaves takes along what it had more than those it had to share with; who comes starts with that.
        """
        time = self._device_time
        least = min(time.values(), default=0.0)
        for member in self._ready:
            if member not in ready:
                self._ahead[member] = time.pop(member) - least
        least = min(time.values(), default=0.0)
        for member in ready:
            if member not in time:
                time[member] = least + self._ahead.pop(member, 0.0)
        self._ready = ready

    def _look_after_readers(self) -> None:
        num_paused = 0
        for engine in self.engines:
            if engine.scheduler.paused:
                self._attempt(engine, engine.look_after_readers)
                num_paused += len(engine.scheduler.paused)
        self._num_paused = num_paused

    def _attempt(self, engine: Member, action: Callable[[Outbox], None]) -> None:
        """Do something for a model and publish what comes of it."""
        outbox: Outbox = []
        failure: Exception | None = None
        try:
            action(outbox)
        except Exception as error:
            # Not a runtime's failure (those are handled inside) but a bug of ours: the requests of
            # this model cannot be trusted any more, those of other models and later ones can.
            logger.exception("model %s: the loop failed", engine.model)
            failure = error
        self._publish(outbox)
        if failure is not None:
            self._end_all(engine, failure)

    def _drain_inbox(self) -> None:
        if not self._inbox:
            return
        outbox: Outbox = []
        while self._inbox:
            action = self._inbox.popleft()
            try:
                action(outbox)
            except Exception:
                # A bug of ours as well; what else is in the inbox must not be lost with it.
                logger.exception("the loop of %s could not take what it was sent", self.device)
        self._publish(outbox)

    def _end(self, stream: RequestStream, error: RequestError | None, outbox: Outbox) -> None:
        for member in self._members():
            if error is None:
                member.abort(stream, outbox)
            else:
                member.cancel(stream, error, outbox)

    def _submit(self, engine: Member, stream: RequestStream, outbox: Outbox) -> None:
        try:
            engine.submit(stream)
        except Exception as error:
            logger.exception("model %s: a request could not be queued", engine.model)
            engine.count_withdrawn(stream.request)
            reason = FinishReason.ERROR
            outbox += [
                (stream, Delta(index=i, finish_reason=reason, error=error))
                for i in range(stream.request.n)
            ]

    def _publish(self, outbox: Outbox) -> None:
        """Hand a step's deltas to their readers: one call per event loop."""
        if not outbox:
            return
        by_loop: dict[asyncio.AbstractEventLoop, Outbox] = {}
        for item in outbox:
            by_loop.setdefault(item[0].event_loop, []).append(item)
        for event_loop, batch in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(deliver, batch)
            except RuntimeError:  # the readers' event loop is closed: nobody is left to read
                for stream in {stream for stream, _ in batch}:
                    for member in self._members():
                        member.abort(stream, [])


def _tidy(engine: ModelEngine, _: Outbox) -> None:
    """Drop kept prefixes that are too old, also while nothing runs."""
    engine.scheduler.lanes.expire()
