"""How likely the model finds a prompt's own tokens: what evaluation harnesses ask for.

The logits after each token of the prompt are wanted, so none of it may come from somebody else's KV before
it was scored; what was computed serves others as ever. A row of logits is as wide as the vocabulary and a
step may have hundreds of them, so chunks of such prompts are bounded by what those take, and each chunk's
rows are turned at once into the little that is told of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stoker.errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.exactness import ExactBlocks
    from stoker.engine.logprobs import LogprobTeller
    from stoker.engine.plan import Plan
    from stoker.engine.sequence import Sequence
    from stoker.types import TokenLogprob

__all__ = ["PromptScores", "max_scored_rows", "rows_to_sample", "score", "within_rows"]

_MAX_LOGITS_BYTES = 64 << 20


class PromptScores:
    """What is known so far of one prompt.

    Args:
        num_prompt: Its tokens.
        num_top: How many of the likeliest tokens to tell at each place.

    Attributes:
        entries: One for each token; ``None`` for the first.
    """

    __slots__ = ("_num_prompt", "entries", "num_top")

    def __init__(self, num_prompt: int, num_top: int) -> None:
        self._num_prompt = num_prompt
        self.num_top = num_top
        self.entries: list[TokenLogprob | None] = [None]

    @property
    def num_scored(self) -> int:
        """How many of the prompt's tokens, from the first, need no logits any more."""
        return len(self.entries) - 1

    @property
    def is_complete(self) -> bool:
        """Whether every token has its entry."""
        return len(self.entries) == self._num_prompt

    def rows(self, start: int, count: int) -> slice:
        """Which rows of a chunk want logits, to score the tokens that follow them.

        Args:
            start: Position of the chunk's first token; it is not after the first that is not scored.
            count: Its tokens.
        """
        first = max(0, min(count, self.num_scored - start))
        return slice(first, max(first, min(count, self._num_prompt - 1 - start)))


def max_scored_rows(vocab_size: int) -> int:
    """Most rows of a step that score prompts: their logits take 64 MiB at most (or one block's)."""
    return max(1, _MAX_LOGITS_BYTES // (4 * vocab_size))


def within_rows(
    shares: dict[int, int], prefilling: Iterable[Sequence], blocks: ExactBlocks, max_rows: int
) -> dict[int, int]:
    """Cut the chunks of prompts that are scored to so many rows together.

    Args:
        shares: Tokens of each sequence's chunk, by its id.
        prefilling: The sequences.
        blocks: How chunks may be cut.
        max_rows: The limit; the first such prompt gets a whole block or tail even if that is more.

    Returns:
        The same keys.
    """
    scored = [s for s in prefilling if s.scores is not None and shares[s.sequence_id]]
    if not scored:
        return shares
    shares, left, is_first = dict(shares), max_rows, True
    for sequence in sorted(scored, key=lambda s: (s.request.arrival_s, s.sequence_id)):
        piece = shares[sequence.sequence_id]
        if piece > left:
            piece = blocks.piece(sequence, left)
            if piece > left and not is_first:
                piece = 0
        shares[sequence.sequence_id] = piece
        left = max(0, left - piece)
        is_first = False
    return shares


def rows_to_sample(
    logits: NDArray[np.float32],
    num_sampled: int,
    plan: Plan,
    vocab_size: int,
    teller: LogprobTeller,
) -> NDArray[np.float32]:
    """The rows of a step to sample from; what the others say of prompts is taken down.

    Args:
        logits: ``float32[R, vocab]``, what the runtime returned.
        num_sampled: Sequences that get a token.
        plan: The step.
        vocab_size: Of the model.
        teller: See ``score``.

    Raises:
        EngineError: These are not the rows that the plan asked for.
    """
    num_scored = plan.num_scored_rows
    num_rows = num_sampled + plan.num_draft_tokens + num_scored
    wanted = (num_rows, vocab_size)
    if num_rows and logits.shape != wanted:
        raise EngineError(f"the runtime returned logits of shape {logits.shape}, not {wanted}")
    return score(logits, plan, teller) if num_scored else logits


def score(logits: NDArray[np.float32], plan: Plan, teller: LogprobTeller) -> NDArray[np.float32]:
    """Score what a step computed of prompts.

    Args:
        logits: ``float32[R, vocab]``, all rows of the step.
        plan: The step.
        teller: Makes entries.

    Returns:
        The rows to sample from, in the order of ``Plan.sampled``.
    """
    row = len(plan.decodes) + plan.num_draft_tokens
    sampled = list(range(row))
    for sequence, count in plan.prefills:
        scores = sequence.scores
        if scores is not None:
            start = sequence.num_computed
            rows = scores.rows(start, count)
            num_rows = rows.stop - rows.start
            first = start + rows.start + 1
            tokens = sequence.tokens[first : first + num_rows].tolist()
            scores.entries += teller.of_rows(logits[row : row + num_rows], tokens, scores.num_top)
            row += num_rows
        if plan.is_sampled(sequence, count):
            sampled.append(row)
            row += 1
    return logits[sampled]
