"""Responses that run without a client: started, followed, cancelled, and kept when they are over."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence

from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from stoker.api.connection import break_off
from stoker.api.events import KEEP_ALIVE
from stoker.api.responses.answer_schemas import Item
from stoker.api.responses.builder import ResponseBuilder
from stoker.api.responses.form import drive
from stoker.api.responses.records import KeptResponse
from stoker.api.responses.store import ResponseStore
from stoker.api.run import Run
from stoker.api.streaming import wait_until_gone
from stoker.errors import RateLimitError, RequestCancelledError, UnavailableError

__all__ = ["BackgroundJob", "BackgroundJobs", "JobStream"]

logger = logging.getLogger("stoker.responses")

_MAX_EVENT_BYTES = 16 * 2**20  # of one response; who follows a longer one is told to poll
_MAX_UNKEPT = 100  # responses that are over and could not be stored
_TOO_LONG = b": this response has become too long to be followed; ask for it without stream\n\n"
_ENDED = frozenset({"completed", "incomplete", "failed", "cancelled"})


class BackgroundJob:
    """A response that runs without a client.

    Args:
        tenant: Whose it is.
        builder: Builds it.
        items: Its input's items.
        with_events: Whether its events can be followed.

    Attributes:
        events: Its events so far; an event's index is its sequence number.
        is_cut: Whether later events were left out.
    """

    def __init__(
        self, tenant: str, builder: ResponseBuilder, items: Sequence[Item], *, with_events: bool
    ) -> None:
        self.tenant = tenant
        self.builder = builder
        self.items = list(items)
        self.with_events = with_events
        self.events: list[bytes] = []
        self.is_cut = False
        self.task: asyncio.Task[None] | None = None
        self._num_bytes = 0
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.builder.response.status in _ENDED

    def tell(self, events: Sequence[bytes]) -> None:
        """Take in some more events."""
        if self.with_events and not self.is_cut:
            self._num_bytes += sum(map(len, events))
            self.is_cut = self._num_bytes > _MAX_EVENT_BYTES
            if not self.is_cut:
                self.events += events
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int) -> AsyncGenerator[bytes, None]:
        """Its events from a sequence number on, as they come, until it is over."""
        at = start
        while True:
            changed, is_over = self._changed, self.is_over
            if at < len(self.events):
                events = self.events[at:]
                at += len(events)
                yield b"".join(events)
            elif self.is_cut:
                yield _TOO_LONG
                return
            elif is_over:
                return
            else:
                await changed.wait()

    def kept(self) -> KeptResponse:
        """What is to be stored of it now."""
        self.builder.settle()
        events = b"".join(self.events) if self.is_over and self.with_events else None
        return KeptResponse(
            response=self.builder.response,
            input=self.items,
            events=None if self.is_cut else events,
        )


class BackgroundJobs:
    """All that run, and those that are over but could not be stored.

    Args:
        store: Keeps them.
        limit: How many of a tenant may run at once.
    """

    def __init__(self, store: ResponseStore, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._jobs: OrderedDict[str, BackgroundJob] = OrderedDict()
        self._is_closing = False

    def find(self, response_id: str, tenant: str) -> BackgroundJob | None:
        """A tenant's job."""
        job = self._jobs.get(response_id)
        return job if job is not None and job.tenant == tenant else None

    def check_room(self, tenant: str) -> None:
        """Refuse a tenant's next one if there are too many already.

        Raises:
            RateLimitError: There are.
        """
        running = [job for job in self._jobs.values() if job.tenant == tenant and not job.is_over]
        if len(running) >= self._limit:
            raise RateLimitError(
                f"{len(running)} responses run in the background, as many as responses.max_background "
                "allows; wait for one of them, or cancel it",
                param="background",
            )

    async def start(self, job: BackgroundJob, run: Run) -> None:
        """Store it as it begins, and let it run.

        Args:
            job: The response.
            run: Its generation.

        Raises:
            UnavailableError: It cannot be stored, so that nobody could ask for it.
        """
        response = job.builder.response
        self._jobs[response.id] = job
        try:
            job.tell(job.builder.create())
            problem = await self._store.put(job.kept(), job.tenant, is_running=True)
            if problem:
                raise UnavailableError(
                    f"this response cannot be stored, and could not be asked for later: {problem}; "
                    "send it without 'background'"
                )
        except BaseException:
            self._jobs.pop(response.id, None)
            raise
        job.task = asyncio.ensure_future(self._run(job, run))
        await asyncio.sleep(0)  # a task that never began would be cancelled without a word

    async def _run(self, job: BackgroundJob, run: Run) -> None:
        builder = job.builder
        error: BaseException | None = None
        try:
            async with contextlib.aclosing(drive(run, builder)) as batches:
                async for events in batches:
                    job.tell(events)
            job.tell([builder.end(run.usage())])
        except asyncio.CancelledError:
            error = RequestCancelledError("the response was cancelled")
            if self._is_closing:
                error = UnavailableError("the server stopped while this response was generated")
        except Exception as failure:  # noqa: BLE001 - whatever it is becomes part of the response
            error = failure
        run.close(error)
        if error is not None:
            job.tell([builder.fail(error)])
        await self._keep(job)

    async def _keep(self, job: BackgroundJob) -> None:
        response_id = job.builder.response.id
        # Whoever cancels this must not take back what is being written.
        problem = await asyncio.shield(self._store.put(job.kept(), job.tenant))
        if not problem:
            self._jobs.pop(response_id, None)
            return
        self._jobs.move_to_end(response_id)
        over = [key for key, other in self._jobs.items() if other.is_over]
        for key in over[: max(0, len(over) - _MAX_UNKEPT)]:
            del self._jobs[key]

    async def cancel(self, job: BackgroundJob) -> None:
        """End it, if it runs; returns when it has."""
        if job.task is None or job.is_over:
            return
        job.task.cancel()
        await asyncio.wait((job.task,))

    def forget(self, response_id: str) -> None:
        """It was deleted."""
        self._jobs.pop(response_id, None)

    async def close(self) -> None:
        """End all."""
        self._is_closing = True
        jobs = list(self._jobs.values())
        for job in jobs:
            if job.task is not None and not job.is_over:
                job.task.cancel()
        tasks = [job.task for job in jobs if job.task is not None]
        if tasks:
            await asyncio.wait(tasks)


class JobStream(ASGIResponse):
    """The events of a job, for one who follows it. Who leaves, or stops reading, leaves it alone.

    Args:
        events: The events.
        keep_alive_s: After so long without an event a comment is sent; 0 for none.
        reader_timeout_s: A client that takes nothing for so long is given up; 0 for never.
        headers: More headers.
    """

    __slots__ = ("_events", "_keep_alive_s", "_reader_timeout_s")

    _should_set_content_length = False

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keep_alive_s: float,
        reader_timeout_s: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._reader_timeout_s = reader_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:  # it has stopped reading, and would keep us waiting for ever
            break_off(scope)
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await self.start_response(send)
        while True:
            following = asyncio.ensure_future(_next(self._events))
            try:
                chunk = await self._waited(following, send)
            finally:
                following.cancel()
            if chunk is None:
                break
            await self._chunk(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _waited(self, following: asyncio.Future[bytes | None], send: Send) -> bytes | None:
        """The next events; comments while there are none."""
        while True:
            done, _ = await asyncio.wait((following,), timeout=self._keep_alive_s or None)
            if done:
                return following.result()
            await self._chunk(send, KEEP_ALIVE)

    async def _chunk(self, send: Send, chunk: bytes) -> None:
        async with asyncio.timeout(self._reader_timeout_s or None):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)
