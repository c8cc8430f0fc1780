"""What sequences ask of the next token, as arrays: for runtimes that sample (see ``device_sampling.py``)."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.engine import sampler
from stoker.types import SampleInput, TokenEdits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.masks import GrammarMasks
    from stoker.engine.sequence import Sequence

__all__ = ["sample_input"]

_MOST_TOP_K = (1 << 31) - 1


def sample_input(
    rows: Rows[int], sequences: Rows[Sequence], masks: GrammarMasks | None = None
) -> SampleInput:
    """How to draw the next tokens of sequences.

    Args:
        rows: The row of each among those that the step was to give logits of.
        sequences: N sequences.
        masks: Where to get the masks of those that have a grammar.
    """
    params = [sequence.sampling for sequence in sequences]
    batch = SampleInput(
        rows=np.array(rows, np.int32),
        temperature=np.array([p.temperature for p in params], np.float64),
        top_k=np.array([min(p.top_k, _MOST_TOP_K) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        draws=np.array(
            [
                sampler.uniform(s.seed, s.num_tokens) if s.sampling.temperature else 0.0
                for s in sequences
            ],
            np.float64,
        ),
    )
    _add_edits(batch, sequences)
    if masks is not None and any(s.request.grammar is not None for s in sequences):
        mask_rows, packed = masks.packed(sequences)
        if mask_rows:
            batch.mask_rows, batch.masks = np.array(mask_rows, np.int32), packed
    return batch


class _EditList:
    """Collects the edits of one kind."""

    __slots__ = ("_rows", "_tokens", "_values")

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int32]] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(self, row: int, tokens: NDArray[np.int64], values: Any) -> None:
        """Edits of one row; ``values`` is an array, or one for all."""
        if len(tokens):
            self._rows.append(np.full(len(tokens), row, np.int32))
            self._tokens.append(tokens)
            self._values.append(np.broadcast_to(np.asarray(values, np.float32), len(tokens)))

    def whole(self) -> TokenEdits | None:
        """All of them; ``None`` if there are none."""
        if not self._rows:
            return None
        return TokenEdits(
            np.concatenate(self._rows),
            np.concatenate(self._tokens).astype(np.int32),
            np.concatenate(self._values),
        )


def _add_edits(batch: SampleInput, sequences: Rows[Sequence]) -> None:
    lists: tuple[_EditList, _EditList, _EditList, _EditList] | None = None
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        is_penalized = sampler.is_penalized(params)
        if not (is_penalized or params.logit_bias or sequence.rules is not None):
            continue
        lists = lists or (_EditList(), _EditList(), _EditList(), _EditList())
        bias, repetition, penalties, forbidden = lists
        if params.logit_bias:
            bias.add(row, *sampler.biases(params))
        if is_penalized:
            counts = sampler.counted(sequence)
            if params.repetition_penalty != 1.0:
                repetition.add(row, counts.seen(), params.repetition_penalty)
            if params.presence_penalty or params.frequency_penalty:
                penalties.add(row, *counts.penalties(params))
        if sequence.rules is not None:
            forbidden.add(row, sequence.rules.forbidden(sequence.num_output), 0.0)
    if lists is not None:
        batch.bias, batch.repetition, batch.penalties, batch.forbidden = (
            edits.whole() for edits in lists
        )
