"""Reasoning: what a model thinks before it answers, told from the answer by the marks around it.

Some models write ``<think>`` themselves, for others the chat template has opened the block already. Marks may
be control tokens, other tokens, or plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stoker.interfaces import Tokenizer
from stoker.pieces import OutputParser, Piece, ReasoningPiece, TextPiece

__all__ = ["MARKS", "ReasoningMarks", "ReasoningParser", "find_marks", "is_open"]


class ReasoningMarks(NamedTuple):
    """What stands before and after the reasoning."""

    opening: str
    closing: str


MARKS = (
    ReasoningMarks("<think>", "</think>"),  # DeepSeek R1, Qwen 3 and most others
    ReasoningMarks("[THINK]", "[/THINK]"),  # Magistral
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ReasoningMarks("<thinking>", "</thinking>"),
    ReasoningMarks("<reasoning>", "</reasoning>"),
)
"""The marks that are known, the likeliest first."""


def find_marks(setting: str, template: str | None, tokenizer: Tokenizer) -> ReasoningMarks | None:
    """The marks that a model uses; ``None`` if it does not reason, or nobody wants to know.

    Args:
        setting: ``auto``, ``on`` or ``off``, as configured for the model.
        template: Its chat template.
        tokenizer: Its tokenizer, whose control tokens may be marks.
    """
    if setting == "off":
        return None
    special = tokenizer.special_tokens
    for marks in MARKS:
        if (template is not None and marks.closing in template) or marks.closing in special:
            return marks
    return MARKS[0] if setting == "on" else None


def is_open(marks: ReasoningMarks, tail: str, continued: str = "") -> bool:
    """Whether an answer begins within the reasoning.

    Args:
        marks: The model's.
        tail: How the prompt ends.
        continued: What of the answer is there already, if it is continued.
    """
    if continued:
        return continued.rfind(marks.opening) > continued.rfind(marks.closing)
    return tail.rstrip().endswith(marks.opening)


class ReasoningParser(OutputParser):
    """Reads one output: reasoning, then what another parser reads.

    Whitespace around the reasoning belongs to neither. Marks after the answer has begun are text.

    Args:
        marks: What stands around the reasoning.
        is_open: Whether the output begins within it.
        inner: Reads the answer; ``None`` if it is all text.
    """

    def __init__(
        self, marks: ReasoningMarks, *, is_open: bool = False, inner: OutputParser | None = None
    ) -> None:
        self._marks = marks
        self._inner = inner
        self._text = ""  # what is not given on yet
        self._read: Callable[[bool], list[Piece]] = self._thought if is_open else self._beginning
        self._has_thought = False

    def push(self, text: str) -> Sequence[Piece]:
        """Read some more text; returns the pieces that are certain now."""
        self._text += text
        return self._read(False)

    def finish(self) -> Sequence[Piece]:
        """The output is over; returns what was held back."""
        pieces = self._read(True)
        return [*pieces, *self._inner.finish()] if self._inner is not None else pieces

    def _beginning(self, ended: bool) -> list[Piece]:
        """Whether it begins with reasoning."""
        text, opening = self._text.lstrip(), self._marks.opening
        if text.startswith(opening):
            self._text = text[len(opening) :]
            self._read = self._thought
        elif ended or not opening.startswith(text):
            self._read = self._answer
        else:
            return []
        return self._read(ended)

    def _thought(self, ended: bool) -> list[Piece]:
        at = self._text.find(self._marks.closing)
        if at >= 0:
            thought, self._text = self._text[:at], self._text[at + len(self._marks.closing) :]
            self._read = self._pause
            return [*self._reasoning(thought.rstrip()), *self._read(ended)]
        if ended:
            thought, self._text = self._text, ""
            return self._reasoning(thought.rstrip())
        closing = self._marks.closing
        sizes = range(min(len(self._text), len(closing) - 1), 0, -1)
        held = next((size for size in sizes if closing.startswith(self._text[-size:])), 0)
        certain = self._text[: len(self._text) - held].rstrip()
        self._text = self._text[len(certain) :]
        return self._reasoning(certain)

    def _reasoning(self, text: str) -> list[Piece]:
        if not self._has_thought:
            text = text.lstrip()
        if not text:
            return []
        self._has_thought = True
        return [ReasoningPiece(text)]

    def _pause(self, ended: bool) -> list[Piece]:
        """The whitespace between reasoning and answer."""
        self._text = self._text.lstrip()
        if not self._text:
            return []
        self._read = self._answer
        return self._read(ended)

    def _answer(self, _: bool) -> list[Piece]:
        text, self._text = self._text, ""
        if self._inner is not None:
            return list(self._inner.push(text)) if text else []
        return [TextPiece(text)] if text else []
