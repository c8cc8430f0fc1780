"""What gives outputs a shape: grammars that constrain tokens, and the forms in which models call tools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from stoker.grammar import Grammar, GrammarSpec
from stoker.pieces import OutputParser

__all__ = ["GrammarCompiler", "Tool", "ToolChoice", "ToolFormat"]


class GrammarCompiler(ABC):
    """Turns what was asked for into grammars over one model's tokens."""

    def prepare(self) -> None:
        """Get ready, before the first ``compile`` and on a thread like its; may take seconds."""

    @abstractmethod
    def compile(self, spec: GrammarSpec) -> Grammar:
        """Compile; called from any thread, several at once, never the event loop's. Must be bounded in time.

        Raises:
            InvalidRequestError: It is malformed, too large, takes too long, or uses what is not
                supported; names ``spec.param`` and what to do about it.
        """


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call.

    Attributes:
        name: Its name; letters, digits, ``_`` and ``-``, at most 64.
        description: What it does, for the model.
        parameters: The JSON schema of its arguments, an object; empty if it takes none.
        strict: Whether arguments must follow the schema even where the model is free to call or not.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = {}
    strict: bool = False


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model has to call a tool.

    Attributes:
        mode: ``none``, ``auto`` or ``required``.
        names: The only tools it may call; empty for all.
        parallel: Whether it may make several calls at once.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


class ToolFormat(ABC):
    """How a family of models writes tool calls. One instance serves all models and threads: keep no state."""

    markers: Sequence[str] = ()
    """Texts of its markup that may be control tokens: in outputs that may hold calls, those show as text."""

    @abstractmethod
    def suits(self, template: str | None, special_tokens: Mapping[str, int]) -> bool:
        """Whether a model with this chat template and these control tokens writes calls like this."""

    @abstractmethod
    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, special_tokens: Mapping[str, int]
    ) -> str:
        """The grammar of outputs, in llguidance's Lark notation; empty if they are not to be constrained.

        With ``required`` the output is one or more calls; with ``auto`` it is text, and a call from where the
        model begins one. Of a marker that is a control token the grammar names the id: ``<[128010]>``.

        Args:
            tools: The tools that may be called, at least one.
            choice: Whether one has to be, and whether it may be several.
            special_tokens: The model's control tokens by their text.
        """

    @abstractmethod
    def parser(
        self, tools: Sequence[Tool], choice: ToolChoice, *, constrained: bool
    ) -> OutputParser:
        """Reads one output: text and calls.

        Args:
            tools: The tools that may be called; a call of another one is text.
            choice: Whether it may be several.
            constrained: Whether the output follows ``grammar``: then arguments can be given on as they
                come. Otherwise a call that turns out to be malformed has to be given back as text.
        """

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> Sequence[Mapping[str, Any]]:
        """Messages for a model whose own template does not know tools: calls, results, tools as text.

        Args:
            messages: In OpenAI's shape, but that arguments are objects and that each ``tool`` message has
                the tool's ``name`` where that is known. Not to be changed.
            tools: What the model is to be told of; may be empty.
            choice: Whether it has to call one.
        """
        return messages

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Messages, as for ``prepare``, for a model whose own template knows tools."""
        return messages
