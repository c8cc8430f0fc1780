"""Hermes and Qwen, and the fallback for models whose template knows no tools.

A call is ``<tool_call>``, a line with a JSON object, ``</tool_call>``: the form of NousResearch's Hermes
models, which Qwen 2.5 and 3 and many others took over.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from stoker import OutputParser, Tool, ToolChoice
from stoker_plugins.tool_formats.lark import MORE, allowed, json_calls, marker
from stoker_plugins.tool_formats.reading import CallReader, dumps
from stoker_plugins.tool_formats.wording import WordedFormat

__all__ = ["Generic", "Hermes"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(WordedFormat):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them."""

    markers = (_OPEN, _CLOSE)

    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Whether its template writes such calls."""
        return template is not None and _OPEN in template

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Mapping[str, int]
    ) -> str:
        """Text, and from ``<tool_call>`` on calls to the end."""
        opening, closing = marker(_OPEN, special_tokens), marker(_CLOSE, special_tokens)
        rest = f'"\\n" body "\\n" {closing}'
        more = f'("\\n"? {opening} {rest}){MORE}' if choice.parallel else ""
        rules = json_calls(allowed(tools, choice))
        if choice.mode == "required":
            return f"start: {opening} {rest} {more}\n{rules}"
        begun = f"begun | TEXT {opening}" if _OPEN in special_tokens else "begun"
        return (
            f"start: TEXT | ({begun}) {rest} {more}\n"
            f"begun[lazy]: /(.|\\n)*{_OPEN}/\n"
            f"TEXT: /(.|\\n)*/\n{rules}"
        )

    def parser(
        self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool
    ) -> OutputParser:
        """Reads text and calls."""
        return _HermesParser(tools, choice, constrained=constrained)

    def form(self) -> str:
        """What a call looks like."""
        return (
            "To call a function, write this, with its name and its arguments as a JSON object:\n"
            f'{_OPEN}\n{{"name": "...", "arguments": {{...}}}}\n{_CLOSE}'
        )

    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """One block each."""
        return "\n".join(
            f"{_OPEN}\n{dumps({'name': name, 'arguments': given})}\n{_CLOSE}"
            for name, given in calls
        )


class Generic(Hermes):
    """The same for any model: what it is told, and a grammar, make up for what it was not trained for.

    The markup is one that plain text does not contain, so that an answer about ``{`` is no call.
    """

    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Always."""
        return True


class _HermesParser(CallReader):
    def _read(self) -> Generator[None]:
        while (yield from self._text_until((_OPEN,))) is not None:
            at = self._text.index(_OPEN) + len(_OPEN)
            if (yield from self._json_call(at)):
                after = yield from self._skip_spaces(0)
                if (yield from self._starts_with(_CLOSE, after)):
                    self._text = self._text[after + len(_CLOSE) :]
                elif self._ended and _CLOSE.startswith(self._text[after:]):
                    self._text = ""  # cut off within what closes the call
            else:
                self._give_back(at)
