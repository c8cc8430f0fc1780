"""What an output must look like: what was asked for, and what checks it token by token.

A request's ``GrammarSpec`` is compiled into a ``Grammar`` once, before it is admitted; each of its sequences
starts a ``Matcher``, which tells the sampler the tokens that may come next. Who compiles is a plugin:
``interfaces.GrammarCompiler``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Grammar", "GrammarSpec", "Matcher"]


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an output must look like, as it was asked for; usable as a key.

    Attributes:
        kind: ``json_object`` (any JSON object), ``json_schema``, ``regex``, ``choice`` (one of some strings),
            ``gbnf`` (llama.cpp's notation) or ``lark`` (llguidance's notation).
        text: The schema as JSON, the expression, the strings as a JSON list, or the grammar.
        param: The request field that it came in, for error messages.
        strict: Refuse what the compiler cannot enforce; otherwise leave it out and tell in
            ``Grammar.warnings``.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "gbnf", "lark"]
    text: str = ""
    param: str = "response_format"
    strict: bool = True


class Matcher(ABC):
    """Where one output stands in its grammar. Used by one thread at a time."""

    @abstractmethod
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Set the tokens that may come next.

        Args:
            mask: ``int32[ceil(vocab / 32)]``, contiguous; bit ``t % 32`` of word ``t // 32`` is to be 1 if
                token ``t`` may come next. End tokens may come once the output can end.

        Raises:
            InvalidRequestError: The grammar is too complex to go on with.
        """

    @abstractmethod
    def accept(self, token: int) -> bool:
        """Move on by a token; false, and nothing changes, if it may not come next.

        Raises:
            InvalidRequestError: As for ``fill_mask``.
        """

    @abstractmethod
    def rollback(self, num_tokens: int) -> None:
        """Take back the tokens that were accepted last."""

    @abstractmethod
    def count_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next, in turn; moves nothing on."""

    @abstractmethod
    def forced(self) -> Sequence[int]:
        """Tokens of the only text that may come next; empty if there is a choice. Moves nothing on."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether nothing but an end token may follow."""


class Grammar(ABC):
    """A compiled grammar; immutable, shared by sequences.

    Attributes:
        spec: What it was compiled from.
        warnings: What of it is not enforced, in words.
    """

    spec: GrammarSpec
    warnings: Sequence[str] = ()

    @abstractmethod
    def start(self) -> Matcher:
        """A matcher at the beginning; quick, and from any thread."""
