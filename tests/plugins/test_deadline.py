"""The rules of ``deadline`` and of its admission control, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stoker import (
    EngineSnapshot,
    FinishReason,
    InvalidRequestError,
    LoadSnapshot,
    Observer,
    PolicyContext,
    RateLimitError,
    Request,
    SamplingParams,
    SchedulingPolicy,
    SequenceView,
    ServedModel,
    ServerContext,
    StepCost,
    StepInput,
    TenantConfig,
    TenantLoad,
)
from stoker.config import Config, SchedulerConfig
from stoker.testing import EngineHarness, ScriptedRuntime
from stoker_plugins.policies.deadline import DeadlineAdmission, EarliestDeadlineFirst
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.policies.options import DeadlineOptions

NOW = 100.0
COST = StepCost(base_s=0.1, prefill_s=0.01, decode_s=0.0)  # a token is 0.1 s, a prompt token 0.01 s
ids = itertools.count(1)


def view(
    due_in_s: float | None, *, prompt: int = 10, output: int = 10, **more: Any
) -> SequenceView:
    """A waiting sequence: by default it needs 0.1 s for its prompt and 1 s for its answer."""
    sequence_id = next(ids)
    fields = {
        "sequence_id": sequence_id,
        "request_id": f"request-{sequence_id}",
        "tenant": "a",
        "priority": 0,
        "arrival_s": NOW,
        "num_prompt_tokens": prompt,
        "num_computed_tokens": 0,
        "num_output_tokens": 0,
        "max_tokens": output,
        "num_preemptions": 0,
        "deadline_s": None if due_in_s is None else NOW + due_in_s,
    }
    return SequenceView(**(fields | more))


def context(running: Sequence[SequenceView] = (), cost: StepCost = COST) -> PolicyContext:
    return PolicyContext(
        now_s=NOW,
        model="model",
        num_lanes=2,
        num_free_lanes=0,
        token_budget=512,
        running=tuple(running),
        cost=cost,
    )


def policy(**more: Any) -> EarliestDeadlineFirst:
    return EarliestDeadlineFirst(DeadlineOptions(**({"slack": 1.0} | more)))


# --------------------------------------------------------------------------- order


def test_the_earliest_deadline_is_first_and_those_without_one_have_one_for_the_order() -> None:
    late, soon, none = view(90.0), view(30.0), view(None)
    old = view(None, arrival_s=NOW - 40.0)
    views = [late, none, soon, old]
    assert list(policy().admission_order(views, context())) == [old, soon, none, late]
    assert list(policy().preemption_order(views, context())) == [late, none, soon, old]
    order = [soon, late, old, none]
    assert list(policy(default_deadline_s=1000.0).admission_order(views, context())) == order


def test_what_cannot_make_its_deadline_any_more_comes_last() -> None:
    doomed, tight, late = view(1.0), view(1.2), view(50.0)
    overdue = view(None, arrival_s=NOW - 1000.0)  # only ordered by a deadline: it has none to miss
    views = [doomed, late, tight, overdue]
    order = [overdue, tight, late, doomed]
    assert list(policy().admission_order(views, context())) == order
    assert list(policy().preemption_order(views, context())) == order[::-1]
    # While costs are unknown nothing is given up.
    unknown = context(cost=StepCost())
    assert list(policy().admission_order(views, unknown)) == [overdue, doomed, tight, late]


def test_prompts_of_a_step_go_by_deadline_too() -> None:
    late, soon = view(90.0, prompt=100), view(30.0, prompt=40)
    assert policy().prefill_shares([late, soon], 64, context()) == {
        soon.sequence_id: 40,
        late.sequence_id: 24,
    }


def test_the_reason_tells_the_time_left() -> None:
    explain = policy().explain
    assert explain(view(3.0), context()) == "earliest deadline, due in 3.0 s"
    assert explain(view(0.5), context()) == "due in 0.5 s, which it will miss; a lane was idle"
    assert explain(view(None), context()) == "no deadline, ordered as if due in 60.0 s"


# --------------------------------------------------------------------------- victims


def test_a_lane_is_taken_only_from_those_that_can_wait_for_it() -> None:
    candidate = view(2.0)  # needs 1.1 s
    can_wait = view(9.0, num_computed_tokens=10, num_output_tokens=1)  # 1.1 s, then 0.1 + 0.9 s
    cannot = view(1.6, num_computed_tokens=10, num_output_tokens=5)
    cannot_either = view(2.05, num_computed_tokens=10, num_output_tokens=1)
    without = view(None, num_computed_tokens=10, num_output_tokens=1)
    running = [can_wait, cannot, cannot_either, without]
    # The next lane falls free in 0.5 s; 0.9 s could be waited.
    assert list(policy().victims(candidate, running, context(running))) == []
    urgent = view(1.5)
    assert list(policy().victims(urgent, running, context(running))) == [without, can_wait]
    # With slack, there is less to spare, and less that can wait.
    strict = policy(slack=8.0)
    assert list(strict.victims(view(9.0), running, context(running))) == [without]


@pytest.mark.parametrize(
    ("due_in_s", "options", "cost"),
    [
        (None, {}, COST),  # nobody without a deadline takes a lane
        (1.0, {}, COST),  # it would be in vain
        (70.0, {}, COST),  # there is time
        (1.2, {"preempt": False}, COST),
        (1.2, {}, StepCost()),
    ],
)
def test_nobody_is_preempted_without_need_or_hope(
    due_in_s: float | None, options: dict[str, Any], cost: StepCost
) -> None:
    running = [view(None, num_computed_tokens=10, num_output_tokens=1)]
    around = context(running, cost)
    assert list(policy().victims(view(1.2), running, context(running))) == running
    assert list(policy(**options).victims(view(due_in_s), running, around)) == []


def test_in_the_engine_an_urgent_request_is_in_time_and_nobody_misses_its_own() -> None:
    runtime = ScriptedRuntime(lanes=1, context_length=300)
    harness = EngineHarness(
        policy(slack=1.2),
        runtime=runtime,
        scheduler=SchedulerConfig(policy="deadline"),
        step_s=0.0,
    )

    def before_step(step: StepInput) -> None:
        harness.fake_clock.advance(0.01 + 0.001 * len(step.token_ids))

    runtime.before_step = before_step
    long = harness.submit("a long one " * 10, max_tokens=150, deadline_s=harness.clock() + 20.0)
    for _ in range(20):
        harness.step()
    urgent = harness.submit("quick", max_tokens=10, deadline_s=harness.clock() + 0.4)
    hopeless = harness.submit("too quick", max_tokens=100, deadline_s=harness.clock() + 0.4)
    patient = harness.submit("whenever", max_tokens=5)
    harness.run()
    assert [r.finish_reason for r in (long, urgent, patient)] == [FinishReason.LENGTH] * 3
    assert long.records[0].num_preemptions == 1
    for request in (long, urgent, patient):
        prompt = list(request.request.prompt_token_ids)
        asked = request.request.sampling.max_tokens or 0
        assert request.text() == runtime.expected_text(prompt, asked)
    # It was left to its deadline, and cost nobody a lane.
    last = hopeless.finish()
    assert last is not None
    assert last.finish_reason is FinishReason.ERROR
    assert getattr(last.error, "status_code", None) == 408
    assert urgent.traces()[0].admitted_by.startswith("deadline: earliest deadline, due in 0.")


# --------------------------------------------------------------------------- admission


class Context(ServerContext):
    """A server that says what the test wants."""

    config = Config()
    observers: Mapping[str, Observer] = {}
    uptime_s = 1.0

    def __init__(self, policy: SchedulingPolicy, snapshot: EngineSnapshot) -> None:
        self._policy = policy
        self._snapshot = snapshot

    def models(self) -> Sequence[ServedModel]:
        return []

    def load(self, model: str) -> LoadSnapshot:
        return LoadSnapshot()

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        return TenantLoad()

    def snapshot(self, model: str) -> EngineSnapshot:
        return self._snapshot

    def policy(self, model: str) -> SchedulingPolicy:
        return self._policy

    def tenant(self, name: str) -> TenantConfig:
        return TenantConfig(name=name)


def request(due_in_s: float | None, *, arrival_s: float = NOW, n: int = 1) -> Request:
    """10 prompt tokens and 10 to generate: with one lane, 1.0 s from the first step to the last."""
    return Request(
        request_id="r",
        model="model",
        prompt_token_ids=[1] * 10,
        sampling=SamplingParams(max_tokens=10),
        n=n,
        arrival_s=arrival_s,
        deadline_s=None if due_in_s is None else NOW + due_in_s,
    )


def snapshot(waiting: Sequence[Request] = (), cost: StepCost = COST) -> EngineSnapshot:
    return EngineSnapshot(
        now_s=NOW,
        num_lanes=1,
        waiting=waiting,
        running=(),
        cost=cost,
        output_ratio=1.0,
        mean_output_tokens=10.0,
        max_prefill_tokens=128,
    )


def admission(waiting: Sequence[Request] = (), **options: Any) -> DeadlineAdmission:
    return DeadlineAdmission(Context(policy(**options), snapshot(waiting)))


async def test_what_will_be_in_time_passes() -> None:
    for given in (request(1.2), request(None)):
        assert await admission().on_request(given) is given
    # What is due later, or has no deadline, is not ahead of it.
    waiting = [request(50.0), request(None), request(50.0)]
    given = request(1.2)
    assert await admission(waiting).on_request(given) is given


async def test_what_is_due_before_counts_and_the_answer_says_when_to_come_back() -> None:
    # Each takes 1.1 s. One without a deadline is ordered as if it had one.
    waiting = [request(2.0), request(5.0), request(50.0), request(None, arrival_s=NOW - 57.0)]
    given = request(3.35)
    assert await admission(waiting).on_request(given) is given
    with pytest.raises(RateLimitError, match=r"about 0\.1 s after its deadline") as refused:
        await admission(waiting).on_request(request(3.2))
    assert refused.value.code == "deadline_unreachable"
    assert refused.value.retry_after_s == pytest.approx(0.1)
    # Who comes back later is due later: here, behind the one that is due in 5 s.
    waiting.append(request(3.0))
    waiting.append(request(4.0))
    with pytest.raises(RateLimitError) as refused:
        await admission(waiting).on_request(request(3.2))
    assert refused.value.retry_after_s == pytest.approx(6.6 - 3.2)


async def test_what_would_take_too_long_even_alone_is_the_clients_to_change() -> None:
    with pytest.raises(InvalidRequestError, match="raise timeout, or lower max_tokens") as refused:
        await admission().on_request(request(0.5))
    assert (refused.value.param, refused.value.code) == ("timeout", "deadline_unreachable")


async def test_slack_makes_it_careful_and_all_sequences_count() -> None:
    given = request(1.5)
    assert await admission(slack=1.2).on_request(given) is given
    with pytest.raises(InvalidRequestError):  # a later retry would not help
        await admission(slack=2.0).on_request(given)
    # The time after which it would be accepted takes the slack into account, too: 2.2 s less 1.5 s.
    with pytest.raises(RateLimitError) as refused:
        await admission([request(1.0)], slack=1.2).on_request(request(1.8))
    assert refused.value.retry_after_s == pytest.approx(2.2 - 1.8 / 1.2)
    given = request(4.0, n=3)
    assert await admission().on_request(given) is given
    with pytest.raises(InvalidRequestError):  # one lane, three times
        await admission().on_request(request(2.0, n=3))


async def test_it_does_nothing_where_it_is_not_wanted_or_cannot_know() -> None:
    overdue = request(-1.0)
    assert await admission().on_request(overdue) is overdue  # the core ends it with a 408
    given = request(0.001)
    assert await admission(admission=False).on_request(given) is given
    unknown = DeadlineAdmission(Context(policy(), snapshot(cost=StepCost())))
    assert await unknown.on_request(given) is given
    other = DeadlineAdmission(Context(FirstComeFirstServed(), snapshot()))
    assert await other.on_request(given) is given
