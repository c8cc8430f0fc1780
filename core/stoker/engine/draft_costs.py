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
_ROW_UNIT = 2.0  # in rows: so that rows and lengths weigh about the same


class DraftCostModel:
    """Seconds of decode steps without drafts, by number of sequences, and of what drafts add.

    What drafts add is ``row_s * rows + shape_s * shapes``, corrected by normalised least mean squares as in
    ``CostModel``, separately for 1, 2 to 3, 4 to 7, ... sequences: a row that is cheap alone need not be so
    in a crowd. Steps that also compute prompts tell nothing.
    """

    def __init__(self) -> None:
        self._plain: dict[int, tuple[float, int]] = {}  # sequences: seconds, steps seen
        self._added: dict[int, tuple[float, float]] = {}  # size class: for rows, for shapes

    def observe(self, num_decodes: int, seconds: float, num_rows: int, num_shapes: int) -> None:
        """Learn from a step that only decoded.

        Args:
            num_decodes: Its sequences.
            seconds: How long it took.
            num_rows: Its draft tokens.
            num_shapes: Different numbers of draft tokens among its sequences, less one.
        """
        if num_rows:
            self._observe_drafts(num_decodes, seconds, (num_rows / _ROW_UNIT, float(num_shapes)))
            return
        known_s, count = self._plain.get(num_decodes, (seconds, 0))
        rate = max(_RATE, 1.0 / (count + 1))
        if count >= _ENOUGH_STEPS:
            seconds = min(seconds, _OUTLIER * known_s)
        self._plain[num_decodes] = (known_s + rate * (seconds - known_s), count + 1)

    def _observe_drafts(self, num_decodes: int, seconds: float, shape: tuple[float, float]) -> None:
        plain_s, count = self._plain.get(num_decodes, (0.0, 0))
        if not count:
            return
        added_s = max(0.0, min(seconds, _OUTLIER * (1.0 + shape[0]) * plain_s) - plain_s)
        size = num_decodes.bit_length()
        if size not in self._added:
            self._added[size] = (added_s / shape[0], 0.0)
            return
        row, other = self._added[size]
        estimate = row * shape[0] + other * shape[1]
        added_s = min(added_s, _OUTLIER * estimate + plain_s)
        rate = _QUICK_RATE if added_s < estimate / 2 else _RATE
        gain = rate * (added_s - estimate) / (shape[0] ** 2 + shape[1] ** 2)
        self._added[size] = (max(0.0, row + gain * shape[0]), max(0.0, other + gain * shape[1]))

    def added_s(self, num_decodes: int, num_rows: int, num_shapes: int) -> float:
        """Seconds that drafts add to a step; 0 where that is unknown."""
        row, other = self._added.get(num_decodes.bit_length(), (0.0, 0.0))
        return row * num_rows / _ROW_UNIT + other * num_shapes

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
            others = [row / _ROW_UNIT for row, _ in self._added.values()]
            return DraftCost(plain_s, max([guess_s, *others]), 0.0, depth_s)
        return DraftCost(plain_s, known[0] / _ROW_UNIT, known[1], depth_s)
