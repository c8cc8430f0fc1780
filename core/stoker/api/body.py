"""Request bodies: read within limits, decoded with errors that name the field."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
from litestar import Request

from stoker.api.errors import ClientDisconnectedError
from stoker.errors import InvalidRequestError, RequestTooLargeError

__all__ = ["BodyDecoder", "read_json_body"]

T = TypeVar("T")
Check = Callable[[dict[str, msgspec.Raw]], dict[str, str]]

_LARGE_BODY = 64 * 1024

# The start of a surrogate pair's escape without the other half, or the other half without a start.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_AT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


async def read_json_body(request: Request[Any, Any, Any], max_bytes: int) -> bytes:
    """The body of a JSON request.

    Raises:
        RequestTooLargeError: It is larger than ``max_bytes``; no more than that was kept.
        InvalidRequestError: It does not say that it is JSON.
        ClientDisconnectedError: The client went away before its end.
    """
    _check_headers(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check_headers(request: Request[Any, Any, Any], max_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"the content type is {content_type[:100]!r}; send JSON with the header "
            "'content-type: application/json'",
            code="invalid_content_type",
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise InvalidRequestError(
            f"the content encoding {encoding[:100]!r} is not supported; send the body uncompressed",
            code="invalid_content_encoding",
        )


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body is larger than {max_bytes} bytes; shorten it, or raise server.max_body_bytes"
    )


class BodyDecoder(Generic[T]):
    """Decodes one kind of body.

    Args:
        kind: The struct to decode into.
    """

    def __init__(self, kind: type[T]) -> None:
        self._typed = msgspec.json.Decoder(kind)
        self._raw = msgspec.json.Decoder(dict[str, msgspec.Raw])

    async def read(
        self, request: Request[Any, Any, Any], max_bytes: int, check: Check
    ) -> tuple[T, dict[str, str]]:
        """A request's body, and what ``check`` makes of its fields: the headers of the answer.

        Args:
            request: The request.
            max_bytes: Largest body.
            check: Looks at all fields, undecoded.

        Raises:
            RequestTooLargeError: It is larger than ``max_bytes``; no more than that was kept.
            InvalidRequestError: It cannot be decoded, or ``check`` says so.
            ClientDisconnectedError: The client went away before its end.
        """
        body = await read_json_body(request, max_bytes)
        if len(body) <= _LARGE_BODY:
            return self._decode_and_check(body, check)
        # Half a second for a hundred thousand little things; others are to be served meanwhile.
        return await asyncio.to_thread(self._decode_and_check, body, check)

    def _decode_and_check(self, body: bytes, check: Check) -> tuple[T, dict[str, str]]:
        decoded, raw = self.decode(body)
        return decoded, check(raw)

    def decode(self, body: bytes) -> tuple[T, dict[str, msgspec.Raw]]:
        """The struct, and all fields of the body undecoded: also those the struct does not know.

        Raises:
            InvalidRequestError: It is not JSON, or a field is missing, of the wrong type or out of range.
        """
        try:
            body.decode()  # msgspec does not look into what it skips
            return self._typed.decode(body), self._raw.decode(body)
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"the body is not valid UTF-8: byte {error.start} is {body[error.start]:#04x}",
                code="invalid_json",
            ) from None
        except RecursionError:
            raise InvalidRequestError(
                "the body's JSON is nested too deeply", code="invalid_json"
            ) from None
        except msgspec.ValidationError as error:
            raise _invalid_field(str(error)) from None
        except msgspec.DecodeError as error:
            raise InvalidRequestError(_malformed(str(error), body), code="invalid_json") from None


def _malformed(what: str, body: bytes) -> str:
    if not body:
        return "the body is empty; send a JSON object"
    if _LONE_SURROGATE.search(body):
        return "the body holds a lone surrogate: an escape \\uD800 to \\uDFFF that is not half of a pair"
    return f"the body cannot be parsed: {what}"


def _invalid_field(error: str) -> InvalidRequestError:
    """``Expected `int`, got `str` - at `$.messages[0].content``` -> param ``messages.0.content``."""
    match = _AT.fullmatch(error)
    what, path = (match["what"], match["path"] or "") if match else (error, "")
    param = path.replace("[...]", "").replace("[", ".").replace("]", "").lstrip(".")
    missing = _MISSING.fullmatch(what)
    if missing:
        param = f"{param}.{missing['name']}".lstrip(".")
        return InvalidRequestError(
            f"{param!r} is missing", param=param, code="missing_required_parameter"
        )
    if not param:
        return InvalidRequestError(f"the body must be a JSON object: {what}", code="invalid_type")
    code = "invalid_type" if "got `" in what else "invalid_value"
    what = what[0].lower() + what[1:]
    return InvalidRequestError(f"{param!r} is wrong: {what}", param=param, code=code)
