"""Draws tokens from logits where they lie: ``stoker.SampleInput`` in torch, batched over rows.

The same tokens as from the core's numpy sampler, for the same uniform numbers: candidates in the same order,
sums in float64. Nothing waits for the device but the copy of the tokens, and no loop goes over rows.

How long a head of the ranking ``top_p`` needs, nobody knows beforehand: rows whose head was too short are
marked, and done again with a longer one after the tokens of all others have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stoker_backend_torch.draws import TOO_SHORT, Choice, draw_from_all, draw_from_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker import SampleInput, TokenEdits

__all__ = ["TorchSampler", "can_sample_on"]

_NOT_FINITE = -1
_NO_HEAD = -1
_HEADS = (64, 512, 4096, 32_768)  # candidates to rank; after these comes the whole vocabulary
_FIRST_OF_TOP_P = 1  # where among them a row starts that has a top_p only
_WORD = 32
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
        edited = self._edited(rows, batch)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for places, width in self._kinds(batch, is_greedy):
            if len(places) == len(rows):
                tokens = self._of_kind(edited, batch, places, width)
            else:
                at = self._to_device(places)
                tokens[at] = self._of_kind(edited.some(at), batch, places, width)
        found = self._to_host(torch.where(edited.is_finite, tokens, _NOT_FINITE))
        head = _FIRST_OF_TOP_P
        while len(places := np.flatnonzero(found == TOO_SHORT)):
            head += 1
            again = edited.some(self._to_device(places))
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

    def _edited(self, rows: torch.Tensor, batch: SampleInput) -> _Rows:
        """The rows to draw from."""
        edited = rows.to(
            torch.float32, copy=batch.edits_logits, memory_format=torch.contiguous_format
        )
        if batch.masks is not None and batch.mask_rows is not None:
            self._mask(edited, batch.mask_rows, batch.masks)
        peaks = edited.amax(dim=1, keepdim=True)
        is_finite = peaks.isfinite()[:, 0]
        if batch.edits_logits:
            self._edit(edited, batch)
            peaks = edited.amax(dim=1, keepdim=True)
        return _Rows(edited, peaks, is_finite)

    def _edit(self, edited: torch.Tensor, batch: SampleInput) -> None:
        flat = edited.view(-1)
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
        self, rows: _Rows, batch: SampleInput, places: NDArray[np.int64], width: int
    ) -> torch.Tensor:
        """The tokens of rows of one kind, ``int64[n]``; ``TOO_SHORT`` where the head was."""
        if width == 0:
            return rows.logits.argmax(dim=1)
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.draws)
        packed = self._to_device(np.stack([column[places] for column in columns]))[:, :, None]
        choice = Choice(
            peaks=rows.peaks,
            temperature=packed[0].clamp(min=_LEAST_TEMPERATURE).float(),
            top_k=packed[1],
            top_p=packed[2],
            min_p=packed[3].float() if batch.min_p[places].any() else None,
            draws=packed[4],
        )
        if width == _NO_HEAD:
            return draw_from_all(rows.logits, choice)
        top_k = batch.top_k[places]
        has_top_k = bool(((top_k > 0) & (top_k < self._vocab_size)).all())
        return draw_from_head(rows.logits, choice, width, needs_total=not has_top_k)


@dataclass(slots=True)
class _Rows:
    """What is drawn from.

    Attributes:
        logits: ``float32[n, vocab]``.
        peaks: ``float32[n, 1]``, the greatest of each row.
        is_finite: ``bool[n]``, whether they were finite when the logits came from the model and its grammar.
    """

    logits: torch.Tensor
    peaks: torch.Tensor
    is_finite: torch.Tensor

    def some(self, at: torch.Tensor) -> _Rows:
        """Those at ``int64[m]``."""
        return _Rows(self.logits[at], self.peaks[at], self.is_finite[at])
