"""Grammars for models that think first: they apply to the answer, not to the reasoning before it.

While a model thinks every token may come but an end. Where the marks around its reasoning are single tokens,
as in most vocabularies, that is simple; where they are spelled, no token may reach over the closing mark into
the answer, or the answer's beginning would escape the grammar. Whitespace may: it belongs to neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stoker.grammar import Grammar, Matcher

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.interfaces import RuntimeInfo, Tokenizer
    from stoker.reasoning import ReasoningMarks

__all__ = ["AfterReasoning", "ThoughtTokens"]

_MAX_BLANKS = 3  # tokens of whitespace between reasoning and answer


class ThoughtTokens:
    """What of a model's vocabulary matters to the marks around its reasoning.

    Args:
        marks: The marks.
        tokenizer: The model's.
        info: The size of its vocabulary and its end tokens.
    """

    def __init__(self, marks: ReasoningMarks, tokenizer: Tokenizer, info: RuntimeInfo) -> None:
        self.opening, self.closing = marks.opening.encode(), marks.closing.encode()
        self._tokenizer = tokenizer
        self._vocab_size = info.vocab_size
        self._special = tokenizer.special_tokens
        self.ends = np.array(sorted(info.end_token_ids), np.int64)
        self._own = {self._special[text]: text.encode() for text in marks if text in self._special}

    def prepare(self) -> None:
        """Look through the vocabulary, once: takes a fraction of a second."""
        _ = self.blanks, self.crossing

    def data(self, token: int) -> bytes:
        """The bytes of a token; of a mark that is a control token its text."""
        return self._own[token] if token in self._own else self._tokenizer.token_bytes(token)

    @cached_property
    def _texts(self) -> list[tuple[int, bytes]]:
        """The tokens that may have to do with a mark, or are whitespace."""
        ends = set(self.ends.tolist())
        pairs = ((t, self.data(t)) for t in range(self._vocab_size) if t not in ends)
        last = (self.closing[-1:], self.opening[-1:])
        return [
            (token, data)
            for token, data in pairs
            if data and (data.isspace() or data in self.opening or any(b in data for b in last))
        ]

    @cached_property
    def blanks(self) -> NDArray[np.int64]:
        """Tokens of nothing but whitespace."""
        return np.array([token for token, data in self._texts if data.isspace()], np.int64)

    @cached_property
    def crossing(self) -> dict[int, NDArray[np.int64]]:
        """Tokens that reach into the answer, by how much of the closing mark is missing before them."""
        found = {}
        for missing in range(1, len(self.closing) + 1):
            rest = self.closing[-missing:]
            whole = missing == len(self.closing)  # then it may stand anywhere in the token
            ids = [
                token
                for token, data in self._texts
                if (at := data.find(rest)) == 0 or (whole and at > 0)
                if data[at + missing :].strip()
            ]
            found[missing] = np.array(ids, np.int64)
        return found

    def opening_with(self, begun: bytes) -> NDArray[np.int64]:
        """Tokens that go on with the opening mark, of which a part is there."""
        rest = self.opening[len(begun) :]
        ids = [t for t, data in self._texts if rest.startswith(data) or _opens(data, rest)]
        return np.array(ids, np.int64)


def _opens(data: bytes, rest: bytes) -> bool:
    return data.startswith(rest) and not data[len(rest) :].strip()


class AfterReasoning(Grammar):
    """A grammar that applies once the model has thought.

    Args:
        inner: The answer's.
        tokens: The model's.
        is_thinking: Whether the output begins within the reasoning; otherwise it may, or may not, open it.
    """

    def __init__(self, inner: Grammar, tokens: ThoughtTokens, *, is_thinking: bool) -> None:
        self.spec = inner.spec
        self.warnings = inner.warnings
        self._inner = inner
        self._tokens = tokens
        self._is_thinking = is_thinking

    def start(self) -> Matcher:
        """A matcher at the beginning."""
        return _Matcher(self._inner, self._tokens, is_thinking=self._is_thinking)


class _State(NamedTuple):
    """Where an output stands.

    Attributes:
        phase: ``start``, ``thought``, ``pause`` or ``answer``.
        tail: In ``start`` what of the opening mark is there; in ``thought`` the last bytes.
        first: Tokens that the matcher of an answer without reasoning has accepted.
        second: Tokens that the matcher of the answer after the reasoning has accepted.
        num_blanks: Tokens of whitespace since the reasoning.
        has_thought: Whether there was reasoning, or is.
    """

    phase: str
    tail: bytes = b""
    first: int = 0
    second: int = 0
    num_blanks: int = 0
    has_thought: bool = False


class _Matcher(Matcher):
    def __init__(self, inner: Grammar, tokens: ThoughtTokens, *, is_thinking: bool) -> None:
        self._tokens = tokens
        # Until it is certain that an output begins with reasoning, it may be an answer without any.
        self._first = inner.start()
        self._second = inner.start()
        phase = "thought" if is_thinking else "start"
        self._state = _State(phase, has_thought=is_thinking)
        self._before: list[_State] = []

    @property
    def _matcher(self) -> Matcher:
        return self._second if self._state.has_thought else self._first

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        state = self._state
        if state.phase == "thought":
            mask[:] = -1
            _clear(mask, self._tokens.ends)
            for missing, ids in self._tokens.crossing.items():
                if state.tail.endswith(self._tokens.closing[:-missing]):
                    _clear(mask, ids)
            return
        if self._is_answer():
            self._matcher.fill_mask(mask)
        else:
            mask[:] = 0
        if state.phase == "start":
            _set(mask, self._tokens.opening_with(state.tail))
        elif state.phase == "pause" and state.num_blanks < _MAX_BLANKS:
            _set(mask, self._tokens.blanks)

    def _is_answer(self) -> bool:
        """Whether what is there may be an answer, or the beginning of one."""
        return self._state.has_thought or self._state.first == len(self._before)

    def accept(self, token: int) -> bool:
        after = self._after(token)
        if after is None:
            return False
        self._before.append(self._state)
        self._state = after
        return True

    def _after(self, token: int) -> _State | None:
        """The state after a token; ``None`` if it may not come."""
        state, tokens = self._state, self._tokens
        is_end = token in tokens.ends
        data = b"" if is_end else tokens.data(token)
        if state.phase == "thought":
            return None if is_end else self._after_thought(state.tail + data)
        if state.phase == "start" and data:
            rest = tokens.opening[len(state.tail) :]
            if _opens(data, rest):
                return state._replace(phase="thought", tail=b"", has_thought=True)
            if rest.startswith(data):
                moved = int(self._is_answer() and self._first.accept(token))
                return state._replace(tail=state.tail + data, first=state.first + moved)
        if state.phase == "pause" and data.isspace() and state.num_blanks < _MAX_BLANKS:
            return state._replace(num_blanks=state.num_blanks + 1)
        if not (self._is_answer() and self._matcher.accept(token)):
            return None
        if state.has_thought:
            return state._replace(phase="answer", second=state.second + 1)
        return state._replace(phase="answer", first=state.first + 1)

    def _after_thought(self, text: bytes) -> _State | None:
        closing = self._tokens.closing
        at = text.find(closing)
        if at < 0:
            return self._state._replace(tail=text[-len(closing) :])
        if text[at + len(closing) :].strip():
            return None
        return self._state._replace(phase="pause", tail=b"")

    def rollback(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        state, target = self._state, self._before[-num_tokens]
        del self._before[-num_tokens:]
        self._first.rollback(state.first - target.first)
        self._second.rollback(state.second - target.second)
        self._state = target

    def count_valid(self, tokens: Sequence[int]) -> int:
        if self._state.phase == "answer":
            return self._matcher.count_valid(tokens)
        count = 0
        while count < len(tokens) and self.accept(tokens[count]):
            count += 1
        self.rollback(count)
        return count

    def forced(self) -> Sequence[int]:
        return self._matcher.forced() if self._state.phase == "answer" else ()

    @property
    def is_complete(self) -> bool:
        return self._state.phase == "answer" and self._matcher.is_complete


def _clear(mask: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
    words = mask.view(np.uint32)
    np.bitwise_and.at(words, ids >> 5, ~(np.uint32(1) << (ids & 31).astype(np.uint32)))


def _set(mask: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
    words = mask.view(np.uint32)
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
