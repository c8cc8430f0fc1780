"""How values are tried, and when a difference counts.

Coordinate descent: one dimension after the other, each value against the best so far, and again from the
start if anything changed. A comparison measures in pairs, baseline and candidate next to each other in time
and in turns first, so that a machine that slows down slows both. A candidate wins only if every pair agrees
and the median ratio is beyond both the least gain and the noise, which is learnt from how much the same
setting differs from one measurement to the next. So a machine that is too noisy yields nothing, rather than
something wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stoker_plugins.tune.loads import combine
from stoker_plugins.tune.messages import Quality
from stoker_plugins.tune.space import Assignment, Dimension, Space

__all__ = [
    "BudgetSpentError",
    "Comparison",
    "Measured",
    "Noise",
    "Rules",
    "Search",
    "compare",
]


_LEAST_STEPS = 8  # differences of neighbours before the noise counts as known


class BudgetSpentError(Exception):
    """There is no time for another measurement."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    Attributes:
        alone: Its score alone; 0 if it failed.
        beside: Its score beside a busy process, if that was asked for.
        quality: If that was asked for.
        failure: Why there is no score; empty if there is one.
    """

    alone: float = 0.0
    beside: float | None = None
    quality: Quality | None = None
    failure: str = ""

    @property
    def score(self) -> float:
        """Both scores as one; 0 if one of them is missing."""
        scores = (self.alone, self.beside)
        if any(score is not None and score <= 0 for score in scores):
            return 0.0
        return combine(self.alone, self.beside)


class Measure(Protocol):
    """Measures an assignment in a process of its own.

    Raises ``BudgetSpentError`` when there is no time for it.
    """

    def __call__(self, assignment: Assignment, *, beside: bool, quality: bool) -> Measured: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """When a difference counts.

    Attributes:
        least_gain: Least median ratio of an improvement.
        min_pairs: Fewest pairs of an improvement.
        max_pairs: Pairs after which what is not clear yet is no improvement.
        confidence: How many standard errors of the noise it must be away from 1.
        max_kl: Largest mean divergence from the reference.
    """

    least_gain: float = 1.03
    min_pairs: int = 3
    max_pairs: int = 7
    confidence: float = 4.5
    max_kl: float = 0.02


@dataclass(slots=True)
class Noise:
    """How much the same setting differs from one measurement to the next, as a share.

    Attributes:
        steps: Differences of the logarithms of neighbouring measurements of one setting.
    """

    steps: list[float] = field(default_factory=list)

    def add(self, before: float, after: float) -> None:
        """Take two neighbouring measurements of one setting."""
        if before > 0 and after > 0:
            self.steps.append(abs(math.log(after / before)))

    @property
    def of_ratio(self) -> float:
        """Standard deviation of the logarithm of a pair's ratio.

        From the median of the absolute differences, which one slow moment does not move; a difference of
        two measurements varies as much as a ratio of two does.
        """
        return 1.4826 * statistics.median(self.steps) if self.steps else 0.0

    @property
    def is_known(self) -> bool:
        """Whether there are enough differences to say."""
        return len(self.steps) >= _LEAST_STEPS


@dataclass(slots=True)
class Comparison:
    """A candidate against a baseline.

    Attributes:
        name: The dimension, or what else is compared.
        label: The candidate's value.
        assignment: The candidate.
        ratios: Speed of the candidate by that of the baseline, of each pair.
        alone: The ratios of the scores alone.
        beside: The ratios of the scores in company, where there were any.
        noise: Standard deviation of a ratio's logarithm, as it was judged by.
        quality: The candidate's.
        fault: Why it may not be accepted however fast it is; empty if it may.
        keep_on: Measure the speed even so: the user asked for exactly this.
        verdict: In words; empty while it is not over.
        accepted: Whether it is an improvement.
    """

    name: str
    label: str
    assignment: Assignment
    ratios: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    noise: float = 0.0
    quality: Quality | None = None
    fault: str = ""
    keep_on: bool = False
    verdict: str = ""
    accepted: bool = False

    @property
    def speed(self) -> float | None:
        """The median ratio; ``None`` if nothing was measured."""
        return statistics.median(self.ratios) if self.ratios else None

    def add(self, base: Measured, candidate: Measured) -> None:
        """Take a pair."""
        self.ratios.append(candidate.score / base.score)
        self.alone.append(candidate.alone / base.alone)
        if candidate.beside is not None and base.beside is not None:
            self.beside.append(candidate.beside / base.beside)

    def close(self, verdict: str, *, accepted: bool = False) -> Comparison:
        """End it."""
        self.verdict, self.accepted = verdict, accepted
        return self


def judge(
    ratios: Sequence[float], noise: float, rules: Rules, *, known: bool = True
) -> bool | None:
    """Whether the pairs so far show an improvement; ``None`` if that is not clear yet.

    Args:
        ratios: Candidate by baseline, of each pair.
        noise: Standard deviation of such a ratio's logarithm.
        rules: When a difference counts.
        known: Whether ``noise`` can be relied on; if not, only the last pair may decide for the candidate.
    """
    logs = [math.log(ratio) for ratio in ratios]
    count = len(logs)
    middle = statistics.median(logs)
    if count == 1 and middle < -max(0.1, 2 * noise):
        return False
    if count == 2 and max(logs) < 0:
        return False
    if count < rules.min_pairs:
        return None
    if middle < math.log(rules.least_gain):
        return False
    spread = 1.4826 * statistics.median([abs(log - middle) for log in logs])
    error = max(noise, spread) / math.sqrt(count)
    last = count >= rules.max_pairs
    if (known or last) and min(logs) > 0 and middle >= rules.confidence * error:
        return True
    return False if last else None


def _measure_pair(
    measure: Measure,
    baseline: Assignment,
    comparison: Comparison,
    rules: Rules,
    *,
    beside: bool,
    quality: bool,
) -> tuple[Measured, Measured] | None:
    """Measure both, in turns first; ``None`` if the candidate is out, with the verdict in ``comparison``."""
    number = len(comparison.ratios)
    base: Measured | None = None
    if number % 2 == 1:
        base = _measure_baseline(measure, baseline, beside=beside)
    look = quality and number == 0
    found = measure(comparison.assignment, beside=beside, quality=look)
    comparison.quality = found.quality or comparison.quality
    kl_mean = found.quality.kl_mean if found.quality is not None else 0.0
    if found.failure or not found.score > 0:
        comparison.close(found.failure or "computes nothing in its time")
        return None
    if not kl_mean <= rules.max_kl:
        comparison.fault = f"other answers: KL {kl_mean:.3g} > {rules.max_kl:g}"
    if comparison.fault and not comparison.keep_on:
        comparison.close(comparison.fault)
        return None
    return base or _measure_baseline(measure, baseline, beside=beside), found


def _measure_baseline(measure: Measure, baseline: Assignment, *, beside: bool) -> Measured:
    found = measure(baseline, beside=beside, quality=False)
    if found.failure or not found.score > 0:
        why = found.failure or "it computes nothing in its time"
        raise RuntimeError(f"the setting to compare with fails: {why}")
    return found


def compare(
    measure: Measure,
    baseline: Assignment,
    comparison: Comparison,
    noise: Noise,
    rules: Rules,
    *,
    beside: bool = False,
    quality: bool = False,
    tell: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Measure in pairs until it is clear.

    Args:
        measure: Measures one assignment.
        baseline: What to compare with.
        comparison: The candidate; filled.
        noise: What is known of the noise; added to.
        rules: When a difference counts.
        beside: Also measure beside a busy process.
        quality: Also look at what the model says, once.
        tell: Called after every pair.

    Raises:
        BudgetSpentError: There is no time for another measurement; nothing was decided.
        RuntimeError: The baseline, which worked before, fails.
    """
    before: tuple[Measured, Measured] | None = None
    while True:
        pair = _measure_pair(measure, baseline, comparison, rules, beside=beside, quality=quality)
        if pair is None:
            return comparison
        if before is not None:
            for earlier, later in zip(before, pair, strict=True):
                noise.add(earlier.score, later.score)
        before = pair
        comparison.add(*pair)
        comparison.noise = noise.of_ratio
        answer = judge(comparison.ratios, comparison.noise, rules, known=noise.is_known)
        tell(comparison)
        if answer is not None:
            word = comparison.fault or _word(comparison, answer, rules)
            return comparison.close(word, accepted=answer and not comparison.fault)


