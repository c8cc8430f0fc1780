"""What the sampler does only for some: tokens that may not come yet, and the rarer filters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.types import SamplingParams

__all__ = ["TokenRules", "head", "make_rules"]

_MIN_GROUPS = 256


class TokenRules:
    """What a sequence's logits need beyond bias and penalties.

    Args:
        endings: ``int64[n]``, tokens that may not come before ``min_tokens``.
        min_tokens: See ``SamplingParams``.
    """

    __slots__ = ("_endings", "_min_tokens")

    def __init__(self, endings: NDArray[np.int64], min_tokens: int) -> None:
        self._endings = endings
        self._min_tokens = min_tokens

    def apply(self, row: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
        """Adjust a row of logits for a sequence's next token.

        Args:
            row: ``float32[vocab]``; not written to.
            sequence: The sequence, as it is before that token.

        Returns:
            The adjusted row; ``row`` itself if nothing is to be done.
        """
        if sequence.num_output < self._min_tokens and len(self._endings):
            without = row.copy()
            without[self._endings] = -np.inf
            # Where a grammar lets nothing but an end come the output is complete: then it ends all the same.
            if np.isfinite(without.max()):
                row = without
        return row


def make_rules(params: SamplingParams, end_token_ids: Collection[int]) -> TokenRules | None:
    """The rules that a request's sequences need; ``None`` if none.

    Args:
        params: What it asks for.
        end_token_ids: The model's end tokens.
    """
    if not params.min_tokens:
        return None
    endings = set(params.stop_token_ids)
    if not params.ignore_eos:
        endings.update(end_token_ids)
    return TokenRules(np.array(sorted(endings), np.int64), params.min_tokens)


def head(values: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Indices of the k largest values, largest first, ties by index.

    The k largest peaks of disjoint groups are k values: nothing below the least of them is in the head.
    What is left to rank is a handful; numpy's partition of the whole vocabulary takes ten times as long.
    """
    groups = min(len(values), max(_MIN_GROUPS, 4 * k))
    whole = len(values) // groups * groups
    peaks = values[:whole].reshape(-1, groups).max(axis=0)
    if whole < len(values):
        peaks = np.append(peaks, values[whole:].max())
    threshold = np.partition(peaks, len(peaks) - k)[len(peaks) - k]
    ids = np.flatnonzero(values >= threshold)
    return ids[np.argsort(-values[ids], kind="stable")[:k]]
