"""The central loop: one thread per device, one step at a time, for every model on that device.

::

    drain the inbox -> ask the scheduler for a plan -> runtime.step -> sample -> update -> publish

The first and the last happen here; what lies between is ``ModelEngine.step``. With several models on a
device, those that have work take turns, so that models share the machine by rule.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.engine.client import RequestStream, deliver
from stoker.errors import UnavailableError
from stoker.types import Delta, FinishReason

if TYPE_CHECKING:
    from stoker.engine.model_engine import ModelEngine, Outbox

__all__ = ["EngineLoop"]

logger = logging.getLogger("stoker.engine")

_SHUTDOWN = "the server is shutting down; send the request elsewhere"
_IDLE_WAIT_S = 1.0  # how long an idle loop sleeps before it shows a heartbeat


class EngineLoop:
    """Drives the engines of one device.

    Args:
        device: The device's name, for the thread and the logs.
        clock: Monotonic seconds.

    Attributes:
        heartbeat_s: When the loop last came round; what liveness is judged by.
    """

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device = device
        self.engines: list[ModelEngine] = []
        self.heartbeat_s = clock()
        self._clock = clock
        self._inbox: deque[tuple[ModelEngine | None, RequestStream]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._closed = False  # nothing may enter the inbox any more; under the lock
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

    def post_submit(self, engine: ModelEngine, stream: RequestStream) -> None:
        """Hand a request to the loop.

        Raises:
            UnavailableError: The loop has ended, or is about to.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError(_SHUTDOWN, code="server_shutdown")
            self._inbox.append((engine, stream))
        self._wake.set()

    def post_abort(self, stream: RequestStream) -> None:
        """Tell the loop that a request's reader has gone."""
        self._inbox.append((None, stream))
        self._wake.set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------ the loop's thread

    def _run(self) -> None:
        while not self._stopping:
            self.heartbeat_s = self._clock()
            if not self.step():
                self._wake.wait(_IDLE_WAIT_S)
                self._wake.clear()
        with self._lock:
            self._closed = True
        self._drain_inbox()
        outbox: Outbox = []
        for engine in self.engines:
            engine.abort_all(UnavailableError(_SHUTDOWN, code="server_shutdown"), outbox)
        self._publish(outbox)

    def step(self) -> bool:
        """One step of every model that has work; returns whether there was any."""
        self._drain_inbox()
        worked = False
        for engine in self.engines:
            if engine.has_work:
                outbox: Outbox = []
                self._step_engine(engine, outbox)
                self._publish(outbox)
                # An abort is obeyed within one step, whichever model's step that was.
                self._drain_inbox()
                worked = True
        return worked

    def _step_engine(self, engine: ModelEngine, outbox: Outbox) -> None:
        try:
            engine.step(outbox)
        except Exception as error:
            # Not a runtime's failure (those are handled inside) but a bug of ours: the requests of
            # this model cannot be trusted any more, those of other models and later ones can.
            logger.exception("model %s: the loop failed", engine.model)
            try:
                engine.abort_all(error, outbox)
            except Exception:
                # Whatever state this model is in, the thread must live for the others.
                logger.exception("model %s: its requests could not be ended", engine.model)

    def _drain_inbox(self) -> None:
        outbox: Outbox = []
        while self._inbox:
            engine, stream = self._inbox.popleft()
            if engine is not None:
                self._submit(engine, stream)
                continue
            for candidate in self.engines:
                candidate.abort(stream, outbox)
        self._publish(outbox)

    def _submit(self, engine: ModelEngine, stream: RequestStream) -> None:
        try:
            engine.submit(stream)
        except Exception as error:
            logger.exception("model %s: a request could not be queued", engine.model)
            reason = FinishReason.ERROR
            deltas = [
                Delta(index=i, finish_reason=reason, error=error) for i in range(stream.request.n)
            ]
            self._publish([(stream, delta) for delta in deltas])

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
                    for engine in self.engines:
                        engine.abort(stream, [])
