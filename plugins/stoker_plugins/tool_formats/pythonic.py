"""Gemma and Llama 4: a call looks like Python's, ``[get_weather(city="Oslo"), now()]``.

A list at the beginning of an answer, which Llama 4 may put between ``<|python_start|>`` and
``<|python_end|>``; or, as in Gemma's documentation, one call a line in a block that is fenced as
``tool_code``. Values are Python's or JSON's.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec

from stoker import CallPiece, OutputParser, Tool, ToolChoice
from stoker_plugins.tool_formats.lark import (
    GAP,
    MORE,
    allowed,
    alternatives,
    arguments,
    free_text,
    literal,
)
from stoker_plugins.tool_formats.reading import CallReader, dumps
from stoker_plugins.tool_formats.wording import WordedFormat

__all__ = ["Pythonic"]

_START, _END = "<|python_start|>", "<|python_end|>"
_FENCE, _FENCE_END = "```tool_code\n", "```"
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CALL_HEAD = re.compile(r"\s*([A-Za-z0-9_.:-]{1,64})\(\s*")
_ARGUMENT = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)\s*=|(\*\*))\s*")
_NOT_A_HEAD = re.compile(r"\s*[A-Za-z0-9_.:-]{0,64}$")
_NOT_AN_ARGUMENT = re.compile(r"\s*(?:[A-Za-z_][A-Za-z0-9_]*\s*|\*)?$")
_PARTS = re.compile(
    r'"(?:[^"\\]|\\.)*"|'
    r"'(?:[^'\\]|\\.)*'|"
    r"[\[\]{}(),\"']",
    re.DOTALL,
)
_QUOTES, _OPENING, _CLOSING = ("'", '"'), ("(", "[", "{"), (")", "]", "}")
_OTHER_KEYS = frozenset(
    {"allOf", "anyOf", "oneOf", "not", "if", "$ref", "patternProperties", "minProperties"}
    | {"maxProperties", "propertyNames", "dependentRequired", "dependentSchemas"}
)


class Pythonic(WordedFormat):
    """``[name(argument=value), ...]``."""

    markers = (_START, _END)

    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Whether it is a Gemma, by its turns, or a Llama 4."""
        gemma = "<start_of_turn>" in special_tokens
        return gemma or _START in special_tokens or (template is not None and _START in template)

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Mapping[str, int]
    ) -> str:
        """Calls, or text that does not begin like the call of a known tool."""
        tools = allowed(tools, choice)
        more = f'(", " call){MORE}' if choice.parallel else ""
        rules = "".join(_call_rules(i, tool) for i, tool in enumerate(tools))
        rules += f"call: {alternatives([f'call_{i}' for i in range(len(tools))])}\n"
        listed = f'"[" call {more} "]"'
        if choice.mode == "required":
            return f"start: {listed}\n{rules}"
        begun = [f'BEGUN_{i} given_{i} ")"' for i in range(len(tools))]
        rules += "".join(f"BEGUN_{i}: /{_beginning([tool])}/\n" for i, tool in enumerate(tools))
        lines = f'("\\n" call){MORE}' if choice.parallel else ""
        start = special_tokens.get(_START)
        tagged = ""
        if start is not None:
            end = special_tokens.get(_END)
            tagged = f" | <[{start}]> {listed}" + ("" if end is None else f" <[{end}]>?")
        beginning = _beginning(tools)
        return (
            f'start: TEXT | begun {more} "]" | fence call {lines} "\\n```"{tagged}\n'
            f"begun: {alternatives(begun)}\n"
            f"fence[lazy]: FENCE\nFENCE: /(.|\\n)*```tool_code\\n/ & ~/{beginning}(.|\\n)*/\n"
            f"{free_text(beginning)}{rules}"
        )

    def parser(
        self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool
    ) -> OutputParser:
        """Reads text and calls."""
        return _PythonicParser(tools, choice, constrained=constrained)

    def form(self) -> str:
        """What calls look like."""
        return (
            "To call functions, answer with nothing but a list of calls in this form:\n"
            '[name(argument="text", other=5), name()]'
        )

    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """A list of calls."""
        return f"[{', '.join(_written(name, given) for name, given in calls)}]"


