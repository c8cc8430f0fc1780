"""Uploads: ``multipart/form-data`` read piece by piece, written to disk, never whole in memory."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

import msgspec
from litestar import Request
from multipart import (
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from stoker import DeadlineError, InvalidRequestError, RequestTooLargeError, UnavailableError
from stoker_plugins.batches.archive import Archive, Store
from stoker_plugins.batches.schemas import FileExpiration

__all__ = ["Upload", "receive_upload"]

_GROUP_BYTES = 2**20  # written at once
_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 16
_MAX_OVERHEAD = 512 * 1024  # what a form may hold beside the file
_MAX_FILENAME = 255
_STALLED_S = 60.0  # without a byte
_FIELDS = {"purpose", "expires_after", "expires_after[anchor]", "expires_after[seconds]"}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Upload:
    """What a client sends to be kept.

    Attributes:
        filename: What the client calls the file.
        size: Its bytes; ``None`` if there was no file.
        fields: The other fields of the form.
        ignored: Names of fields that mean nothing here.
    """

    def __init__(self) -> None:
        self.filename = ""
        self.size: int | None = None
        self.fields: dict[str, str] = {}
        self.ignored: list[str] = []

    def check_purpose(self) -> None:
        """Refuse other purposes than ``batch``.

        Raises:
            InvalidRequestError: It is another one, or missing.
        """
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise _missing("purpose")
        if purpose != "batch":
            raise InvalidRequestError(
                f"the purpose {purpose[:100]!r} is not served here; the only one is 'batch'",
                param="purpose",
                code="unsupported_value",
            )

    def expires_after_s(self) -> int | None:
        """How long to keep it, if the client says so.

        Raises:
            InvalidRequestError: What it says is wrong.
        """
        whole = self.fields.get("expires_after")
        parts = {
            name: self.fields[f"expires_after[{name}]"]
            for name in ("anchor", "seconds")
            if f"expires_after[{name}]" in self.fields
        }
        if whole is None and not parts:
            return None
        try:
            if whole is not None:
                return msgspec.json.decode(whole, type=FileExpiration).seconds
            return msgspec.convert(parts, FileExpiration, strict=False).seconds
        except msgspec.DecodeError as error:
            raise InvalidRequestError(
                "'expires_after' is wrong: give the anchor 'created_at' and 3600 to 2592000 seconds; "
                f"{error}",
                param="expires_after",
                code="invalid_value",
            ) from None


async def receive_upload(
    request: Request[Any, Any, Any], archive: Archive, file_id: str, max_bytes: int
) -> Upload:
    """Write the file of a request to its place in the archive; it is not in the database then.

    Whoever calls this discards the file if anything goes wrong, here or later.

    Args:
        request: The request.
        archive: Where to.
        file_id: The file's id.
        max_bytes: Largest file.

    Raises:
        InvalidRequestError: It is no such form.
        RequestTooLargeError: The file is too large, or there is no room.
        DeadlineError: The client stopped sending.
        UnavailableError: The disk does not take it.
    """
    _check_length(request, max_bytes)
    writer = _Writer(archive, file_id, max_bytes)
    reader = _FormReader(Upload(), writer)
    try:
        parser = PushMultipartParser(
            _boundary(request), max_segment_count=_MAX_PARTS, max_header_size=_MAX_FIELD_BYTES
        )
        with parser:
            async for chunk in _chunks(request, max_bytes):
                for event in parser.parse(chunk):
                    reader.take(event)
                if writer.is_due:
                    await writer.write()
                if parser.closed:
                    break
        await writer.write()
    except MultipartError as error:
        raise InvalidRequestError(
            f"the body is not the form that its content type promises: {error}",
            code="invalid_multipart",
        ) from None
    except OSError as error:
        raise UnavailableError(f"the disk does not take the file: {error}") from error
    finally:
        await writer.close()
    if reader.upload.size is None:
        raise _missing("file")
    return reader.upload


def _check_length(request: Request[Any, Any, Any], max_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes + _MAX_OVERHEAD:
        raise _too_large(max_bytes)


def _boundary(request: Request[Any, Any, Any]) -> str:
    content_type = request.headers.get("content-type", "")
    media_type, options = parse_options_header(content_type)
    if media_type.lower() != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequestError(
            f"the content type is {content_type[:100]!r}; send a form as 'multipart/form-data' with its "
            "boundary",
            code="invalid_content_type",
        )
    return str(options["boundary"])


async def _chunks(request: Request[Any, Any, Any], max_bytes: int) -> AsyncIterator[bytes]:
    """The pieces of the body."""
    size = 0
    while True:
        try:
            async with asyncio.timeout(_STALLED_S):
                message: Any = await request.receive()
        except TimeoutError:
            raise DeadlineError(f"nothing of the body came for {_STALLED_S:g} s") from None
        if message["type"] == "http.disconnect":
            raise InvalidRequestError("the client went away before the end of the body")
        if message.get("body"):
            size += len(message["body"])
            if size > max_bytes + _MAX_OVERHEAD:
                raise _too_large(max_bytes)
            yield message["body"]
        if not message.get("more_body", False):
            return


class _Writer:
    """Collects the file's bytes and writes them in groups, in the archive's thread."""

    def __init__(self, archive: Archive, file_id: str, max_bytes: int) -> None:
        self._archive = archive
        self._file_id = file_id
        self._max_bytes = max_bytes
        self._pending: list[bytes] = []
        self._num_pending = 0
        self._file: BinaryIO | None = None
        self.size = 0

    @property
    def is_due(self) -> bool:
        return self._num_pending >= _GROUP_BYTES

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._pending.append(data)
        self._num_pending += len(data)

    async def write(self) -> None:
        pending, self._pending, self._num_pending = self._pending, [], 0
        await self._archive.run(self._append, b"".join(pending))

    def _append(self, store: Store, data: bytes) -> None:
        if self._file is None:
            self._file = store.path(self._file_id).open("xb")
        store.grow(self._file_id, len(data))
        self._file.write(data)

    async def close(self) -> None:
        """Wait until it is all on disk."""

        def close(_: Store) -> None:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

        await self._archive.run(close)


class _FormReader:
    """Sorts what the parser finds into fields and the file."""

    def __init__(self, upload: Upload, writer: _Writer) -> None:
        self.upload = upload
        self._writer = writer
        self._name = ""
        self._value = bytearray()

    def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        """Take one of the parser's events: the start of a part, a piece of it, or its end (``None``)."""
        if event is None:
            self._end()
        elif isinstance(event, MultipartSegment):
            self._begin(event)
        elif self._name == "file":
            self._writer.add(bytes(event))
        elif len(self._value) + len(event) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"the field {self._name[:100]!r} is longer than {_MAX_FIELD_BYTES} bytes",
                param=self._name[:100],
                code="invalid_value",
            )
        else:
            self._value += event

    def _begin(self, segment: MultipartSegment) -> None:
        self._name = segment.name
        self._value = bytearray()
        if self._name == "file":
            if self.upload.size is not None:
                raise InvalidRequestError("there is more than one 'file'", param="file")
            name = _CONTROLS.sub("", segment.filename or "")
            self.upload.filename = name[-_MAX_FILENAME:] or "upload.jsonl"
            self.upload.size = 0

    def _end(self) -> None:
        if self._name == "file":
            self.upload.size = self._writer.size
        elif self._name not in _FIELDS:
            self.upload.ignored.append(self._name)
        elif self._name in self.upload.fields:
            raise InvalidRequestError(
                f"there is more than one {self._name!r}", param=self._name, code="invalid_value"
            )
        else:
            try:
                self.upload.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise InvalidRequestError(
                    f"{self._name!r} is not UTF-8", param=self._name, code="invalid_value"
                ) from None
            if self._name == "purpose":
                self.upload.check_purpose()  # at once, if it stands before the file


def _missing(name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name!r} is missing", param=name, code="missing_required_parameter"
    )


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the file is larger than {max_bytes} bytes; split it, or raise max_file_bytes in "
        "[plugins.batches]"
    )
