"""Speculative decoding changes the number of steps and nothing else."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import FinishReason, Observer, RequestRecord, StepInput, StepRecord
from stoker.config import CacheConfig, SchedulerConfig, SpeculationConfig
from stoker.engine.drafters import Drafter
from stoker.engine.ngram import NgramDrafter
from stoker.engine.sequence import Sequence
from stoker.testing import (
    EngineHarness,
    Fault,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    Submitted,
)
from stoker.testing.scripted import _mix_one
from stoker_plugins.fcfs import FirstComeFirstServed

ALWAYS = SpeculationConfig(adaptive=False, max_draft_tokens=6)


class Recorder(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.ends: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.ends.append(record)

    def total(self, field: str) -> int:
        return sum(getattr(step, field) for step in self.steps)


class Oracle(Drafter):
    """Says what a function of the sequence says."""

    def __init__(self, guess: Callable[[Sequence, int], Any], *, is_free: bool = False) -> None:
        self.guess = guess
        self.is_free = is_free
        self.forgotten: list[int] = []

    def propose(self, sequences: Rows[Sequence], limits: Mapping[int, int]) -> dict[int, Any]:
        return {s.sequence_id: self.guess(s, limits[s.sequence_id]) for s in sequences}

    def forget(self, sequence_id: int) -> None:
        self.forgotten.append(sequence_id)


def make(
    drafter: Drafter | None,
    *,
    speculation: SpeculationConfig = ALWAYS,
    lanes: int = 4,
    context: int = 600,
    scheduler: SchedulerConfig | None = None,
    cache: CacheConfig | None = None,
    runtime: Any = None,
    observers: Rows[Observer] = (),
    **options: Any,
) -> EngineHarness:
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime
        or ScriptedRuntime(lanes=lanes, context_length=context, options=ScriptedOptions(**options)),
        scheduler=scheduler,
        cache=cache,
        observers=observers,
        drafter=drafter,
        speculation=speculation,
    )


def truth(harness: EngineHarness, request: Submitted) -> str:
    runtime = getattr(harness.runtime, "inner", harness.runtime)
    assert isinstance(runtime, ScriptedRuntime)
    return runtime.expected_text(
        list(request.request.prompt_token_ids), request.request.sampling.max_tokens or 0
    )


def check_lanes(harness: EngineHarness) -> None:
    """The runtime's lanes hold exactly the tokens that the books say."""
    runtime = getattr(harness.runtime, "inner", harness.runtime)
    lanes = harness.engine.scheduler.lanes
    for lane, owner in enumerate(lanes._owner):
        kept = lanes.retention.kept.get(lane)
        held = np.empty(0, np.int32) if kept is None else kept.tokens
        held = owner.tokens[: owner.num_computed] if owner else held
        assert runtime._lengths[lane] == len(held)
        state = functools.reduce(_mix_one, held.tolist(), 0)
        assert int(runtime._states[lane, len(held)]) == state, "KV and tokens disagree"


