"""Input files: one request a line, checked before any of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from stoker_plugins.batches.schemas import BatchError

__all__ = ["InputLimits", "InputLine", "InputRequest", "Scan", "read_request", "scan"]

_MAX_ERRORS = 100
_MAX_ID = 512
_LINE_OVERHEAD = 4096  # what a line may hold beside a body of the largest size
_SHOWN = 100  # characters of a client's value in a message


class InputLine(NamedTuple):
    """Where a request stands in its file.

    Attributes:
        offset: Bytes before it.
        length: Bytes of it.
    """

    offset: int
    length: int


class InputRequest(msgspec.Struct):
    """A line of an input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Outline(msgspec.Struct):
    """A line, before its fields are checked."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: Any = None


class InputLimits(NamedTuple):
    """What a file may hold.

    Attributes:
        endpoint: Where all requests must go.
        models: The models that are served, the default first.
        max_requests: Most requests.
        max_body_bytes: Largest body.
    """

    endpoint: str
    models: tuple[str, ...]
    max_requests: int
    max_body_bytes: int


class Scan:
    """What was found in an input file.

    Attributes:
        lines: Its requests, in order.
        custom_ids: Their ids, in the same order.
        errors: What is wrong with it; not all of it, if that is a lot.
        model: The model that all requests are for.
    """

    def __init__(self) -> None:
        self.lines: list[InputLine] = []
        self.custom_ids: list[str] = []
        self.errors: list[BatchError] = []
        self.model: str | None = None


_outline_decoder = msgspec.json.Decoder(_Outline)
_request_decoder = msgspec.json.Decoder(InputRequest)


def read_request(file: BinaryIO, line: InputLine) -> InputRequest:
    """A request of a file that was scanned without errors."""
    file.seek(line.offset)
    return _request_decoder.decode(file.read(line.length))


def scan(path: Path, limits: InputLimits, should_stop: Callable[[], bool]) -> Scan:
    """Check every line of a file. Takes seconds for a large one, and little memory: bodies are not kept.

    Args:
        path: The file.
        limits: What it may hold.
        should_stop: Asked at every line; what was found until then is returned.
    """
    found = Scan()
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line, raw in _lines(file, limits.max_body_bytes + _LINE_OVERHEAD):
            if should_stop() or len(found.errors) >= _MAX_ERRORS:
                return found
            if len(found.lines) >= limits.max_requests:
                found.errors.append(
                    BatchError(
                        code="too_many_requests",
                        message=f"a batch may have {limits.max_requests} requests; split the file",
                        line=number,
                    )
                )
                return found
            error = _check(raw, limits, found, seen)
            if error is None:
                found.lines.append(line)
            else:
                error.line = number
                found.errors.append(error)
    if not found.lines and not found.errors:
        message = "the input file holds no request; write one JSON object on each line"
        found.errors.append(BatchError(code="empty_file", message=message))
    return found


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, InputLine, bytes | None]]:
    """Number, place and content of each line that is not blank; no content for one that is too long."""
    number = offset = 0
    while raw := file.readline(limit):
        number += 1
        length = len(raw)
        is_whole = raw.endswith(b"\n") or length < limit
        while not is_whole:
            rest = file.readline(limit)
            length += len(rest)
            is_whole = rest.endswith(b"\n") or len(rest) < limit
            raw = b""
        if raw.strip():
            yield number, InputLine(offset, length), raw
        elif not raw:
            yield number, InputLine(offset, length), None
        offset += length


def _check(
    raw: bytes | None, limits: InputLimits, found: Scan, seen: set[str]
) -> BatchError | None:
    """What is wrong with a line, if anything; takes in its id and model."""
    if raw is None:
        return BatchError(
            code="line_too_long",
            message=f"the line is longer than a body of {limits.max_body_bytes} bytes allows",
        )
    try:
        raw.decode()  # msgspec does not look into what it skips
        outline = _outline_decoder.decode(raw)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        return BatchError(
            code="invalid_json_line", message=f"the line is not a JSON object in UTF-8: {error}"
        )
    wrong = (
        _check_custom_id(outline.custom_id, seen)
        or _check_address(outline, limits)
        or _check_body(outline.body, limits, found)
    )
    if wrong is None:
        seen.add(outline.custom_id)
        found.custom_ids.append(outline.custom_id)
    return wrong


def _check_custom_id(custom_id: Any, seen: set[str]) -> BatchError | None:
    if custom_id is None:
        return _missing("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID:
        return BatchError(
            code="invalid_custom_id",
            message=f"custom_id must be a string of 1 to {_MAX_ID} characters",
            param="custom_id",
        )
    if custom_id in seen:
        return BatchError(
            code="duplicate_custom_id",
            message=f"custom_id {_shown(custom_id)} stands on an earlier line, too; each needs its own",
            param="custom_id",
        )
    return None


def _check_address(outline: _Outline, limits: InputLimits) -> BatchError | None:
    if outline.method is None:
        return _missing("method")
    if outline.method != "POST":
        return BatchError(
            code="invalid_method",
            message=f"the method must be 'POST', not {_shown(outline.method)}",
            param="method",
        )
    if outline.url is None:
        return _missing("url")
    if outline.url != limits.endpoint:
        return BatchError(
            code="invalid_url",
            message=f"the batch's endpoint is {limits.endpoint!r}, and this line's url is "
            f"{_shown(outline.url)}; all must be the same",
            param="url",
        )
    return None


def _check_body(body: Any, limits: InputLimits, found: Scan) -> BatchError | None:
    if body is None:
        return _missing("body")
    if not isinstance(body, dict):
        return BatchError(code="invalid_body", message="body must be a JSON object", param="body")
    for name in ("stream", "background"):
        if body.get(name) not in (None, False):
            return BatchError(
                code="unsupported_parameter",
                message=f"body.{name} is not possible in a batch; leave it out",
                param=f"body.{name}",
            )
    return _check_model(body.get("model"), limits, found)


def _check_model(model: Any, limits: InputLimits, found: Scan) -> BatchError | None:
    if model is None:
        model = limits.models[0]
    if not isinstance(model, str) or model not in limits.models:
        return BatchError(
            code="model_not_found",
            message=f"the model {_shown(model)} is not served here; served: {', '.join(limits.models)}",
            param="body.model",
        )
    if found.model is None:
        found.model = model
    if model != found.model:
        return BatchError(
            code="mismatched_model",
            message=f"the batch's first request is for {_shown(found.model)}, and this one for "
            f"{_shown(model)}; make one batch for each model",
            param="body.model",
        )
    return None


def _missing(name: str) -> BatchError:
    return BatchError(code="missing_required_parameter", message=f"{name!r} is missing", param=name)


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN]
