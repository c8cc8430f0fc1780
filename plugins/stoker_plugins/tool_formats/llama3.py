"""Llama 3.1 to 3.3: a call is an answer that is a JSON object, ``{"name": ..., "parameters": {...}}``.

Several stand one after the other with ``; `` between them. ``<|python_tag|>`` may stand before the first.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from stoker import OutputParser, Tool, ToolChoice
from stoker_plugins.tool_formats.lark import (
    GAP,
    MORE,
    allowed,
    alternatives,
    free_text,
    json_calls,
)
from stoker_plugins.tool_formats.reading import CallReader, Reading, dumps
from stoker_plugins.tool_formats.wording import WordedFormat

__all__ = ["Llama3"]

_TAG = "<|python_tag|>"


class Llama3(WordedFormat):
    """``{"name": ..., "parameters": {...}}``, at the beginning of an answer only.

    JSON that names no known tool there is text: it may be what was asked for.
    """

    markers = (_TAG,)

    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Whether its template writes such calls, and its vocabulary is Llama 3's."""
        return template is not None and '"parameters"' in template and _TAG in special_tokens

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Mapping[str, int]
    ) -> str:
        """Calls, or text that does not begin like the call of a known tool."""
        tools = allowed(tools, choice)
        more = f'("; " body){MORE}' if choice.parallel else ""
        rules = json_calls(tools, key="parameters")
        if choice.mode == "required":
            return f"start: body {more}\n{rules}"
        begun = [f'BEGUN_{i} arguments_{i} "}}"' for i in range(len(tools))]
        rules += "".join(
            f'BEGUN_{i}: /{_beginning([tool])}{GAP},{GAP}"parameters"{GAP}:{GAP}/\n'
            for i, tool in enumerate(tools)
        )
        tag = special_tokens.get(_TAG)
        tagged = "" if tag is None else f" | <[{tag}]> body {more}"
        return (
            f"start: TEXT | begun {more}{tagged}\nbegun: {alternatives(begun)}\n"
            f"{free_text(_beginning(tools))}{rules}"
        )

    def parser(
        self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool
    ) -> OutputParser:
        """Reads text or calls."""
        return _Llama3Parser(tools, choice, constrained=constrained)

    def form(self) -> str:
        """What a call looks like."""
        return (
            "To call a function, answer with nothing but this, with its name and its arguments as a JSON "
            'object:\n{"name": "...", "parameters": {...}}'
        )

    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """One object each."""
        return "; ".join(dumps({"name": name, "parameters": given}) for name, given in calls)


def _beginning(tools: Sequence[Tool]) -> str:
    """What an answer begins with that is a call of one of these; an expression."""
    names = "|".join(re.escape(tool.name) for tool in tools)
    return rf'{GAP}\{{{GAP}"name"{GAP}:{GAP}"({names})"'


class _Llama3Parser(CallReader):
    _needs_arguments = True  # nothing else tells it from JSON that was asked for

    def _read(self) -> Generator[None]:
        at = yield from self._skip_spaces(0)
        if (yield from self._starts_with(_TAG, at)):
            at += len(_TAG)
        elif self._constrained:
            at = 0
        while (yield from self._json_call(at)):
            at = yield from self._skip_spaces(0)
            if (yield from self._starts_with(";", at)):
                at += 1
        if self._constrained and self._num_calls:
            return
        yield from self._all_text()

    def _certain_call(self, at: int) -> Reading:
        # What begins differently is text under the same grammar.
        names = [f'"{name}"' for name in self._names]
        if not (yield from self._begins(at, ("{",), ('"name"',), (":",), names)):
            return False
        return (yield from super()._certain_call(at))
