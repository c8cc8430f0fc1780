"""The priority policy in a real engine, on the scripted runtime and a clock that the test moves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker_policy_priority import Options, Priority, stoker_register_policies


def make(lanes: int = 1, **options) -> EngineHarness:  # type: ignore[no-untyped-def]
    runtime = ScriptedRuntime(lanes=lanes, context_length=200)
    return EngineHarness(Priority(Options(**options)), runtime=runtime)


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


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


def test_it_registers_itself() -> None:
    (info,) = stoker_register_policies()
    assert (info.name, info.options) == ("priority", Options)
    assert isinstance(info.factory(Options()), Priority)
