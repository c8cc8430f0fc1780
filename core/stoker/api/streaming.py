"""Server-sent events: one event for each delta with text, one chunk of bytes for each batch.

The hot path of the API. Only the text of an event is encoded; what surrounds it is made once for each
choice, and the encoder once for the process.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from stoker.api.connection import break_off
from stoker.api.errors import describe
from stoker.api.requests import Explain
from stoker.api.run import Run
from stoker.api.schemas import UsageBody
from stoker.errors import SlowReaderError
from stoker.logs import CURRENT_REQUEST

__all__ = ["EventEncoder", "EventStream", "stream_events", "wait_until_gone"]

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_MAX_EVENTS = 256  # of one chunk: a reader that fell behind gets what piled up in pieces


class EventEncoder:
    """Makes the events of one stream.

    Args:
        chat: Chat chunks, or text completion chunks.
        response_id: The ``id`` of all chunks.
        created: Seconds since 1970.
        model: The model's id.
        fingerprint: The ``system_fingerprint`` of all chunks.
        include_usage: Whether chunks have a ``usage``, which is ``null`` in all but the last.
    """

    def __init__(
        self,
        *,
        chat: bool,
        response_id: str,
        created: int,
        model: str,
        fingerprint: str,
        include_usage: bool,
    ) -> None:
        head = {
            "id": response_id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._chat = chat
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._end = b"]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"
        close = b"}" if chat else b""
        self._after = close + b',"logprobs":null,"finish_reason":null}' + self._end
        self._before: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """The event of some new text; the first of a chat choice comes with its role event."""
        before = self._before.get(index)
        if before is None:
            return self.start(index) + self.text(index, text)
        return before + _encode(text) + self._after

    def start(self, index: int) -> bytes:
        """What comes before a choice's first event; nothing if it has begun."""
        if index in self._before:
            return b""
        choice = b'%s{"index":%d,' % (self._head, index)
        if not self._chat:
            self._before[index] = choice + b'"text":'
            return b""
        self._before[index] = choice + b'"delta":{"content":'
        return choice + b'"delta":{"role":"assistant","content":""' + self._after

    def finish(self, index: int, reason: str) -> bytes:
        """The last event of a choice."""
        content = b'"delta":{}' if self._chat else b'"text":""'
        return (
            self.start(index)
            + b'%s{"index":%d,' % (self._head, index)
            + content
            + b',"logprobs":null,"finish_reason":"%s"}' % reason.encode()
            + self._end
        )

    def usage(self, usage: UsageBody) -> bytes:
        """The event with the token counts."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"


async def stream_events(
    run: Run, encoder: EventEncoder, *, include_usage: bool, explain: Explain | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's bytes; an error becomes the last event, without ``[DONE]``.

    Args:
        run: What to stream.
        encoder: Makes its events.
        include_usage: Whether the token counts come last.
        explain: If given, what it says becomes a comment before the end.

    Raises:
        Exception: An error before the first event: there is still time for a proper status.
    """
    events: list[bytes] = []
    has_begun = False
    try:
        async with contextlib.aclosing(run.batches()) as batches:
            async for offset, batch in batches:
                for delta in batch:
                    index = offset + delta.index
                    if delta.text:
                        events.append(encoder.text(index, delta.text))
                    if delta.finish_reason is not None:
                        events.append(encoder.finish(index, run.finish(offset, delta)))
                    if len(events) >= _MAX_EVENTS:
                        has_begun = True
                        yield _join(events)
                if events:
                    has_begun = True
                    yield _join(events)
    except Exception as error:
        if not (has_begun or events):
            raise
        context = CURRENT_REQUEST.get()
        if context is not None:
            context.error = type(error).__name__
        yield _join(events) + _comment(explain) + b"data: " + describe(error).body() + b"\n\n"
        return
    yield (encoder.usage(run.usage()) if include_usage else b"") + _comment(explain) + _DONE


def _join(events: list[bytes]) -> bytes:
    chunk = b"".join(events)
    events.clear()
    return chunk


def _comment(explain: Explain | None) -> bytes:
    return b"" if explain is None else b": stoker-explain %s\n\n" % explain().encode()


class EventStream(ASGIResponse):
    """A streaming answer that always lets go of what it streams from.

    A client that went away ends it. So does one that stays but stops reading, for the engine pauses it and
    gives it up at last; and what is left to send after the last token must move on within the same time.

    Args:
        first: The stream's first bytes.
        events: The rest of them.
        run: What they come from.
        headers: More headers.
        reader_timeout_s: How long nothing may be read once nothing more is generated.
    """

    __slots__ = ("_events", "_first", "_num_sent", "_reader_timeout_s", "_run")

    _should_set_content_length = False

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        run: Run,
        headers: Mapping[str, str],
        reader_timeout_s: float,
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._first = first
        self._events = events
        self._run = run
        self._reader_timeout_s = reader_timeout_s
        self._num_sent = 0

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
        tasks = (sending, gone, stalled)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
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
        await self._send_chunk(send, self._first)
        async for chunk in self._events:
            await self._send_chunk(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunk(self, send: Send, chunk: bytes) -> None:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._num_sent += 1

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
