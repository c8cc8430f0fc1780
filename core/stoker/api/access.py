"""The outermost layer, for every answer whoever made it: request ids, API keys, tenants, the access log."""

import logging
import re
import time
import uuid
from collections.abc import Awaitable
from typing import Any

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.types import Receive, Scope, Send

from stoker.api.auth import KeyRing
from stoker.api.errors import describe, error_body
from stoker.api.in_process import CALLER, Caller
from stoker.api.messages_errors import speaks_anthropic
from stoker.api.slow_bodies import impatient
from stoker.errors import RequestError
from stoker.logs import CURRENT_REQUEST, RequestContext
from stoker.tenants import ANONYMOUS

__all__ = ["Application"]

logger = logging.getLogger("stoker.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-:/+=]{1,128}")
_MAX_PATH = 200
_POLICY_VIOLATION = 1008  # RFC 6455


class Application(Litestar):
    """A Litestar application behind a gate.

    Litestar's own middleware does not see requests for unknown paths; this sees everything.

    Attributes:
        keys: Which API keys open it, and whose they are; may be replaced at any time.
        log_access: Whether to write a line for every request.
        body_timeout_s: How long a client may be silent within a body.
    """

    keys: KeyRing = KeyRing()
    log_access: bool = False
    body_timeout_s: float = 30.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI entry point."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket" and not self._may_pass(scope):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await super().__call__(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        try:
            self._identify(scope)
        except RequestError:
            return False
        return True

    def _identify(self, scope: Scope) -> str:
        client = scope.get("client")
        return self.keys.identify(scope["path"], scope["headers"], client[0] if client else None)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        request_id = _request_id(scope["headers"])
        context = RequestContext(request_id)
        token = CURRENT_REQUEST.set(context)
        id_headers = [(b"x-request-id", request_id.encode())]
        if speaks_anthropic(scope["path"], scope["headers"]):
            id_headers.append((b"request-id", request_id.encode()))
        status = 0

        def tagged(
            message: Any,
        ) -> Awaitable[None]:  # not a coroutine: it is called for every event
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *id_headers]
            return send(message)

        try:
            if _is_preflight(scope) and self.cors_config is not None:
                await super().__call__(scope, receive, tagged)
                return
            try:
                caller = scope.get(CALLER)
                if isinstance(caller, Caller):
                    context.tenant, context.priority = caller.tenant, caller.priority
                else:
                    context.tenant = self._identify(scope)
                    receive = impatient(receive, self.body_timeout_s)
            except RequestError as error:
                await self._refuse(scope, tagged, error)
                return
            await super().__call__(scope, receive, tagged)
        finally:
            if self.log_access:
                _log(scope, status, time.monotonic() - started_s, context)
            CURRENT_REQUEST.reset(token)

    async def _refuse(self, scope: Scope, send: Send, error: RequestError) -> None:
        reply = describe(error)
        body = error_body(reply, scope)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **reply.headers,
            **_cors_headers(self.cors_config, scope),
        }
        await send(
            {
                "type": "http.response.start",
                "status": reply.status_code,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _header(scope: Scope, name: bytes) -> bytes | None:
    headers: list[tuple[bytes, bytes]] = list(scope["headers"])
    return next((value for key, value in headers if key == name), None)


def _request_id(headers: Any) -> str:
    """The client's own, if it is fit to be sent back and logged."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks if it may ask; it cannot send a key then."""
    return (
        scope.get("method") == "OPTIONS"
        and _header(scope, b"origin") is not None
        and _header(scope, b"access-control-request-method") is not None
    )


def _cors_headers(config: CORSConfig | None, scope: Scope) -> dict[str, str]:
    """What lets a browser's script read an answer that Litestar's CORS layer does not see."""
    origin = (_header(scope, b"origin") or b"").decode("latin-1")
    if config is None or not origin or not config.is_origin_allowed(origin):
        return {}
    if config.is_allow_all_origins:
        return {"access-control-allow-origin": "*"}
    return {"access-control-allow-origin": origin, "vary": "Origin"}


def _log(scope: Scope, status: int, seconds: float, context: RequestContext) -> None:
    """One line; the path as it came, escaped, without the query, which may hold what is secret."""
    path = scope.get("raw_path") or scope["path"].encode()
    fields: dict[str, Any] = {
        "method": scope.get("method"),
        "path": path.partition(b"?")[0][:_MAX_PATH].decode("ascii", "backslashreplace"),
        "status": status or 499,
        "duration_ms": round(seconds * 1e3, 1),
    }
    if context.tenant != ANONYMOUS:
        fields["tenant"] = context.tenant
    if context.user:
        fields["user"] = context.user[:_MAX_USER]
    for name in ("model", "prompt_tokens", "completion_tokens", "error"):
        value = getattr(context, name)
        if value is not None:
            fields[name] = value
    details = [f"{name}={fields[name]!s}" for name in fields if name not in _IN_MESSAGE]
    message = "{method} {path} {status} {duration_ms} ms".format(**fields)
    logger.info("%s", " ".join([message, *details]), extra={"fields": fields})


_MAX_USER = 128
_IN_MESSAGE = {"method", "path", "status", "duration_ms"}
