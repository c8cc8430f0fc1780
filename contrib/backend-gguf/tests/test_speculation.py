"""Speculative decoding on the real default model: the same tokens in fewer steps."""

from __future__ import annotations

import time

import pytest

from stoker.config import SpeculationConfig
from stoker.engine.draft_model import DraftModelDrafter, check_draft_model
from stoker.engine.ngram import NgramDrafter
from stoker.testing import EngineHarness
from stoker_plugins.fcfs import FirstComeFirstServed

pytestmark = [pytest.mark.model, pytest.mark.slow]

LIST = "alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lambda, mu"
COPY = (
    "<|im_start|>user\nRepeat this list word for word: " + LIST + "<|im_end|>\n"
    "<|im_start|>assistant\n" + LIST + "\n" + LIST + "\n"
)
STORY = "<|im_start|>user\nTell me about the sea.<|im_end|>\n<|im_start|>assistant\n"


def generate(runtime, drafter=None, prompts=(COPY,), **sampling):
    """Texts, draft tokens, accepted tokens and steps of some prompts, from empty lanes."""
    for lane in range(runtime.info.num_lanes):
        runtime.truncate(lane, 0)
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime,
        clock=time.monotonic,
        drafter=drafter,
        speculation=SpeculationConfig(adaptive=False, max_draft_tokens=6),
    )
    requests = [harness.submit(p, **{"max_tokens": 48, **sampling}) for p in prompts]
    steps = harness.run()
    speculator = harness.engine.speculator
    assert speculator is None or speculator.num_errors == 0
    traces = [trace for request in requests for trace in request.traces()]
    return (
        [request.text() for request in requests],
        sum(trace.draft_tokens for trace in traces),
        sum(trace.accepted_tokens for trace in traces),
        steps,
    )


def test_a_copied_list_is_the_same_in_fewer_steps(runtime) -> None:
    plain, *_, plain_steps = generate(runtime)
    drafted, computed, accepted, steps = generate(runtime, NgramDrafter(2, 4))
    assert drafted == plain
    assert "epsilon, zeta" in drafted[0]
    assert 0 < accepted <= computed
    assert steps < plain_steps / 2


def test_a_seeded_request_draws_the_same_tokens(runtime) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.1}
    plain, *_ = generate(runtime, **sampling)
    drafted, _, accepted, _ = generate(runtime, NgramDrafter(2, 4), **sampling)
    assert drafted == plain
    assert accepted > 0


def test_several_lanes_draft_each_for_itself(runtime) -> None:
    prompts = [COPY, STORY, COPY.replace("gamma", "omega")]
    texts, computed, accepted, _ = generate(runtime, NgramDrafter(2, 4), prompts)
    assert accepted > 30
    assert "gamma" in texts[0]
    assert "omega" in texts[2]
    assert computed >= accepted


def test_a_model_that_drafts_for_itself_is_nearly_always_right(load, runtime) -> None:
    draft = load(lanes=runtime.info.num_lanes)
    check_draft_model(runtime, draft, "target", "draft")
    plain, *_ = generate(runtime, prompts=(STORY,))
    clock = time.monotonic
    drafted, computed, accepted, steps = generate(
        runtime, DraftModelDrafter(draft, clock), prompts=(STORY,)
    )
    assert drafted == plain
    assert accepted >= 0.9 * computed > 20
    assert steps < 20
