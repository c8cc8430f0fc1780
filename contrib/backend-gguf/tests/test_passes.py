"""Steps of several passes: a run is computed in the shape it was asked for in, whatever is beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stoker
from stoker_backend_gguf.passes import plan_passes

pytestmark = pytest.mark.model

TOKENS = np.random.default_rng(7).integers(100, 40_000, 400).tolist()


@given(st.lists(st.integers(1, 600), min_size=1, max_size=20), st.sampled_from([64, 512]))
def test_each_run_is_in_one_pass_of_runs_of_its_length(lengths, n_ubatch):
    passes = plan_passes(lengths, n_ubatch)
    assert sorted(run for runs in passes for run in runs) == list(range(len(lengths)))
    for runs in passes:
        assert len({lengths[run] for run in runs}) == 1
        assert len(runs) == 1 or len(runs) * lengths[runs[0]] <= n_ubatch


def test_runs_that_company_would_change_are_alone():
    assert plan_passes([9, 1, 9, 1, 9], 64, [0]) == [[0], [2, 4], [1, 3]]


@pytest.fixture
def lanes(partitioned):
    for lane in range(partitioned.info.num_lanes):
        partitioned.truncate(lane, 0)
    return partitioned


def test_a_mixed_step_computes_what_its_runs_give_alone(lanes, run):
    prompts = {0: TOKENS[:9], 1: TOKENS[9:30], 2: TOKENS[30:39]}
    for lane, tokens in prompts.items():
        run(lanes, (lane, tokens, 0))
    step = [(0, [5], 9), (3, TOKENS[:128], 0), (1, [6], 21), (4, TOKENS[:20], 0), (2, [7], 9)]
    want = [run(lanes, *([row])) for row in step]
    for lane, _, start in step:
        lanes.truncate(lane, start)
    got = run(lanes, *step)
    # Alone or together, only the number of a pass's rows differs: bit-equal, but for a lone decode.
    for row, alone in zip(got, want, strict=True):
        np.testing.assert_allclose(row, alone[0], atol=1e-4)
        assert row.argmax() == alone[0].argmax()
    np.testing.assert_array_equal(got[1], want[1][0])
    np.testing.assert_array_equal(got[3], want[3][0])


@pytest.fixture(scope="module")
def prefill(partitioned, run):
    """The logits after 220 tokens that are computed in pieces, with company in each step."""

    def compute(cuts, company):
        for lane in range(partitioned.info.num_lanes):
            partitioned.truncate(lane, 0)
        for start, end in itertools.pairwise([0, *cuts, 220]):
            logits = run(partitioned, (0, TOKENS[start:end], start), *company)[0]
            for lane, _, _ in company:
                partitioned.truncate(lane, 0)
        return logits

    return compute


@pytest.fixture(scope="module")
def in_two(prefill):
    return prefill([192], [])


LONG, SHORT = [(1, TOKENS[:70], 0)], [(1, [5], 0), (2, [5, 6, 7], 0)]


@pytest.mark.parametrize(
    ("cuts", "company"),
    [
        *(([64, 128, 192], company) for company in ([], LONG, SHORT)),
        ([128, 192], []),
        *(([64, 192, 200, 205], company) for company in ([], LONG, SHORT)),
        ([192], LONG),
    ],
)
def test_whole_blocks_and_rests_give_the_same_bits_however_they_are_cut(
    prefill, in_two, cuts, company
):
    np.testing.assert_array_equal(prefill(cuts, company), in_two)


def test_a_later_pass_without_room_undoes_the_passes_before_it(lanes, run, build_step, monkeypatch):
    run(lanes, (0, TOKENS[:9], 0))
    run(lanes, (1, TOKENS[:70], 0))
    want = run(lanes, (0, [5], 9), (1, [5], 70))
    lanes.truncate(0, 9)
    lanes.truncate(1, 70)
    real, calls = lanes._lib.llama_decode, []

    def decode(context, batch):
        calls.append(batch.n_tokens)
        return real(context, batch) if len(calls) == 1 else 1

    monkeypatch.setattr(lanes._lib, "llama_decode", decode)
    assert lanes.step(build_step((0, [5], 9), (1, TOKENS[70:100], 70))).no_room
    assert calls == [30, 1]
    monkeypatch.undo()
    assert lanes.truncate(1, 999) == 70
    np.testing.assert_array_equal(run(lanes, (0, [5], 9), (1, [5], 70)), want)


def test_a_later_pass_that_fails_undoes_the_passes_before_it(lanes, run, build_step, monkeypatch):
    run(lanes, (0, TOKENS[:9], 0))
    real, calls = lanes._lib.llama_decode, []

    def decode(context, batch):
        calls.append(batch.n_tokens)
        return real(context, batch) if len(calls) == 1 else -3

    monkeypatch.setattr(lanes._lib, "llama_decode", decode)
    with pytest.raises(stoker.EngineError, match="code -3"):
        lanes.step(build_step((0, [5], 9), (1, TOKENS[:30], 0)))
    monkeypatch.undo()
    assert lanes.truncate(0, 999) == 9
    assert lanes.truncate(1, 999) == 0
