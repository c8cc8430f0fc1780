"""Exceptions into OpenAI error objects: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
import math
from collections.abc import Mapping

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException
from litestar.response import Response
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Scope

from stoker.api.messages_errors import messages_error, speaks_anthropic
from stoker.api.schemas import ErrorBody, ErrorDetail
from stoker.errors import ModelError, OutOfMemoryError, RequestError, StokerError
from stoker.logs import CURRENT_REQUEST

__all__ = [
    "ClientDisconnectedError",
    "ErrorReply",
    "asgi_error",
    "describe",
    "error_body",
    "error_response",
    "handle_exception",
]

logger = logging.getLogger("stoker.api")

_SERVER_ERROR = "server_error"
_INVALID = "invalid_request_error"
_UNAVAILABLE_RETRY_S = (
    5.0  # nobody knows when the next server is there; a restart takes about so long
)
_MAX_MESSAGE = 4000
_MAX_PARAM = 500
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ClientDisconnectedError(Exception):
    """The client went away; nobody reads the answer, only the log does (499, as in nginx)."""


class ErrorReply(msgspec.Struct, frozen=True):
    """An error, as HTTP tells it.

    Attributes:
        status_code: HTTP status.
        detail: The error object.
        headers: More headers: ``Retry-After``, ``Allow``, ...
    """

    status_code: int
    detail: ErrorDetail
    headers: dict[str, str] = {}

    def body(self) -> bytes:
        """The JSON of the error object."""
        return msgspec.json.encode(ErrorBody(error=self.detail))


def describe(error: Exception) -> ErrorReply:
    """What to tell the client of any exception; what it must not know goes to the log."""
    if isinstance(error, RequestError):
        detail = ErrorDetail(
            message=_short(error.message, _MAX_MESSAGE),
            type=error.error_type,
            param=None if error.param is None else _short(error.param, _MAX_PARAM),
            code=error.code,
        )
        return ErrorReply(error.status_code, detail, _headers(error))
    if isinstance(error, HTTPException):
        return _describe_http(error)
    if isinstance(error, ClientDisconnectedError):
        return ErrorReply(499, ErrorDetail(message="the client went away", type=_INVALID))
    if isinstance(error, StokerError):
        status = 507 if isinstance(error, OutOfMemoryError) else 500
        status = 503 if isinstance(error, ModelError) and status == 500 else status
        logger.error("request failed: %s", error, exc_info=error)
        return ErrorReply(status, ErrorDetail(message=str(error), type=_SERVER_ERROR))
    logger.error("unexpected error", exc_info=error)
    return ErrorReply(500, _internal_error())


def _short(text: str, most: int) -> str:
    """A text that may quote what the client sent, which may be long."""
    return text if len(text) <= most else f"{text[:most]}..."


def _headers(error: RequestError) -> dict[str, str]:
    headers = dict(error.headers)
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status_code == 503 and "retry-after" not in headers:
        retry_after_s = _UNAVAILABLE_RETRY_S
    if retry_after_s is not None:
        # RFC 9110 knows whole seconds only; OpenAI's clients look at the milliseconds first.
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1e3)))
    if error.status_code == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def _internal_error() -> ErrorDetail:
    request = CURRENT_REQUEST.get()
    where = f" under request id {request.request_id}" if request is not None else ""
    return ErrorDetail(
        message=f"internal error; the server's log says more{where}",
        type=_SERVER_ERROR,
        code="internal_error",
    )


def _describe_http(error: HTTPException) -> ErrorReply:
    """Litestar's own errors: unknown paths, wrong methods, and what plugins' routes raise."""
    status = error.status_code
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if status >= 500:
        logger.error("request failed: %s", error.detail, exc_info=error)
        return ErrorReply(status, _internal_error(), headers)
    detail = ErrorDetail(
        message=error.detail or type(error).__name__,
        type="authentication_error" if status in {401, 403} else _INVALID,
        code=_CODES.get(status),
    )
    return ErrorReply(status, detail, headers)


def error_body(reply: ErrorReply, scope: Scope) -> bytes:
    """The JSON of an error, in the words of the API that was asked."""
    if speaks_anthropic(scope["path"], scope["headers"]):
        return messages_error(reply.status_code, reply.detail)
    return reply.body()


def error_response(reply: ErrorReply, scope: Scope) -> Response[bytes]:
    """The HTTP answer of an error."""
    return Response(
        content=error_body(reply, scope),
        status_code=reply.status_code,
        media_type="application/json",
        headers=reply.headers,
    )


def asgi_error(error: Exception, headers: Mapping[str, str]) -> ASGIApp:
    """The answer of an error that ended a request after it was started.

    Args:
        error: What went wrong.
        headers: More headers; those of the error win.
    """
    reply = describe(error)
    return ASGIResponse(
        body=reply.body(),
        status_code=reply.status_code,
        media_type="application/json",
        headers={**headers, **reply.headers},
    )


def handle_exception(request: Request, error: Exception) -> Response[bytes]:  # type: ignore[type-arg]
    """Litestar's exception handler for everything."""
    reply = describe(error)
    where = f"{request.method} {request.url.path}"
    if isinstance(error, HTTPException) and reply.status_code == 404:
        reply.detail.message = f"there is nothing at {where}; GET /schema lists what there is"
    elif isinstance(error, HTTPException) and reply.status_code == 405:
        allowed = reply.headers.get("allow", "")
        reply.detail.message = f"{where} is not possible; allowed here: {allowed}"
    context = CURRENT_REQUEST.get()
    if context is not None and reply.status_code >= 499:
        context.error = type(error).__name__
    return error_response(reply, request.scope)
