"""``SampleInput`` taken at its word, in numpy: what a runtime that draws tokens itself is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.types import SampleInput

__all__ = ["reference_sample"]


def reference_sample(logits: NDArray[np.float32], batch: SampleInput) -> NDArray[np.int64]:
    """Draw tokens as ``SampleInput`` says, one row after the other and with the vocabulary sorted.

    Args:
        logits: ``float32[R, vocab]``, all wanted rows of the step.
        batch: How to draw.

    Returns:
        ``int64[N]``; -1 for a row without a finite maximum.
    """
    rows = logits[batch.rows].astype(np.float32)
    if batch.masks is not None and batch.mask_rows is not None:
        bits = np.unpackbits(batch.masks.view(np.uint8), axis=1, bitorder="little")
        allowed = bits[:, : rows.shape[1]].astype(bool)
        rows[batch.mask_rows] = np.where(allowed, rows[batch.mask_rows], -np.inf)
    finite = np.isfinite(rows.max(axis=1, initial=-np.inf))
    _edit(rows, batch)
    tokens = [_draw(row, batch, at) if finite[at] else -1 for at, row in enumerate(rows)]
    return np.array(tokens, np.int64)


def _edit(rows: NDArray[np.float32], batch: SampleInput) -> None:
    if (edits := batch.bias) is not None:
        rows[edits.rows, edits.tokens] += edits.values
    if (edits := batch.repetition) is not None:
        before = rows[edits.rows, edits.tokens]
        rows[edits.rows, edits.tokens] = np.where(
            before > 0, before / edits.values, before * edits.values
        )
    if (edits := batch.penalties) is not None:
        rows[edits.rows, edits.tokens] -= edits.values
    if (edits := batch.forbidden) is not None:
        without = rows.copy()
        without[edits.rows, edits.tokens] = -np.inf
        possible = np.isfinite(without.max(axis=1))
        rows[possible] = without[possible]


def _draw(row: NDArray[np.float32], batch: SampleInput, at: int) -> int:
    if batch.temperature[at] == 0:
        return int(row.argmax())
    top_k, top_p = int(batch.top_k[at]), float(batch.top_p[at])
    candidates = np.arange(len(row))
    if 0 < top_k < len(row) or top_p < 1:
        candidates = np.argsort(-row, kind="stable")
    if 0 < top_k < len(row):
        candidates = candidates[:top_k]
    temperature = np.float32(max(batch.temperature[at], 1e-5))
    # Subtract before dividing: a tiny temperature must not overflow to inf - inf.
    weights = np.exp((row[candidates] - row.max()) / temperature).astype(np.float64)
    if top_p < 1:
        count = int(np.searchsorted(weights.cumsum(), top_p * weights.sum())) + 1
        candidates, weights = candidates[:count], weights[:count]
    kept = weights >= np.float32(batch.min_p[at])
    candidates, weights = candidates[kept], weights[kept]
    sums = weights.cumsum()
    chosen = int(np.searchsorted(sums, batch.draws[at] * sums[-1], side="right"))
    # By rounding the sum itself may be asked for.
    return int(candidates[min(chosen, int(np.flatnonzero(weights)[-1]))])
