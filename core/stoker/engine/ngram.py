"""Prompt lookup: the text that followed the same few tokens before is the guess for what follows now.

Saxena, "Prompt Lookup Decoding" (2023): a suffix of n tokens is looked up in the sequence's own prompt and
output, the longest n first and the latest occurrence first. It needs no second model, and pays wherever an
answer repeats what is there: summaries, edits of code, extraction, lists, and loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.drafters import Drafter
from stoker.engine.prediction import PredictedText

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence

__all__ = ["NgramDrafter", "NgramIndex"]

_MULTIPLIER = 6364136223846793005  # Knuth's MMIX linear congruential generator
_MASK64 = (1 << 64) - 1


class NgramIndex:
    """Where each n-gram of one growing text was last followed by something.

    Keys are 64-bit hashes of n tokens; two n-grams that share one cost a wrong guess, no more. Each token is
    indexed once: what a text brings along in numpy, then token by token.

    Args:
        min_ngram: Fewest tokens that must agree.
        max_ngram: Most tokens to look for.
    """

    __slots__ = ("_last", "_max", "_min", "_num_indexed")

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._min = min_ngram
        self._max = max_ngram
        # For each n: hash of n tokens -> the position after their latest occurrence.
        self._last: list[dict[int, int]] = [{} for _ in range(min_ngram, max_ngram + 1)]
        self._num_indexed = 0  # n-grams that end before this position are in

    def lookup(self, tokens: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
        """What followed the end of the text before; takes in what is new of the text first.

        Where the earlier occurrence reaches into the end itself the text repeats with that period, and so
        does the guess.

        Args:
            tokens: ``int32[n]``, the text; what was there at the last call must not have changed.
            limit: Most tokens wanted.

        Returns:
            ``int32[k]`` with k = ``limit``, or 0 if no suffix occurred before.
        """
        length = len(tokens)
        self._take_in(tokens)
        state = 0
        found = 0
        tail = tokens[max(0, length - self._max) :][::-1].tolist()
        for n, token in enumerate(tail, 1):
            # Hashed from the last token backwards, so that one pass gives all lengths.
            state = (state * _MULTIPLIER + token + 1) & _MASK64
            if n >= self._min:
                after = self._last[n - self._min].get(state)
                if after is None:
                    break  # a longer one contains this one, and does not occur either
                found = after
        if not found or limit <= 0:
            return tokens[:0]
        draft = tokens[found : found + limit]
        return draft.copy() if len(draft) == limit else np.resize(draft, limit)

    def _take_in(self, tokens: NDArray[np.int32]) -> None:
        """Index the n-grams that something follows now."""
        start, end = self._num_indexed, len(tokens) - 1
        if end - start > 16:
            self._take_in_many(tokens, start, end)
        else:
            for at in range(start, end):
                self._take_in_one(tokens, at)
        self._num_indexed = max(start, end)

    def _take_in_one(self, tokens: NDArray[np.int32], at: int) -> None:
        state = 0
        for n, token in enumerate(tokens[max(0, at + 1 - self._max) : at + 1][::-1].tolist(), 1):
            state = (state * _MULTIPLIER + token + 1) & _MASK64
            if n >= self._min:
                self._last[n - self._min][state] = at + 1

    def _take_in_many(self, tokens: NDArray[np.int32], start: int, end: int) -> None:
        """The n-grams that end at ``start`` to ``end - 1``, all at once."""
        base = max(0, start - self._max + 1)
        values = tokens[base:end].astype(np.uint64) + np.uint64(1)
        states = np.zeros(len(values), np.uint64)  # of the n tokens that end here
        for n in range(1, min(self._max, len(values)) + 1):
            states[n - 1 :] *= np.uint64(_MULTIPLIER)
            states[n - 1 :] += values[: len(values) - n + 1]
            if n >= self._min:
                first = max(start - base, n - 1)
                # A dict keeps the last of equal keys: the latest occurrence.
                places = range(base + first + 1, end + 1)
                self._last[n - self._min].update(zip(states[first:].tolist(), places, strict=True))


class NgramDrafter(Drafter):
    """Prompt lookup for every sequence, with an index each; what a request predicts is looked at first.

    Args:
        min_ngram: Fewest tokens that must agree.
        max_ngram: Most tokens to look for.
    """

    is_free = True

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._min = min_ngram
        self._max = max_ngram
        self._indexes: dict[int, NgramIndex] = {}
        self._predictions: dict[int, PredictedText] = {}
        self.predicted: set[int] = set()

    def propose(
        self, sequences: Rows[Sequence], limits: Mapping[int, int]
    ) -> dict[int, NDArray[np.int32]]:
        """What followed the end of each text before, in its prediction or in itself."""
        drafts = {}
        self.predicted.clear()
        for sequence in sequences:
            key = sequence.sequence_id
            if sequence.request.predicted_token_ids:
                draft = self._from_prediction(sequence, limits[key])
                if len(draft):
                    drafts[key] = draft
                    self.predicted.add(key)
                    continue
            index = self._indexes.get(key)
            if index is None:
                index = self._indexes[key] = NgramIndex(self._min, self._max)
            draft = index.lookup(sequence.tokens[: sequence.num_tokens], limits[key])
            if len(draft):
                drafts[key] = draft
        return drafts

    def _from_prediction(self, sequence: Sequence, limit: int) -> NDArray[np.int32]:
        text = self._predictions.get(sequence.sequence_id)
        if text is None:
            text = PredictedText(sequence.request.predicted_token_ids, self._min, self._max)
            self._predictions[sequence.sequence_id] = text
        return text.lookup(sequence.tokens[sequence.num_prompt : sequence.num_tokens], limit)

    def forget(self, sequence_id: int) -> None:
        """Drop the index of a sequence."""
        self._indexes.pop(sequence_id, None)
        self._predictions.pop(sequence_id, None)
