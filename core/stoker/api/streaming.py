"""Streams of server-sent events: a chunk of bytes for each batch of deltas, and how it is sent."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from stoker.api.connection import break_off
from stoker.api.events import KEEP_ALIVE, StreamEncoder
from stoker.api.requests import Explain
from stoker.api.run import Run
from stoker.errors import SlowReaderError
from stoker.logs import CURRENT_REQUEST

__all__ = ["EventStream", "stream_events", "wait_until_gone"]

_MAX_EVENTS = 256  # of one chunk: a reader that fell behind gets what piled up in pieces


async def stream_events(
    run: Run, encoder: StreamEncoder, explain: Explain | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's bytes; an error becomes the last event.

    Args:
        run: What to stream.
        encoder: Makes its events.
        explain: If given, what it says becomes a comment before the end.

    Raises:
        Exception: An error before the first event: there is still time for a proper status.
    """
    events: list[bytes] = []
    has_begun = False
    begin = encoder.begin()
    try:
        async with contextlib.aclosing(run.batches()) as batches:
            async for offset, batch in batches:
                for delta in batch:
                    index = offset + delta.index
                    event = encoder.delta(index, delta)
                    if event:
                        events.append(event)
                    if delta.finish_reason is not None:
                        events.append(encoder.finish(index, delta, run.finish(offset, delta)))
                    if len(events) >= _MAX_EVENTS:
                        has_begun, begin = True, b"".join((begin, *events))
                        events.clear()
                        yield begin
                        begin = b""
                if events:
                    has_begun, begin = True, b"".join((begin, *events))
                    events.clear()
                    yield begin
                    begin = b""
    except Exception as error:
        if not (has_begun or events):
            raise
        context = CURRENT_REQUEST.get()
        if context is not None:
            context.error = type(error).__name__
        yield begin + b"".join(events) + _comment(explain) + encoder.error(error)
        return
    yield begin + encoder.end(_comment(explain))


def _comment(explain: Explain | None) -> bytes:
    return b"" if explain is None else b": stoker-explain %s\n\n" % explain().encode()


class EventStream(ASGIResponse):
    """A streaming answer that always lets go of what it streams from.

    A client that went away ends it. So does one that stays but stops reading, for the engine pauses it and
    gives it up at last; and what is left to send after the last token must move on within the same time.

    A stream whose first bytes are not there yet is begun all the same, and kept alive by comments: then an
    error before them is an event, too. So is a stream that pauses.

    Args:
        first: Becomes the stream's first bytes.
        events: The rest of them.
        run: What they come from.
        encoder: Makes the event of an error before the first bytes.
        headers: More headers.
        reader_timeout_s: How long nothing may be read once nothing more is generated.
        keep_alive_s: After so long without anything to send, a comment is sent; 0 for none.
    """

    __slots__ = (
        *(
            "_encoder",
            "_events",
            "_first",
            "_has_begun",
            "_is_sending",
            "_keep_alive_s",
            "_num_sent",
        ),
        *("_reader_timeout_s", "_run"),
    )

    _should_set_content_length = False

    def __init__(
        self,
        first: asyncio.Future[bytes],
        events: AsyncGenerator[bytes, None],
        run: Run,
        encoder: StreamEncoder,
        headers: Mapping[str, str],
        reader_timeout_s: float,
        keep_alive_s: float = 0.0,
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._first = first
        self._events = events
        self._run = run
        self._encoder = encoder
        self._reader_timeout_s = reader_timeout_s
        self._keep_alive_s = keep_alive_s
        self._num_sent = 0
        self._is_sending = False
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with contextlib.aclosing(self._events):
            error: BaseException | None = None
            try:
                await self._send_or_drop(scope, receive, send)
            except BaseException as failure:
                error = failure
                raise
            finally:
                self._run.close(error)

    async def _send_or_drop(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        stalled = asyncio.ensure_future(self._wait_until_stalled())
        tasks = [sending, gone, stalled]
        if self._keep_alive_s:
            tasks.append(asyncio.ensure_future(self._keep_alive(send)))
        try:
            await asyncio.wait(tasks[:3], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif stalled.done() and not gone.done():
                stalled.result()
                self._run.close(SlowReaderError("the client has stopped reading"))
                if break_off(scope):
                    await gone
        finally:
            for task in tasks:
                task.cancel()
            # They must have ended, or the generator that one of them runs could not be closed.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await self.start_response(send)
        if not self._first.done():
            await self._send_chunk(send, KEEP_ALIVE)
        try:
            first = await self._first
        except Exception as error:  # noqa: BLE001 - too late for a status: whatever it is, it is told
            first = self._encoder.error(error)
        await self._send_chunk(send, first)
        self._has_begun = True
        async for chunk in self._events:
            await self._send_chunk(send, chunk)
        self._is_sending = True  # for good
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunk(self, send: Send, chunk: bytes) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._is_sending = False
        self._num_sent += 1

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever nothing was sent for long: proxies and clients give up on silence."""
        num_sent = -1
        while True:
            if num_sent == self._num_sent and num_sent and not self._is_sending:
                # What the encoder has made is not sent yet, or nothing may come before it.
                pause = self._encoder.keep_alive() if self._has_begun else KEEP_ALIVE
                await send({"type": "http.response.body", "body": pause, "more_body": True})
            num_sent = self._num_sent
            await asyncio.sleep(self._keep_alive_s)

    async def _wait_until_stalled(self) -> None:
        """Return once nothing more is generated and the client does not take what is there."""
        await self._run.wait_until_over()
        patience_s = self._run.patience_s(self._reader_timeout_s)
        num_sent = -1
        while patience_s and num_sent != self._num_sent:
            num_sent = self._num_sent
            await asyncio.sleep(patience_s)


async def wait_until_gone(receive: Receive) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
