"""The HTTP connection: what it may cost, and how to break it off.

Uvicorn waits for a request as long as it takes, and buffers as much of its head as comes. Here a head has a
size and a time, a connection's pipeline an end, and all connections a number. What is refused gets an error
object, as from the API itself.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stoker.api.schemas import ErrorBody, ErrorDetail

if sys.platform != "win32":
    import resource

__all__ = ["HttpProtocol", "bounded_protocol", "break_off"]

logger = logging.getLogger("stoker.api")

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers together; more get 431."""
MAX_HEADERS = 256
MAX_PIPELINED = 16
"""Requests that a connection may send ahead of their answers; more end it."""

_EXTENSION = "stoker.connection"
_SPARE_FILES = 128  # for models, databases, sockets that listen, ...
_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol within bounds, whose requests can break off their connection.

    Attributes:
        head_timeout_s: How long a connection may take for the head of a request, also for the first one,
            and for what it still sends of a request that was answered.
        max_connections: Most connections at once; 0 for no limit.
    """

    head_timeout_s: float = 30.0
    max_connections: int = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes since the last progress that a request has made
        self._head_is_read = False
        self._is_over = False

    # ------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects."""
        super().connection_made(transport)
        if 0 < self.max_connections < len(self.connections):
            self._refuse(
                503,
                ErrorDetail(
                    message="the server has as many connections as it takes; try again later",
                    type="server_error",
                    code="too_many_connections",
                ),
            )
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes; those of a request's head are counted."""
        if self._is_over:
            return
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._timer is None and self._is_between_requests():
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(
            400,
            ErrorDetail(
                message="this is not a valid HTTP request",
                type="invalid_request_error",
                code="invalid_http",
            ),
        )

    def handle_websocket_upgrade(self) -> None:
        """The connection goes on as something else, by somebody else."""
        self._is_over = True
        super().handle_websocket_upgrade()

    # ------------------------------------------------------------------ the parser's events

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._unread = 0
        self._head_is_read = False
        self.scope["extensions"] = {_EXTENSION: {"break_off": self.transport.abort}}

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those after a body would change a request that is being answered."""
        if not self._head_is_read:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's head is there; its handler starts."""
        self._unread = 0
        self._head_is_read = True
        if self._is_over:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_head()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._break_off("too many pipelined requests")
        else:
            self._stop_timer()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._unread = 0
        if not self._is_over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request's end."""
        self._unread = 0
        if not self._is_over:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer's end; whoever still sends the request gets some time for that."""
        super().on_response_complete()
        if self._is_between_requests() and self.cycle.more_body and self._timer is None:
            self._start_timer()

    # ------------------------------------------------------------------ bounds

    def _is_between_requests(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and not self.pipeline

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.scope is not None and not self._head_is_read:
            self._refuse(
                408,
                ErrorDetail(
                    message=f"the request's head did not come within {self.head_timeout_s:g} s",
                    type="timeout_error",
                    code="request_timeout",
                ),
            )
        else:
            self._break_off("it was silent for too long, or did not end its request")

    def _refuse_head(self) -> None:
        self._refuse(
            431,
            ErrorDetail(
                message=f"the request line and headers are more than {MAX_HEAD_BYTES} bytes or "
                f"{MAX_HEADERS} headers",
                type="invalid_request_error",
                code="headers_too_large",
            ),
        )

    def _refuse(self, status: int, detail: ErrorDetail) -> None:
        """Answer with an error and close; only close if that would get into another answer."""
        if self._is_over:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._break_off(detail.message)
            return
        self._is_over = True
        body = msgspec.json.encode(ErrorBody(error=detail))
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, _REASONS[status], len(body), body)
        )
        self.transport.close()

    def _break_off(self, why: str) -> None:
        self._is_over = True
        logger.debug("a connection is broken off: %s", why)
        self.transport.abort()


def bounded_protocol(head_timeout_s: float, max_connections: int) -> type[HttpProtocol]:
    """The protocol with these bounds.

    Args:
        head_timeout_s: See there.
        max_connections: See there; 0 for as many as the process may open files, but for a few.
    """
    most = max_connections or _most_connections()
    bounds = {"head_timeout_s": head_timeout_s, "max_connections": most}
    return type("BoundedHttpProtocol", (HttpProtocol,), bounds)


def _most_connections() -> int:
    if sys.platform != "win32":
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            return max(16, soft - _SPARE_FILES)
    return 0


def break_off(scope: Any) -> bool:
    """Break off a request's connection, sent or not; returns whether the server can do that."""
    connection = (scope.get("extensions") or {}).get(_EXTENSION)
    if connection is None:
        return False
    connection["break_off"]()
    return True
