"""Server-sent events: one event for each delta with text, one chunk of bytes for each batch.

The hot path of the API. Only the text of an event is encoded; what surrounds it is made once for each
choice, and the encoder once for the process.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable

import msgspec
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Scope, Send

from stoker.api.errors import describe
from stoker.api.run import Run
from stoker.api.schemas import UsageBody
from stoker.logs import CURRENT_REQUEST

__all__ = ["EventEncoder", "EventStream", "stream_events"]

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


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
    run: Run, encoder: EventEncoder, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's bytes; an error becomes the last event, without ``[DONE]``."""
    events: list[bytes] = []
    try:
        async with contextlib.aclosing(run.batches()) as batches:
            async for offset, batch in batches:
                for delta in batch:
                    index = offset + delta.index
                    if delta.text:
                        events.append(encoder.text(index, delta.text))
                    if delta.finish_reason is not None:
                        events.append(encoder.finish(index, run.finish(offset, delta)))
                if events:
                    yield b"".join(events)
                    events.clear()
    except Exception as error:  # noqa: BLE001 - the status is sent; the stream must tell it
        context = CURRENT_REQUEST.get()
        if context is not None:
            context.error = type(error).__name__
        yield b"".join(events) + b"data: " + describe(error).body() + b"\n\n"
        return
    yield (encoder.usage(run.usage()) if include_usage else b"") + _DONE


class EventStream(ASGIStreamingResponse):
    """A streaming answer that always lets go of what it streams from.

    Litestar cancels the stream when the client goes away, but a generator that was never started, or that
    was cancelled while its chunk was being sent, would only be closed by the garbage collector.

    Args:
        events: The stream's bytes.
        on_close: Called when it is over, however it ended.
        headers: More headers.
    """

    __slots__ = ("_events", "_on_close")

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_close: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            iterator=events,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with contextlib.aclosing(self._events):
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._on_close()
