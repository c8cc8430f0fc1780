"""What one step computes, and the arrays that tell a runtime."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from stoker.engine.sequence import Sequence
from stoker.types import StepInput

__all__ = ["Plan"]


@dataclass(slots=True)
class Plan:
    """What one step computes.

    Attributes:
        decodes: Sequences with one pending token.
        prefills: Sequences and how many of their pending tokens to compute.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens to compute."""
        return sum(count for _, count in self.prefills)

    @property
    def num_tokens(self) -> int:
        """All tokens to compute."""
        return len(self.decodes) + self.num_prefill_tokens

    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return self.decodes + [sequence for sequence, _ in self.prefills]

    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of the logits' rows."""
        return self.decodes + [s for s, count in self.prefills if count == s.num_pending]

    def step_input(self) -> StepInput:
        """The arrays for ``Runtime.step``."""
        decodes = self.decodes
        head = len(decodes)
        total = self.num_tokens
        token_ids = np.empty(total, np.int32)
        positions = np.empty(total, np.int32)
        lanes = np.empty(total, np.int32)
        wants_logits = np.zeros(total, np.bool_)
        if decodes:
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
            at += count
            wants_logits[at - 1] = end == sequence.num_tokens
        return StepInput(token_ids, positions, lanes, wants_logits)
