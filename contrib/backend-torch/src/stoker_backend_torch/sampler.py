"""Draws tokens from logits where they lie: ``stoker.SampleInput`` in torch, batched over rows.

The same tokens as the core's numpy sampler, for the same uniform numbers: candidates in the same order, sums in
float64. Nothing waits for the device but the copy of the tokens, and no loop goes over rows.

The vocabulary is not sorted. What ``top_k`` and ``top_p`` look at is the head of the ranking: the k likeliest
tokens are in the k groups of neighbouring tokens with the greatest peaks, so one pass over the logits finds the
groups, and only those are ranked. ``top_p`` cannot know beforehand how long a head it needs; rows whose head was
too short are marked, and done again with a longer one after the tokens of all others have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker import SampleInput, TokenEdits

__all__ = ["TorchSampler", "can_sample_on"]

_NOT_FINITE = -1
_TOO_SHORT = -2
_HEADS = (64, 512, 4096, 32_768)  # candidates to rank; after these comes the whole vocabulary
_FIRST_OF_TOP_P = 1  # where among them a row starts that has a top_p only
_BLOCK = 256
_WORD = 32
_LOW_BITS = (1 << 32) - 1
_LEAST_TEMPERATURE = 1e-5


def can_sample_on(device: torch.device) -> bool:
    """Whether the device has what it takes: float64 sums and ranks of int64, which MPS has not."""
    return device.type in ("cpu", "cuda")


class TorchSampler:
    """Draws the tokens of one model's steps.

    Args:
        device: Where the logits lie; see ``can_sample_on``.
        vocab_size: Columns of the logits.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._bits = torch.arange(_WORD, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: SampleInput) -> NDArray[np.int64]:
        """Draw tokens.

        Args:
            logits: ``[R, vocab]``, all wanted rows of the step, of any float type; not written to.
            batch: How to draw; its indices are in range.

        Returns:
            ``int64[N]``; -1 for a row without a finite maximum.
        """
        rows = logits
        if len(batch.rows) != len(logits):  # they are ascending: otherwise it is all of them
            rows = logits.index_select(0, self._to_device(batch.rows.astype(np.int64)))
        is_greedy = batch.temperature == 0.0
        if is_greedy.all() and not batch.edits_logits:
            tokens = rows.argmax(dim=1)
            peaks = rows.gather(1, tokens[:, None])[:, 0]
            return self._to_host(torch.where(peaks.isfinite(), tokens, _NOT_FINITE))
        rows, is_finite = self._edited(rows, batch)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for places, width in self._kinds(batch, is_greedy):
            if len(places) == len(rows):
                tokens = self._of_kind(rows, batch, places, width)
            else:
                at = self._to_device(places)
                tokens[at] = self._of_kind(rows[at], batch, places, width)
        found = self._to_host(torch.where(is_finite, tokens, _NOT_FINITE))
        head = _FIRST_OF_TOP_P
        while len(places := np.flatnonzero(found == _TOO_SHORT)):
            head += 1
            again = rows[self._to_device(places)]
            found[places] = self._to_host(self._of_kind(again, batch, places, self._head(head)))
        return found

    # ------------------------------------------------------------------ between host and device

    def _to_device(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)

    @staticmethod
    def _to_host(tokens: torch.Tensor) -> NDArray[np.int64]:
        found: NDArray[np.int64] = tokens.cpu().numpy()
        return found

    # ------------------------------------------------------------------ masks, bias, penalties

    def _edited(self, rows: torch.Tensor, batch: SampleInput) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows to draw from, ``float32[N, vocab]``, and which had a finite maximum, ``bool[N]``."""
        edited = rows.float()
        if batch.edits_logits and edited.data_ptr() == rows.data_ptr():
            edited = edited.clone()
        if batch.masks is not None and batch.mask_rows is not None:
            self._mask(edited, batch.mask_rows, batch.masks)
        is_finite = edited.amax(dim=1).isfinite()
        flat = edited.view(-1) if batch.edits_logits else edited
        if batch.bias is not None:
            at, values = self._places(batch.bias)
            flat[at] += values
        if batch.repetition is not None:
            at, values = self._places(batch.repetition)
            before = flat[at]
            flat[at] = torch.where(before > 0, before / values, before * values)
        if batch.penalties is not None:
            at, values = self._places(batch.penalties)
            flat[at] -= values
        if batch.forbidden is not None:
            self._forbid(edited, batch.forbidden)
        return edited, is_finite

    def _places(self, edits: TokenEdits) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in the flat logits the edits are, ``int64[E]``, and their values, ``float32[E]``."""
        at = edits.rows.astype(np.int64) * self._vocab_size + edits.tokens
        return self._to_device(at), self._to_device(edits.values)

    def _mask(
        self, edited: torch.Tensor, mask_rows: NDArray[np.int32], masks: NDArray[np.int32]
    ) -> None:
        words = self._to_device(masks)
        allowed = ((words[:, :, None] >> self._bits) & 1).view(len(masks), -1)
        is_forbidden = allowed[:, : self._vocab_size] == 0
        if len(mask_rows) == len(edited):
            edited.masked_fill_(is_forbidden, -torch.inf)
        else:
            at = self._to_device(mask_rows.astype(np.int64))
            edited[at] = edited[at].masked_fill_(is_forbidden, -torch.inf)

    def _forbid(self, edited: torch.Tensor, edits: TokenEdits) -> None:
        """Take tokens out, but of rows that would have none left."""
        rows, of_row = np.unique(edits.rows, return_inverse=True)
        at = self._to_device(rows.astype(np.int64))
        before = edited[at]
        without = before.clone()
        without.view(-1)[self._to_device(of_row * self._vocab_size + edits.tokens)] = -torch.inf
        is_possible = without.amax(dim=1, keepdim=True).isfinite()
        edited[at] = torch.where(is_possible, without, before)

    # ------------------------------------------------------------------ kinds of rows

    def _kinds(
        self, batch: SampleInput, is_greedy: NDArray[np.bool_]
    ) -> list[tuple[NDArray[np.int64], int]]:
        """Which rows are drawn in the same way, and from how many candidates.

        Returns:
            Places among the N rows, each in one of the lists, and the length of the head: 0 for greedy rows,
            and the vocabulary's size, for which nothing is ranked, for those without ``top_k`` and ``top_p``.
        """
        has_top_k = (batch.top_k > 0) & (batch.top_k < self._vocab_size)
        widths = np.full(len(is_greedy), _FIRST_OF_TOP_P)
        widths[has_top_k] = np.searchsorted(_HEADS, batch.top_k[has_top_k])
        widths = np.array([*map(self._head, range(len(_HEADS) + 1))])[widths]
        widths[~has_top_k & (batch.top_p >= 1.0)] = _NO_HEAD
        widths[is_greedy] = 0
        return [(np.flatnonzero(widths == width), int(width)) for width in np.unique(widths)]

    def _head(self, number: int) -> int:
        return min(_HEADS[number], self._vocab_size) if number < len(_HEADS) else self._vocab_size

    def _of_kind(
        self, rows: torch.Tensor, batch: SampleInput, places: NDArray[np.int64], width: int
    ) -> torch.Tensor:
        """The tokens of rows of one kind, ``int64[n]``; ``_TOO_SHORT`` where the head was."""
        if width == 0:
            return rows.argmax(dim=1)
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.draws)
        packed = self._to_device(np.stack([column[places] for column in columns]))
        choice = _Choice(
            peaks=rows.amax(dim=1, keepdim=True),
            temperature=packed[0].clamp(min=_LEAST_TEMPERATURE).float()[:, None],
            top_k=packed[1][:, None],
            top_p=packed[2][:, None],
            min_p=packed[3].float()[:, None],
            draws=packed[4][:, None],
        )
        if width == _NO_HEAD:
            return _draw_from_all(rows, choice)
        top_k = batch.top_k[places]
        has_top_k = bool(((top_k > 0) & (top_k < self._vocab_size)).all())
        return _draw_from_head(rows, choice, width, needs_total=not has_top_k)