def _written(name: str, given: Mapping[str, Any]) -> str:
    if not all(map(_KEYWORD.fullmatch, given)):
        return f"{name}(**{dumps(given)})"
    return f"{name}({', '.join(f'{key}={dumps(value)}' for key, value in given.items())})"


def _beginning(tools: Sequence[Tool]) -> str:
    """What an answer begins with that is a call of one of these; an expression."""
    names = "|".join(re.escape(tool.name) for tool in tools)
    return rf"{GAP}\[{GAP}({names})\("


def _call_rules(index: int, tool: Tool) -> str:
    """The rules ``call_i``, a whole call, and ``given_i``, what stands in its parentheses."""
    head = f'call_{index}: {literal(f"{tool.name}(")} given_{index} ")"\n'
    schema = dict(tool.parameters)
    properties = schema.get("properties")
    if not schema or (properties == {} and not schema.get("additionalProperties")):
        return f'{head}given_{index}: ""\n'
    plain = isinstance(properties, Mapping) and properties and _OTHER_KEYS.isdisjoint(schema)
    if not plain or not all(map(_KEYWORD.fullmatch, properties or {})):
        # Whatever Python's keywords cannot say its dictionaries can.
        whole = arguments(f"whole_{index}", schema)
        return f'{head}given_{index}: "**" whole_{index}\n{whole}'
    return head + _keywords(index, schema)


def _keywords(index: int, schema: Mapping[str, Any]) -> str:
    """``a=1, b=2``: properties in their order, those that are not required or not."""
    required = set(schema.get("required") or ())
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    rules: list[str] = []
    first, rest = '""', '""'  # what may follow as the first argument, and after another one
    numbered = list(enumerate(schema["properties"].items()))
    for at, (name, shape) in reversed(numbered):
        value = f"value_{index}_{at}"
        rules.append(_value_rule(value, shape, shared))
        keyword = f"{literal(f'{name}=')} {value}"
        later, optional = f"rest_{index}_{at}", name not in required
        rules.append(f"{later}: {rest}\n")
        first = f"{keyword} {later}" + (f" | {first}" if optional else "")
        rest = f'", " {keyword} {later}'
        if optional:
            rest = f"({rest}) | {later}"
    return f"given_{index}: {first}\n{''.join(rules)}"


def _value_rule(name: str, shape: Any, shared: Mapping[str, Any]) -> str:
    if not isinstance(shape, Mapping):
        shape = {} if shape else {"not": {}}
    return arguments(name, {**shared, **shape}, is_object=False)