def _word(comparison: Comparison, answer: bool, rules: Rules) -> str:
    if answer:
        return "better"
    speed = comparison.speed or 0.0
    if speed < 1 / rules.least_gain:
        return "slower"
    return "no clear gain" if speed >= rules.least_gain else "the same"


class Search:
    """Coordinate descent over a space.

    Args:
        space: What there is to tune.
        measure: Measures one assignment.
        rules: When a difference counts.
        only: Names of the dimensions to tune; all if empty.
        tell: Called after every pair of a comparison that goes on.

    Attributes:
        best: The best assignment so far.
        comparisons: All that was compared, in order.
        noise: What was learnt about it.
    """

    def __init__(
        self,
        space: Space,
        measure: Measure,
        rules: Rules,
        *,
        only: Sequence[str] = (),
        tell: Callable[[Comparison], None] = lambda _: None,
    ) -> None:
        self.space = space
        self.measure = measure
        self.rules = rules
        self.only = set(only) or set(space.dimensions)
        self.tell = tell
        self.best: dict[str, str] = {}
        self.comparisons: list[Comparison] = []
        self.noise = Noise()
        self._tuned_under: dict[str, dict[str, str]] = {}
        self._useless: set[tuple[str, str]] = set()

    def run(self, max_rounds: int = 2) -> Mapping[str, str]:
        """Search until a round changes nothing.

        Raises:
            BudgetSpentError: The time is up; ``best`` is what is known by then.
            RuntimeError: The best setting so far fails.
        """
        for _ in range(max_rounds):
            before = dict(self.best)
            for dimension in self.space.dimensions.values():
                if dimension.name in self.only:
                    self._tune(dimension)
            if self.best == before:
                break
        return self.best

    def _tune(self, dimension: Dimension) -> None:
        others = {name: label for name, label in self.best.items() if name != dimension.name}
        if self._tuned_under.get(dimension.name) == others:
            return  # nothing else has changed since
        self._tuned_under[dimension.name] = others
        seen = self.best.get(dimension.name, dimension.default)
        for label in dimension.values:
            current = self.best.get(dimension.name, dimension.default)
            candidate = {**self.best, dimension.name: label}
            if label in (current, seen) or (dimension.name, label) in self._useless:
                continue
            if self.space.works(candidate):
                self._try(dimension, label, candidate)

    def _try(self, dimension: Dimension, label: str, candidate: Assignment) -> None:
        comparison = Comparison(dimension.name, label, candidate)
        self.comparisons.append(comparison)
        try:
            compare(
                self.measure,
                dict(self.best),
                comparison,
                self.noise,
                self.rules,
                beside=dimension.depends_on_company,
                quality=dimension.changes_quality,
                tell=self.tell,
            )
        except BudgetSpentError:
            comparison.close("no time left")
            raise
        if not comparison.ratios:
            self._useless.add((dimension.name, label))
        if comparison.accepted and label == dimension.default:
            self.best.pop(dimension.name, None)
        elif comparison.accepted:
            self.best[dimension.name] = label
