"""One step of a runtime as data: what to compute, what came of it, and how to draw tokens from that.

Token ids are ``int32``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DeviceStepOutput", "SampleInput", "StepInput", "StepOutput", "TokenEdits"]


@dataclass(slots=True)
class StepInput:
    """One ragged forward pass: T tokens of any mix of prefill chunks and decodes.

    Rows of one lane are contiguous and in order of position; lanes come in any order. Rows of a lane
    continue exactly where that lane's KV ends.

    Attributes:
        token_ids: ``int32[T]``.
        positions: ``int32[T]``, position of each token in its lane, from 0.
        lanes: ``int32[T]``, the lane of each token.
        wants_logits: ``bool[T]``, the rows whose logits are needed; R of them are true. A lane may have
            several: guessed tokens that are to be verified (speculative decoding).
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lanes: NDArray[np.int32]
    wants_logits: NDArray[np.bool_]


@dataclass(slots=True)
class StepOutput:
    """The answer to a ``StepInput``.

    Attributes:
        logits: ``float32[R, vocab]``, one row per wanted row, in order; a view that is valid until the
            runtime's next call, and must not be written to. Empty if ``no_room``.
        no_room: The KV memory cannot hold these tokens. Nothing was computed and no lane changed.
    """

    logits: NDArray[np.float32]
    no_room: bool = False

    def rows(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Some rows of the logits.

        Args:
            rows: ``intp[n]``, which of the R.

        Returns:
            ``float32[n, vocab]``.
        """
        return self.logits[rows]


class DeviceStepOutput(StepOutput):
    """The answer of a runtime whose logits lie on a device: they are fetched only when somebody asks.

    Log-probabilities and scored prompts need logits on the host; tokens do not where the runtime draws them
    (``Runtime.sample``).

    Args:
        fetch: Returns the rows asked for (``intp[n]``; ``None`` for all R) as ``float32[n, vocab]``. Called
            at any time before the runtime's next ``step``, also after ``sample``.
    """

    __slots__ = ("_fetch", "_fetched")

    def __init__(self, fetch: Callable[[NDArray[np.intp] | None], NDArray[np.float32]]) -> None:
        self.no_room = False
        self._fetch = fetch
        self._fetched: NDArray[np.float32] | None = None

    @property
    def logits(self) -> NDArray[np.float32]:  # type: ignore[override] # nobody assigns a step's logits
        """All rows, fetched once."""
        if self._fetched is None:
            self._fetched = self._fetch(None)
        return self._fetched

    def rows(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Some rows, and no others are fetched."""
        return self._fetch(rows) if self._fetched is None else self._fetched[rows]


@dataclass(slots=True)
class TokenEdits:
    """Changes of single logits, sparse: E of them. No (row, token) pair occurs twice.

    Attributes:
        rows: ``int32[E]``, which of the N rows of the ``SampleInput``.
        tokens: ``int32[E]``.
        values: ``float32[E]``.
    """

    rows: NDArray[np.int32]
    tokens: NDArray[np.int32]
    values: NDArray[np.float32]


@dataclass(slots=True)
class SampleInput:
    """How to draw N tokens from the logits of a runtime's latest step, one from each of N rows.

    Rows are computed with in float32, in this order:

    1. ``masks``: what a mask forbids gets minus infinity. **A row whose maximum is not finite now (NaN, or
       infinite, or everything is forbidden) is answered with -1**, whatever follows.
    2. ``bias`` is added; ``repetition`` divides positive logits and multiplies others; ``penalties`` are
       subtracted; ``forbidden`` tokens get minus infinity, unless the row would have no finite maximum then.
    3. With a temperature of 0 the token is the row's maximum, of equals the one with the smallest id.
    4. Otherwise the candidates are ranked by logit, of equals the smallest id first, and weighted by
       ``exp((logit - maximum) / max(temperature, 1e-5))``. ``top_k`` keeps the first k; ``top_p`` the
       shortest head whose share of the weight that is left reaches it; ``min_p`` those that have at least
       this share of the first one's weight.
    5. The token is the first whose running sum of weights is above ``draws`` times their sum. They are
       summed up in the order of rank; in that of ids if neither ``top_k`` nor ``top_p`` applies. So all who
       sample draw the same token, but for the rounding of sums: use float64 there.

    Attributes:
        rows: ``int32[N]``, which of the step's R wanted rows, ascending.
        temperature: ``float64[N]``, 0 or more.
        top_k: ``int32[N]``; 0, or the vocabulary's size and more, is off.
        top_p: ``float64[N]``, in (0, 1]; 1 is off.
        min_p: ``float64[N]``, in [0, 1]; 0 is off.
        draws: ``float64[N]``, uniform in [0, 1): what chooses.
        bias: ``None`` where there is nothing to do, as for all that follow.
        repetition: The values are positive factors.
        penalties: Presence and frequency penalties together.
        forbidden: The values mean nothing.
        mask_rows: ``int32[M]``, which of the N rows have a mask, ascending.
        masks: ``int32[M, ceil(vocab / 32)]``: bit ``t % 32`` of word ``t // 32`` is 1 if token t may come.
    """

    rows: NDArray[np.int32]
    temperature: NDArray[np.float64]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    draws: NDArray[np.float64]
    bias: TokenEdits | None = None
    repetition: TokenEdits | None = None
    penalties: TokenEdits | None = None
    forbidden: TokenEdits | None = None
    mask_rows: NDArray[np.int32] | None = None
    masks: NDArray[np.int32] | None = None

    @property
    def edits_logits(self) -> bool:
        """Whether any row's logits are changed before tokens are drawn."""
        edits = (self.bias, self.repetition, self.penalties, self.forbidden, self.masks)
        return any(edit is not None for edit in edits)
