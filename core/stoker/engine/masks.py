"""Keeps outputs within their grammars: masks logits, so that whatever samples from them cannot leave.

What a mask forbids gets a logit of minus infinity before bias, penalties and temperature, none of which can
undo that. The runtime's own logits stay as they are: log-probabilities are read from them.

Masks are computed between the runtime's step and sampling, one after the other on the loop's thread. They
take some tens of microseconds each; a thread that computed them during the step would take a core from the
model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np

from stoker.errors import EngineError, InvalidRequestError, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.grammar import Grammar
    from stoker.interfaces import RuntimeInfo

__all__ = ["Constraint", "GrammarMasks"]

logger = logging.getLogger("stoker.engine")

# The processor's time that a grammar may take of everybody's: at first, and for each token.
_FREE_S = 0.5
_TOKEN_S = 0.02


class Constraint:
    """Where one sequence stands in its grammar. Nothing that goes wrong in here is raised: see ``error``.

    Args:
        grammar: The grammar.

    Attributes:
        is_over: Whether the output is complete: nothing may follow.
        error: Why the sequence cannot go on.
    """

    __slots__ = ("_grammar", "_matcher", "_num_tokens", "_spent_s", "error", "is_over")

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.is_over = False
        self._spent_s = 0.0
        self._num_tokens = 0
        self.error: Exception | None = None
        try:
            self._matcher = grammar.start()
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; others must go on
            self._fail(error)

    def fill(self, mask: NDArray[np.int32]) -> bool:
        """Set the tokens that may come next; false if it cannot go on.

        Args:
            mask: ``int32[ceil(vocab / 32)]``.
        """
        if self.error is not None:
            return False
        try:
            self._matcher.fill_mask(mask)
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)
            return False
        return True

    def accept(self, token: int) -> None:
        """Move on by a token that was sampled."""
        if self.error is not None:
            return
        began_s = time.thread_time()
        try:
            if not self._matcher.accept(token):
                raise EngineError(f"token {token} was sampled, which the grammar does not allow")
            self.is_over = self._matcher.is_complete
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)
        self._num_tokens += 1
        self._charge(began_s)

    def fill_ahead(self, draft: Rows[int], masks: NDArray[np.int32]) -> int:
        """Set the tokens that may come next, and after each token of a draft.

        Args:
            draft: Tokens that may come next, in turn.
            masks: ``int32[len(draft) + 1, ceil(vocab / 32)]``.

        Returns:
            How many masks were set: fewer than all where the draft completes the output or leaves it.
        """
        moved, began_s = 0, time.thread_time()
        try:
            for at in range(len(draft) + 1):
                if not self.fill(masks[at]):
                    return at
                if at == len(draft):
                    return at + 1
                if not self._matcher.accept(draft[at]):
                    return at + 1
                moved += 1
                if self._matcher.is_complete:
                    return at + 1
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)
            return 0
        finally:
            self._take_back(moved)
            self._charge(began_s)
        return len(draft) + 1

    def count_valid(self, tokens: Rows[int]) -> int:
        """How many of these tokens may come next, in turn."""
        if self.error is not None or self.is_over:
            return 0
        try:
            return self._matcher.count_valid(tokens)
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)
            return 0

    def forced(self) -> Rows[int]:
        """Tokens of the only text that may come next; empty if there is a choice."""
        if self.error is not None or self.is_over:
            return ()
        try:
            return self._matcher.forced()
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)
            return ()

    def cannot_go_on(self) -> None:
        """No token of the vocabulary may come next."""
        param = self._grammar.spec.param
        self._fail(
            InvalidRequestError(
                f"{param} asks for text that this model has no tokens for", param=param
            )
        )

    def _charge(self, began_s: float) -> None:
        """Count the processor's time, not the clock's: a busy machine is no fault of the grammar."""
        self._spent_s += time.thread_time() - began_s
        if self._spent_s > _FREE_S + _TOKEN_S * self._num_tokens and self.error is None:
            param = self._grammar.spec.param
            self._fail(
                InvalidRequestError(
                    f"{param} takes too long to follow: {self._spent_s:.2f} s for {self._num_tokens} tokens; "
                    "make it simpler: smaller bounds, fewer alternatives",
                    param=param,
                )
            )

    def _take_back(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        try:
            self._matcher.rollback(num_tokens)
        except Exception as error:  # noqa: BLE001 - see __init__
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, EngineError | RequestError):
            logger.error("a grammar failed", exc_info=error)
            error = EngineError(f"the grammar failed: {type(error).__name__}")
        self.error = self.error or error


class GrammarMasks:
    """Masks the logits of one model's steps; on the loop's thread.

    Args:
        info: The model's facts.
    """

    def __init__(self, info: RuntimeInfo) -> None:
        self._vocab_size = info.vocab_size
        self._num_words = (info.vocab_size + 31) // 32
        self._ends = self._words(info.end_token_ids)
        self._last_word = self._words(range(32 * (self._num_words - 1), info.vocab_size))[-1]
        self._masked = np.empty((0, info.vocab_size), np.float32)
        self._masks = np.empty((0, self._num_words), np.int32)

    def apply(
        self,
        logits: NDArray[np.float32],
        sequences: Rows[Sequence],
        drafts: Mapping[int, NDArray[np.int32]],
    ) -> NDArray[np.float32]:
        """Logits to sample from.

        Args:
            logits: ``float32[R, vocab]``, the runtime's; not written to.
            sequences: In the order of the rows: each has one, and one more for each of its draft tokens.
            drafts: ``int32[k]`` by sequence id.

        Returns:
            ``logits`` if no sequence has a grammar; else a copy with what is forbidden at minus infinity,
            valid until the next call. Rows of a sequence that is over or has failed are as they were.
        """
        if all(sequence.request.grammar is None for sequence in sequences):
            return logits
        if len(self._masked) < len(logits):
            self._masked = np.empty_like(logits)
        masked = self._masked[: len(logits)]
        start = 0
        for sequence in sequences:
            draft = drafts.get(sequence.sequence_id)
            end = start + 1 + (0 if draft is None else len(draft))
            rows = slice(start, end)
            count = 0
            if sequence.request.grammar is not None:
                count = self._mask(
                    sequence, [] if draft is None else draft.tolist(), logits[rows], masked[rows]
                )
            masked[start + count : end] = logits[start + count : end]
            start = end
        return masked

    def packed(self, sequences: Rows[Sequence]) -> tuple[list[int], NDArray[np.int32]]:
        """The masks themselves, for logits that lie elsewhere; of sequences without drafts.

        Returns:
            Which of the sequences have a mask, ascending, and ``int32[M, ceil(vocab / 32)]``. One that is
            over or has failed has none.
        """
        asking = [at for at, s in enumerate(sequences) if s.request.grammar is not None]
        masks = np.empty((len(asking), self._num_words), np.int32)
        rows: list[int] = []
        for at in asking:
            end = len(rows)
            if self._fill(sequences[at], [], masks[end : end + 1]):
                rows.append(at)
        return rows, masks[: len(rows)]

    def _mask(
        self,
        sequence: Sequence,
        draft: list[int],
        rows: NDArray[np.float32],
        masked: NDArray[np.float32],
    ) -> int:
        """Mask a sequence's rows; returns how many of them, from the first on, were."""
        if len(self._masks) < len(rows):
            self._masks = np.empty((len(rows), self._num_words), np.int32)
        masks = self._masks[: len(rows)]
        count = self._fill(sequence, draft, masks)
        for at in range(count):
            bits = np.unpackbits(
                masks[at].view(np.uint8), bitorder="little", count=self._vocab_size
            )
            masked[at].fill(-np.inf)
            np.copyto(masked[at], rows[at], where=bits.view(np.bool_))
        return count

    def _fill(self, sequence: Sequence, draft: list[int], masks: NDArray[np.int32]) -> int:
        """Set the tokens that may come next, and after each token of a draft; returns how many were set."""
        constraint = sequence.constraint
        if constraint is None:
            grammar = sequence.request.grammar
            if grammar is None:
                return 0
            constraint = sequence.constraint = Constraint(grammar)
        count = constraint.fill_ahead(draft, masks)
        for at in range(count):
            masks[at, -1] &= self._last_word
            if not self._settle_ends(sequence, masks[at], sequence.num_output + at):
                if at == 0:
                    # Seen late: the last token has completed the output.
                    if masks[at].any() or not self._ends.any():
                        constraint.is_over = True
                    else:
                        constraint.cannot_go_on()
                return at
        return count

    def _settle_ends(self, sequence: Sequence, mask: NDArray[np.int32], num_output: int) -> bool:
        """Forbid end tokens where the request does; false if nothing but them may come."""
        others = mask & ~self._ends
        if not others.any():
            return False
        sampling = sequence.sampling
        if sampling.ignore_eos or num_output < sampling.min_tokens:
            mask[:] = others
        return True

    def _words(self, tokens: Iterable[int]) -> NDArray[np.int32]:
        """A mask of these tokens."""
        bits = np.zeros(32 * self._num_words, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)
