"""Forecasts against what the real engine then did, on a clock that only the steps move."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.config import SchedulerConfig
from stoker.forecast import Forecast
from stoker.interfaces import EngineSnapshot, StepCost
from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import Request, SamplingParams, SequenceView, StepInput
from stoker_plugins.fcfs import FirstComeFirstServed

BASE_S, PREFILL_S, DECODE_S = 0.006, 0.0008, 0.002

Size = tuple[int, int]


@dataclass
class Load:
    """What is asked for: ``sizes(random)`` gives the next prompt and output length."""

    sizes: Callable[[random.Random], Size]
    num_requests: int = 60
    lanes: int = 4
    end_every: int = 0
    kv_capacity_tokens: int | None = None
    n: int = 1
    spread: int = 0
    """Steps between arrivals; 0 sends all at once."""


LOADS = {
    "all the same, at once: lanes end together": Load(lambda r: (40, 50), 40, lanes=8),
    "all the same, spread": Load(lambda r: (40, 50), spread=6),
    "mixed": Load(lambda r: (r.randint(1, 400), r.randint(1, 120)), spread=8),
    "mixed, at once": Load(lambda r: (r.randint(1, 400), r.randint(1, 120)), lanes=8),
    "long prompts, short answers": Load(lambda r: (800, 4), 30),
    "long prompts, short answers, spread": Load(lambda r: (800, 4), 40, spread=3),
    "long and short prompts": Load(lambda r: r.choice([(1200, 30), (10, 30)]), 40, spread=5),
    "short prompts, long answers": Load(lambda r: (8, 300), 30, lanes=6),
    "tiny": Load(lambda r: (2, 1), 80),
    "one lane": Load(lambda r: (r.randint(1, 200), r.randint(1, 50)), 20, lanes=1),
    "several answers each": Load(lambda r: (30, r.randint(10, 60)), 20, n=3),
    "a queue of 200": Load(lambda r: (20, r.randint(2, 20)), 200),
    "answers that end early": Load(lambda r: (20, 200), 80, end_every=25),
    "memory for half of the lanes": Load(
        lambda r: (100, 40), 40, lanes=8, kv_capacity_tokens=600, spread=3
    ),
}


@dataclass
class Prophecy:
    """What was forecast for a sequence that waits, and what came of it."""

    position: int
    seconds: float
    truth: float


class Played:
    """A load that is served by the real engine, on a clock by which steps take what their shape says."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        self.chance = random.Random(seed)
        self.longest_step_s = 0.0
        self.submitted: dict[int, Submitted] = {}
        self.said: list[tuple[float, int, float, Submitted, int]] = []
        runtime = ScriptedRuntime(
            lanes=load.lanes,
            options=ScriptedOptions(
                end_every=load.end_every, kv_capacity_tokens=load.kv_capacity_tokens
            ),
        )
        runtime.before_step = self.take_time
        self.harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=runtime,
            scheduler=SchedulerConfig(max_prefill_tokens_while_decoding=128),
            step_s=0.0,
        )

    def take_time(self, step: StepInput) -> None:
        rows = Counter(step.lanes.tolist())
        decodes = sum(1 for count in rows.values() if count == 1)
        prefill = len(step.token_ids) - decodes
        took_s = BASE_S + PREFILL_S * prefill + DECODE_S * decodes
        self.longest_step_s = max(self.longest_step_s, took_s)
        self.harness.fake_clock.advance(took_s)

    def submit(self) -> None:
        prompt, output = self.load.sizes(self.chance)
        tokens = [self.chance.randrange(256) for _ in range(prompt)]  # nothing to reuse
        one = self.harness.submit(tokens, max_tokens=output, n=self.load.n)
        self.submitted[id(one.request)] = one

    def play(self) -> list[Prophecy]:
        """Ask for forecasts at random moments, once some answers were seen to end."""
        load = self.load
        steps = 0
        if not load.spread:
            for _ in range(load.num_requests):
                self.submit()
        while self.harness.engine.has_work or len(self.submitted) < load.num_requests:
            if len(self.submitted) < load.num_requests and steps % load.spread == 0:
                self.submit()
            self.harness.step()
            steps += 1
            ended = sum(bool(one.records) for one in self.submitted.values())
            if ended >= (5 if load.end_every else 1) * load.lanes and self.chance.random() < 0.1:
                self.ask()
        return [
            Prophecy(position, seconds, admitted_s(one, index) - at_s)
            for at_s, position, seconds, one, index in self.said
        ]

    def ask(self) -> None:
        snapshot = self.harness.engine.snapshot()
        forecast = Forecast(snapshot)
        running = Counter(view.request_id for view in snapshot.running)
        position = 0
        for request in snapshot.waiting:
            for index in range(running[request.request_id], request.n):
                seconds = forecast.time_to_admit(position)
                one = self.submitted[id(request)]
                self.said.append((snapshot.now_s, position, seconds, one, index))
                position += 1


