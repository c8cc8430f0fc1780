"""What a chat model's output is made of, once its markup has been read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

__all__ = ["CallPiece", "OutputParser", "Piece", "ReasoningPiece", "TextPiece"]


class TextPiece(msgspec.Struct, frozen=True, gc=False):
    """Some more of the answer's text."""

    text: str


class ReasoningPiece(msgspec.Struct, frozen=True, gc=False):
    """Some more of what the model thought before it answered."""

    text: str


class CallPiece(msgspec.Struct, frozen=True, gc=False):
    """Some more of a tool call.

    Attributes:
        index: Which of the answer's calls, from 0.
        arguments: Some more of its arguments' JSON text.
        name: The tool's name: on the first piece of a call only.
    """

    index: int
    arguments: str = ""
    name: str = ""


Piece = TextPiece | ReasoningPiece | CallPiece


class OutputParser(ABC):
    """Reads one output as it comes; pieces put together are the same however the text was cut."""

    @abstractmethod
    def push(self, text: str) -> Sequence[Piece]:
        """Read some more text; returns the pieces that are certain now."""

    @abstractmethod
    def finish(self) -> Sequence[Piece]:
        """The output is over; returns what was held back. Called once."""
