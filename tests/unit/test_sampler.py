"""The sampler: exact where it can be, statistical where it must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stoker import Request, SamplingParams
from stoker.engine import sampler
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.sampler import NOT_FINITE, sample, uniform
from stoker.engine.sequence import Sequence


def sequence(prompt=(1, 2), output=(), **sampling) -> Sequence:  # type: ignore[no-untyped-def]
    request = Request(
        request_id="r",
        model="m",
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**({"seed": 7, "max_tokens": 8000} | sampling)),
    )
    made = Sequence(request, 0, None, Detokenizer(TokenText(lambda _: b"")), 100_000)  # type: ignore[arg-type]
    for token in output:
        made.append(token)
    return made


def draws(logits, count=4000, **sampling) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Relative frequencies of ``count`` draws at successive positions."""
    row = np.asarray(logits, np.float32)[None, :]
    seq = sequence(**sampling)
    seen = np.zeros(len(logits))
    for _ in range(count):
        token = sample(row, [seq])[0]
        seen[token] += 1
        seq.append(token)
    return seen / count


def softmax(logits, temperature=1.0) -> np.ndarray:  # type: ignore[no-untyped-def]
    scaled = np.asarray(logits, float) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def test_greedy_takes_the_maximum_of_every_row() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 1000)).astype(np.float32)
    seqs = [sequence(temperature=0.0) for _ in range(5)]
    assert sample(logits, seqs) == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    seen = draws(LOGITS, temperature=temperature)
    assert np.abs(seen - softmax(LOGITS, temperature)).max() < 0.03


@pytest.mark.slow
def test_top_k_keeps_the_k_likeliest() -> None:
    seen = draws(LOGITS, top_k=2)
    expected = softmax(LOGITS[:2])
    assert seen[2:].sum() == 0
    assert np.abs(seen[:2] - expected).max() < 0.03


@pytest.mark.slow
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    mass = softmax(LOGITS).cumsum()
    seen = draws(LOGITS, top_p=float(mass[1]) - 0.01)
    assert (seen[:2] > 0).all()
    assert seen[2:].sum() == 0
    assert (draws(LOGITS, top_p=float(mass[1]) + 0.01)[:3] > 0).all()


@pytest.mark.slow
def test_top_p_over_a_flat_distribution_looks_beyond_the_first_head() -> None:
    flat = np.zeros(3000)
    flat[:10] = 0.1
    seen = draws(flat, count=3000, top_p=0.9)
    assert 1500 < (seen > 0).sum() <= 2720


def test_min_p_drops_what_is_unlikely_against_the_likeliest() -> None:
    seen = draws(LOGITS, min_p=0.2)  # exp(-1) and exp(-1.5) stay, exp(-2) = 0.135 goes
    assert (seen[:3] > 0).all()
    assert seen[3:].sum() == 0


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.01, 2.0),
)
def test_a_draw_is_always_a_token_that_the_filters_allow(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=50).astype(np.float32)
    seq = sequence(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    token = sample(logits[None], [seq])[0]
    probabilities = softmax(logits, temperature)
    rank = int((probabilities > probabilities[token]).sum())
    if top_k:
        assert rank < top_k
    assert probabilities[token] >= min_p * probabilities.max() * (1 - 1e-4)
    if top_k == 0:
        assert np.sort(probabilities)[::-1][:rank].sum() <= top_p + 1e-4


def test_the_same_seed_and_position_draw_the_same_alone_and_in_a_crowd() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(8, 500)).astype(np.float32)
    alone = [sample(logits[i : i + 1], [sequence(seed=i)])[0] for i in range(8)]
    crowd = sample(logits, [sequence(seed=i) for i in range(8)])
    assert crowd == alone
    assert len({uniform(1, position) for position in range(1000)}) == 1000


