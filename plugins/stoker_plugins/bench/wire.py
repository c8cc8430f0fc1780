"""One HTTP request on a connection of its own, read at the smallest cost that still parses HTTP properly.

The load generator shares its cores with the server it measures, so what it spends on an event is missing
there: docs/decisions/0010-bench.md has the figures. One timestamp is taken for all that a read brought.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

import httptools

__all__ = ["Endpoint", "Listener", "Response", "WireError", "exchange"]

_MAX_LINE = 4 << 20
_MAX_BODY = 1 << 20


class WireError(Exception):
    """The exchange failed. Its text is the kind of failure, as tables count it."""


class Endpoint:
    """Where to connect, and what does not change between requests.

    Args:
        url: Base URL, such as ``http://127.0.0.1:8000/v1``.
        api_key: Presented as a bearer token.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts: SplitResult = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path.rstrip("/")
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        host = f"[{self.host}]" if ":" in self.host else self.host
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"Host: {host}:{self.port}\r\n{key}User-Agent: stoker-bench\r\nConnection: close\r\n"
        )

    def request(self, path: str, body: bytes | None) -> bytes:
        """The bytes of a request: GET, or POST of a JSON body."""
        if body is None:
            return f"GET {self.path}{path} HTTP/1.1\r\n{self._head}\r\n".encode()
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\n{self._head}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Listener(Protocol):
    """Told of what comes."""

    def on_event(self, data: bytes, now_s: float) -> None:
        """The data of a server-sent event, and when it came (``time.perf_counter``)."""


async def exchange(
    endpoint: Endpoint, path: str, body: bytes | None, listener: Listener | None = None
) -> Response:
    """Send a request and read the answer to its end.

    Args:
        endpoint: Where to.
        path: Below the base URL.
        body: JSON to POST; ``None`` for GET.
        listener: Told of every event, if the answer is an event stream.

    Returns:
        The answer, with its body unless it was a stream.

    Raises:
        WireError: No connection, a broken one, or no HTTP.
    """
    loop = asyncio.get_running_loop()
    response = Response(loop.create_future(), listener)
    try:
        transport, _ = await loop.create_connection(
            lambda: response, endpoint.host, endpoint.port, ssl=endpoint.ssl
        )
    except ConnectionRefusedError as error:
        raise WireError("connection refused") from error
    except ssl.SSLError as error:
        raise WireError(f"TLS: {error.reason or error}") from error
    except OSError as error:
        raise WireError(f"cannot connect: {error.strerror or error}") from error
    try:
        transport.write(endpoint.request(path, body))
        await response.done
    finally:
        transport.abort()
    return response


class Response(asyncio.Protocol):
    """Reads one answer.

    Args:
        done: Resolved at the end.
        listener: Told of every event of a stream.

    Attributes:
        status: HTTP status.
        headers: Lower-case names.
        body: What came, unless it was a stream of events.
        done: As given.
    """

    def __init__(self, done: asyncio.Future[None], listener: Listener | None) -> None:
        self.done = done
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self._on_event = None if listener is None else listener.on_event
        self._parser = httptools.HttpResponseParser(self)
        self._take: Callable[[bytes], None] = self._collect
        self._rest = b""
        self._now_s = 0.0
        self._until_close = False

    # ---- asyncio

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._end(error.__context__ if isinstance(error.__context__, WireError) else error)
        except httptools.HttpParserError:
            self._end(WireError("the answer is no HTTP"))

    def eof_received(self) -> None:
        """The server has said all: ``connection_lost`` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """An answer without a length ends so; any other one is broken off."""
        complete = self._until_close and exc is None
        self._end(None if complete else WireError("disconnected"))

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Decide what the body is."""
        self.status = self._parser.get_status_code()
        self._until_close = (
            "content-length" not in self.headers and "transfer-encoding" not in self.headers
        )
        kind = self.headers.get("content-type", "")
        if self._on_event is not None and self.status == 200 and "event-stream" in kind:
            self._take = self._split

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._take(data)

    def on_message_complete(self) -> None:
        """The end."""
        if self.status >= 200:  # not an interim answer
            self._end(None)

    # ---- ours

    def _collect(self, data: bytes) -> None:
        self.body += data[: _MAX_BODY - len(self.body)]

    def _split(self, data: bytes) -> None:
        """Hand on the events; one ends with its line, as every server of this API writes them."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_LINE:
            raise WireError("an event is too long")
        on_event, now_s = self._on_event, self._now_s
        if on_event is None:
            return
        for line in lines:
            if line.startswith(b"data:"):
                on_event(line[5:].strip(), now_s)

    def _end(self, error: BaseException | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
