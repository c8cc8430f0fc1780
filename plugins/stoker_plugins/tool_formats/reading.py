"""What the parsers of outputs share: text that comes in pieces, and JSON calls inside it.

A parser is a generator that reads ``_text`` from its beginning, takes from it what is certain, and yields
where it needs more. What it decides depends on the text alone, so that pieces put together are the same
however the text was cut.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Collection, Generator, Sequence
from typing import Any

import msgspec

from stoker import CallPiece, OutputParser, Piece, TextPiece, Tool, ToolChoice
from stoker_plugins.tool_formats.lark import allowed

__all__ = ["CallReader", "Reading", "decode_call", "dumps", "is_object", "next_part", "overlap"]

Reading = Generator[None, None, bool]
"""Yields where it needs more text; returns whether a call was read."""

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_MAX_GAP = 4  # as in grammars: lark.GAP
_SPACES = re.compile(r"\s*")
_REST_OF_CALL = re.compile(r"\s*\}")


class _JsonCall(msgspec.Struct):
    """A call as models write it."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


class _ValueEnd:
    """Finds where a JSON object or array ends, without looking at anything twice."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self.at = 0

    def find(self, text: str) -> bool:
        """Look at what has come after ``at``; true if the value ends there."""
        while True:
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, self.at)
            if found is None:
                self.at = max(self.at, len(text))
                return False
            character = found.group()
            if character == "\\":
                self.at = found.end() + 1  # whatever is escaped is no end; \uXXXX holds none either
                continue
            self.at = found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return True


class CallReader(OutputParser):
    """Reads text with calls in it.

    Args:
        tools: The tools that there are.
        choice: Which of them may be called, and whether several.
        constrained: Whether a grammar makes sure that what begins like a call is one.
    """

    _needs_arguments = False  # whether an object that has none is no call

    def __init__(self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool) -> None:
        self._names = frozenset(tool.name for tool in allowed(tools, choice))
        self._required = choice.mode == "required"
        self._parallel = choice.parallel
        self._constrained = constrained
        self._text = ""  # what has come and was not given on
        self._ended = False
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._wrote_text = False
        self._after_call = False
        self._run = self._read()

    def push(self, text: str) -> Sequence[Piece]:
        """Read some more text; returns the pieces that are certain now."""
        self._text += text
        next(self._run, None)
        return self._taken()

    def finish(self) -> Sequence[Piece]:
        """The output is over; returns what was held back."""
        self._ended = True
        next(self._run, None)
        if not (self._constrained and (self._required or self._num_calls)):
            self._write_text(len(self._text))  # else it is the beginning of a call, cut off
        return self._taken()

    @abstractmethod
    def _read(self) -> Generator[None]:
        """Read the output from its beginning to its end."""

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # ------------------------------------------------------------------ text

    def _write_text(self, size: int) -> None:
        """Give on the first characters as text; of whitespace after a call no more than a line's end."""
        text, self._text = self._text[:size], self._text[size:]
        if self._constrained and self._required:
            return  # there is none but what was cut off at the beginning of a call
        if self._after_call:
            text = text.lstrip()
            if not text:
                return
            self._after_call = False
            text = f"\n{text}" if self._wrote_text else text
        if text:
            self._wrote_text = True
            self._pieces.append(TextPiece(text))

    def _text_until(self, openers: Sequence[str]) -> Generator[None, None, str | None]:
        """Give on text up to one of these; returns which, or ``None`` at the end.

        It stays in ``_text``, with the whitespace before it: they are text after all if no call follows.
        """
        while True:
            found = [(at, opener) for opener in openers if (at := self._text.find(opener)) >= 0]
            if found:
                at, opener = min(found)
                self._write_text(len(self._text[:at].rstrip()))
                return opener
            if self._ended:
                return None
            certain = len(self._text) - max(overlap(self._text, opener) for opener in openers)
            self._write_text(len(self._text[:certain].rstrip()))
            yield

    def _all_text(self) -> Generator[None]:
        """Give on everything that comes as text."""
        while True:
            self._write_text(len(self._text))
            if self._ended:
                return
            yield

    def _skip_spaces(self, at: int) -> Generator[None, None, int]:
        """The place of the next character that is no whitespace, or the end."""
        while True:
            match = _SPACES.match(self._text, at)
            at = match.end() if match else at
            if at < len(self._text) or self._ended:
                return at
            yield

    def _starts_with(self, expected: str, at: int) -> Generator[None, None, bool]:
        """Whether the text goes on like this."""
        while len(self._text) - at < len(expected):
            if self._ended or not expected.startswith(self._text[at:]):
                return False
            yield
        return self._text.startswith(expected, at)

    def _give_back(self, size: int) -> None:
        """What began like a call is text, but where a grammar made sure that it was one: that was cut off."""
        if self._constrained and self._ended:
            self._text = ""
        else:
            self._write_text(size)

    def _begins(self, at: int, *parts: Collection[str]) -> Generator[None, None, bool]:
        """Whether one of each of these parts comes next, in turn, with no more than gaps before them."""
        for part in parts:
            while (size := next_part(self._text, at, part)) < 0:
                if self._ended:
                    return False
                yield
            if not size:
                return False
            at += size
        return True

    # ------------------------------------------------------------------ calls

    def _may_call(self, name: str) -> bool:
        return name in self._names and (self._parallel or not self._num_calls)

    def _begin_call(self, size: int, name: str, arguments: str = "") -> None:
        """A call it is: ``size`` characters were its beginning."""
        self._text = self._text[size:]
        self._pieces.append(CallPiece(index=self._num_calls, name=name, arguments=arguments))
        self._num_calls += 1
        self._after_call = True

    def _write_arguments(self, size: int) -> None:
        if size:
            piece = CallPiece(index=self._num_calls - 1, arguments=self._text[:size])
            self._pieces.append(piece)
            self._text = self._text[size:]

    def _json_call(self, at: int) -> Reading:
        """Read ``{"name": ..., "arguments": ...}`` from there; if it is no such thing, take nothing."""
        if self._constrained:
            return (yield from self._certain_call(at))
        return (yield from self._whole_call(at))

    def _certain_call(self, at: int) -> Reading:
        """A call that cannot go wrong any more but by ending early: arguments as they come."""
        while (head := _HEAD.match(self._text, at)) is None:
            if self._ended:
                return False
            yield
        self._begin_call(head.end(), head.group(1))
        yield from self._arguments()
        while (rest := _REST_OF_CALL.match(self._text)) is None:
            if self._ended:
                return True
            yield
        self._text = self._text[rest.end() :]
        return True

    def _arguments(self) -> Generator[None]:
        """Give on the JSON object at the beginning of the text, as it comes."""
        end = _ValueEnd()
        while not end.find(self._text):
            size = len(self._text)
            self._write_arguments(size)
            end.at -= size
            if self._ended:
                return
            yield
        self._write_arguments(end.at)

    def _value_end(self, at: int) -> Generator[None, None, int]:
        """Where the JSON object or array that begins at ``at`` ends; -1 if it does not."""
        end = _ValueEnd()
        end.at = at
        while not end.find(self._text):
            if self._ended:
                return -1
            yield
        return end.at

    def _whole_call(self, at: int) -> Reading:
        """A call that may turn out to be none: nothing is given on before its end."""
        at = yield from self._skip_spaces(at)
        if not self._text.startswith("{", at):
            return False
        end = yield from self._value_end(at)
        if end < 0:
            return False
        call = decode_call(self._text[at:end], needs_arguments=self._needs_arguments)
        if call is None or not self._may_call(call[0]):
            return False
        self._begin_call(end, *call)
        return True


