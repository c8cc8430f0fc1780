"""What one step computes, and the arrays that tell a runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.sequence import Sequence
from stoker.types import StepInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Plan"]


@dataclass(slots=True)
class Plan:
    """What one step computes.

    Attributes:
        decodes: Sequences with one pending token.
        prefills: Sequences and how many of their pending tokens to compute.
        drafts: By sequence id, guessed tokens to verify behind the pending token of a decode.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    drafts: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens to compute."""
        return sum(count for _, count in self.prefills)

    @property
    def num_tokens(self) -> int:
        """All tokens to compute."""
        return len(self.decodes) + self.num_prefill_tokens + self.num_draft_tokens

    @property
    def num_draft_tokens(self) -> int:
        """Guessed tokens to compute."""
        return sum(map(len, self.drafts.values())) if self.drafts else 0

    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return self.decodes + [sequence for sequence, _ in self.prefills]

    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of the logits' rows.

        A sequence has a row of logits, and one more for each of its draft tokens. (Rows that only score a
        prompt come before its row: see ``scoring.py``.)
        """
        return self.decodes + [s for s, count in self.prefills if self.is_sampled(s, count)]

    @staticmethod
    def is_sampled(sequence: Sequence, count: int) -> bool:
        """Whether computing so many of its pending tokens gives a sequence its next one."""
        return count == sequence.num_pending and sequence.max_tokens > 0

    @property
    def num_scored_rows(self) -> int:
        """Rows of logits that only score prompts."""
        num_rows = 0
        for sequence, count in self.prefills:
            if sequence.scores is not None:
                rows = sequence.scores.rows(sequence.num_computed, count)
                num_rows += rows.stop - rows.start
        return num_rows

    def step_input(self) -> StepInput:
        """The arrays for ``Runtime.step``."""
        decodes = self.decodes
        head = len(decodes) + self.num_draft_tokens
        total = self.num_tokens
        token_ids = np.empty(total, np.int32)
        positions = np.empty(total, np.int32)
        lanes = np.empty(total, np.int32)
        wants_logits = np.zeros(total, np.bool_)
        if self.drafts:
            wants_logits[:head] = True
            self._put_drafts(token_ids, positions, lanes)
        elif decodes:
            token_ids[:head] = [s.tokens[s.num_computed] for s in decodes]
            positions[:head] = [s.num_computed for s in decodes]
            lanes[:head] = [s.lane for s in decodes]
            wants_logits[:head] = True
        at = head
        for sequence, count in self.prefills:
            start, end = sequence.num_computed, sequence.num_computed + count
            token_ids[at : at + count] = sequence.tokens[start:end]
            positions[at : at + count] = np.arange(start, end, dtype=np.int32)
            lanes[at : at + count] = sequence.lane
            if sequence.scores is not None:
                wants_logits[at : at + count][sequence.scores.rows(start, count)] = True
            at += count
            wants_logits[at - 1] |= self.is_sampled(sequence, count)
        return StepInput(token_ids, positions, lanes, wants_logits)

    def _put_drafts(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        lanes: NDArray[np.int32],
    ) -> None:
        """Fill the rows of decodes, each followed by its draft tokens."""
        at = 0
        for sequence in self.decodes:
            start = sequence.num_computed
            token_ids[at] = sequence.tokens[start]
            end = at + 1
            draft = self.drafts.get(sequence.sequence_id)
            if draft is not None:
                end += len(draft)
                token_ids[at + 1 : end] = draft
            positions[at:end] = np.arange(start, start + end - at, dtype=np.int32)
            lanes[at:end] = sequence.lane
            at = end