_NO_HEAD = -1


@dataclass(slots=True)
class _Choice:
    """How n rows are drawn from; each of these is ``[n, 1]``, and float64 but where it says otherwise.

    Attributes:
        peaks: The greatest logit; float32.
        temperature: float32.
        top_k: As in ``SampleInput``.
        top_p: As in ``SampleInput``.
        min_p: As in ``SampleInput``; float32, as the weights are.
        draws: As in ``SampleInput``.
    """

    peaks: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    draws: torch.Tensor

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Unnormalized probabilities, 1 for the likeliest token; ``float32``, shaped as the logits are."""
        # Subtract before dividing: a tiny temperature must not overflow to inf - inf.
        return (logits - self.peaks).div_(self.temperature).exp_()


def _draw_from_all(rows: torch.Tensor, choice: _Choice) -> torch.Tensor:
    """Draw from the whole vocabulary, in the order of ids: first the block, then the place in it."""
    weights = choice.weights(rows)
    weights.mul_(weights >= choice.min_p)
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


def _draw_from_head(
    rows: torch.Tensor, choice: _Choice, width: int, *, needs_total: bool
) -> torch.Tensor:
    """Draw from the ``width`` likeliest tokens, in the order of rank.

    Args:
        rows: ``float32[n, vocab]``.
        choice: How to draw.
        width: How many tokens to rank.
        needs_total: Whether any row has no ``top_k``, so that its ``top_p`` is one of the whole vocabulary.
    """
    vocab_size = rows.shape[1]
    values, ids = _ranked(rows, width)
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
    is_enough = (cumulative[:, -1:] >= mass) | has_top_k | (width == vocab_size)
    # The first at which the mass is reached is the last to stay.
    last = (cumulative < mass).sum(dim=1, keepdim=True)
    weights.mul_((rank <= last) | (choice.top_p >= 1.0))
    weights.mul_(weights >= choice.min_p)
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    place = _first_above(cumulative, choice.draws * cumulative[:, -1:], weights)
    return torch.where(is_enough, ids.gather(1, place), _TOO_SHORT)[:, 0]


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


def _ranked(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest logits, of equals the one with the smallest id first.

    A token that is among the ``width`` first is in one of the ``width`` groups that come first by their peaks,
    of equals again the first one: otherwise each of those would have a token before it.

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
    return 1 << round(float(np.log2(best))) if best >= 2.0 else 0


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
    return (ordered.long() << _WORD) | (_LOW_BITS - numbers)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    """The numbers that keys were made of."""
    return _LOW_BITS - (keys & _LOW_BITS)
