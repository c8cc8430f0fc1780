"""The priority policy in a real engine, on the scripted runtime and a clock that the test moves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import PolicyContext, SequenceView
from stoker.config import Config, SchedulerConfig
from stoker.discovery import Plugins
from stoker.errors import ConfigError
from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker_policy_priority import Options, Priority, stoker_register_policies


def make(lanes: int = 1, **options) -> EngineHarness:  # type: ignore[no-untyped-def]
    runtime = ScriptedRuntime(lanes=lanes, context_length=200)
    return EngineHarness(Priority(Options(**options)), runtime=runtime)


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


ids = itertools.count(1)
# Quarters of a second are exact in binary, so that no order depends on rounding.
times = st.integers(0, 400).map(lambda quarters: quarters / 4)
priorities = st.integers(-5, 5)


def view(priority: int, arrival_s: float) -> SequenceView:
    sequence_id = next(ids)
    return SequenceView(
        sequence_id=sequence_id,
        request_id=f"request-{sequence_id}",
        tenant="a",
        priority=priority,
        arrival_s=arrival_s,
        num_prompt_tokens=10,
        num_computed_tokens=0,
        num_output_tokens=0,
        max_tokens=10,
        num_preemptions=0,
        deadline_s=None,
    )


def context(now_s: float) -> PolicyContext:
    return PolicyContext(
        now_s=now_s, model="model", num_lanes=1, num_free_lanes=0, token_budget=512
    )


def order_of_ends(requests: dict[str, Submitted], harness: EngineHarness) -> list[str]:
    ended: list[str] = []
    while harness.engine.has_work:
        harness.step()
        ended += [n for n, r in requests.items() if r.finish() is not None and n not in ended]
    return ended


def test_more_urgent_requests_are_admitted_first() -> None:
    harness = make(preempt=False)
    requests = {
        "normal": harness.submit("a", max_tokens=4),
        "low": harness.submit("b", priority=5, max_tokens=4),
        "high": harness.submit("c", priority=-5, max_tokens=4),
        "middle": harness.submit("d", priority=0, max_tokens=4),
    }
    harness.step()
    assert order_of_ends(requests, harness) == ["high", "normal", "middle", "low"]


def test_an_urgent_request_takes_the_lane_of_a_less_urgent_one_which_loses_nothing() -> None:
    harness = make()
    low = harness.submit("a long and unimportant one", priority=5, max_tokens=30)
    for _ in range(5):
        harness.step()
    high = harness.submit("urgent", priority=0, max_tokens=5)
    harness.step()
    assert high.text() != ""
    assert low.finish() is None
    harness.run()
    assert low.records[0].num_preemptions == 1
    assert (low.text(), high.text()) == (truth(harness, low), truth(harness, high))


def test_equals_and_slightly_more_urgent_ones_do_not_preempt() -> None:
    harness = make(preempt_margin=3)
    running = harness.submit("runs", priority=2, max_tokens=20)
    harness.step()
    harness.submit("equal", priority=2, max_tokens=2)
    harness.submit("a little more urgent", priority=0, max_tokens=2)
    harness.run()
    assert running.records[0].num_preemptions == 0


def test_waiting_makes_urgent_so_that_nothing_starves() -> None:
    """Under a steady stream of urgent requests, an old one still gets through."""
    harness = make(ageing_s=0.1)
    low = harness.submit("patient", priority=10, max_tokens=3)
    for _ in range(400):
        if harness.engine.load().num_waiting < 3:
            harness.submit("urgent", priority=0, max_tokens=3)
        harness.step()
        if low.finish() is not None:
            break
    assert low.finish() is not None
    assert low.text() == truth(harness, low)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    lanes=st.integers(1, 3),
    jobs=st.lists(
        st.tuples(st.integers(-5, 5), st.integers(1, 20), st.integers(0, 4)),
        min_size=1,
        max_size=15,
    ),
)
def test_every_request_gets_its_text_whatever_is_preempted(
    lanes: int, jobs: list[tuple[int, int, int]]
) -> None:
    harness = make(lanes=lanes)
    requests = []
    for number, (priority, length, steps) in enumerate(jobs):
        prompt = f"job {number} " * 2
        requests.append(harness.submit(prompt, priority=priority, max_tokens=length))
        for _ in range(steps):
            harness.step()
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert harness.engine.scheduler.policy.num_errors == 0


# --------------------------------------------------------------------------- what the README promises


@pytest.mark.slow
@given(
    jobs=st.lists(st.tuples(priorities, times), min_size=2, max_size=8),
    now_s=times,
    later_s=times,
    ageing_s=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_two_requests_never_change_their_order(
    jobs: list[tuple[int, float]], now_s: float, later_s: float, ageing_s: float
) -> None:
    policy = Priority(Options(ageing_s=ageing_s))
    views = [view(priority, arrival_s) for priority, arrival_s in jobs]
    now, later = context(100 + now_s), context(100 + now_s + later_s)
    order = policy.admission_order(views, now)
    assert order == policy.admission_order(views[::-1], later)
    assert order == policy.preemption_order(views, later)[::-1]
    # It is the order of the times at which each would be as urgent as anything can get.
    assert order == sorted(
        views, key=lambda v: (v.priority * ageing_s + v.arrival_s, v.arrival_s, v.sequence_id)
    )


@pytest.mark.slow
@given(
    candidate=st.tuples(priorities, times),
    running=st.lists(st.tuples(priorities, times), max_size=8),
    margin=st.integers(1, 3),
    ageing_s=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_a_lane_goes_only_to_who_is_more_urgent_by_the_margin(
    candidate: tuple[int, float], running: list[tuple[int, float]], margin: int, ageing_s: float
) -> None:
    policy = Priority(Options(ageing_s=ageing_s, preempt_margin=margin))
    newcomer = view(*candidate)
    views = [view(*job) for job in running]
    victims = policy.victims(newcomer, views, context(200.0))

    def urgency(v: SequenceView) -> float:
        return v.priority - (200.0 - v.arrival_s) / ageing_s

    assert set(victims) == {v for v in views if urgency(v) >= urgency(newcomer) + margin}
    assert [urgency(v) for v in victims] == sorted(map(urgency, victims), reverse=True)
    # Who lost its lane could not take it back.
    for victim in victims:
        assert newcomer not in policy.victims(victim, [newcomer], context(200.0))


class Watched(Priority):
    """Notes at every preemption by how much the candidate was more urgent."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.leads: list[float] = []

    def victims(
        self, candidate: SequenceView, running: Any, context: PolicyContext
    ) -> list[SequenceView]:
        chosen = list(super().victims(candidate, running, context))
        now_s = context.now_s
        self.leads += [self._rank(v, now_s)[0] - self._rank(candidate, now_s)[0] for v in chosen]
        return chosen


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    lanes=st.integers(1, 3),
    jobs=st.lists(
        st.tuples(priorities, st.integers(1, 20), st.integers(0, 4)), min_size=1, max_size=20
    ),
    ageing_s=st.sampled_from([0.05, 1.0]),
)
def test_for_random_loads_nothing_starves_and_nobody_preempts_in_a_circle(
    lanes: int, jobs: list[tuple[int, int, int]], ageing_s: float
) -> None:
    policy = Watched(Options(ageing_s=ageing_s))
    runtime = ScriptedRuntime(lanes=lanes, context_length=200)
    harness = EngineHarness(policy, runtime=runtime)
    requests = []
    for number, (priority, length, steps) in enumerate(jobs):
        requests.append(harness.submit(f"job {number} " * 2, priority=priority, max_tokens=length))
        for _ in range(steps):
            harness.step()
    harness.run(max_steps=sum(4 * length + 10 for _, length, _ in jobs))
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert all(lead >= 1 for lead in policy.leads)
    # Each arrival moves each lane on at most once.
    assert harness.engine.scheduler.num_preemptions <= lanes * len(jobs)
    # Nothing that came more than (P - Q) * ageing_s later was admitted before.
    for first, then in itertools.permutations(requests, 2):
        head_start_s = (first.request.priority - then.request.priority) * ageing_s
        if then.request.arrival_s > first.request.arrival_s + max(0.0, head_start_s) + 1e-6:
            admitted_s = first.request.arrival_s + first.records[0].queue_s
            assert admitted_s <= then.request.arrival_s + then.records[0].queue_s


def test_it_says_why() -> None:
    policy = Priority(Options(ageing_s=10.0))
    assert policy.explain(view(3, 80.0), context(100.0)) == (
        "priority 3, raised by 2.0 levels of waiting"
    )


@pytest.mark.parametrize(("key", "value"), [("ageing_s", 0), ("preempt_margin", 0)])
def test_options_that_would_break_the_promises_are_refused(key: str, value: int) -> None:
    plugins = Plugins.of(*stoker_register_policies())
    with pytest.raises(ConfigError, match=rf"^plugins\.priority\.{key}"):
        plugins.check(
            Config(scheduler=SchedulerConfig(policy="priority"), plugins={"priority": {key: value}})
        )


def test_it_registers_itself() -> None:
    (info,) = stoker_register_policies()
    assert (info.name, info.options) == ("priority", Options)
    assert isinstance(info.factory(Options()), Priority)
