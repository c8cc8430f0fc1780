"""Prompts that are scored: every token's likelihood, whatever happens on the way; and how far prompts are."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import FinishReason, StepInput
from stoker.config import CacheConfig, SchedulerConfig, SpeculationConfig
from stoker.engine import scoring
from stoker.engine.drafters import Drafter
from stoker.engine.ngram import NgramDrafter
from stoker.testing import (
    EngineHarness,
    Fault,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    Submitted,
)
from stoker_plugins.fcfs import FirstComeFirstServed

CHOSEN = 8 - math.log(math.exp(8) + 260)  # of the scripted model's own choice
OTHER = -math.log(math.exp(8) + 260)


def make(
    runtime: Any = None,
    *,
    chunk: int = 512,
    lanes: int = 4,
    cache: CacheConfig | None = None,
    drafter: Drafter | None = None,
    **options: Any,
) -> EngineHarness:
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime
        or ScriptedRuntime(lanes=lanes, context_length=400, options=ScriptedOptions(**options)),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=chunk, max_prefill_tokens_while_decoding=chunk, target_step_s=0
        ),
        cache=cache,
        drafter=drafter,
        speculation=SpeculationConfig(adaptive=False, max_draft_tokens=5),
    )


@functools.cache
def next_token(prompt: tuple[int, ...]) -> int:
    text = ScriptedRuntime(lanes=1, context_length=401).expected_text(list(prompt), 1)
    return ord(text)


def check(request: Submitted, num_top: int = 2) -> None:
    """The scores are on the first delta that is not about progress, and right."""
    first = [d for d in request.deltas if d.index == 0 and not d.num_prefilled]
    assert all(d.prompt_logprobs is None for d in request.deltas if d is not first[0])
    entries = first[0].prompt_logprobs
    prompt = tuple(request.request.prompt_token_ids)
    assert entries is not None
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for at in range(1, len(prompt)):
        entry = entries[at]
        assert entry is not None
        likeliest = next_token(prompt[:at])
        assert entry.token_id == prompt[at]
        assert entry.logprob == pytest.approx(
            CHOSEN if prompt[at] == likeliest else OTHER, abs=1e-4
        )
        assert len(entry.top) == num_top
        assert not num_top or entry.top[0].token_id == likeliest


def test_a_prompt_is_scored_and_the_answer_is_the_same() -> None:
    harness = make()
    plain = harness.submit("What is the sea?")
    harness.run()
    scored = harness.submit("What is the sea?", prompt_logprobs=2, logprobs=0, n=2)
    harness.run()
    check(scored)
    assert scored.text() == scored.text(1) == plain.text()
    assert sum(len(d.logprobs) for d in scored.deltas) == 32
    again = harness.submit("What is the sea?", prompt_logprobs=2)
    harness.run()
    check(again)
    usage = scored.finish().usage  # type: ignore[union-attr]
    assert usage.cached_tokens == 0  # type: ignore[union-attr]
    served = harness.submit("What is the sea?")
    harness.run()
    assert served.finish().usage.cached_tokens > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("n", [1, 3])
def test_nothing_but_scores(chunk: int, n: int) -> None:
    harness = make(chunk=chunk)
    other = harness.submit("somebody else", max_tokens=40)
    scored = harness.submit("What is the sea?", prompt_logprobs=0, max_tokens=0, n=n)
    harness.run()
    check(scored, 0)
    assert len(scored.deltas) == n
    for index in range(n):
        last = scored.finish(index)
        assert last is not None
        assert (last.finish_reason, last.text) == (FinishReason.LENGTH, "")
        assert last.usage.completion_tokens == 0  # type: ignore[union-attr]
        assert last.usage.prompt_tokens == 16  # type: ignore[union-attr]
    assert len(other.text()) == 40
    assert not harness.engine.scheduler.running


def test_a_prompt_of_one_token_has_no_score_and_one_that_fills_the_context_has_all() -> None:
    harness = make()
    one = harness.submit("W", prompt_logprobs=1, max_tokens=0)
    full = harness.submit("x" * 400, prompt_logprobs=1, max_tokens=0)
    harness.run()
    assert one.deltas[0].prompt_logprobs == (None,)
    check(full, 1)


@pytest.mark.parametrize(("block", "tail"), [(1, "any"), (8, "any"), (8, "whole")])
def test_the_logits_of_a_step_are_bounded(
    monkeypatch: pytest.MonkeyPatch, block: int, tail: Any
) -> None:
    monkeypatch.setattr(scoring, "_MAX_LOGITS_BYTES", 4 * 261 * 20)
    rows: list[int] = []

    def watch(step: StepInput) -> None:
        rows.append(int(step.wants_logits.sum()))

    runtime = ScriptedRuntime(
        lanes=6,
        context_length=400,
        options=ScriptedOptions(exact_block=block, exact_tail=tail),
    )
    runtime.before_step = watch
    harness = make(runtime)
    requests = [harness.submit(f"{i} " + "What? " * 20, prompt_logprobs=1) for i in range(4)]
    others = [harness.submit(f"{i} other " * 9, max_tokens=30) for i in range(2)]
    harness.run()
    assert max(rows) <= 20 + 6
    for request, count in [*((r, 16) for r in requests), *((r, 30) for r in others)]:
        prompt = list(request.request.prompt_token_ids)
        assert request.text() == runtime.expected_text(prompt, count)
    if block == 1:
        for request in requests:
            check(request, 1)


def life(seed: int) -> None:
    """Scored and other requests through preemptions, failing steps, odd chunks and cached prefixes."""
    rng = random.Random(seed)
    options = ScriptedOptions(
        kv_capacity_tokens=rng.choice([None, 260, 500]),
        copy_prefix=rng.random() < 0.7,
        truncation=rng.choice(["any", "any", "reset"]),
    )
    faults = [Fault.RAISE_BEFORE, Fault.RAISE_MIDWAY, Fault.RAISE_AFTER, Fault.NO_ROOM, Fault.NAN]
    inner = ScriptedRuntime(lanes=3, context_length=200, options=options)
    bad = rng.choice([0, 0.1])
    runtime = FaultyRuntime(inner, lambda _: rng.choice(faults) if rng.random() < bad else None)
    drafter = NgramDrafter(2, 4) if rng.random() < 0.5 else None
    harness = make(runtime, chunk=rng.choice([5, 17, 100]), drafter=drafter)
    requests = []
    for _ in range(rng.randint(1, 8)):
        prompt = rng.choice(["What is ", "What is the sea? " * 3, "x"]) + "abc"[: rng.randint(0, 3)]
        wanted = rng.choice([None, 0, 2])
        requests.append(
            harness.submit(
                prompt,
                n=rng.choice([1, 1, 2]),
                max_tokens=rng.choice([0, 1, 20]),
                wants_progress=rng.random() < 0.5,
                # What is drafted rides in the steps that score.
                predicted=inner.expected_text(list(prompt.encode()), 12),
                **({} if wanted is None else {"prompt_logprobs": wanted}),
            )
        )
        for _ in range(rng.randint(0, 6)):
            harness.step()
    harness.run()
    for request in requests:
        sampling = request.request.sampling
        failed = any(d.finish_reason is FinishReason.ERROR for d in request.deltas)
        assert not failed or bad
        if failed:
            continue
        if sampling.prompt_logprobs is not None:
            check(request, sampling.prompt_logprobs)
        truth = inner.expected_text(
            list(request.request.prompt_token_ids), sampling.max_tokens or 0
        )
        assert all(request.text(i) == truth for i in range(request.request.n))


@pytest.mark.parametrize("seed", range(12))
def test_some_lives(seed: int) -> None:
    life(seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_life(seed: int) -> None:
    life(seed)


# --------------------------------------------------------------------------- progress


def test_progress_is_told_while_the_prompt_is_computed() -> None:
    harness = make(chunk=10)
    asking = harness.submit("What is the sea? It is wide.", wants_progress=True)
    plain = harness.submit("What is the sky? It is wide.")
    harness.run()
    told = [d for d in asking.deltas if d.num_prefilled]
    counts = [d.num_prefilled for d in told]
    assert counts == sorted(set(counts))
    assert 0 < counts[0] <= counts[-1] < 28
    assert asking.deltas[: len(told)] == told
    assert all(not d.text and not d.num_tokens for d in told)
    assert all(not d.num_prefilled for d in plain.deltas)
    assert asking.num_sent == asking.num_read == len(asking.deltas) - 1
    record = asking.records[0].trace
    assert record is not None
    # Its first token is what counts, not what was told before.
    assert record.time_to_first_token_s == pytest.approx(0.01 * len(told))


def test_a_prompt_that_is_done_in_one_step_tells_no_progress() -> None:
    harness = make()
    asking = harness.submit("What is the sea?", wants_progress=True)
    harness.run()
    assert all(not d.num_prefilled for d in asking.deltas)
