"""From logits and uniform numbers to tokens, many rows at once: the inverse of the distribution function.

The vocabulary is not sorted. What ``top_k`` and ``top_p`` look at is the head of the ranking: the k likeliest
tokens are in the k groups of neighbouring tokens with the greatest peaks, so one pass over the logits finds
the groups, and only those are ranked.

Nothing in here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TOO_SHORT", "Choice", "draw_from_all", "draw_from_head", "ranked"]

TOO_SHORT = -2
"""What ``draw_from_head`` returns for a row whose ``top_p`` needs a longer head."""

_BLOCK = 256
_LOW_BITS = (1 << 32) - 1


@dataclass(slots=True)
class Choice:
    """How n rows are drawn from; each of these is ``[n, 1]``, and float64 but where it says otherwise.

    Attributes:
        peaks: The greatest logit; float32.
        temperature: float32.
        top_k: As in ``SampleInput``.
        top_p: As in ``SampleInput``.
        min_p: As in ``SampleInput``; float32, as the weights are. ``None`` if it is off for all rows.
        draws: As in ``SampleInput``.
    """

    peaks: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor | None
    draws: torch.Tensor

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Unnormalized probabilities, 1 for the likeliest token; ``float32``, shaped as the logits are."""
        # Subtract before dividing: a tiny temperature must not overflow to inf - inf.
        return (logits - self.peaks).div_(self.temperature).exp_()

    def drop_unlikely(self, weights: torch.Tensor) -> None:
        """Set weights below ``min_p`` to 0."""
        if self.min_p is not None:
            weights.mul_(weights >= self.min_p)


def draw_from_all(rows: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Draw from the whole vocabulary, in the order of ids: first the block, then the place in it."""
    weights = choice.weights(rows)
    choice.drop_unlikely(weights)
    count, size = weights.shape
    whole = size // _BLOCK * _BLOCK
    blocks = weights[:, :whole].reshape(count, -1, _BLOCK)
    sums = blocks.sum(dim=2, dtype=torch.float64)
    rest = weights[:, whole:].sum(dim=1, keepdim=True, dtype=torch.float64)
    sums = torch.cat([sums, rest], dim=1)
    cumulative = sums.cumsum(dim=1)
    target = choice.draws * cumulative[:, -1:]
    block = _first_above(cumulative, target, sums)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    at = block * _BLOCK + torch.arange(_BLOCK, device=rows.device)
    inside = weights.gather(1, at.clamp(max=size - 1)).mul_(at < size)
    place = _first_above(inside.cumsum(dim=1, dtype=torch.float64), target - before, inside)
    return (block * _BLOCK + place)[:, 0]


def draw_from_head(
    rows: torch.Tensor, choice: Choice, width: int, *, needs_total: bool
) -> torch.Tensor:
    """Draw from the ``width`` likeliest tokens, in the order of rank.

    Args:
        rows: ``float32[n, vocab]``.
        choice: How to draw.
        width: How many tokens to rank.
        needs_total: Whether any row has no ``top_k``, so that its ``top_p`` is one of the whole vocabulary.
    """
    vocab_size = rows.shape[1]
    values, ids = ranked(rows, width)
    weights = choice.weights(values)
    rank = torch.arange(width, device=rows.device)
    has_top_k = (choice.top_k > 0) & (choice.top_k < vocab_size)
    weights.mul_((rank < choice.top_k) | ~has_top_k)
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if needs_total:
        of_all = choice.weights(rows).sum(dim=1, keepdim=True, dtype=torch.float64)
        total = torch.where(has_top_k, total, of_all)
    mass = choice.top_p * total
    is_enough = (cumulative[:, -1:] >= mass) | (width == vocab_size)
    # The first at which the mass is reached is the last to stay.
    last = (cumulative < mass).sum(dim=1, keepdim=True)
    weights.mul_((rank <= last) | (choice.top_p >= 1.0))
    choice.drop_unlikely(weights)
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    place = _first_above(cumulative, choice.draws * cumulative[:, -1:], weights)
    return torch.where(is_enough, ids.gather(1, place), TOO_SHORT)[:, 0]


def _first_above(
    cumulative: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Where a running sum is above a target for the first time.

    Args:
        cumulative: ``[n, m]``, the running sums of ``weights``.
        target: ``[n, 1]``.
        weights: ``[n, m]``, 0 or more.

    Returns:
        ``int64[n, 1]``; by rounding the target may be the sum itself: then the last place that has a weight.
    """
    place = (cumulative <= target).sum(dim=1, keepdim=True)
    numbers = torch.arange(weights.shape[1], device=weights.device)
    last = (numbers * (weights > 0)).amax(dim=1, keepdim=True)
    return torch.minimum(place, last)


def ranked(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest logits, of equals the one with the smallest id first.

    A token that is among the ``width`` first is in one of the ``width`` groups that come first by their
    peaks, of equals again the first one: otherwise each of those would have a token before it.

    Args:
        rows: ``float32[n, vocab]``.
        width: How many.

    Returns:
        The logits, ``float32[n, width]``, and their ids, ``int64[n, width]``.
    """
    count, size = rows.shape
    group = _group_size(size, width)
    num_groups = size // group if group else 0
    if num_groups <= width:
        values, ids = rows.sort(dim=1, descending=True, stable=True)
        return values[:, :width], ids[:, :width]
    whole = num_groups * group
    peaks = rows[:, :whole].reshape(count, num_groups, group).amax(dim=2)
    numbers = torch.arange(num_groups, device=rows.device)
    groups = _ids(_keys(peaks, numbers).topk(width, dim=1, sorted=False).values)
    ids = (groups[:, :, None] * group + torch.arange(group, device=rows.device)).view(count, -1)
    if whole < size:
        rest = torch.arange(whole, size, device=rows.device)
        ids = torch.cat([ids, rest.expand(count, -1)], dim=1)
    ids = _ids(_keys(rows.gather(1, ids), ids).topk(width, dim=1).values)
    return rows.gather(1, ids), ids


def _group_size(size: int, width: int) -> int:
    """Tokens of a group, for the least to rank: as many groups as tokens in those that are looked into.

    Returns:
        A power of two; 0 if groups would not pay.
    """
    best = (size / width) ** 0.5
    return 1 << round(math.log2(best)) if best >= 2.0 else 0


def _keys(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Integers whose order is that of the values, of equal values the smaller number being the greater.

    Args:
        values: ``float32[...]``, no NaN.
        numbers: ``int64``, below 2**32, of a shape that goes with it.

    Returns:
        ``int64[...]``, all different: so whoever ranks them cannot choose among equals.
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (_LOW_BITS - numbers)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    """The numbers that keys were made of."""
    return _LOW_BITS - (keys & _LOW_BITS)
