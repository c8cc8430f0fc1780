"""How many tokens to draft: as many as pay, by what was accepted lately and what a row costs now.

A draft row costs a part of a step, and saves a token only if it and all before it in its sequence are
accepted. With p the share of a sequence's draft tokens that were accepted lately, row j saves p^j tokens.
Rows are taken, the likeliest first, as long as a row gives more tokens per second than the step does without
it. That is the draft length of Leviathan et al. (ICML 2023), chosen for a whole batch at once: alone a row is
cheap against the step it may save, in a crowd it costs about what the token costs anyway, and the answer
becomes 0.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

__all__ = ["Acceptance", "DraftCost", "choose_lengths"]

_PRIOR_WEIGHT = 2.0  # the model's history counts as much as so many tokens of the sequence itself
_MARGIN = (
    1.05  # drafting must promise this much more than not drafting, or it is not worth the risk
)
_UNKNOWN_ROW = 0.25  # a row against a step, while nothing has been measured
_MIN_GAIN = 0.05  # rows less likely than this are not worth a thought, even if they seem free


class Acceptance:
    """The share of draft tokens that were accepted, with a fading memory.

    Args:
        memory: About how many tokens are remembered.
        rate: What to believe before there were any.
    """

    __slots__ = ("_accepted", "_fade", "_start", "_tried")

    def __init__(self, memory: float, rate: float = 0.0) -> None:
        self._fade = 1.0 - 1.0 / memory
        self._start = rate
        self._accepted = 0.0
        self._tried = 0.0

    def observe(self, accepted: int, *, rejected: bool) -> None:
        """So many tokens in a row were right, and the next one was wrong, or was not looked at."""
        if accepted:
            fade = self._fade**accepted
            gained = (1.0 - fade) / (1.0 - self._fade)
            self._accepted = self._accepted * fade + gained
            self._tried = self._tried * fade + gained
        if rejected:
            self._accepted *= self._fade
            self._tried = self._tried * self._fade + 1.0

    def rate(self, prior: float | None = None) -> float:
        """The share, between 0 and 1.

        Args:
            prior: What others' history says; by default what it started with.
        """
        prior = self._start if prior is None else prior
        return (self._accepted + _PRIOR_WEIGHT * prior) / (self._tried + _PRIOR_WEIGHT)


@dataclass(slots=True)
class DraftCost:
    """What drafts cost in the step at hand, in seconds.

    Attributes:
        step_s: The step's decodes without any draft; 0 if that is too little to measure.
        row_s: One row more.
        start_s: Any draft at all.
        shape_s: One more draft length among its sequences: runtimes that compute lanes in groups of
            equal length need another pass for it.
        depth_s: Guessing one more token for all its sequences, if that takes a model.
    """

    step_s: float
    row_s: float
    start_s: float = 0.0
    shape_s: float = 0.0
    depth_s: float = 0.0


def choose_lengths(
    num_decodes: int,
    rates: Rows[float],
    limits: Rows[int],
    cost: DraftCost,
    max_rows: int,
) -> list[int]:
    """The draft length of each sequence that makes a step yield the most tokens per second.

    Args:
        num_decodes: Sequences that decode in the step, with or without a draft.
        rates: The share of draft tokens accepted, for each sequence that may have a draft.
        limits: Most draft tokens of each of those.
        cost: What drafts cost.
        max_rows: Most draft tokens of the step.
    """
    none = [0] * len(rates)
    if not rates or max_rows <= 0:
        return none
    if cost.step_s <= 0.0:
        cost = DraftCost(1.0, _UNKNOWN_ROW)
    plain = num_decodes / cost.step_s
    best, wanted = none, plain * _MARGIN
    if max(rates) <= wanted * cost.row_s:
        return none  # not even the likeliest single row pays: the common case of a busy server
    for depth in _depths(max(limits), cost):
        lengths = _fill(num_decodes, rates, [min(k, depth) for k in limits], cost, max_rows)
        for candidate in (lengths, *_evened(lengths, cost)):
            found = _tokens_per_s(num_decodes, rates, candidate, cost)
            if found > wanted:
                best, wanted = candidate, found
    return best


def _depths(longest: int, cost: DraftCost) -> list[int]:
    """The greatest lengths to try: only where guessing itself costs time does that matter."""
    if not cost.depth_s:
        return [longest]
    return [depth for depth in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if depth < longest] + [longest]


def _fill(
    num_decodes: int, rates: Rows[float], limits: Rows[int], cost: DraftCost, max_rows: int
) -> list[int]:
    """Rows in order of what they promise, as long as each raises the tokens per second."""
    gains = []
    for at, (rate, limit) in enumerate(zip(rates, limits, strict=True)):
        gain = 1.0
        for _ in range(limit):
            gain *= rate
            if gain < _MIN_GAIN:
                break
            gains.append((gain, at))
    gains.sort(reverse=True)
    lengths = [0] * len(rates)
    tokens = float(num_decodes)
    seconds = cost.step_s + cost.start_s + cost.depth_s * max(limits)
    for gain, at in gains[:max_rows]:
        if gain * seconds <= tokens * cost.row_s:
            break
        lengths[at] += 1
        tokens += gain
        seconds += cost.row_s
    return lengths


def _evened(lengths: list[int], cost: DraftCost) -> list[list[int]]:
    """The same with only one length beside 0, for each that occurs: fewer passes, if those cost anything."""
    different = set(lengths) - {0}
    if not cost.shape_s or len(different) < 2:
        return []
    return [[level if k >= level else 0 for k in lengths] for level in different]


def _tokens_per_s(
    num_decodes: int, rates: Rows[float], lengths: list[int], cost: DraftCost
) -> float:
    tokens = float(num_decodes)
    for rate, length in zip(rates, lengths, strict=True):
        tokens += rate * (1.0 - rate**length) / (1.0 - rate) if rate < 1.0 else length
    shapes = len(set(lengths))
    if num_decodes > len(lengths):
        shapes += 0 not in lengths
    seconds = cost.step_s + cost.row_s * sum(lengths) + (cost.start_s if any(lengths) else 0.0)
    return tokens / (seconds + cost.shape_s * (shapes - 1) + cost.depth_s * max(lengths))