def decode_call(text: str, *, needs_arguments: bool = False) -> tuple[str, str] | None:
    """Name and arguments of a call that is one JSON object; ``None`` if it is not that.

    Args:
        text: The object.
        needs_arguments: Whether it is no call without arguments, however few.
    """
    try:
        call = msgspec.json.decode(text, type=_JsonCall)
        raw = bytes(call.arguments) or bytes(call.parameters)
        if needs_arguments and not raw:
            return None
        arguments = (raw or b"{}").decode()
        value: Any = msgspec.json.decode(arguments)
        if isinstance(value, str):  # some models write the object as a string
            arguments, value = value, msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return None
    if value is None:
        return call.name, "{}"
    if not isinstance(value, dict):
        return None
    return call.name, arguments.strip()


def is_object(text: str) -> bool:
    """Whether this is a JSON object."""
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def next_part(text: str, at: int, part: Collection[str]) -> int:
    """Length of a gap and one of these texts, if they come next; 0 if not; -1 if that is not certain yet."""
    start = at
    while start - at < _MAX_GAP and text[start : start + 1] in {" ", "\n"}:
        start += 1
    is_open = False
    for expected in part:
        found = text[start : start + len(expected)]
        if found == expected:
            return start - at + len(expected)
        is_open = is_open or expected.startswith(found)
    return -1 if is_open else 0


def dumps(value: Any) -> str:
    """JSON as models write it, with a space after commas and colons."""
    return json.dumps(value, ensure_ascii=False)


def overlap(text: str, opener: str) -> int:
    """Length of the longest end of ``text`` that is a beginning, but not the whole, of ``opener``."""
    for size in range(min(len(text), len(opener) - 1), 0, -1):
        if opener.startswith(text[len(text) - size :]):
            return size
    return 0
