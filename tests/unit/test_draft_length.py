"""How many draft tokens pay."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.engine.draft_length import Acceptance, DraftCost, choose_lengths

SOLO = DraftCost(step_s=0.0072, row_s=0.0032)


def rate_of(num_decodes: int, rates: list[float], lengths: list[int], cost: DraftCost) -> float:
    tokens = num_decodes + sum(
        rate**j for rate, k in zip(rates, lengths, strict=True) for j in range(1, k + 1)
    )
    shapes = len({*lengths, *([0] if num_decodes > len(lengths) else [])}) - 1
    seconds = cost.step_s + cost.row_s * sum(lengths) + cost.shape_s * shapes
    seconds += cost.start_s if any(lengths) else 0.0
    return tokens / (seconds + cost.depth_s * max(lengths, default=0))


def test_copied_text_alone_is_drafted_and_free_text_is_not() -> None:
    (copying,) = choose_lengths(1, [0.95], [16], SOLO, 100)
    assert 4 <= copying <= 10
    assert rate_of(1, [0.95], [copying], SOLO) >= 1.5 * rate_of(1, [0.95], [0], SOLO)
    assert choose_lengths(1, [0.3], [16], SOLO, 100) == [0]


def test_in_a_crowd_a_row_costs_what_it_saves() -> None:
    crowd = DraftCost(step_s=0.004 + 16 * 0.0032, row_s=0.0032)
    assert choose_lengths(16, [0.9] * 16, [16] * 16, crowd, 500) == [0] * 16


def test_the_likeliest_rows_go_first_and_the_budget_holds() -> None:
    cheap = DraftCost(step_s=0.01, row_s=0.0001)
    lengths = choose_lengths(3, [0.9, 0.5, 0.1], [8, 8, 8], cheap, 9)
    assert sum(lengths) == 9
    assert lengths[0] > lengths[1] >= lengths[2]


def test_with_costs_unknown_only_what_is_likely_is_drafted() -> None:
    unknown = DraftCost(step_s=0.0, row_s=0.0)
    assert choose_lengths(1, [0.1], [8], unknown, 8) == [0]
    assert choose_lengths(1, [0.95], [8], unknown, 8)[0] > 2
    assert choose_lengths(1, [], [], unknown, 8) == []
    assert choose_lengths(1, [0.9], [8], unknown, 0) == [0]


def test_where_any_draft_is_dear_it_is_a_long_one_or_none() -> None:
    cost = DraftCost(step_s=0.0074, row_s=0.0038, start_s=0.003)
    assert choose_lengths(1, [0.75], [15], cost, 100) == [0]
    assert choose_lengths(1, [0.97], [15], cost, 100)[0] > 7


def test_another_length_is_avoided_where_it_costs_a_pass() -> None:
    cost = DraftCost(step_s=0.02, row_s=0.001, shape_s=0.01)
    lengths = choose_lengths(2, [0.95, 0.9], [12, 12], cost, 100)
    assert len(set(lengths)) == 1
    assert lengths[0] > 0


def test_a_slow_draft_model_drafts_less() -> None:
    quick = choose_lengths(1, [0.9], [16], DraftCost(0.1, 0.001, depth_s=0.001), 100)
    slow = choose_lengths(1, [0.9], [16], DraftCost(0.1, 0.001, depth_s=0.03), 100)
    too_slow = choose_lengths(1, [0.9], [16], DraftCost(0.1, 0.001, depth_s=0.1), 100)
    assert quick[0] > slow[0] > too_slow[0] == 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    rates=st.lists(st.floats(0, 0.99), min_size=1, max_size=3),
    others=st.integers(0, 3),
    limit=st.integers(1, 3),
    row_s=st.floats(0.0001, 0.02),
    start_s=st.sampled_from([0.0, 0.004]),
    depth_s=st.sampled_from([0.0, 0.001]),
    max_rows=st.integers(0, 9),
)
def test_it_is_the_best_there_is_and_never_worse_than_none(
    rates: list[float],
    others: int,
    limit: int,
    row_s: float,
    start_s: float,
    depth_s: float,
    max_rows: int,
) -> None:
    cost = DraftCost(step_s=0.01, row_s=row_s, start_s=start_s, depth_s=depth_s)
    n = len(rates) + others
    lengths = choose_lengths(n, rates, [limit] * len(rates), cost, max_rows)
    assert sum(lengths) <= max_rows
    assert all(0 <= k <= limit for k in lengths)
    found = rate_of(n, rates, lengths, cost)
    plain = rate_of(n, rates, [0] * len(rates), cost)
    assert found >= plain
    best = max(
        rate_of(n, rates, list(candidate), cost)
        for candidate in itertools.product(range(limit + 1), repeat=len(rates))
        if sum(candidate) <= max_rows
    )
    # Less than a margin over none is not worth the risk, and rows of under 5 % are not looked at.
    assert found >= 0.8 * best or (not any(lengths) and best <= 1.06 * plain)


def test_acceptance_forgets_and_starts_from_its_prior() -> None:
    acceptance = Acceptance(10.0, rate=0.3)
    assert acceptance.rate() == pytest.approx(0.3)
    assert acceptance.rate(0.9) == pytest.approx(0.9)
    for _ in range(40):
        acceptance.observe(0, rejected=True)
    assert acceptance.rate() < 0.1
    acceptance.observe(6, rejected=False)
    assert 0.3 < acceptance.rate() < 0.6
    acceptance.observe(16, rejected=False)
    assert acceptance.rate() > 0.8
    before = acceptance.rate()
    acceptance.observe(0, rejected=False)
    assert acceptance.rate() == before


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=30))
def test_acceptance_at_once_is_acceptance_one_by_one(trials: list[tuple[int, bool]]) -> None:
    together, single = Acceptance(10.0), Acceptance(10.0)
    for accepted, rejected in trials:
        together.observe(accepted, rejected=rejected)
        for _ in range(accepted):
            single.observe(1, rejected=False)
        single.observe(0, rejected=rejected)
    assert together.rate() == pytest.approx(single.rate())
    assert 0 <= together.rate() <= 1
