"""The real engine over real lanes: what this runtime cannot do, the core does without."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from stoker.config import SchedulerConfig
from stoker.engine.ngram import NgramDrafter
from stoker.testing import EngineHarness, Fault, FaultyRuntime
from stoker_backend_ctransformers.runtime import CTransformersRuntime
from stoker_plugins.fcfs import FirstComeFirstServed

Load = Callable[..., CTransformersRuntime]
Run = Callable[..., Any]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(250), k=length)


def alone(runtime: CTransformersRuntime, run: Run, tokens: Sequence[int], count: int) -> list[int]:
    """Greedy tokens, computed in lane 0 without an engine."""
    runtime.truncate(0, 0)
    fresh, position, made = list(tokens), 0, []
    while len(made) < count:
        best = int(run(runtime, (0, fresh, position))[0].argmax())
        position += len(fresh)
        made.append(best)
        fresh = [best]
        if best in runtime.info.end_token_ids:
            break
    return made


def written(submitted: Any, index: int = 0) -> list[int]:
    return [t for d in submitted.deltas if d.index == index for t in d.token_ids]


@pytest.mark.parametrize(
    ("architecture", "truncation"),
    [("gpt2", "any"), ("gpt2", "reset"), ("llama", "any"), ("falcon", "reset")],
)
def test_many_requests_over_few_lanes(
    architecture: str, truncation: str, load: Load, run: Run
) -> None:
    """Chunked, preempted, aborted, beside each other: each gets what it gets alone."""
    runtime = load(architecture, context=128, truncation=truncation)
    reference = load(architecture, lanes=1, context=128)
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime,
        scheduler=SchedulerConfig(max_num_batched_tokens=24, max_prefill_tokens_while_decoding=8),
    )
    prompts = [prompt(i, length) for i, length in enumerate((5, 60, 33, 1, 90, 17, 60, 40, 64, 12))]
    prompts += [prompts[1] + [7, 8, 9], prompts[4][:50]]  # with a common beginning
    submitted = [harness.submit(p, max_tokens=12, wants_token_ids=True) for p in prompts]
    doomed = [harness.submit(prompt(50 + i, 40), max_tokens=30) for i in range(3)]
    dice = random.Random(0)
    for _ in range(2000):
        if not (harness.engine.has_work or harness.engine.scheduler.paused):
            break
        harness.step()
        running = list(harness.engine.scheduler.running.values())
        if len(running) > 1 and dice.random() < 0.1:
            harness.engine.scheduler.preempt(dice.choice(running), "policy")
        if doomed and dice.random() < 0.1:
            harness.abort(doomed.pop())
    for tokens, one in zip(prompts, submitted, strict=True):
        assert one.finish_reason in {"length", "stop"}
        assert written(one) == alone(reference, run, tokens, 12)
    assert harness.engine.scheduler.num_preemptions > 0


def test_a_conversation_goes_on_in_its_lane(load: Load, run: Run) -> None:
    runtime = load("gpt2")
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    first = harness.submit(prompt(1, 70), max_tokens=5, wants_token_ids=True)
    harness.run()
    longer = prompt(1, 70) + written(first) + [5, 6, 7]
    second = harness.submit(longer, max_tokens=5, wants_token_ids=True)
    harness.run()
    assert second.records[0].cached_tokens >= 64
    assert second.traces()[0].cached_by == "takeover"
    assert written(second) == alone(load("gpt2", lanes=1), run, longer, 5)


def test_with_reset_nothing_is_found_again(load: Load, run: Run) -> None:
    """Lanes that cannot go back to a whole block cannot be taken over without other bits."""
    harness = EngineHarness(FirstComeFirstServed(), runtime=load("gpt2", truncation="reset"))
    first = harness.submit(prompt(1, 70), max_tokens=5, wants_token_ids=True)
    harness.run()
    for tokens in (prompt(1, 70)[:40], prompt(1, 70), prompt(1, 70) + written(first)):
        again = harness.submit([*tokens, 9], max_tokens=5, wants_token_ids=True)
        harness.run()
        assert written(again) == alone(load("gpt2", lanes=1), run, [*tokens, 9], 5)
        assert again.records[0].cached_tokens == 0


def test_several_choices_of_one_prompt(load: Load, run: Run) -> None:
    """There is no copy of a prefix: each choice computes the prompt."""
    harness = EngineHarness(FirstComeFirstServed(), runtime=load("gpt2"))
    many = harness.submit(prompt(3, 40), n=5, max_tokens=6, wants_token_ids=True)
    harness.run()
    expected = alone(load("gpt2", lanes=1), run, prompt(3, 40), 6)
    assert [written(many, index) for index in range(5)] == [expected] * 5


def test_prompts_are_scored(load: Load, run: Run) -> None:
    runtime = load("gpt2")
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    tokens = prompt(4, 50)
    scored = harness.submit(tokens, max_tokens=2, prompt_logprobs=1)
    harness.run()
    logits = run(load("gpt2", lanes=1), (0, tokens, 0), every=True).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = [entry for delta in scored.deltas for entry in delta.prompt_logprobs or ()]
    values = [entry.logprob for entry in found if entry is not None]
    np.testing.assert_allclose(
        values, [logs[i, token] for i, token in enumerate(tokens[1:])], atol=1e-3
    )


def test_drafts_are_verified(load: Load, run: Run) -> None:
    runtime = load("gpt2")
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, drafter=NgramDrafter(1, 3))
    expected = alone(load("gpt2", lanes=1), run, prompt(5, 30), 40)
    guessed = harness.submit(prompt(5, 30), max_tokens=40, predicted=expected, wants_token_ids=True)
    harness.run()
    assert written(guessed) == expected


@pytest.mark.parametrize("truncation", ["any", "reset"])
@pytest.mark.parametrize("fault", [Fault.NO_ROOM, Fault.RAISE_BEFORE, Fault.RAISE_MIDWAY])
def test_steps_that_fail_hurt_nobody_for_long(
    fault: Fault, truncation: str, load: Load, run: Run
) -> None:
    runtime = load("gpt2", truncation=truncation)
    dice = random.Random(2)
    faulty = FaultyRuntime(runtime, lambda _: fault if dice.random() < 0.1 else None)
    harness = EngineHarness(FirstComeFirstServed(), runtime=faulty)
    reference = load("gpt2", lanes=1)
    submitted = [
        harness.submit(prompt(i, 40), max_tokens=8, wants_token_ids=True) for i in range(8)
    ]
    harness.run()
    for i, one in enumerate(submitted):
        expected = alone(reference, run, prompt(i, 40), 8)
        assert one.finish_reason is not None
        assert written(one) == expected[: len(written(one))]
        assert one.finish_reason == "error" or written(one) == expected
