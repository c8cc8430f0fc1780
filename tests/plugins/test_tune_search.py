"""The search of ``stoker tune``: it finds what is planted, and never mistakes noise for a gain."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker_plugins.tune.loads import BESIDE_WEIGHT, LOADS, combine
from stoker_plugins.tune.messages import Quality
from stoker_plugins.tune.search import (
    BudgetSpentError,
    Comparison,
    Measured,
    Noise,
    Rules,
    Search,
    compare,
    judge,
)
from stoker_plugins.tune.space import Assignment, Dimension, Space, Value

RULES = Rules()


def dimension(name: str, labels: list[str], **flags: bool) -> Dimension:
    values = {label: Value(label, options={name: label}) for label in labels}
    return Dimension(name=name, summary="", values=values, default=labels[0], **flags)


class Landscape:
    """A machine on which every value has a speed, with noise and drift, that never fails by itself."""

    def __init__(
        self,
        speeds: Mapping[str, Mapping[str, float]],
        *,
        noise: float = 0.0,
        drift: float = 0.0,
        seed: int = 0,
        budget: float = math.inf,
    ) -> None:
        self.speeds = speeds
        self.random = random.Random(seed)
        self.noise = noise
        self.drift = drift
        self.budget = budget
        self.measured: list[dict[str, str]] = []
        self.failures: dict[str, str] = {}
        self.kl: dict[str, float] = {}

    def truth(self, assignment: Assignment) -> float:
        return math.prod(
            values[assignment.get(name, next(iter(values)))] for name, values in self.speeds.items()
        )

    def __call__(self, assignment: Assignment, *, beside: bool, quality: bool) -> Measured:
        if len(self.measured) >= self.budget:
            raise BudgetSpentError
        self.measured.append(dict(assignment))
        for label in assignment.values():
            if label in self.failures:
                return Measured(failure=self.failures[label])
        speed = self.truth(assignment)
        # A machine that gets slower by and by, as one does that gets warm or busy.
        speed *= math.exp(-self.drift * len(self.measured))
        speed *= math.exp(self.random.gauss(0, self.noise)) if self.noise else 1.0
        kl = max((self.kl.get(label, 0.0) for label in assignment.values()), default=0.0)
        looked = Quality(kl_mean=kl, kl_max=kl, top1=1.0, positions=1) if quality else None
        return Measured(alone=speed, beside=speed if beside else None, quality=looked)


def search(
    landscape: Landscape, rules: Rules = RULES, *, only: tuple[str, ...] = (), **flags: bool
) -> Search:
    space = Space([dimension(name, list(v), **flags) for name, v in landscape.speeds.items()])
    found = Search(space, landscape, rules, only=only)
    try:
        found.run()
    except BudgetSpentError:
        assert landscape.budget < math.inf
    return found


labels = st.sampled_from("abcdef")
speeds = st.dictionaries(
    st.sampled_from(["one", "two", "three"]),
    st.dictionaries(labels, st.sampled_from([0.4, 0.8, 1.0, 1.1, 1.5, 2.0]), min_size=1),
    min_size=1,
)


@pytest.mark.slow
@given(speeds)
def test_without_noise_the_planted_best_is_found(
    planted: dict[str, dict[str, float]],
) -> None:
    landscape = Landscape(planted)
    found = search(landscape)
    for name, values in planted.items():
        chosen = values[found.best.get(name, next(iter(values)))]
        assert chosen == max(values.values())


@pytest.mark.parametrize("seed", range(20))
def test_a_clear_gain_is_found_in_noise_and_drift(seed: int) -> None:
    landscape = Landscape(
        {"one": {"slow": 1.0, "same": 1.0, "fast": 1.6}, "two": {"a": 1.0, "b": 0.7}},
        noise=0.03,
        drift=0.02,
        seed=seed,
    )
    assert search(landscape).best == {"one": "fast"}


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1, 0.3])
def test_noise_is_never_accepted(noise: float) -> None:
    """On a flat landscape every acceptance is a mistake.

    Of 2,200 comparisons hardly any makes it; none survives the check against the defaults at the end, without
    which there is no profile.
    """
    flat = {name: dict.fromkeys("abcdefghijkl"[:k], 1.0) for name, k in (("one", 8), ("two", 5))}
    accepted, survived = 0, 0
    for seed in range(200):
        landscape = Landscape(flat, noise=noise, seed=seed)
        found = search(landscape)
        accepted += sum(comparison.accepted for comparison in found.comparisons)
        if found.best:
            last = Comparison("all", "tuned", dict(found.best))
            survived += compare(landscape, {}, last, found.noise, RULES).accepted
    assert accepted <= 6
    assert survived == 0


def test_a_steady_drift_is_no_gain() -> None:
    for drift in (-0.05, 0.05):
        landscape = Landscape({"one": dict.fromkeys("abcdef", 1.0)}, drift=drift)
        assert search(landscape).best == {}


def test_a_gain_below_the_least_does_not_count() -> None:
    assert search(Landscape({"one": {"a": 1.0, "b": 1.02}})).best == {}
    assert search(Landscape({"one": {"a": 1.0, "b": 1.04}})).best == {"one": "b"}


def test_what_crashes_is_said_and_not_tried_again() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 9.0}, "two": {"x": 1.0, "y": 2.0}})
    landscape.failures["b"] = "crashes here (SIGSEGV)"
    found = search(landscape)
    assert found.best == {"two": "y"}
    assert [c.verdict for c in found.comparisons if c.label == "b"] == ["crashes here (SIGSEGV)"]
    assert sum(assignment.get("one") == "b" for assignment in landscape.measured) == 1


def test_what_says_something_else_is_refused_however_fast() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 9.0, "c": 2.0}})
    landscape.kl = {"b": 0.5, "c": 0.001}
    found = search(landscape, changes_quality=True)
    assert found.best == {"one": "c"}
    assert found.comparisons[0].verdict == "other answers: KL 0.5 > 0.02"
    assert found.comparisons[0].ratios == []
    assert search(landscape, Rules(max_kl=1.0), changes_quality=True).best == {"one": "b"}


def test_what_was_asked_for_by_name_is_measured_though_it_may_not_win() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 2.0}})
    landscape.kl = {"b": 0.5}
    found = Comparison("one", "b", {"one": "b"}, keep_on=True)
    compare(landscape, {}, found, Noise(), RULES, quality=True)
    assert found.speed == 2.0
    assert (found.accepted, found.verdict) == (False, "other answers: KL 0.5 > 0.02")


def test_a_divergence_that_is_no_number_is_refused() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 9.0}})
    landscape.kl = {"b": math.nan}
    assert search(landscape, changes_quality=True).best == {}


def test_a_baseline_that_fails_ends_the_search() -> None:
    def measure(assignment: Assignment, *, beside: bool, quality: bool) -> Measured:
        return Measured(alone=1.0) if assignment else Measured(failure="broke")

    space = Space([dimension("one", ["a", "b"])])
    with pytest.raises(RuntimeError, match="the setting to compare with fails: broke"):
        Search(space, measure, RULES).run()


@given(st.integers(0, 30), speeds)
def test_the_budget_ends_it_and_what_was_found_stays(
    budget: int, planted: dict[str, dict[str, float]]
) -> None:
    landscape = Landscape(planted, budget=budget)
    found = search(landscape)
    assert len(landscape.measured) <= budget
    accepted = [comparison for comparison in found.comparisons if comparison.accepted]
    assert landscape.truth(found.best) >= landscape.truth({})
    assert all(len(comparison.ratios) >= RULES.min_pairs for comparison in accepted)
    assert all(comparison.verdict for comparison in found.comparisons)


def test_only_what_is_asked_for_is_tuned() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 1.0, "b": 2.0}})
    assert search(landscape, only=("two",)).best == {"two": "b"}


def test_combinations_that_cannot_work_are_not_measured() -> None:
    flash = dimension("flash", ["on", "off"])
    narrow = Value("narrow", options={"kv": "narrow"}, requires={"flash": ["on", "auto"]})
    wide = Value("wide", options={"kv": "wide"})
    kv = Dimension(name="kv", summary="", values={"wide": wide, "narrow": narrow}, default="wide")
    landscape = Landscape({"flash": {"on": 1.0, "off": 2.0}, "kv": {"wide": 1.0, "narrow": 2.0}})
    Search(Space([flash, kv]), landscape, RULES).run()
    assert {"flash": "off", "kv": "narrow"} not in landscape.measured
    landscape.measured.clear()
    Search(Space([kv, flash]), landscape, RULES).run()
    assert {"flash": "off", "kv": "narrow"} not in landscape.measured


def test_pairs_alternate_who_goes_first() -> None:
    landscape = Landscape({"one": {"a": 1.0, "b": 2.0}})
    compare(landscape, {}, Comparison("one", "b", {"one": "b"}), Noise(), RULES)
    first = [assignment.get("one", "a") for assignment in landscape.measured]
    assert "".join(first) == "baabbaabba"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0, 1))
def test_a_verdict_always_comes_and_an_improvement_satisfies_the_rules(
    ratios: list[float], noise: float
) -> None:
    answer = judge(ratios, noise, RULES)
    if answer:
        assert len(ratios) >= RULES.min_pairs
        assert min(ratios) > 1
        assert sorted(ratios)[len(ratios) // 2] >= RULES.least_gain
    if len(ratios) >= RULES.max_pairs:
        assert answer is not None


def test_a_setting_that_collapses_in_company_does_not_win() -> None:
    """A spinning wait: 1.5 times as fast alone, and 50 times slower beside one busy process."""
    spin = combine(1.5, 1 / 50)
    assert spin < 0.5
    assert combine(1.2, 1.0) == pytest.approx(1.2 ** (1 - BESIDE_WEIGHT))
    assert combine(1.2, None) == 1.2

    def measure(assignment: Assignment, *, beside: bool, quality: bool) -> Measured:
        assert beside
        spins = assignment.get("waiting") == "spin"
        return Measured(alone=1.5 if spins else 1.0, beside=0.02 if spins else 1.0)

    space = Space([dimension("waiting", ["sleep", "spin"], depends_on_company=True)])
    found = Search(space, measure, RULES)
    assert found.run() == {}
    assert found.comparisons[0].verdict == "slower"
    assert found.comparisons[0].beside == [pytest.approx(0.02)]


def test_noise_is_learnt_from_the_baseline() -> None:
    noise = Noise()
    assert noise.of_ratio == 0
    for _ in range(2):
        noise.add(1.0, 1.1)
    assert noise.of_ratio == pytest.approx(1.4826 * math.log(1.1))
    assert not noise.is_known
    for _ in range(20):
        noise.add(1.0, 1.01)
    assert noise.is_known
    assert noise.of_ratio < 0.02  # one slow moment does not make a machine noisy


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_scores_grow_with_speed(load: object) -> None:
    score: Callable[[float, float, float], float] = load.score  # type: ignore[attr-defined]
    assert score(0.05, 0.01, 200.0) == pytest.approx(2 * score(0.1, 0.02, 100.0))
    assert score(0.0, 0.0, 0.0) > 0 or score(0.0, 0.0, 0.0) == pytest.approx(0.0)
