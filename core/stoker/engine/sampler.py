"""Chooses tokens from logits, in numpy.

Order: logit bias, repetition, presence and frequency penalties, DRY, what ``min_tokens`` forbids; then, if
the temperature is not 0: temperature, top-k, typical, top-p, min-p, XTC, draw.
(vLLM's order, with llama.cpp's filters at llama.cpp's places; min-p comes after top-p as there, and on the
top-p set it is the same as before it, since both keep a head of the same ranking. llama.cpp applies the
temperature last: here the filters see the probabilities that are drawn from.)

Randomness is counter-based: the one uniform number of a draw is a hash of (seed, position), so that a seeded
request draws the same numbers alone, in a crowd and after a preemption; whether XTC applies is drawn with
another seed made of the same one. The vocabulary is never sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.filters import exclude_top_choices, typical
from stoker.engine.filters import head as _head

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Rows

    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.types import SamplingParams

__all__ = [
    "NOT_FINITE",
    "TokenCounts",
    "accepted",
    "biases",
    "counted",
    "excludes_top_choices",
    "is_penalized",
    "sample",
    "uniform",
    "verify",
]

NOT_FINITE = -1
"""What ``sample`` returns for a row whose logits hold no finite maximum."""

_MASK64 = (1 << 64) - 1
_FIRST_HEAD = 256  # candidates to rank before top-p looks further
_BLOCK = 256
_XTC_SALT = 0x58544358544358  # its draws have nothing to do with those of the tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied twice.
    """
    x = _mix((seed + 0x9E3779B97F4A7C15) & _MASK64)
    x = _mix((x ^ position) + 0x9E3779B97F4A7C15 & _MASK64)
    return (x >> 11) * (1.0 / (1 << 53))


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class TokenCounts:
    """How often each token occurred in a sequence: what the penalties need, kept up incrementally.

    Args:
        prompt: ``int32[n]``, the prompt; counts for the repetition penalty only.
    """

    __slots__ = ("_num_seen", "output", "prompt")

    def __init__(self, prompt: NDArray[np.int32]) -> None:
        self.prompt = np.unique(prompt)
        self.output: dict[int, int] = {}
        self._num_seen = 0

    def update(self, output: NDArray[np.int32]) -> None:
        """Count the output tokens that are new since the last call."""
        for token in output[self._num_seen :].tolist():
            self.output[token] = self.output.get(token, 0) + 1
        self._num_seen = len(output)

    def apply(self, logits: NDArray[np.float32], params: SamplingParams) -> None:
        """Penalize ``logits`` (``float32[vocab]``) in place."""
        if params.repetition_penalty != 1.0:
            seen = self.seen()
            values = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self.output and (params.presence_penalty or params.frequency_penalty):
            ids, penalties = self.penalties(params)
            logits[ids] -= penalties

    def seen(self) -> NDArray[np.int64]:
        """The tokens of prompt and output, ascending."""
        return np.union1d(self._ids(), self.prompt).astype(np.int64)

    def penalties(self, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The tokens of the output, and what presence and frequency take from the logit of each."""
        counts = np.fromiter(self.output.values(), np.float32, len(self.output))
        return self._ids(), params.presence_penalty + params.frequency_penalty * counts

    def _ids(self) -> NDArray[np.int64]:
        return np.fromiter(self.output.keys(), np.int64, len(self.output))


def sample(logits: NDArray[np.float32], sequences: Rows[Sequence]) -> list[int]:
    """Choose the next token of each sequence.

    Args:
        logits: ``float32[R, vocab]``; not written to.
        sequences: R sequences, one for each row.

    Returns:
        R token ids; ``NOT_FINITE`` for a row without a finite maximum.
    """
    chosen = _likeliest(logits)
    for row, sequence in enumerate(sequences):
        if chosen[row] != NOT_FINITE and not _is_plain_greedy(sequence):
            chosen[row] = _sample_row(logits[row], sequence)
    return chosen


def verify(
    logits: NDArray[np.float32],
    sequences: Rows[Sequence],
    drafts: Mapping[int, NDArray[np.int32]],
) -> list[list[int]]:
    """Choose the next tokens of sequences some of which have draft tokens in the step.

    Row after row is sampled as ever, with the tokens before it in place, for as long as what was sampled is
    the draft's next token. Since a draw depends on seed and position only, these are the very tokens that
    would have been sampled one by one; a draft token is accepted with the probability that the model gives
    it, which is the most that is possible for a guess without probabilities (Leviathan et al., ICML 2023).

    Args:
        logits: ``float32[R, vocab]``; for each sequence one row, and one for each of its draft tokens.
        sequences: In the order of the rows.
        drafts: ``int32[k]`` by sequence id.

    Returns:
        For each sequence 1 to k + 1 token ids; the last may be ``NOT_FINITE``.
    """
    likeliest = _likeliest(logits)
    chosen: list[list[int]] = []
    row = 0
    for sequence in sequences:
        found = drafts.get(sequence.sequence_id)
        draft: list[int] = [] if found is None else found.tolist()
        end = row + len(draft) + 1
        if _is_plain_greedy(sequence):
            chosen.append(accepted(likeliest[row:end], draft))
        else:
            chosen.append(_verify_rows(logits[row:end], likeliest[row:end], sequence, draft))
        row = end
    return chosen


def accepted(tokens: list[int], draft: Rows[int]) -> list[int]:
    """What of a sequence's sampled tokens counts: up to the first that is not the draft's.

    Args:
        tokens: One for each token of the draft, sampled with those before it in place, and one more.
        draft: The guess.
    """
    wrong = (at for at, token in enumerate(draft) if tokens[at] != token)
    return tokens[: next(wrong, len(draft)) + 1]


def _verify_rows(
    rows: NDArray[np.float32], likeliest: list[int], sequence: Sequence, draft: list[int]
) -> list[int]:
    tokens: list[int] = []
    before = sequence.num_tokens
    try:
        for at, row in enumerate(rows):
            token = likeliest[at]
            if token != NOT_FINITE:
                token = _sample_row(row, sequence)
            tokens.append(token)
            if at == len(draft) or token != draft[at]:
                break
            sequence.append(token)  # penalties and draws of the next row depend on it
    except BaseException:
        sequence.counts = None  # they may count tokens that will not be there
        raise
    finally:
        sequence.num_tokens = before
    return tokens


def _likeliest(logits: NDArray[np.float32]) -> list[int]:
    """The token with the greatest logit of each row, or ``NOT_FINITE``."""
    tokens: NDArray[np.intp] = logits.argmax(axis=1)
    finite = np.isfinite(logits[np.arange(len(tokens)), tokens])
    if not finite.all():
        tokens[~finite] = NOT_FINITE
    likeliest: list[int] = tokens.tolist()
    return likeliest


def _is_plain_greedy(sequence: Sequence) -> bool:
    params = sequence.sampling
    return (
        params.temperature == 0.0
        and sequence.rules is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
    )


def _sample_row(row: NDArray[np.float32], sequence: Sequence) -> int:
    params = sequence.sampling
    row = _adjusted(row, sequence)
    if sequence.rules is not None:
        row = sequence.rules.apply(row, sequence)
    if params.temperature == 0.0:
        return int(row.argmax())
    ids, probabilities = _candidates(row, params)
    if excludes_top_choices(sequence):
        kept = exclude_top_choices(probabilities, params.xtc_threshold)
        if kept is not None:
            ids = kept if ids is None else ids[kept]
            probabilities = probabilities[kept]
    at = _draw(probabilities, uniform(sequence.seed, sequence.num_tokens))
    return at if ids is None else int(ids[at])


def excludes_top_choices(sequence: Sequence) -> bool:
    """Whether XTC applies to a sequence's next token."""
    params = sequence.sampling
    if params.xtc_probability <= 0.0 or params.xtc_threshold > 0.5:
        return False
    return uniform(sequence.seed ^ _XTC_SALT, sequence.num_tokens) < params.xtc_probability


def is_penalized(params: SamplingParams) -> bool:
    """Whether tokens that were seen before are penalized."""
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def biases(params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens that have a bias, and theirs."""
    count = len(params.logit_bias)
    return (
        np.fromiter(params.logit_bias.keys(), np.int64, count),
        np.fromiter(params.logit_bias.values(), np.float32, count),
    )


def counted(sequence: Sequence) -> TokenCounts:
    """How often each token has occurred in a sequence so far."""
    if sequence.counts is None:
        sequence.counts = TokenCounts(sequence.tokens[: sequence.num_prompt])
    sequence.counts.update(sequence.tokens[sequence.num_prompt : sequence.num_tokens])
    return sequence.counts


def _adjusted(row: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
    """The row with bias and penalties applied; the row itself if there are none."""
    params = sequence.sampling
    penalized = is_penalized(params)
    if not penalized and not params.logit_bias:
        return row
    row = row.copy()
    if params.logit_bias:
        ids, values = biases(params)
        row[ids] += values
    if penalized:
        counted(sequence).apply(row, params)
    return row


def _candidates(
    row: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """The tokens that may be drawn and their unnormalized probabilities.

    Returns:
        Ids (``None`` for the whole vocabulary, in order) and ``exp(logit / temperature - max)``.
    """
    ids: NDArray[np.intp] | None = None
    if 0 < params.top_k < len(row):
        ids = _head(row, params.top_k)
        row = row[ids]
    # Subtract before dividing: a tiny temperature must not overflow to inf - inf.
    weights = np.exp((row - row.max()) / np.float32(max(params.temperature, 1e-5)))
    if params.typical_p < 1.0:
        kept = typical(weights, params.typical_p)
        ids = kept if ids is None else ids[kept]
        row, weights = row[kept], weights[kept]
    if params.top_p < 1.0:
        kept = _nucleus(row, weights, params.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    return ids, weights


def _draw(weights: NDArray[np.float32], draw: float) -> int:
    """The index that ``draw``, in [0, 1), falls on when each has its share by weight.

    First the block, then the place in it: a running sum over a vocabulary is slow.
    """
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float64))
    cumulative = sums.cumsum()
    target = draw * float(cumulative[-1])
    block = min(int(np.searchsorted(cumulative, target, side="right")), len(sums) - 1)
    block = block if sums[block] else int(np.flatnonzero(sums)[-1])
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = float(cumulative[block] - sums[block])
    at = int(np.searchsorted(inside.cumsum(dtype=np.float64), target - before, side="right"))
    if at >= len(inside):  # by rounding
        at = int(np.flatnonzero(inside)[-1])
    return block * _BLOCK + at


def _nucleus(
    row: NDArray[np.float32], weights: NDArray[np.float32], top_p: float
) -> NDArray[np.intp]:
    """Indices of the smallest set of the likeliest tokens whose mass reaches ``top_p``.

    They are ranked by logit, not by weight: which weights are equal is a matter of rounding, and whoever else
    samples (``Runtime.sample``) has to arrive at the same order.
    """
    target = top_p * float(weights.sum())
    k = min(_FIRST_HEAD, len(weights))
    while True:
        head = _head(row, k)
        cumulative = weights[head].cumsum(dtype=np.float64)
        if cumulative[-1] >= target or k == len(weights):
            return head[: int(np.searchsorted(cumulative, target)) + 1]
        k = min(k * 8, len(weights))
