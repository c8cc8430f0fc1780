"""Result files: one answer a line, appended in groups, and what a later process finds in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from stoker import HttpAnswer
from stoker_plugins.batches.schemas import BatchRequestCounts, BatchUsage

__all__ = ["Progress", "Result", "append", "make_result", "recover", "refusal"]


class _LineError(msgspec.Struct):
    code: str
    message: str


class _LineResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _OutputLine(msgspec.Struct):
    """A line of an output or error file, as OpenAI has it."""

    id: str
    custom_id: str
    response: _LineResponse | None = None
    error: _LineError | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _AnswerUsage(msgspec.Struct):
    """The usage of an answer, under the names of either generation of the API."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _AnswerBody(msgspec.Struct):
    usage: Any = None


class _ReadResponse(msgspec.Struct):
    status_code: int
    body: _AnswerBody


class _ReadLine(msgspec.Struct):
    custom_id: str
    response: _ReadResponse | None = None


class Result(msgspec.Struct, frozen=True):
    """A line to be written.

    Attributes:
        custom_id: Of which request.
        is_success: Whether it goes into the output file, or else into the error file.
        line: The line, with its end.
    """

    custom_id: str
    is_success: bool
    line: bytes


class Progress:
    """What is done of a batch.

    Attributes:
        done: The ids of requests that have a result.
        counts: How many those are; their total is known only to the input file.
        usage: Tokens of all answers.
    """

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.counts = BatchRequestCounts()
        self.usage = BatchUsage()

    def add(self, result: Result) -> None:
        """Count a line that was written."""
        self.count(_line_decoder.decode(result.line), is_success=result.is_success)

    def count(self, line: _ReadLine, *, is_success: bool) -> None:
        """Count a line that was read."""
        self.done.add(line.custom_id)
        if is_success:
            self.counts.completed += 1
        else:
            self.counts.failed += 1
        if line.response is not None and line.response.body.usage is not None:
            self._add_usage(line.response.body.usage)

    def _add_usage(self, raw: Any) -> None:
        try:
            used = msgspec.convert(raw, _AnswerUsage)
        except msgspec.ValidationError:
            return  # what an endpoint of a plugin calls usage may be anything
        read = used.input_tokens_details or used.prompt_tokens_details
        written = used.output_tokens_details or used.completion_tokens_details
        total = self.usage
        total.input_tokens += used.input_tokens or used.prompt_tokens
        total.output_tokens += used.output_tokens or used.completion_tokens
        total.total_tokens += used.total_tokens
        total.input_tokens_details.cached_tokens += read.cached_tokens if read else 0
        total.output_tokens_details.reasoning_tokens += written.reasoning_tokens if written else 0


_line_decoder = msgspec.json.Decoder(_ReadLine)
_encoder = msgspec.json.Encoder()


def make_result(line_id: str, custom_id: str, answer: HttpAnswer) -> Result:
    """The result line of an answer.

    Raises:
        ValueError: The answer is not JSON.
    """
    try:
        body = msgspec.Raw(
            msgspec.json.format(answer.body, indent=-1)
        )  # in one line, whoever made it
        _body_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(f"the endpoint's answer is not a JSON object: {error}") from error
    request_id = answer.headers.get("x-request-id", "")
    response = _LineResponse(answer.status_code, request_id, body)
    line = _encoder.encode(_OutputLine(line_id, custom_id, response)) + b"\n"
    return Result(custom_id, 200 <= answer.status_code < 300, line)


_body_decoder = msgspec.json.Decoder(_AnswerBody)


def refusal(line_id: str, custom_id: str, code: str, message: str) -> Result:
    """The result line of a request that has no answer."""
    line = _OutputLine(line_id, custom_id, error=_LineError(code, message))
    return Result(custom_id, is_success=False, line=_encoder.encode(line) + b"\n")


def append(path: Path, lines: Sequence[bytes]) -> None:
    """Add lines to a file; they survive a power cut when this returns.

    Raises:
        OSError: They could not be written, and none was.
    """
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.write(b"".join(lines))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def recover(path: Path, progress: Progress, *, is_success: bool) -> int:
    """Take in the results that a file holds, and cut off a last line that is not whole.

    Args:
        path: The file; it may be missing.
        progress: Takes them in.
        is_success: Whether it is the output file.

    Returns:
        The file's size.
    """
    if not path.exists():
        return 0
    size = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                read = _line_decoder.decode(line)
            except msgspec.DecodeError:
                break  # blocks that a power cut left empty
            if read.custom_id not in progress.done:
                progress.count(read, is_success=is_success)
            size += len(line)
        file.truncate(size)
        os.fsync(file.fileno())
    return size
