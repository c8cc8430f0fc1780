"""Requests that this process makes of its own API, on behalf of a tenant: the same path, without a socket.

Whose request it is stands in the ASGI scope, which the server makes and no client can write into.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litestar.types import ASGIApp

from stoker.interfaces import HttpAnswer

__all__ = ["CALLER", "Caller", "call", "http_scope"]

CALLER = "stoker.caller"
"""The key of the ASGI scope under which a ``Caller`` stands."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, on this process's own word.

    Attributes:
        tenant: The tenant.
        priority: The priority of what it starts; ``None`` leaves that to the request.
    """

    tenant: str
    priority: int | None = None


async def call(
    app: ASGIApp,
    caller: Caller,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> HttpAnswer:
    """The application's answer, as a client would get it. Whoever is cancelled here has hung up.

    Args:
        app: The application.
        caller: Who asks.
        method: ``POST``, ...
        path: The path, without a query.
        body: The body.
        headers: Headers of the request, lower-case names.
    """
    pending = [{"type": "http.request", "body": body, "more_body": False}]
    never = asyncio.Event()
    status = 500
    answered: dict[str, str] = {}
    pieces: list[bytes] = []

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await never.wait()  # a client that waits for its answer sends nothing more
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message.get("headers", ()):
                answered[name.decode("latin-1").lower()] = value.decode("latin-1")
        else:
            pieces.append(message.get("body", b""))

    scope = http_scope(caller, method, path, body, headers)
    await app(scope, receive, send)
    return HttpAnswer(status_code=status, headers=answered, body=b"".join(pieces))


def http_scope(
    caller: Caller,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """The ASGI scope of such a request; arguments as of ``call``."""
    sent = {"host": "localhost", "content-length": str(len(body)), **(headers or {})}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": None,
        "server": None,
        "extensions": {},
        CALLER: caller,
    }
