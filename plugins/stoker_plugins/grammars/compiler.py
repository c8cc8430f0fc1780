"""Grammars and matchers by llguidance: what may come next, by a lexer and an Earley parser in Rust."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from stoker import Grammar, GrammarCompiler, InvalidRequestError, Matcher
from stoker_plugins.grammars.options import LlguidanceOptions
from stoker_plugins.grammars.reasons import in_words
from stoker_plugins.grammars.sources import source_of
from stoker_plugins.grammars.vocabulary import build_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker import GrammarSpec, RuntimeInfo, Tokenizer

__all__ = ["LlguidanceCompiler"]


class LlguidanceCompiler(GrammarCompiler):
    """Compiles for one model.

    Args:
        tokenizer: The model's.
        info: The model's facts.
        options: Limits.
    """

    def __init__(
        self, tokenizer: Tokenizer, info: RuntimeInfo, options: LlguidanceOptions | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._options = options = options or LlguidanceOptions()
        self._limits = LLParserLimits(
            max_grammar_size=options.max_grammar_size,
            step_max_items=options.max_items,
            max_lexer_states=options.max_lexer_states,
            initial_lexer_fuel=options.compile_fuel,
            step_lexer_fuel=options.step_fuel,
            verbose_errors=False,
        )
        self._building = threading.Lock()
        self._built: LLTokenizer | None = None

    def prepare(self) -> None:
        """Build the trie over the vocabulary."""
        self._trie()

    def compile(self, spec: GrammarSpec) -> LlguidanceGrammar:
        """Compile, and take a first step: what fails there fails here.

        Raises:
            InvalidRequestError: See ``GrammarCompiler.compile``.
        """
        source = source_of(spec, self._options)
        trie = self._trie()
        matcher = LLMatcher(trie, source, log_level=0, limits=self._limits)
        _check(matcher, spec)
        warnings = tuple(matcher.get_grammar_warnings())
        num_words = (trie.vocab_size + 31) // 32
        grammar = LlguidanceGrammar(spec, matcher, warnings, num_words)
        _probe(LlguidanceMatcher(matcher, spec, num_words), grammar.start(), num_words)
        return grammar

    def _trie(self) -> LLTokenizer:
        with self._building:
            if self._built is None:
                self._built = build_tokenizer(self._tokenizer, self._info)
            return self._built


class LlguidanceGrammar(Grammar):
    """A matcher at its beginning, of which copies are made.

    Args:
        spec: What was asked for.
        matcher: At the beginning, its first mask computed.
        warnings: What is not enforced.
        num_words: Length of its masks.
    """

    def __init__(
        self, spec: GrammarSpec, matcher: LLMatcher, warnings: Sequence[str], num_words: int
    ) -> None:
        self.spec = spec
        self.warnings = warnings
        self._matcher = matcher
        self._num_words = num_words
        self._copying = threading.Lock()  # one borrower at a time is what the binding allows

    def start(self) -> LlguidanceMatcher:
        """A copy; takes about 10 microseconds."""
        with self._copying:
            return LlguidanceMatcher(self._matcher.deep_copy(), self.spec, self._num_words)


class LlguidanceMatcher(Matcher):
    """One output.

    Args:
        matcher: Its own.
        spec: What was asked for, for error messages.
        num_words: Length of llguidance's masks: a token more than the model's where that has no end token.
    """

    __slots__ = ("_matcher", "_num_words", "_spec")

    def __init__(self, matcher: LLMatcher, spec: GrammarSpec, num_words: int) -> None:
        self._matcher = matcher
        self._spec = spec
        self._num_words = num_words

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Set the tokens that may come next; releases the GIL."""
        into = mask if self._num_words == len(mask) else np.empty(self._num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)
        if into is not mask:
            mask[:] = into[: len(mask)]
        if self._matcher.is_error():
            _check(self._matcher, self._spec)

    def accept(self, token: int) -> bool:
        """Move on by a token, if it may come next."""
        if self._matcher.try_consume_tokens([token]) == 1:
            return True
        _check(self._matcher, self._spec)
        return False

    def rollback(self, num_tokens: int) -> None:
        """Take tokens back."""
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def count_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next."""
        return self._matcher.validate_tokens(list(tokens))

    def forced(self) -> Sequence[int]:
        """Tokens of the text that has to come next, as the model would have written it."""
        return self._matcher.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _probe(first: Matcher, copy: Matcher, num_words: int) -> None:
    """Compute the first mask of one matcher, and with a copy the second."""
    mask = np.empty(num_words, np.int32)
    first.fill_mask(mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    if len(allowed) and copy.accept(int(allowed[0])) and not copy.is_complete:
        copy.fill_mask(mask)


def _check(matcher: LLMatcher, spec: GrammarSpec) -> None:
    """Raise what is wrong with a matcher, if anything is."""
    if not matcher.is_error():
        return
    reason = in_words(matcher.get_error())
    raise InvalidRequestError(f"{spec.param} cannot be used: {reason}", param=spec.param)
