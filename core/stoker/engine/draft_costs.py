"""What draft tokens cost, measured: steps with them against steps of as many sequences without.

The fit of ``costs.py`` does not do here. It knows well what a step costs, but not which part of that is due
to what; and the difference between two nearly equal numbers is what decides whether drafts pay.
"""

from __future__ import annotations

from stoker.engine.draft_length import DraftCost

__all__ = ["DraftCostModel"]

_RATE = 0.2  # how far one step moves an estimate
_QUICK_RATE = 0.5  # and if drafts turn out to cost less than half of what was believed
_OUTLIER = 4.0  # a step that takes more than so many times the estimate counts as that many
_ENOUGH_STEPS = 4  # steps without drafts before their time is believed
# Units in which a step's drafts are measured, so that the three parts of their cost weigh about the same.
_ROW_UNIT = 4.0
_START_UNIT = 0.5

_Weights = tuple[float, float, float]  # for having drafts at all, for rows, for lengths


class DraftCostModel:
    """Seconds of decode steps without drafts, by number of sequences, and of what drafts add.

    What drafts add is ``start_s + row_s * rows + shape_s * shapes``, corrected by normalised least mean
    squares as in ``CostModel``, separately for 1, 2 to 3, 4 to 7, ... sequences: a row that is cheap alone
    need not be so in a crowd. (``start_s`` is there because one row is often computed by a quicker kernel
    than several.) Steps that also compute prompts tell nothing.
    """

    def __init__(self) -> None:
        self._plain: dict[int, tuple[float, int]] = {}  # sequences: seconds, steps seen
        self._added: dict[int, _Weights] = {}  # by size class

    def observe(self, num_decodes: int, seconds: float, num_rows: int, num_shapes: int) -> None:
        """Learn from a step that only decoded.

        Args:
            num_decodes: Its sequences.
            seconds: How long it took.
            num_rows: Its draft tokens.
            num_shapes: Different numbers of draft tokens among its sequences, less one.
        """
        if num_rows:
            self._observe_drafts(num_decodes, seconds, _shape(num_rows, num_shapes))
            return
        known_s, count = self._plain.get(num_decodes, (seconds, 0))
        rate = max(_RATE, 1.0 / (count + 1))
        if count >= _ENOUGH_STEPS:
            seconds = min(seconds, _OUTLIER * known_s)
        self._plain[num_decodes] = (known_s + rate * (seconds - known_s), count + 1)

    def _observe_drafts(self, num_decodes: int, seconds: float, shape: _Weights) -> None:
        plain_s, count = self._plain.get(num_decodes, (0.0, 0))
        if not count:
            return
        # A row that costs as much as a whole step never pays; how much more it costs does not matter.
        added_s = min(max(0.0, seconds - plain_s), shape[1] * _ROW_UNIT * plain_s)
        size = num_decodes.bit_length()
        weights = self._added.get(size)
        if weights is None:
            self._added[size] = (0.0, added_s / shape[1], 0.0)
            return
        estimate = _dot(weights, shape)
        error = min(added_s, _OUTLIER * estimate + plain_s) - estimate
        if error < 0.0:  # what is at 0 already cannot take a part of it
            start, row, other = (x if w else 0.0 for w, x in zip(weights, shape, strict=True))
            shape = (start, row, other)
        gain = (_QUICK_RATE if error < -estimate / 2 else _RATE) * error
        gain /= _dot(shape, shape) or 1.0
        start, row, other = (max(0.0, w + gain * x) for w, x in zip(weights, shape, strict=True))
        self._added[size] = (start, row, other)

    def added_s(self, num_decodes: int, num_rows: int, num_shapes: int) -> float:
        """Seconds that drafts add to a step; 0 where that is unknown."""
        weights = self._added.get(num_decodes.bit_length())
        return 0.0 if weights is None else _dot(weights, _shape(num_rows, num_shapes))

    def knows_drafts(self, num_decodes: int) -> bool:
        """Whether there was a step with drafts of about so many sequences."""
        return num_decodes.bit_length() in self._added

    def cost(self, num_decodes: int, guess_s: float, depth_s: float) -> DraftCost | None:
        """What drafts cost in a step of so many sequences; ``None`` while not even the step's time is known.

        Args:
            num_decodes: Sequences of the step.
            guess_s: What to believe of a row before there was any.
            depth_s: See ``DraftCost``.
        """
        plain_s, count = self._plain.get(num_decodes, (0.0, 0))
        if count < _ENOUGH_STEPS:
            return None
        known = self._added.get(num_decodes.bit_length())
        if known is None:
            others = [row / _ROW_UNIT for _, row, _ in self._added.values()]
            return DraftCost(plain_s, max([guess_s, *others]), depth_s=depth_s)
        start, row, other = known
        return DraftCost(
            plain_s, row / _ROW_UNIT, start_s=start / _START_UNIT, shape_s=other, depth_s=depth_s
        )


def _shape(num_rows: int, num_shapes: int) -> _Weights:
    return 1.0 / _START_UNIT, num_rows / _ROW_UNIT, float(num_shapes)


def _dot(a: _Weights, b: _Weights) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
