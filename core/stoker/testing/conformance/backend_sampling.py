"""The backend suite: tokens that a runtime draws itself, against ``reference_sample``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stoker.testing.conformance.backend_base import BackendSuite
from stoker.testing.conformance.base import check
from stoker.testing.conformance.driving import LaneDriver, Reference, Run
from stoker.testing.reference_sampling import reference_sample
from stoker.types import SampleInput, TokenEdits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BackendSampling"]

_ROWS = 6
_CLOSE = 1e-5  # a draw so near to a border between two tokens may fall on either side, by rounding


class BackendSampling(BackendSuite):
    """What is drawn is what ``SampleInput`` says. Skipped where the core samples."""

    @pytest.mark.parametrize(
        "name", ["greedy", "plain", "top_k", "top_p", "min_p", "all of them", "edits", "masks"]
    )
    def test_tokens_are_drawn_as_the_core_draws_them(
        self, driver: LaneDriver, references: list[Reference], name: str
    ) -> None:
        """``sample`` draws other tokens from the same logits than the core would.

        To fix: follow ``SampleInput`` step by step: masks, edits, temperature, ``top_k``, ``top_p``,
        ``min_p``, then the running sum in float64; of equal logits the smallest token id first.
        """
        if not driver.info.capabilities.samples:
            pytest.skip("Capabilities.samples is false: the core draws the tokens")
        batch, untouched = (_batch(name, driver.info.vocab_size) for _ in range(2))
        output = driver.runtime.step(driver.build(Run(0, references[0].prompt[:_ROWS], "all")))
        got = np.asarray(driver.runtime.sample(batch))
        logits = np.array(output.logits)  # they must still be there
        want = reference_sample(logits, untouched)
        check(
            got.shape == want.shape and np.issubdtype(got.dtype, np.integer),
            f"sample() gave {got.dtype}{list(got.shape)} for {len(want)} rows",
            f"Return int64[{len(want)}].",
        )
        around = [
            reference_sample(logits, _moved(untouched, shift)) for shift in (-_CLOSE, 0.0, _CLOSE)
        ]
        right = np.any([got == tokens for tokens in around], axis=0)
        check(
            right.all(),
            f"with {name} it drew {got.tolist()}, and the core would draw {want.tolist()}",
            "See the documentation of stoker.SampleInput.",
        )


def _batch(name: str, vocabulary: int) -> SampleInput:
    """Parameters for all rows of a step but the second, each with a draw of its own."""
    rows = np.array([row for row in range(_ROWS) if row != 1], np.int32)
    count = len(rows)
    every = name == "all of them"
    batch = SampleInput(
        rows=rows,
        temperature=np.full(count, 0.0 if name == "greedy" else 0.8),
        top_k=np.full(count, 5 if name == "top_k" or every else 0, np.int32),
        top_p=np.full(count, 0.7 if name == "top_p" or every else 1.0),
        min_p=np.full(count, 0.05 if name == "min_p" or every else 0.0),
        draws=np.linspace(0.02, 0.95, count),
    )
    if name == "edits":
        batch.bias = _edits([0, 1], [3, 5], [50.0, 50.0])
        batch.repetition = _edits([2], [7], [1.5])
        batch.penalties = _edits([3], [9], [0.5])
        batch.forbidden = _edits([1], [5], [0.0])
    if name == "masks":
        allowed = np.zeros((1, -(-vocabulary // 32) * 32), np.uint8)
        allowed[0, [2, 4, 11]] = 1
        batch.mask_rows = np.array([2], np.int32)
        batch.masks = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    return batch


def _edits(rows: list[int], tokens: list[int], values: list[float]) -> TokenEdits:
    return TokenEdits(
        np.array(rows, np.int32), np.array(tokens, np.int32), np.array(values, np.float32)
    )


def _moved(batch: SampleInput, shift: float) -> SampleInput:
    draws: NDArray[np.float64] = np.clip(batch.draws + shift, 0.0, 1.0 - 1e-12)
    return SampleInput(
        **{name: getattr(batch, name) for name in batch.__slots__ if name != "draws"}, draws=draws
    )
