"""What the sampler does only for some: tokens that may not come yet, and the rarer filters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.dry import Dry, is_dry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.types import SamplingParams

__all__ = ["TokenRules", "exclude_top_choices", "head", "make_rules", "typical"]

_MIN_GROUPS = 256
_FIRST_HEAD = 256  # candidates to rank before a filter looks further


class TokenRules:
    """What a sequence's logits need beyond bias and penalties.

    Args:
        endings: ``int64[n]``, tokens that may not come before ``min_tokens``.
        min_tokens: See ``SamplingParams``.
        dry: The penalty on repetitions, if there is one.
    """

    __slots__ = ("_dry", "_endings", "_min_tokens")

    def __init__(self, endings: NDArray[np.int64], min_tokens: int, dry: Dry | None) -> None:
        self._endings = endings
        self._min_tokens = min_tokens
        self._dry = dry

    def apply(self, row: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
        """Adjust a row of logits for a sequence's next token.

        Args:
            row: ``float32[vocab]``; not written to.
            sequence: The sequence, as it is before that token.

        Returns:
            The adjusted row; ``row`` itself if nothing is to be done.
        """
        if self._dry is not None:
            row = row.copy()
            self._dry.apply(row, sequence.tokens[: sequence.num_tokens])
        if sequence.num_output < self._min_tokens and len(self._endings):
            without = row.copy()
            without[self._endings] = -np.inf
            # Where a grammar lets nothing but an end come the output is complete: then it ends all the same.
            if np.isfinite(without.max()):
                row = without
        return row

    @property
    def needs_text(self) -> bool:
        """Whether they depend on more than the number of tokens so far."""
        return self._dry is not None

    def forbidden(self, num_output: int) -> NDArray[np.int64]:
        """Tokens that may not come after so many tokens of output (but if nothing else can)."""
        return self._endings if num_output < self._min_tokens else self._endings[:0]


def make_rules(
    params: SamplingParams, end_token_ids: Collection[int], names: Callable[[int], bytes]
) -> TokenRules | None:
    """The rules that a request's sequences need; ``None`` if none.

    Args:
        params: What it asks for.
        end_token_ids: The model's end tokens.
        names: The bytes of a token; of control tokens their text.
    """
    dry = Dry(params, names) if is_dry(params) else None
    if dry is None and not params.min_tokens:
        return None
    endings = set(params.stop_token_ids)
    if not params.ignore_eos:
        endings.update(end_token_ids)
    return TokenRules(np.array(sorted(endings), np.int64), params.min_tokens, dry)


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


def typical(weights: NDArray[np.float32], mass: float) -> NDArray[np.intp]:
    """Locally typical sampling (Meister et al., 2022): the tokens about as surprising as was to be expected.

    Args:
        weights: ``float32[n]``, unnormalized probabilities.
        mass: Tokens are kept, the most typical first, until their probability is more than this.

    Returns:
        Indices of the tokens that are kept, ascending; at least one.
    """
    probabilities = weights / weights.sum(dtype=np.float64)
    possible = probabilities > 0
    surprise = np.full(len(weights), np.inf)
    np.log(probabilities, out=surprise, where=possible)
    np.negative(surprise, out=surprise, where=possible)
    entropy = float(probabilities[possible] @ surprise[possible])
    closeness = -np.abs(surprise - entropy)
    k = min(_FIRST_HEAD, len(weights))
    while True:
        kept = head(closeness, k)
        over = int(np.searchsorted(probabilities[kept].cumsum(), mass, side="right"))
        if over < k or k == len(weights):
            return np.sort(kept[: over + 1])
        k = min(k * 8, len(weights))


def exclude_top_choices(weights: NDArray[np.float32], threshold: float) -> NDArray[np.intp] | None:
    """XTC, "exclude top choices" (p-e-w, 2024): of the likely tokens only the least likely one stays.

    Args:
        weights: ``float32[n]``, unnormalized probabilities.
        threshold: Tokens at least as probable as this are likely.

    Returns:
        Indices of the tokens that are kept, ascending; ``None`` for all of them. Of equals the last stays.
    """
    likely = np.flatnonzero(weights >= threshold * weights.sum(dtype=np.float64))
    if len(likely) < 2:
        return None
    stays = len(likely) - 1 - int(weights[likely][::-1].argmin())
    return np.delete(np.arange(len(weights)), np.delete(likely, stays))
