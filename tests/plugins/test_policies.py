"""The rules of ``fcfs`` and ``token-budget``, one by one, and how the bundled policies are registered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from stoker import PolicyContext, SchedulingPolicy, SequenceView, StepCost, StepInput
from stoker.config import Config
from stoker.discovery import Plugins
from stoker.errors import ConfigError
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins import stoker_register_middleware, stoker_register_policies
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.policies.options import FcfsOptions, TokenBudgetOptions
from stoker_plugins.policies.token_budget import TokenBudget
from stoker_plugins.policies.views import output_left, seconds_left

NOW = 100.0
ids = itertools.count(1)


def view(*, arrival_s: float = NOW, prompt: int = 10, output: int = 0, **more: Any) -> SequenceView:
    sequence_id = next(ids)
    fields = {
        "sequence_id": sequence_id,
        "request_id": f"request-{sequence_id}",
        "tenant": "a",
        "priority": 0,
        "arrival_s": arrival_s,
        "num_prompt_tokens": prompt,
        "num_computed_tokens": 0,
        "num_output_tokens": output,
        "max_tokens": 10,
        "num_preemptions": 0,
        "deadline_s": None,
        "waiting_since_s": arrival_s,
    }
    return SequenceView(**(fields | more))


def context(**more: Any) -> PolicyContext:
    fields = {
        "now_s": NOW,
        "model": "model",
        "num_lanes": 4,
        "num_free_lanes": 1,
        "token_budget": 512,
        "kv_tokens_capacity": 1000,
    }
    return PolicyContext(**(fields | more))


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


# --------------------------------------------------------------------------- registration


def test_the_bundled_policies_take_options_that_are_checked() -> None:
    infos = {info.name: info for info in stoker_register_policies()}
    assert set(infos) == {"fcfs", "token-budget", "fair", "deadline"}
    for info in infos.values():
        assert info.options is not None
        policy = info.factory(info.options())
        assert isinstance(policy, SchedulingPolicy)
        assert policy.options == info.options()
        # Without options, too: that is how a test or a benchmark makes one.
        assert type(policy)().options == info.options()
    assert "deadline-admission" in {info.name for info in stoker_register_middleware()}


@pytest.mark.parametrize(
    ("policy", "key", "value"),
    [
        ("fcfs", "max_passed", -1),
        ("token-budget", "ageing_tokens_per_s", 0),
        ("fair", "decode_price", -2.0),
        ("deadline", "slack", 0),
    ],
)
def test_options_out_of_range_are_refused_by_name(policy: str, key: str, value: float) -> None:
    plugins = Plugins.of(*stoker_register_policies())
    plugins.check(Config(plugins={policy: {key: 3}}))
    with pytest.raises(ConfigError, match=rf"^plugins\.{policy}\.{key}"):
        plugins.check(Config(plugins={policy: {key: value}}))


# --------------------------------------------------------------------------- what views tell


def test_who_writes_more_than_was_expected_is_expected_to_write_as_much_again() -> None:
    assert output_left(view(max_tokens=100)) == 100
    assert output_left(view(max_tokens=100, expected_output_tokens=30)) == 30
    assert output_left(view(max_tokens=100, expected_output_tokens=30, output=20)) == 10
    assert output_left(view(max_tokens=100, expected_output_tokens=30, output=40)) == 40
    assert output_left(view(max_tokens=100, expected_output_tokens=30, output=90)) == 10
    assert output_left(view(max_tokens=100, output=100)) == 1


def test_seconds_left_are_those_of_the_prompt_and_of_the_answer_in_company() -> None:
    cost = StepCost(base_s=1.0, prefill_s=0.5, decode_s=0.25)
    running = [view(), view()]
    assert seconds_left(view(prompt=10, max_tokens=4), context(cost=cost, running=running)) == (
        10 * 0.5 + 4 * (1.0 + 2 * 0.25)
    )
    decoding = view(prompt=10, output=1, num_computed_tokens=10, max_tokens=4)
    assert seconds_left(decoding, context(cost=cost, running=[decoding])) == 3 * 1.25


# --------------------------------------------------------------------------- fcfs


def test_fcfs_orders_by_arrival_and_gives_up_the_latest_first() -> None:
    views = [view(arrival_s=3.0), view(arrival_s=1.0), view(arrival_s=2.0), view(arrival_s=1.0)]
    policy = FirstComeFirstServed()
    expected = [views[1], views[3], views[2], views[0]]
    assert list(policy.admission_order(views, context())) == expected
    assert list(policy.preemption_order(views, context())) == expected[::-1]


@pytest.mark.parametrize(
    ("num_passed", "waited_s", "may_pass"),
    [(0, 0.0, True), (3, 9.9, True), (4, 0.0, False), (0, 10.0, False)],
)
def test_fcfs_lets_so_many_pass_and_for_so_long(
    num_passed: int, waited_s: float, may_pass: bool
) -> None:
    policy = FirstComeFirstServed(FcfsOptions(max_passed=4, max_wait_s=10.0))
    # What counts is the time since it entered the queue, not since it arrived.
    blocked = view(arrival_s=0.0, waiting_since_s=NOW - waited_s, num_passed=num_passed)
    assert policy.may_pass(blocked, context()) is may_pass


def test_fcfs_says_whether_others_were_passed() -> None:
    policy = FirstComeFirstServed()
    oldest, older, admitted, newer = (view(arrival_s=float(i)) for i in range(4))
    around = context(waiting=(oldest, older, admitted, newer), running=(oldest,))
    assert policy.explain(admitted, around) == "arrival order, past 1 that did not fit"
    assert policy.explain(older, around) == "arrival order"


def test_fcfs_in_the_engine_passes_what_does_not_fit_and_then_waits_for_it() -> None:
    """KV for 50 tokens; one request of 40 prompt tokens, and small ones that fit beside each other."""
    runtime = ScriptedRuntime(
        lanes=2, context_length=50, options=ScriptedOptions(kv_capacity_tokens=50)
    )
    harness = EngineHarness(FirstComeFirstServed(FcfsOptions(max_passed=3)), runtime=runtime)
    first = harness.submit("x" * 10, max_tokens=8)
    harness.step()
    large = harness.submit("y" * 40, max_tokens=8)
    small = [harness.submit(f"{i}" * 10, max_tokens=5) for i in range(6)]
    harness.run()
    admitted = {name: r.records[0].queue_s for name, r in zip("012345", small, strict=True)}
    own = large.records[0].queue_s
    assert [name for name, queue_s in admitted.items() if queue_s < own] == ["0", "1", "2"]
    trace = large.traces()[0]
    assert (trace.passed_by, trace.admitted_by) == (3, "fcfs: arrival order")
    told = [r.traces()[0].admitted_by for r in small]
    assert told[0] == "fcfs: arrival order, past 1 that did not fit"
    assert told[3] == "fcfs: arrival order"
    for request in (first, large, *small):
        assert request.text() == truth(harness, request)


# --------------------------------------------------------------------------- token-budget


def budget(**more: Any) -> TokenBudget:
    return TokenBudget(TokenBudgetOptions(**more))


def test_token_budget_puts_the_least_work_first() -> None:
    long_prompt = view(prompt=100, max_tokens=1)
    long_answer = view(prompt=10, max_tokens=60)
    expected_short = view(prompt=10, max_tokens=60, expected_output_tokens=20)
    half_done = view(prompt=10, output=40, max_tokens=60)  # 50 to compute again, 20 to write
    views = [long_prompt, long_answer, expected_short, half_done]
    order = [expected_short, long_answer, half_done, long_prompt]
    assert list(budget().admission_order(views, context())) == order
    by_prompt = [long_answer, expected_short, half_done, long_prompt]
    assert list(budget(output_weight=0.0).admission_order(views, context())) == by_prompt


def test_token_budget_ages_what_waits() -> None:
    policy = budget(ageing_tokens_per_s=10.0)
    old = view(arrival_s=NOW - 9.0, prompt=100)
    new = view(prompt=9)
    assert list(policy.admission_order([old, new], context())) == [new, old]
    old = view(arrival_s=NOW - 9.2, prompt=100)
    assert list(policy.admission_order([new, old], context())) == [old, new]
    assert list(policy.preemption_order([old, new], context())) == [new, old]


def test_token_budget_holds_back_what_would_exceed_it() -> None:
    policy = budget(budget_tokens=100)
    running = view(prompt=40, output=5, num_computed_tokens=44, max_tokens=10)  # 50 in the end
    around = context(running=(running,))
    assert policy.admits(view(prompt=40, max_tokens=10), around)
    assert not policy.admits(view(prompt=41, max_tokens=10), around)
    # By default the budget is what KV memory holds.
    assert budget().admits(view(prompt=940, max_tokens=10), around)
    assert not budget().admits(view(prompt=941, max_tokens=10), around)


def test_token_budget_lets_nobody_pass_one_whose_waiting_made_up_for_its_work() -> None:
    policy = budget(budget_tokens=100, ageing_tokens_per_s=10.0)
    around = context(running=(view(prompt=40, max_tokens=10),))
    small = view(prompt=20, max_tokens=10)
    young = view(prompt=90, max_tokens=10, arrival_s=NOW - 9.9)
    policy.admission_order([young, small], around)
    assert [policy.admits(young, around), policy.admits(small, around)] == [False, True]
    old = view(prompt=90, max_tokens=10, arrival_s=NOW - 10.0)
    assert list(policy.admission_order([small, old], around)) == [old, small]
    assert [policy.admits(old, around), policy.admits(small, around)] == [False, False]
    # The next step starts afresh.
    policy.admission_order([small], around)
    assert policy.admits(small, around)


def test_token_budget_says_what_decided() -> None:
    policy = budget(ageing_tokens_per_s=10.0)
    quick = view(arrival_s=NOW - 0.5, prompt=30, max_tokens=10)
    assert policy.explain(quick, context()) == "least work, about 40 tokens, after 0.5 s of waiting"
    aged = view(arrival_s=NOW - 4.0, prompt=30, max_tokens=10)
    assert policy.explain(aged, context()) == (
        "4.0 s of waiting made up for its work of about 40 tokens"
    )


def test_token_budget_in_the_engine_keeps_the_running_work_within_the_budget() -> None:
    runtime = ScriptedRuntime(lanes=4, context_length=100)
    harness = EngineHarness(budget(budget_tokens=60), runtime=runtime)
    seen: list[int] = []

    def look(step: StepInput) -> None:
        running = harness.engine.scheduler.running.values()
        seen.append(sum(s.num_prompt + s.max_tokens for s in running))

    runtime.before_step = look
    requests = [harness.submit(f"{i}" * 10, max_tokens=10) for i in range(9)]
    harness.run()
    assert max(seen) == 60  # three of 20 tokens each, though there are four lanes
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    # One that is larger than the budget runs, alone.
    seen.clear()
    large = harness.submit("z" * 70, max_tokens=10)
    others = [harness.submit(f"{i}" * 10, max_tokens=10) for i in range(3)]
    harness.run()
    assert set(seen) <= {20, 40, 60, 80}
    assert 80 in seen
    assert [r.text() for r in (large, *others)] == [truth(harness, r) for r in (large, *others)]
