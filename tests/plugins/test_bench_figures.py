"""What ``stoker bench`` makes of answers."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker_plugins.bench.figures import Objectives, figures, ratios, spread
from stoker_plugins.bench.target import Answer
from stoker_plugins.bench.workload import Shot, user


def answer(
    stamps: Sequence[float],
    *,
    sent_s: float = 0.0,
    due_s: float | None = None,
    tokens: int | None = None,
    group: str = "",
    failure: str = "",
    cached: int | None = None,
) -> Answer:
    made = Answer(Shot((user("x"),), 100, group=group))
    made.sent_s = sent_s
    made.due_s = sent_s if due_s is None else due_s
    made.stamps = array("d", stamps)
    made.end_s = stamps[-1] if stamps else sent_s
    made.completion_tokens = tokens
    made.failure = failure
    made.cached_tokens = cached
    return made


def test_latencies_and_rates_of_two_answers() -> None:
    found = figures(
        [
            answer([1.0, 1.5, 2.5], tokens=3, cached=7),
            answer([2.0, 2.1, 4.0], sent_s=1.0, tokens=6, cached=0),
        ],
        cpu_s=0.4,
    )
    assert (found.requests, found.completed, found.output_tokens) == (2, 2, 9)
    assert found.duration_s == 4.0
    assert found.output_tok_s == pytest.approx(9 / 4)
    assert found.requests_s == pytest.approx(0.5)
    assert found.ttft_p50_ms == pytest.approx(1000)
    assert found.worst_gap_ms == pytest.approx(1900)
    assert found.itl_p50_ms == pytest.approx(750)  # of 0.1, 0.5, 1.0, 1.9
    assert found.tpot_p50_ms == pytest.approx((750 + 400) / 2)
    assert found.e2e_p99_ms == pytest.approx(2995)
    assert found.request_tok_s_p50 == pytest.approx((3 / 2.5 + 6 / 3) / 2)
    assert found.cached_tokens == 7
    assert found.ended_early == 2
    assert found.client_cpu == pytest.approx(0.1)


def test_without_usage_events_are_counted_and_nothing_is_said_of_the_cache() -> None:
    found = figures([answer([1.0, 2.0])])
    assert found.output_tokens == 2
    assert found.cached_tokens is None
    assert found.ended_early == 0


def test_failures_are_counted_by_kind_and_leave_no_latencies() -> None:
    found = figures(
        [
            answer([], failure="http 429"),
            answer([], failure="http 429"),
            answer([9.0], failure="disconnected"),
            answer([1.0, 2.0]),
        ]
    )
    assert found.failures == {"http 429": 2, "disconnected": 1}
    assert (found.requests, found.completed) == (4, 1)
    assert found.ttft_p99_ms == pytest.approx(1000)


@pytest.mark.parametrize("answers", [[], [answer([], failure="timeout")]])
def test_a_round_without_answers_has_no_figures(answers: list[Answer]) -> None:
    found = figures(answers, Objectives({"ttft": 1.0}))
    assert math.isnan(found.ttft_p50_ms)
    assert math.isnan(found.output_tok_s)
    assert found.good_requests_s == 0
    assert found.good_share == (0 if answers else None)


def test_the_worst_gap_may_be_a_groups() -> None:
    answers = [answer([1.0, 1.2], group="decoder"), answer([1.0, 9.0], group="long prompt")]
    assert figures(answers, gap_group="decoder").worst_gap_ms == pytest.approx(200)
    assert figures(answers).worst_gap_ms == pytest.approx(8000)


def test_lateness_counts_for_latency_and_is_told() -> None:
    found = figures([answer([3.0], sent_s=2.0, due_s=1.5)])
    assert found.ttft_p50_ms == pytest.approx(1500)
    assert found.lag_max_ms == pytest.approx(500)


def test_goodput_is_of_all_requests_and_needs_every_objective() -> None:
    answers = [
        answer([0.4, 0.5]),
        answer([0.4, 0.9]),  # its gap is too long
        answer([0.6, 0.7]),  # its first token is late
        answer([], failure="http 503"),
    ]
    found = figures(answers, Objectives.parse("ttft=500ms,gap=0.2s"))
    assert found.good_share == 0.25
    assert found.good_requests_s == pytest.approx(1 / found.duration_s)


def test_each_objective_measures_what_it_says() -> None:
    one = answer([1.0, 1.1, 3.0], tokens=21)
    for text, good in [
        ("ttft=1s", True),
        ("ttft=999ms", False),
        ("tpot=100ms", True),
        ("tpot=99ms", False),
        ("gap=1901ms", True),
        ("gap=1899ms", False),
        ("itl=1890ms", True),
        ("itl=1880ms", False),
        ("e2e=3s", True),
        ("e2e=2.9s", False),
    ]:
        assert Objectives.parse(text).met_by(one) is good, text
    assert Objectives.parse("tpot=1ms,gap=1ms,itl=1ms").met_by(answer([1.0]))


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "ttft=-5ms", "speed=5ms", "ttft=1s,,itl=1s"]
)
def test_other_objectives_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Objectives.parse(text)


@pytest.mark.slow
@given(st.lists(st.lists(st.floats(0.001, 10), min_size=1, max_size=20), min_size=1, max_size=10))
def test_percentiles_agree_with_numpys(gaps: list[list[float]]) -> None:
    answers = [answer(np.cumsum(each).tolist()) for each in gaps]
    found = figures(answers)
    first = np.array([each[0] for each in gaps]) * 1e3
    assert found.ttft_p50_ms == pytest.approx(np.percentile(first, 50))
    assert found.ttft_p99_ms == pytest.approx(np.percentile(first, 99))
    between = [gap * 1e3 for each in gaps for gap in each[1:]]
    if between:
        assert found.itl_p99_ms == pytest.approx(np.percentile(between, 99), rel=1e-6)
        assert found.worst_gap_ms == pytest.approx(max(between), rel=1e-6)
    assert found.output_tokens == sum(map(len, gaps))


@pytest.mark.slow
@given(st.lists(st.one_of(st.none(), st.just(math.nan), st.floats(0.1, 1e6))))
def test_a_spread_holds_its_values(values: list[float | None]) -> None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    found = spread(values)
    if not known:
        assert found is None
        return
    assert found is not None
    assert (found.low, found.high) == (min(known), max(known))
    assert found.low <= found.median <= found.high


def test_ratios_are_taken_round_by_round() -> None:
    # The machine became three times slower; the ratio did not change.
    found = ratios([100.0, 50.0, 33.0], [50.0, 25.0, 16.5])
    assert found is not None
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratios([1.0, None], [0.0, 2.0]) is None