class _PythonicParser(CallReader):
    def _read(self) -> Generator[None]:
        yield from self._leading_list()
        while (yield from self._text_until((_FENCE,))) is not None:
            at = self._text.index(_FENCE) + len(_FENCE)
            if not (yield from self._calls(at, "\n", _FENCE_END)):
                self._give_back(at)

    def _leading_list(self) -> Generator[None]:
        at = yield from self._skip_spaces(0)
        is_tagged = yield from self._starts_with(_START, at)
        at = at + len(_START) if is_tagged else 0
        heads = [f"{name}(" for name in self._names]
        if not (yield from self._begins(at, ("[",), heads)):
            return
        if not (yield from self._calls(self._text.index("[", at) + 1, ",", "]")):
            return
        at = yield from self._skip_spaces(0)
        if (yield from self._starts_with(_END, at)):
            self._text = self._text[at + len(_END) :]

    def _calls(self, at: int, separator: str, closing: str) -> Generator[None, None, bool]:
        """Calls from there to what closes them; nothing is taken if they may be, and are, malformed."""
        found: list[CallPiece] = []
        first = self._num_calls
        while True:
            end = yield from self._call(at, found)
            if end < 0 or not self._is_allowed(first, found):
                break
            at = yield from self._skip_spaces(end)
            if (yield from self._starts_with(closing, at)):
                self._emit(found)
                self._text = self._text[at + len(closing) :]
                return True
            # Lines need no separator of their own: the whitespace is skipped.
            if separator.strip():
                if not (yield from self._starts_with(separator, at)):
                    break
                at += len(separator)
            elif at >= len(self._text) or at == end:
                break
        if self._num_calls == first:
            return False
        self._text = self._text[at:]  # given on already: cut off, or not what the grammar says
        return True

    def _is_allowed(self, first: int, found: Sequence[CallPiece]) -> bool:
        names = [piece.name for piece in found if piece.name]
        return all(name in self._names for name in names) and (
            self._parallel or self._constrained or first + len(names) <= 1
        )

    def _emit(self, found: list[CallPiece]) -> None:
        """Give on what was found, in calls that go on from those that there are."""
        for piece in found:
            if piece.name:
                self._begin_call(0, piece.name, piece.arguments)
            else:
                self._pieces.append(CallPiece(self._num_calls - 1, piece.arguments))
        found.clear()

    def _call(self, at: int, found: list[CallPiece]) -> Generator[None, None, int]:
        """One call; returns where it ends, or -1. Under a grammar its pieces are given on at once."""
        while (head := _CALL_HEAD.match(self._text, at)) is None:
            if self._ended or not _NOT_A_HEAD.match(self._text, at):
                return -1
            yield
        found.append(CallPiece(0, name=head.group(1)))
        at, written = head.end(), 0
        while True:
            if self._constrained:
                self._emit(found)
            at = yield from self._skip_spaces(at)
            if self._text.startswith(")", at):
                found.append(CallPiece(0, "}" if written else "{}"))
                if self._constrained:
                    self._emit(found)
                return at + 1
            if written:
                if not self._text.startswith(",", at):
                    return -1
                at += 1
            end = yield from self._argument(at, written, found)
            if end < 0:
                return -1
            at, written = end, written + 1

    def _argument(
        self, at: int, written: int, found: list[CallPiece]
    ) -> Generator[None, None, int]:
        while (name := _ARGUMENT.match(self._text, at)) is None or name.end() == len(self._text):
            if self._ended or (name is None and not _NOT_AN_ARGUMENT.match(self._text, at)):
                return -1
            yield
        end = yield from self._python_end(name.end())
        if end < 0:
            return -1
        is_read, value = read_value(self._text[name.end() : end])
        if not is_read:
            return -1
        if name.group(2) is None:
            text = f"{dumps(name.group(1))}: {dumps(value)}"
        elif isinstance(value, dict):
            text = dumps(value)[1:-1]
            if not text:
                return end
        else:
            return -1
        found.append(CallPiece(0, f"{', ' if written else '{'}{text}"))
        return end

    def _python_end(self, at: int) -> Generator[None, None, int]:
        """Where the value that begins there ends: at a comma or parenthesis outside of it; -1 if nowhere."""
        depth = 0
        while True:
            for part in _PARTS.finditer(self._text, at):
                character = part.group()
                if character in _QUOTES:  # the text is not complete
                    break
                at = part.end()
                if character in _OPENING:
                    depth += 1
                elif character in _CLOSING and depth:
                    depth -= 1
                elif character in _CLOSING:
                    return part.start() if character == ")" else -1
                elif character == "," and not depth:
                    return part.start()
            if self._ended:
                return -1
            yield


def read_value(text: str) -> tuple[bool, Any]:
    """A value as JSON or Python writes it; the first is false if it is neither."""
    try:
        return True, msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text.strip())
        # Through JSON: what that does not know (sets, bytes, NaN) is no argument.
        return True, json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError):
        return False, None
