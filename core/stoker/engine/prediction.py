"""Predicted outputs: a request may say what its answer will probably be, and drafts are taken from that.

As long as the output follows the prediction the next tokens are read off it. Where it leaves it, the place is
looked up at which both go on alike: the last few tokens, the longest match first, and of several the first
one behind what was used already, since edits mostly keep the order.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PredictedText"]


class PredictedText:
    """One request's prediction, as one of its sequences uses it.

    Args:
        tokens: What the output will probably look like.
        min_ngram: Fewest tokens that must agree to find the place again.
        max_ngram: Most tokens to look for.
    """

    __slots__ = ("_at", "_max", "_min", "_num_seen", "_num_used", "_tokens")

    def __init__(self, tokens: Rows[int], min_ngram: int, max_ngram: int) -> None:
        self._tokens = np.asarray(tokens, np.int32)
        self._min = min_ngram
        self._max = max_ngram
        self._at: int | None = 0  # where the output goes on, as far as is known
        self._num_used = 0  # the furthest it ever was
        self._num_seen = 0

    def lookup(self, output: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
        """What the prediction says comes next.

        Args:
            output: ``int32[n]``, the output so far; what was there at the last call must not have changed.
            limit: Most tokens wanted.

        Returns:
            ``int32[k]``, with k = 0 where it has nothing to say.
        """
        at = self._at
        for token in output[self._num_seen :].tolist():
            follows = at is not None and at < len(self._tokens) and self._tokens[at] == token
            at = at + 1 if follows and at is not None else None
        self._num_seen = len(output)
        if at is None:
            at = self._find(output)
        self._at = at
        if at is None:
            return self._tokens[:0]
        self._num_used = max(self._num_used, at)
        return self._tokens[at : at + limit]

    def _find(self, output: NDArray[np.int32]) -> int | None:
        """Where the prediction goes on after the last tokens of the output, if it holds them."""
        tail = output[-self._max :][::-1].tolist()
        ends = np.arange(1, len(self._tokens))  # places that something follows
        for num_same, token in enumerate(tail):
            alike = ends[ends > num_same]
            alike = alike[self._tokens[alike - 1 - num_same] == token]
            if not len(alike):
                break
            ends = alike
        else:
            num_same = len(tail)
        if num_same < max(1, self._min):
            return None
        first = int(np.searchsorted(ends, self._num_used))
        return int(ends[first if first < len(ends) else -1])