# --------------------------------------------------------------------------- the same output


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_life_has_the_same_tokens_with_and_without(seed: int) -> None:
    live_twice(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_some_lives_have_the_same_tokens_with_and_without(seed: int) -> None:
    live_twice(seed)


def live_twice(seed: int) -> None:
    """Random prompts, sampling, preemptions, aborts, stop strings and drafters: token for token the same."""
    dice = random.Random(seed)
    lanes = dice.randint(1, 4)
    period = dice.choice([0, 3, 7, 12])
    tight = dice.random() < 0.4
    options = {
        "period": period,
        "surprise_every": dice.choice([0, 3, 9]),
        "end_every": dice.choice([0, 0, 19]),
        "kv_capacity_tokens": dice.randint(120, 200) if tight else None,
    }
    budget = dice.randint(lanes, 40)
    config = SchedulerConfig(
        max_num_batched_tokens=budget, max_prefill_tokens_while_decoding=dice.randint(1, 30)
    )
    cache = CacheConfig(prefix_reuse=dice.random() < 0.7)
    script = [_request(dice) for _ in range(dice.randint(1, 8))]
    moves = [dice.random() for _ in range(200)]
    kind = dice.choice(["ngram", "ngram", "right", "wrong", "mixed", "long"])
    adaptive = dice.random() < 0.3
    speculation = SpeculationConfig(
        adaptive=adaptive, max_draft_tokens=dice.randint(1, 20), min_ngram=1, max_ngram=3
    )
    recorder = Recorder()
    drafter = _drafter(kind, dice)
    on = make(
        drafter,
        lanes=lanes,
        context=110,
        scheduler=config,
        cache=cache,
        speculation=speculation,
        observers=[recorder],
        **options,
    )
    off = make(None, lanes=lanes, context=110, scheduler=config, cache=cache, **options)
    with_drafts = _live(on, script, moves, check=True)
    without = _live(off, script, [], check=False)
    for mine, plain in zip(with_drafts, without, strict=True):
        for index in range(mine.request.n):
            last = mine.finish(index)
            assert last is not None
            if last.finish_reason is FinishReason.ABORT:
                # It may end within a character, and in what was held back as the beginning of a stop.
                certain = mine.text(index).rstrip("\ufffd")
                certain = certain[: -2 if mine.request.sampling.stop else None]
                assert plain.text(index).startswith(certain)
                continue
            assert mine.text(index) == plain.text(index)
            reference = plain.finish(index)
            assert reference is not None
            assert (last.finish_reason, last.usage and last.usage.completion_tokens) == (
                reference.finish_reason,
                reference.usage and reference.usage.completion_tokens,
            )
            counted = sum(d.num_tokens for d in mine.deltas if d.index == index)
            assert last.usage is not None
            assert counted == last.usage.completion_tokens
    assert recorder.total("num_draft_tokens") == sum(
        t.draft_tokens for r in with_drafts for t in r.traces()
    )
    accepted = sum(t.accepted_tokens for r in with_drafts for t in r.traces())
    assert recorder.total("num_accepted_tokens") == accepted
    assert sum(sum(s.accepted_per_position) for s in recorder.steps) == accepted
    speculator = on.engine.speculator
    assert speculator is not None
    assert not any((speculator._own, speculator._guesses, speculator._banned))
    if isinstance(drafter, NgramDrafter):
        assert not drafter._indexes


def _request(dice: random.Random) -> dict[str, Any]:
    word = "".join(dice.choices("abc ", k=dice.randint(1, 6)))
    greedy = dice.random() < 0.5
    return {
        "prompt": (word * 12)[: dice.randint(1, 40)],
        "max_tokens": dice.randint(1, 60),
        "n": dice.choice([1, 1, 2]),
        "temperature": 0.0 if greedy else dice.choice([0.3, 1.0, 2.0]),
        "seed": dice.randint(0, 99),
        "top_p": dice.choice([1.0, 0.9]),
        "top_k": dice.choice([0, 5]),
        "presence_penalty": dice.choice([0.0, 0.0, 1.5]),
        "frequency_penalty": dice.choice([0.0, 0.0, 0.7]),
        "repetition_penalty": dice.choice([1.0, 1.0, 1.3]),
        "logit_bias": dice.choice([{}, {}, {97: 5.0}]),
        "stop": dice.choice([(), (), ("ab",), ("c a", "bb"), ("é",)]),
        "ignore_eos": dice.random() < 0.2,
    }


def _drafter(kind: str, dice: random.Random) -> Drafter:
    if kind == "ngram":
        return NgramDrafter(1, 3)
    runtime = ScriptedRuntime()

    def guess(sequence: Sequence, limit: int) -> Any:
        known = sequence.tokens[: sequence.num_tokens].tolist()
        if kind == "wrong":
            return np.full(limit, 255, np.int32)
        text = runtime.expected_text(known, limit)
        right = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        if kind == "mixed":
            right[dice.randint(0, limit - 1) :] = dice.choice([-1, 10**6, 97, 257])
        return np.concatenate([right, right]) if kind == "long" else right

    return Oracle(guess, is_free=dice.random() < 0.5)


def _live(
    harness: EngineHarness, script: list[dict[str, Any]], moves: list[float], *, check: bool
) -> list[Submitted]:
    requests = [harness.submit(**parameters) for parameters in script]
    for move in moves:
        if not harness.engine.has_work:
            break
        running = list(harness.engine.scheduler.running.values())
        if move < 0.08 and running:
            harness.engine.scheduler.preempt(running[int(move * 1000) % len(running)], "policy")
        elif move < 0.1:
            harness.abort(requests[int(move * 1000) % len(requests)])
        else:
            harness.step()
        if check:
            check_lanes(harness)
    harness.run()
    return requests


def test_a_repeated_text_takes_few_steps() -> None:
    recorder = Recorder()
    harness = make(NgramDrafter(2, 4), period=20, observers=[recorder])
    request = harness.submit("twenty letters long. " * 2, max_tokens=140)
    steps = harness.run()
    assert request.text() == truth(harness, request)
    assert steps < 40
    (trace,) = request.traces()
    assert trace.accepted_tokens > 100
    assert trace.completion_tokens == 140
    assert trace.num_decode_steps < 40
    # What a tenant is charged for is what it got.
    assert sum(item.decode for s in recorder.steps for item in s.scheduled) == 139
    # One delta and one gap for a step, however many tokens it brought.
    assert len(request.deltas) == trace.num_decode_steps + 1
    assert sum(len(s.token_gaps_s) for s in recorder.steps) == trace.num_decode_steps


def test_a_stop_string_in_the_middle_of_accepted_tokens() -> None:
    on = make(NgramDrafter(2, 4), period=10)
    prompt = "0123456789" * 3
    request = on.submit(prompt, max_tokens=50, stop=("45",))
    on.run()
    assert request.text() == "0123"
    last = request.finish()
    assert last is not None
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert last.usage.completion_tokens == 6
    # What is retained is what it would be without drafts, and it is found again.
    check_lanes(on)
    again = on.submit(prompt + "012345", max_tokens=3)
    on.run()
    assert again.traces()[0].cached_tokens == len(prompt) + 5


def test_retained_kv_is_the_same_with_and_without() -> None:
    kept = []
    for drafter in (NgramDrafter(2, 4), None):
        harness = make(drafter, period=5)
        harness.submit("abcde" * 4, max_tokens=23)
        harness.run()
        retained = harness.engine.scheduler.lanes.retention.kept
        kept.append({lane: held.tokens.tolist() for lane, held in retained.items()})
    assert kept[0] == kept[1]
    assert kept[0]


def test_drafts_take_only_what_is_left_of_the_token_budget() -> None:
    sizes: list[int] = []
    runtime = ScriptedRuntime(lanes=4, context_length=400, options=ScriptedOptions(period=6))
    runtime.before_step = lambda step: sizes.append(len(step.token_ids))
    harness = make(
        NgramDrafter(1, 3),
        runtime=runtime,
        scheduler=SchedulerConfig(max_num_batched_tokens=7),
    )
    requests = [harness.submit("abcdef" * 3, max_tokens=40) for _ in range(4)]
    harness.run()
    assert max(sizes) <= 7
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


def test_drafts_never_preempt_anybody() -> None:
    recorder = Recorder()
    prompt = "abcdef" * 5
    harness = make(
        NgramDrafter(1, 3),
        lanes=3,
        context=60,
        period=6,
        kv_capacity_tokens=3 * 50,
        observers=[recorder],
    )
    requests = [harness.submit(prompt, max_tokens=20) for _ in range(3)]
    harness.run()
    assert recorder.total("num_accepted_tokens") > 20
    assert recorder.total("num_preemptions") == 0
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


def test_a_runtime_without_room_for_drafts_computes_without() -> None:
    def no_room(step: StepInput) -> Fault | None:
        return Fault.NO_ROOM if np.count_nonzero(step.wants_logits) > 2 else None

    inner = ScriptedRuntime(lanes=2, context_length=400, options=ScriptedOptions(period=6))
    runtime = FaultyRuntime(inner, no_room)
    recorder = Recorder()
    harness = make(NgramDrafter(1, 3), runtime=runtime, observers=[recorder])
    request = harness.submit("abcdef" * 3, max_tokens=100)
    harness.run()
    assert request.text() == truth(harness, request)
    assert recorder.total("num_preemptions") == 0
    assert 0 < runtime.num_failed < 6, "it tries ever more rarely"


@pytest.mark.parametrize("fault", [f for f in Fault if f not in (Fault.NAN, Fault.INFINITE)])
def test_a_step_that_fails_with_drafts_is_done_again_without(fault: Fault) -> None:
    def fails(step: StepInput) -> Fault | None:
        return fault if np.count_nonzero(step.wants_logits) > len(set(step.lanes)) else None

    inner = ScriptedRuntime(lanes=3, context_length=400, options=ScriptedOptions(period=6))
    harness = make(NgramDrafter(1, 3), runtime=FaultyRuntime(inner, fails))
    requests = [harness.submit("abcdef" * 3, max_tokens=60) for _ in range(3)]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert {r.finish_reason for r in requests} == {FinishReason.LENGTH}


def test_rows_that_are_not_finite_end_the_sequence_after_its_good_tokens() -> None:
    harness = make(Oracle(lambda s, k: np.zeros(k, np.int32)))
    runtime = harness.runtime
    assert isinstance(runtime, ScriptedRuntime)
    prompt = list(b"hello")
    text = runtime.expected_text(prompt, 10).encode()
    speculator = harness.engine.speculator
    assert speculator is not None
    speculator._drafter = Oracle(
        lambda s, k: np.frombuffer(text, np.uint8)[s.num_output :][:k].astype(np.int32)
    )
    step = runtime.step

    def spoilt(step_input: StepInput) -> Any:
        output = step(step_input)
        if len(output.logits) > 1:
            output.logits[2] = np.nan
        return output

    runtime.step = spoilt  # type: ignore[method-assign]
    request = harness.submit(prompt, max_tokens=10)
    harness.run()
    assert request.finish_reason is FinishReason.ERROR
    assert request.text() == text[:3].decode()
    check_lanes(harness)


@pytest.mark.parametrize("num_stuck", [1, 3])
def test_a_lane_that_cannot_be_cut_costs_time_and_no_request(num_stuck: int) -> None:
    left = [num_stuck]

    def truncates(lane: int) -> bool:
        if not inner._lengths[lane]:
            return True
        left[0] -= 1
        return left[0] < 0

    inner = ScriptedRuntime(lanes=2, context_length=400)
    runtime = FaultyRuntime(inner, truncates=truncates)
    harness = make(Oracle(lambda s, k: np.full(k, 1, np.int32)), runtime=runtime)
    requests = [harness.submit(f"hello {i}", max_tokens=30) for i in range(2)]
    while harness.engine.has_work:
        harness.step()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert sum(t.num_preemptions for r in requests for t in r.traces()) >= 1


# --------------------------------------------------------------------------- drafters that are no good


def raising(sequence: Sequence, limit: int) -> Any:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    "guess",
    [
        raising,
        lambda s, k: "nonsense",
        lambda s, k: [1, 2],
        lambda s, k: np.zeros((2, 2), np.int32),
        lambda s, k: np.array(["a"]),
    ],
)
def test_a_drafter_that_fails_is_switched_off_and_counted(
    guess: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    harness = make(Oracle(guess), observers=[recorder])
    requests = [harness.submit(f"hello {i}", max_tokens=20) for i in range(3)]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert recorder.steps[-1].num_drafter_errors == 1
    assert caplog.text.count("speculative decoding is off") == 1


def test_a_drafter_that_fails_in_forgetting_is_switched_off() -> None:
    drafter = Oracle(lambda s, k: np.full(k, 1, np.int32))

    def forget(sequence_id: int) -> None:
        raise KeyError(sequence_id)

    drafter.forget = forget  # type: ignore[method-assign]
    harness = make(drafter)
    requests = [harness.submit(f"hello {i}", max_tokens=5 + i) for i in range(3)]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


@pytest.mark.parametrize("token", [-1, -(2**31), 261, 2**31 - 1, 257])
def test_ids_that_are_no_tokens_and_end_tokens_are_never_computed(token: int) -> None:
    seen: set[int] = set()
    runtime = ScriptedRuntime(lanes=2, context_length=300)
    runtime.before_step = lambda step: seen.update(step.token_ids.tolist())
    harness = make(Oracle(lambda s, k: np.full(k, token, np.int32)), runtime=runtime)
    request = harness.submit("hello", max_tokens=20)
    harness.run()
    assert request.text() == truth(harness, request)
    assert token not in seen


def test_a_runtime_that_cannot_truncate_gets_no_drafts() -> None:
    harness = make(NgramDrafter(1, 3), truncation="reset", period=5)
    assert harness.engine.speculator is None
    request = harness.submit("abcde" * 3, max_tokens=20)
    harness.run()
    assert request.text() == truth(harness, request)


def test_drafters_are_told_of_every_end() -> None:
    drafter = Oracle(lambda s, k: np.full(k, 1, np.int32))
    harness = make(drafter)
    requests = [harness.submit(f"hello {i}", n=2, max_tokens=5) for i in range(3)]
    harness.step()
    harness.abort(requests[0])
    harness.run()
    ids = [s.sequence_id for r in requests for s in r.sequences]
    assert sorted(drafter.forgotten) == sorted(ids)