def admitted_s(one: Submitted, index: int) -> float:
    return one.request.arrival_s + sorted(record.queue_s for record in one.records)[index]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_forecasts_are_between_half_and_twice_the_truth(name: str) -> None:
    load = LOADS[name]
    num_said = num_wrong = 0
    for seed in range(2):
        played = Played(load, seed)
        slack_s = 0.0
        for said in played.play():
            slack_s = played.longest_step_s
            num_said += 1
            num_wrong += not said.truth / 2 - slack_s <= said.seconds <= said.truth * 2 + slack_s
    assert num_said > 40
    # When a single answer ends by chance, or loses its lane because memory ran out, nobody can know; nor
    # does a snapshot say how many answers of a request have ended already.
    is_chance = load.end_every or load.kv_capacity_tokens
    bound = 0.1 if is_chance else 0.01 if load.n > 1 else 0.0
    assert num_wrong <= bound * num_said


NEWCOMERS = {
    "behind a queue": (LOADS["mixed"], (300, 60)),
    "behind a queue of the same": (LOADS["all the same, spread"], (40, 50)),
    "on a free lane beside long answers": (Load(lambda r: (10, 400), 3), (500, 20)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_end_of_a_newcomer_is_foreseen_too(name: str) -> None:
    load, (prompt, output) = NEWCOMERS[name]
    played = Played(load, 1)
    for _ in range(load.num_requests):
        played.submit()
    for _ in range(150):
        played.harness.step()
    now = msgspec.structs.replace(
        played.harness.engine.snapshot(),
        cost=StepCost(base_s=BASE_S, prefill_s=PREFILL_S, decode_s=DECODE_S),
    )
    seconds = Forecast(now).time_to_finish(prompt, output)
    newcomer = played.harness.submit([7] * prompt, max_tokens=output)
    for _ in range(20 if now.waiting else 0):  # a queue that does not become shorter
        played.submit()
    played.harness.run()
    (record,) = newcomer.records
    assert seconds == pytest.approx(record.total_s, rel=0.2)


# --------------------------------------------------------------------------- any snapshot

counts = st.integers(0, 5000)
seconds = st.floats(0, 10) | st.sampled_from([-1.0, math.inf, math.nan, 1e-12])
sampling = st.builds(SamplingParams, max_tokens=st.none() | st.integers(1, 10**6))
requests = st.builds(
    Request,
    request_id=st.sampled_from("abc"),
    model=st.just("m"),
    prompt_token_ids=st.integers(1, 300).map(lambda n: [1] * n),
    sampling=sampling,
    n=st.integers(1, 4),
)
views = st.builds(
    SequenceView,
    sequence_id=counts,
    request_id=st.sampled_from("abcde"),
    tenant=st.just("t"),
    priority=st.just(0),
    arrival_s=st.just(0.0),
    num_prompt_tokens=counts,
    num_computed_tokens=counts,
    num_output_tokens=counts,
    max_tokens=st.integers(1, 10**6),
    num_preemptions=st.just(0),
    deadline_s=st.none(),
    expected_output_tokens=counts,
)
snapshots = st.builds(
    EngineSnapshot,
    now_s=st.just(0.0),
    num_lanes=st.integers(1, 40),
    waiting=st.lists(requests, max_size=30),
    running=st.lists(views, max_size=40),
    cost=st.builds(StepCost, base_s=seconds, prefill_s=seconds, decode_s=seconds),
    output_ratio=seconds,
    mean_output_tokens=seconds,
    max_prefill_tokens=st.integers(0, 512),
    prompt_ratio=seconds,
    kv_tokens_capacity=counts,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(snapshots, st.integers(1, 4000), st.none() | st.integers(1, 10**6))
def test_every_answer_is_a_number_that_grows_with_the_position(
    snapshot: EngineSnapshot, prompt: int, max_tokens: int | None
) -> None:
    forecast = Forecast(snapshot)
    times = [forecast.time_to_admit(position) for position in (0, 1, 2, 5, 40, 63, 64, 65, 1000)]
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert times == sorted(times)
    end_s = forecast.time_to_finish(prompt, max_tokens)
    assert math.isfinite(end_s)
    assert end_s >= forecast.time_to_admit()
    assert Forecast(snapshot).time_to_admit(64) == times[6], (
        "the order of questions does not matter"
    )


def snapshot(cost: StepCost, *waiting: Request, lanes: int = 2) -> EngineSnapshot:
    return EngineSnapshot(
        now_s=0.0,
        num_lanes=lanes,
        waiting=waiting,
        running=(),
        cost=cost,
        output_ratio=1.0,
        mean_output_tokens=256.0,
        max_prefill_tokens=128,
    )


def test_without_a_step_nothing_is_known() -> None:
    forecast = Forecast(snapshot(StepCost()))
    assert not forecast.is_known
    assert forecast.time_to_admit() == forecast.time_to_finish(10, 10) == 0.0


def test_an_idle_model_admits_at_once_and_works_as_long_as_its_steps_take() -> None:
    forecast = Forecast(snapshot(StepCost(base_s=1.0, prefill_s=0.01, decode_s=0.5)))
    assert forecast.is_known
    assert forecast.time_to_admit() == 0.0
    # Two steps for the prompt, of which the second brings the first of ten tokens.
    assert forecast.time_to_finish(200, 10) == pytest.approx(2 + 2.0 + 9 * 1.5)
    assert forecast.time_to_finish(200, None) == pytest.approx(2 + 2.0 + 255 * 1.5)


def test_the_queue_may_be_given_in_another_order() -> None:
    long, short = (
        Request(
            request_id=str(tokens),
            model="m",
            prompt_token_ids=[1],
            sampling=SamplingParams(max_tokens=tokens),
        )
        for tokens in (100, 10)
    )
    now = snapshot(StepCost(base_s=1.0), long, short, lanes=1)
    assert Forecast(now).time_to_admit(1) == pytest.approx(100)
    assert Forecast(now, ahead=[short]).time_to_admit() == pytest.approx(10)
    assert Forecast(now, ahead=[]).time_to_admit() == 0.0


def test_what_need_not_be_computed_takes_no_time() -> None:
    cost = StepCost(base_s=1e-9, prefill_s=1.0)
    whole = Forecast(snapshot(cost)).time_to_finish(100, 1)
    tenth = Forecast(msgspec.structs.replace(snapshot(cost), prompt_ratio=0.1)).time_to_finish(
        100, 1
    )
    assert tenth == pytest.approx(whole / 10)


def test_what_has_run_of_a_step_is_not_waited_for_again() -> None:
    """A snapshot in the middle of a step shows what was before it."""
    runtime = ScriptedRuntime(lanes=1, context_length=2000)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, step_s=0.0)
    told: list[tuple[float, float]] = []

    def compute(step: object) -> None:
        harness.fake_clock.advance(0.3)
        forecast = Forecast(harness.engine.snapshot())
        told.append((harness.clock(), forecast.time_to_admit(0)))
        harness.fake_clock.advance(0.7)

    runtime.before_step = compute
    harness.submit("runs", max_tokens=20)
    harness.step()
    waits = harness.submit("waits", max_tokens=2)
    harness.run()
    admitted_s = waits.request.arrival_s + waits.traces()[0].queue_s
    for now_s, wait_s in told[5:20]:
        assert wait_s == pytest.approx(admitted_s - now_s, abs=0.05)