def test_uniform_is_uniform_over_positions_and_seeds() -> None:
    for values in ([uniform(42, p) for p in range(20_000)], [uniform(s, 3) for s in range(20_000)]):
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert abs(np.mean(values) - 0.5) < 0.01
        assert counts.min() > 850
        assert counts.max() < 1150


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = np.array([[1.0, 1.4, 0.0, 0.0]], np.float32)
    assert sample(logits, [sequence(prompt=[1], temperature=0.0, presence_penalty=1.0)]) == [1]
    seq = sequence(prompt=[2], output=[1], temperature=0.0, presence_penalty=1.0)
    assert sample(logits, [seq]) == [0]
    once = sequence(prompt=[2], output=[1], temperature=0.0, frequency_penalty=0.3)
    twice = sequence(prompt=[2], output=[1, 1], temperature=0.0, frequency_penalty=0.3)
    assert sample(logits, [once]) == [1]
    assert sample(logits, [twice]) == [0]


def test_counts_follow_the_output_as_it_grows() -> None:
    logits = np.array([[1.0, 1.4, 0.0, 0.0]], np.float32)
    seq = sequence(prompt=[2], temperature=0.0, frequency_penalty=0.3)
    taken = []
    for _ in range(6):
        token = sample(logits, [seq])[0]
        taken.append(token)
        seq.append(token)
    # 1 costs 0.3 more each time it is taken: 1.4, 1.1, 0.8; then 0 at 1.0, 0.7; and 1 again.
    assert taken == [1, 1, 0, 1, 0, 1]


def test_repetition_penalty_counts_the_prompt_and_handles_both_signs() -> None:
    logits = np.array([[2.0, 1.5, -1.0, -1.1]], np.float32)
    assert sample(logits, [sequence(prompt=[0], temperature=0.0, repetition_penalty=2.0)]) == [1]
    negative = np.array([[-1.0, -1.1, -9.0, -9.0]], np.float32)
    assert sample(negative, [sequence(prompt=[0], temperature=0.0, repetition_penalty=2.0)]) == [1]


def test_logit_bias_forces_and_forbids() -> None:
    logits = np.array([[2.0, 1.5, 0.0, 0.0]], np.float32)
    assert sample(logits, [sequence(temperature=0.0, logit_bias={3: 100.0})]) == [3]
    assert sample(logits, [sequence(temperature=0.0, logit_bias={0: -100.0})]) == [1]
    assert logits.tolist() == [[2.0, 1.5, 0.0, 0.0]]  # the runtime's view is not written to


def test_rows_without_a_finite_maximum_are_told_apart() -> None:
    logits = np.array([[np.nan, 1.0], [1.0, 2.0], [-np.inf, -np.inf]], np.float32)
    seqs = [sequence(temperature=0.0), sequence(temperature=0.0), sequence()]
    assert sample(logits, seqs) == [NOT_FINITE, 1, NOT_FINITE]


def test_a_tiny_temperature_is_greedy() -> None:
    assert draws(LOGITS, count=50, temperature=1e-9)[0] == 1.0


def test_sequences_of_one_request_draw_differently_and_reproducibly() -> None:
    request = Request(
        request_id="r",
        model="m",
        prompt_token_ids=[1],
        sampling=SamplingParams(seed=5, max_tokens=9),
        n=2,
    )
    made = [
        Sequence(request, index, None, Detokenizer(TokenText(lambda _: b"")), 100)  # type: ignore[arg-type]
        for index in (0, 1, 0)
    ]
    assert made[0].seed != made[1].seed
    assert made[0].seed == made[2].seed


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([-3.0, 0.0, 0.5, 0.5, 2.0, float("-inf")]), min_size=1, max_size=900),
    st.data(),
)
def test_the_head_is_that_of_a_full_sort(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, np.float32)
    k = data.draw(st.integers(1, len(values)))
    want = np.argsort(-array, kind="stable")[:k]
    np.testing.assert_array_equal(sampler._head(array, k), want)


@given(
    st.lists(st.sampled_from([0.0, 1e-6, 0.25, 1.0]), min_size=1, max_size=900),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_falls_where_a_running_sum_says(values: list[float], draw: float) -> None:
    weights = np.array(values, np.float32)
    assume(weights.any())
    at = sampler._draw(weights, draw)
    assert weights[at] > 0
    cumulative = weights.cumsum(dtype=np.float64)
    target = draw * cumulative[-1]
    slack = 1e-9 * cumulative[-1]
    assert cumulative[at] - weights[at] - slack <= target <= cumulative[at] + slack
