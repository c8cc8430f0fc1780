"""A step as attention sees it: decodes side by side, and runs of several tokens one by one.

Rows are put into an order of their own: first the single tokens, by ascending lane, then the longer runs. So
the decodes of neighbouring lanes are one slice of rows over one slice of the KV, and nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stoker import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stoker import StepInput

__all__ = ["Decodes", "RaggedBatch", "Run", "find_runs", "group_decodes"]

# What one more call of attention costs, in KV tokens that are looked at. Measured with scaled dot-product
# attention of a 135M model on two CPUs: a call takes about 20 us, and 100 tokens of a lane take as long.
_CALL_COST = 100


@dataclass(frozen=True, slots=True)
class Decodes:
    """Single tokens whose attention is one call.

    Attributes:
        start: First row, in the batch's order.
        stop: End of its rows.
        first_lane: The lanes that the call looks at, used or not: from this one
        last_lane: to this one, included.
        lanes: ``int64[n]``, ascending: the lane of each row.
        lengths: ``int64[n]``, tokens in each lane with the new one.
    """

    start: int
    stop: int
    first_lane: int
    last_lane: int
    lanes: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def is_dense(self) -> bool:
        """Whether every lane that is looked at has a row."""
        return self.last_lane - self.first_lane + 1 == self.stop - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """Several tokens of one lane.

    Attributes:
        start: First row, in the batch's order.
        stop: End of its rows.
        lane: The lane.
        position: Position of its first token.
    """

    start: int
    stop: int
    lane: int
    position: int

    @property
    def end(self) -> int:
        """Tokens in the lane, with these."""
        return self.position + self.stop - self.start


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """A step in attention's order.

    Attributes:
        order: ``int64[T]``, for each of its rows the row of the step; ``None`` if they are the same.
        token_ids: ``int64[T]``.
        positions: ``int64[T]``.
        lanes: ``int64[T]``.
        wanted: ``int64[R]``, its rows whose logits are wanted, in the order of the step.
        decodes: Groups of single tokens.
        runs: The longer runs.
        touched: The lanes with new tokens, and
        ends: how many tokens each has with them.
    """

    order: NDArray[np.int64] | None
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    lanes: NDArray[np.int64]
    wanted: NDArray[np.int64]
    decodes: Sequence[Decodes]
    runs: Sequence[Run]
    touched: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, step: StepInput, starts: NDArray[np.int64]) -> RaggedBatch:
        """Bring a step into order.

        Args:
            step: At least one row.
            starts: ``int64[N]``, the first row of each lane's run, from ``find_runs``.
        """
        total = len(step.token_ids)
        counts = np.diff(starts, append=total)
        run_lanes = step.lanes[starts].astype(np.int64)
        # Single tokens first, by lane; then the others.
        by_place = np.lexsort((run_lanes, counts > 1))
        order: NDArray[np.int64] | None = None
        if not np.array_equal(by_place, np.arange(len(starts))):
            order = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in by_place])
        rows = slice(None) if order is None else order
        positions = step.positions[rows].astype(np.int64)
        lanes = step.lanes[rows].astype(np.int64)
        wanted = np.flatnonzero(step.wants_logits[rows])
        if order is not None:
            wanted = wanted[np.argsort(order[wanted])]
        num_decodes = int(np.count_nonzero(counts == 1))
        runs, at = [], num_decodes
        for i in by_place[num_decodes:].tolist():
            stop = at + int(counts[i])
            runs.append(Run(at, stop, int(run_lanes[i]), int(step.positions[starts[i]])))
            at = stop
        return cls(
            order=order,
            token_ids=step.token_ids[rows].astype(np.int64),
            positions=positions,
            lanes=lanes,
            wanted=wanted,
            decodes=group_decodes(lanes[:num_decodes], positions[:num_decodes] + 1),
            runs=runs,
            touched=run_lanes,
            ends=step.positions[starts].astype(np.int64) + counts,
        )


def find_runs(
    step: StepInput, lengths: NDArray[np.int64], max_step_tokens: int
) -> NDArray[np.int64]:
    """The first row of each lane's run, ``int64[N]``; checks that each continues where its lane ends.

    Args:
        step: At least one row.
        lengths: ``int64[num_lanes]``, tokens in each lane.
        max_step_tokens: Most rows.

    Raises:
        EngineError: The step is malformed.
    """
    total = len(step.token_ids)
    if total > max_step_tokens:
        raise EngineError(f"a step of {total} tokens exceeds {max_step_tokens}")
    starts = np.concatenate(([0], np.flatnonzero(np.diff(step.lanes)) + 1))
    lanes, firsts = step.lanes[starts], step.positions[starts]
    if lanes.min() < 0 or lanes.max() >= len(lengths):
        raise EngineError(f"a step names a lane outside 0 to {len(lengths) - 1}")
    if len(np.unique(lanes)) != len(lanes):
        raise EngineError("a step has rows of one lane in several places")
    if not np.array_equal(firsts, lengths[lanes]):
        wrong = int(np.flatnonzero(firsts != lengths[lanes])[0])
        raise EngineError(
            f"lane {lanes[wrong]} continues at position {firsts[wrong]} but holds "
            f"{lengths[lanes[wrong]]} tokens"
        )
    return starts


def group_decodes(lanes: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[Decodes]:
    """Cut single tokens into groups for one call each, from the lowest lane up.

    A call looks at as many tokens of each of its lanes as the longest has, and at idle lanes in between. A
    lane joins its neighbours where that is cheaper than a call of its own.

    Args:
        lanes: ``int64[n]``, ascending.
        lengths: ``int64[n]``, tokens in each with the new one.
    """
    groups: list[Decodes] = []
    start, longest = 0, 0
    all_lanes, all_lengths = lanes.tolist(), lengths.tolist()
    for at, (lane, length) in enumerate(zip(all_lanes, all_lengths, strict=True)):
        if at == start:
            longest = length
        else:
            first = all_lanes[start]
            together = (lane - first + 1) * max(longest, length)
            apart = (all_lanes[at - 1] - first + 1) * longest + length + _CALL_COST
            if together <= apart:
                longest = max(longest, length)
            else:
                groups.append(_decodes(start, at, lanes, lengths))
                start, longest = at, length
    if len(all_lanes):
        groups.append(_decodes(start, len(all_lanes), lanes, lengths))
    return groups


def _decodes(
    start: int, stop: int, lanes: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Decodes:
    chosen = lanes[start:stop]
    return Decodes(start, stop, int(chosen[0]), int(chosen[-1]), chosen, lengths[start:stop])
