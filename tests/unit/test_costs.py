"""What is learned of steps and answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import StepCost
from stoker.engine.costs import CostModel, OutputModel


def test_nothing_is_known_at_first() -> None:
    assert CostModel().cost == StepCost()


def test_it_finds_what_steps_cost() -> None:
    rng = random.Random(1)
    model = CostModel()
    for _ in range(2000):
        prefill, decodes = rng.choice([0, 0, 64, 128, 512]), rng.randrange(17)
        seconds = 0.02 + 0.003 * prefill + 0.004 * decodes
        model.observe(prefill, decodes, seconds * rng.uniform(0.9, 1.1))
    assert model.cost.step_s(128, 8) == pytest.approx(0.02 + 0.384 + 0.032, rel=0.1)
    assert model.cost.step_s(0, 16) == pytest.approx(0.084, rel=0.25)
    assert model.cost.prefill_s == pytest.approx(0.003, rel=0.1)


def test_what_was_learned_of_prompts_outlives_a_time_without_any() -> None:
    model = CostModel()
    for _ in range(50):
        model.observe(128, 4, 0.4)
    before = model.cost.prefill_s
    for _ in range(500):
        model.observe(0, 4, 0.03)
    assert model.cost.prefill_s == before
    assert model.cost.step_s(0, 4) == pytest.approx(0.03, rel=0.05)


def test_one_slow_step_does_not_upset_it() -> None:
    model = CostModel()
    for _ in range(50):
        model.observe(0, 8, 0.05)
    model.observe(0, 8, 60.0)
    assert model.cost.step_s(0, 8) < 0.1


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 256), st.floats(0, 100)), min_size=1)
)
def test_estimates_are_never_negative_nor_infinite(
    steps: list[tuple[int, int, float]],
) -> None:
    model = CostModel()
    for step in steps:
        model.observe(*step)
    assert 0 <= model.cost.step_s(512, 64) < 1e7


def test_answers_are_as_long_as_they_were() -> None:
    outputs = OutputModel()
    assert outputs.expect(100, 1000) == 100, "without experience: what was asked for"
    for _ in range(100):
        outputs.observe(20, 200)
        outputs.observe(50, None)
    assert outputs.expect(100, 1000) == pytest.approx(10, abs=1)
    assert outputs.expect(None, 1000) == pytest.approx(50, abs=1)
    assert outputs.expect(None, 7) == 7
    assert outputs.expect(1, 1000) == 1
