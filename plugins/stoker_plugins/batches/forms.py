"""What routes read of a request, with errors that name the parameter, and how they answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Request
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker import InvalidRequestError, RequestTooLargeError, ServerContext
from stoker.logs import CURRENT_REQUEST
from stoker.tenants import ANONYMOUS

__all__ = [
    "AnyRequest",
    "choice",
    "current_tenant",
    "ignore",
    "limit",
    "read_body",
    "reply",
    "unknown_query",
]

AnyRequest = Request[Any, Any, Any]
S = TypeVar("S", bound=msgspec.Struct)

_AT = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def current_tenant() -> str:
    """Who asks."""
    context = CURRENT_REQUEST.get()
    return ANONYMOUS if context is None else context.tenant


def ignore(context: ServerContext, names: Iterable[str]) -> dict[str, str]:
    """Headers that name the parameters that mean nothing here.

    Raises:
        InvalidRequestError: The server is strict, and there is one.
    """
    shown = sorted({re.sub(r"[^\x21-\x7e]", "?", name)[:100] for name in names})
    if not shown:
        return {}
    if context.config.server.strict:
        raise InvalidRequestError(
            f"there is no parameter {shown[0]!r}; leave it out",
            param=shown[0],
            code="unknown_parameter",
        )
    return {"x-stoker-warning": f"ignored: {', '.join(shown[:10])}"}


def unknown_query(request: AnyRequest, known: Collection[str]) -> list[str]:
    """Names of query parameters that a route does not know."""
    return [name for name in request.query_params if name not in known]


def limit(request: AnyRequest, default: int, most: int) -> int:
    """The query parameter ``limit``.

    Raises:
        InvalidRequestError: It is no number from 1 to ``most``.
    """
    value = request.query_params.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= most:
        raise InvalidRequestError(
            f"'limit' must be 1 to {most}, not {value[:100]!r}", param="limit", code="invalid_value"
        )
    return int(value)


def choice(request: AnyRequest, name: str, choices: Collection[str], default: str | None) -> Any:
    """A query parameter that is one of a few words.

    Raises:
        InvalidRequestError: It is another one.
    """
    value = request.query_params.get(name, default)
    if value is not None and value not in choices:
        raise InvalidRequestError(
            f"{name!r} must be one of {', '.join(sorted(choices))}, not {value[:100]!r}",
            param=name,
            code="invalid_value",
        )
    return value


async def read_body(request: AnyRequest, kind: type[S], most: int) -> tuple[S, list[str]]:
    """A JSON body, and the names of fields that it has and ``kind`` has not.

    Raises:
        InvalidRequestError: It is not JSON, or a field is missing or wrong.
        RequestTooLargeError: It is larger than ``most`` bytes.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"the content type is {media_type[:100]!r}; send JSON with the header "
            "'content-type: application/json'",
            code="invalid_content_type",
        )
    body = await _receive(request, most)
    try:
        body.decode()  # msgspec does not look into what it skips
        decoded = msgspec.json.decode(body, type=kind)
        names = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from None
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"the body cannot be parsed: {error}", code="invalid_json"
        ) from None
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    return decoded, [name for name in names if name not in known]


async def _receive(request: AnyRequest, most: int) -> bytes:
    body = bytearray()
    while True:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequestError("the client went away before the end of the body")
        body += message.get("body", b"")
        if len(body) > most:
            raise RequestTooLargeError(f"the body is larger than {most} bytes; shorten it")
        if not message.get("more_body", False):
            return bytes(body)


def _wrong_field(error: str) -> InvalidRequestError:
    match = _AT.fullmatch(error)
    what, path = (match["what"], match["path"] or "") if match else (error, "")
    param = path.replace("[...]", "").lstrip(".")
    missing = _MISSING.fullmatch(what)
    if missing:
        param = f"{param}.{missing['name']}".lstrip(".")
        return InvalidRequestError(
            f"{param!r} is missing", param=param, code="missing_required_parameter"
        )
    if not param:
        return InvalidRequestError(f"the body must be a JSON object: {what}", code="invalid_type")
    code: Literal["invalid_type", "invalid_value"]
    code = "invalid_type" if "got `" in what else "invalid_value"
    return InvalidRequestError(
        f"{param!r} is wrong: {what[0].lower()}{what[1:]}", param=param, code=code
    )


def reply(body: msgspec.Struct, headers: dict[str, str] | None = None) -> ASGIApp:
    """An answer with a JSON body."""
    return ASGIResponse(
        body=msgspec.json.encode(body), media_type="application/json", headers=headers
    )
