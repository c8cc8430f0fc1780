"""A real server inside the test's process: all of stoker but the socket, in front of any model.

::

    async with AppHarness(config, plugins) as app:
        answer = await app.ask("/v1/completions", {"prompt": "hello", "max_tokens": 5})
        stream = app.open("/v1/completions", {"prompt": "hello", "stream": True})
        await stream.first_byte()
        await stream.hang_up()
        await app.wait_until_idle()
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec

from stoker.api.in_process import Caller, http_scope
from stoker.interfaces import HttpAnswer
from stoker.server import Server

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.discovery import Plugins

__all__ = ["AppHarness", "OpenRequest"]

_PATIENCE_S = 60.0  # so that what never comes is an error and does not hang


class OpenRequest:
    """A request whose answer may still be coming. Made by ``AppHarness.open``.

    Attributes:
        status_code: HTTP status; 0 until it is known.
        headers: The answer's headers, lower-case names.
    """

    def __init__(self, app: Any, scope: Any, body: bytes) -> None:
        self.status_code = 0
        self.headers: dict[str, str] = {}
        self._pending = [{"type": "http.request", "body": body, "more_body": False}]
        self._pieces: list[bytes] = []
        self._gone = asyncio.Event()
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: Any, scope: Any) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            self._came.set()

    async def _receive(self) -> Any:
        if self._pending:
            return self._pending.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status_code = message["status"]
            for name, value in message.get("headers", ()):
                self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        elif message.get("body"):
            self._pieces.append(message["body"])
            self._came.set()

    async def first_byte(self) -> bytes:
        """Wait for the beginning of the body; what has come of it so far."""
        async with asyncio.timeout(_PATIENCE_S):
            await self._came.wait()
        return b"".join(self._pieces)

    async def finish(self) -> HttpAnswer:
        """Wait for the end of the answer."""
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.shield(self._task)
        return HttpAnswer(
            status_code=self.status_code, headers=self.headers, body=b"".join(self._pieces)
        )

    async def hang_up(self) -> None:
        """Go away, as a client that closes its connection; returns when the application has let go."""
        self._gone.set()
        _, late = await asyncio.wait([self._task], timeout=_PATIENCE_S)
        if late:
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if late:
            raise TimeoutError("the application did not notice that the client hung up")


class AppHarness:
    """A server and its application, entered as an asynchronous context manager.

    Args:
        config: Its configuration.
        plugins: Its plugins, such as ``Plugins.of(...)``.

    Attributes:
        server: The server.
    """

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.server = Server(config, plugins)
        self._leave = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.server.build()
        self._leave.callback(self.server.stop)
        self.server.start()
        await self._leave.enter_async_context(cast(Any, self.server.app).lifespan())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave.aclose()

    def open(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        method: str = "POST",
        tenant: str = "anonymous",
        headers: Mapping[str, str] | None = None,
    ) -> OpenRequest:
        """Send a request and go on.

        Args:
            path: The path, without a query.
            body: Becomes JSON; ``None`` for no body.
            method: HTTP method.
            tenant: In whose name.
            headers: More headers, lower-case names.
        """
        data = b"" if body is None else msgspec.json.encode(body)
        sent = {"content-type": "application/json", **(headers or {})}
        scope = http_scope(Caller(tenant), method, path, data, sent)
        return OpenRequest(self.server.app, scope, data)

    async def ask(self, path: str, body: Mapping[str, Any] | None = None, **how: Any) -> HttpAnswer:
        """Send a request and wait for all of its answer; ``how`` as in ``open``."""
        return await self.open(path, body, **how).finish()

    async def wait_until_idle(self) -> None:
        """Wait until nothing runs or waits, and the router knows of no request."""

        def is_idle() -> bool:
            loads = [self.server.load(model.model_id) for model in self.server.models()]
            busy = any(load.num_running or load.num_waiting or load.num_paused for load in loads)
            return not busy and not self.server.router.num_active

        await self.wait_until(is_idle)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: It did not happen within a minute.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError("what was waited for did not happen")
            await asyncio.sleep(0.002)
