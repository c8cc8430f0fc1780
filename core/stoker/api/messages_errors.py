"""Errors in Anthropic's words: ``{"type": "error", "error": {"type", "message"}, "request_id"}``.

Also who wants them: whoever asks for ``/v1/messages``, or for the models with ``anthropic-version``.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from stoker.api.messages_answers import (
    ErrorType,
    MessagesError,
    MessagesErrorBody,
    MessagesErrorDetails,
)
from stoker.api.schemas import ErrorDetail
from stoker.logs import CURRENT_REQUEST

__all__ = ["messages_error", "speaks_anthropic"]

_BY_STATUS: dict[int, ErrorType] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_OWN_PATH = "/v1/messages"
_SHARED_PATH = "/v1/models"
_VERSION = b"anthropic-version"


def speaks_anthropic(path: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request is one to Anthropic's API, and its answer has to be one of it.

    Args:
        path: The path that was asked for.
        headers: The headers, with lower-case names.
    """
    if _is_below(path, _OWN_PATH):
        return True
    return _is_below(path, _SHARED_PATH) and any(name == _VERSION for name, _ in headers)


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def messages_error(status_code: int, detail: ErrorDetail) -> bytes:
    """The JSON of an error.

    Args:
        status_code: Its HTTP status; tells its type.
        detail: What went wrong.
    """
    request = CURRENT_REQUEST.get()
    details: Any = None
    if detail.code or detail.param:
        details = MessagesErrorDetails(error_code=detail.code, param=detail.param)
    other: ErrorType = "api_error" if status_code >= 500 else "invalid_request_error"
    message = detail.message
    if detail.param and detail.param not in message:
        message = f"{detail.param}: {message}"  # most clients show nothing but the message
    body = MessagesErrorBody(
        error=MessagesError(
            type=_BY_STATUS.get(status_code, other), message=message, details=details
        ),
        request_id="" if request is None else request.request_id,
    )
    return msgspec.json.encode(body)
