"""DRY, "don't repeat yourself": a penalty on tokens that would go on with a repetition, the longer the more.

By p-e-w for text-generation-webui (2024); names and details as in llama.cpp. If the end of the text, L tokens
of it, occurred before and was followed by a token then, that token now costs
``multiplier * base ** (L - allowed_length)``, for L of at least ``allowed_length``. No repetition reaches
across a sequence breaker, and a token that contains one costs nothing.

llama.cpp looks for breakers as sequences of tokens that it makes of every token of the vocabulary; here they
are looked for in the text of the last tokens, which finds the same, and those that were cut otherwise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from stoker.types import SamplingParams

__all__ = ["Dry", "is_dry"]

_LOG_OF_MOST = 88.7228391  # logarithm of the largest float32
_MOST = 3.0e38
_WIDTH = 32  # tokens to compare at once


def is_dry(params: SamplingParams) -> bool:
    """Whether the penalty is on."""
    return params.dry_multiplier != 0 and params.dry_base >= 1 and params.dry_penalty_last_n != 0


class Dry:
    """The penalty of one request; it keeps nothing of a text.

    Args:
        params: How strong it is.
        names: The bytes of a token; of control tokens their text.
    """

    def __init__(self, params: SamplingParams, names: Callable[[int], bytes]) -> None:
        self._params = params
        self._names = names
        self._breakers = [text.encode() for text in params.dry_sequence_breakers if text]
        self._longest_breaker = max(map(len, self._breakers), default=0)
        self._max_exponent: int | None = None
        if params.dry_base > 1.000001:
            self._max_exponent = int(_LOG_OF_MOST / math.log(params.dry_base))

    def apply(self, row: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        """Penalize a row in place.

        Args:
            row: ``float32[vocab]``, the logits of the next token.
            tokens: ``int32[n]``, the text so far, prompt and all.
        """
        params = self._params
        if params.dry_penalty_last_n > 0:
            tokens = tokens[-params.dry_penalty_last_n :]
        allowed = params.dry_allowed_length
        if len(tokens) <= allowed:
            return
        # Longer repetitions cost no more, so nobody needs to know how long they are.
        most = len(tokens)
        if self._max_exponent is not None:
            most = min(most, max(0, allowed) + self._max_exponent)
        limit = self._reach(tokens, most)
        if limit < allowed:
            return
        lengths = _repetitions(tokens, limit)
        at = np.flatnonzero(lengths >= allowed)
        longest: dict[int, int] = {}
        for token, length in zip(tokens[at + 1].tolist(), lengths[at].tolist(), strict=True):
            longest[token] = max(length, longest.get(token, length))
        for token, length in longest.items():
            if not self._breaks(token):
                penalty = params.dry_multiplier * params.dry_base ** (length - allowed)
                row[token] -= np.float32(max(-_MOST, min(_MOST, penalty)))

    def _breaks(self, token: int) -> bool:
        name = self._names(token)
        return any(breaker in name for breaker in self._breakers)

    def _reach(self, tokens: NDArray[np.int32], most: int) -> int:
        """How many of the last tokens come after the last breaker; ``most`` if they are as many or more."""
        pieces = [
            self._names(token) for token in tokens[-(most + self._longest_breaker) :].tolist()
        ]
        text = b"".join(pieces)
        end = max(
            (at + len(b) for b in self._breakers if (at := text.rfind(b)) >= 0),
            default=0,
        )
        if not end:
            return most
        start, count = len(text), 0
        for piece in reversed(pieces):
            start -= len(piece)
            if start < end:
                break
            count += 1
        return min(count, most)


def _repetitions(tokens: NDArray[np.int32], most: int) -> NDArray[np.int64]:
    """For each token but the last: how many up to it are the same as the last ones; ``most`` at most.

    Args:
        tokens: ``int32[n]``.
        most: No more of them are compared.

    Returns:
        ``int64[n - 1]``.
    """
    num_tokens = len(tokens)
    lengths = np.zeros(num_tokens - 1, np.int64)
    alive = np.flatnonzero(tokens[:-1] == tokens[-1]) if most > 0 else lengths[:0]
    # What is before the beginning is like no token.
    padded = np.concatenate([np.full(_WIDTH, -1, tokens.dtype), tokens])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WIDTH)
    done = 0
    while len(alive) and done < most and done < num_tokens:
        # The window that ends with the token ``done`` before this one, latest first.
        ends = alive - done
        is_inside = ends >= 0
        alive, ends = alive[is_inside], ends[is_inside]
        same = windows[ends + 1][:, ::-1] == windows[num_tokens - done][::-1]
        run = np.where(same.all(axis=1), _WIDTH, same.argmin(axis=1))
        lengths[alive] += run
        alive = alive[run == _WIDTH]
        done += _WIDTH
    return np.minimum(lengths, most)
