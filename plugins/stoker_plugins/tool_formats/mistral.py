"""Mistral: ``[TOOL_CALLS]`` and a list, or, since tokenizer v11, ``[TOOL_CALLS]name[ARGS]{...}`` each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from stoker import OutputParser, Tool, ToolChoice
from stoker_plugins.tool_formats.lark import (
    MORE,
    allowed,
    alternatives,
    arguments,
    json_calls,
    literal,
    marker,
    repeated,
)
from stoker_plugins.tool_formats.reading import CallReader, Reading, dumps, is_object
from stoker_plugins.tool_formats.wording import WordedFormat

__all__ = ["Mistral"]

_CALLS, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID_FORM = re.compile(r"[A-Za-z0-9]{9}")
_NAME = re.compile(
    r"\s*([A-Za-z0-9_.:-]{1,64})(?:\[CALL_ID\][A-Za-z0-9_-]{1,64})?\[ARGS\]\s*(?=\{)"
)
_LONGEST_HEAD = 200


class Mistral(WordedFormat):
    """Calls after ``[TOOL_CALLS]``, in the newer form where the vocabulary has ``[ARGS]``."""

    markers = (_CALLS, _ARGUMENTS, _ID)

    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Whether its template or its vocabulary has the mark."""
        return _CALLS in special_tokens or (template is not None and _CALLS in template)

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Mapping[str, int]
    ) -> str:
        """Text, and from ``[TOOL_CALLS]`` on calls to the end."""
        tools = allowed(tools, choice)
        opening = marker(_CALLS, special_tokens)
        if _ARGUMENTS in special_tokens:
            rest, more = "named", f"({opening} named){MORE}" if choice.parallel else ""
            rules = _named_calls(tools, marker(_ARGUMENTS, special_tokens))
        else:
            rest, more = f'" "? "[" {repeated("body", literal(", "), choice)} "]"', ""
            rules = json_calls(tools)
        if choice.mode == "required":
            return f"start: {opening} {rest} {more}\n{rules}"
        begun = f"begun | TEXT {opening}" if _CALLS in special_tokens else "begun"
        return (
            f"start: TEXT | ({begun}) {rest} {more}\n"
            f"begun[lazy]: /(.|\\n)*{re.escape(_CALLS)}/\n"
            f"TEXT: /(.|\\n)*/\n{rules}"
        )

    def parser(
        self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool
    ) -> OutputParser:
        """Reads text and calls of either form."""
        return _MistralParser(tools, choice, constrained=constrained)

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The same with ids of nine letters and digits: Mistral's templates refuse others."""
        adapted = []
        for message in messages:
            changed = dict(message)
            if message.get("tool_calls"):
                changed["tool_calls"] = [
                    {**call, "id": _short_id(call.get("id"))} for call in message["tool_calls"]
                ]
            if message.get("tool_call_id"):
                changed["tool_call_id"] = _short_id(message["tool_call_id"])
            adapted.append(changed)
        return adapted

    def form(self) -> str:
        """What a call looks like."""
        return (
            "To call functions, write this, with their names and their arguments as JSON objects:\n"
            f'{_CALLS}[{{"name": "...", "arguments": {{...}}}}]'
        )

    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """A list of objects."""
        return _CALLS + dumps([{"name": name, "arguments": given} for name, given in calls])


def _named_calls(tools: Sequence[Tool], between: str) -> str:
    rules = [f"named: {alternatives([f'named_{i}' for i in range(len(tools))])}\n"]
    for i, tool in enumerate(tools):
        rules.append(f"named_{i}: {literal(tool.name)} {between} arguments_{i}\n")
        rules.append(arguments(f"arguments_{i}", tool.parameters))
    return "".join(rules)


def _short_id(call_id: object) -> str:
    text = str(call_id or "")
    if _ID_FORM.fullmatch(text):
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:9]


class _MistralParser(CallReader):
    def _read(self) -> Generator[None]:
        while (yield from self._text_until((_CALLS,))) is not None:
            before = self._text.index(_CALLS) + len(_CALLS)
            at = yield from self._skip_spaces(before)
            if self._text.startswith("[", at):
                is_call = yield from self._list(at)
            elif self._text.startswith("{", at):
                is_call = yield from self._json_call(at)
            else:
                is_call = yield from self._named_call(at)
            if not is_call:
                self._give_back(before)

    def _list(self, at: int) -> Reading:
        """A list of calls; where one may be wrong, none is given on before the list has ended."""
        if not self._constrained and (yield from self._value_end(at)) < 0:
            return False
        if not (yield from self._json_call(at + 1)):
            return False
        while True:
            at = yield from self._skip_spaces(0)
            if not (yield from self._starts_with(",", at)):
                break
            if not (yield from self._json_call(at + 1)):
                return True
        if (yield from self._starts_with("]", at)):
            self._text = self._text[at + 1 :]
        return True

    def _named_call(self, at: int) -> Reading:
        while (head := _NAME.match(self._text, at)) is None:
            if self._ended or len(self._text) - at > _LONGEST_HEAD:
                return False
            yield
        name = head.group(1)
        if self._constrained:
            self._begin_call(head.end(), name)
            yield from self._arguments()
            return True
        end = yield from self._value_end(head.end())
        text = "" if end < 0 else self._text[head.end() : end]
        if not self._may_call(name) or not is_object(text):
            return False
        self._begin_call(end, name, text)
        return True
