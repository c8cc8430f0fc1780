"""What every bundled policy must keep to, for random loads: on the scripted runtime, on a clock we move.

Work conservation, no starvation, permutations without errors, determinism, and the model's own text whatever
is preempted; and for ``fair`` the bound that its module states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Observer, ScheduledTokens, SchedulingPolicy, StepInput, StepRecord, TenantConfig
from stoker.config import SchedulerConfig
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.policies.deadline import EarliestDeadlineFirst
from stoker_plugins.policies.fair import FairShare
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.policies.options import (
    DeadlineOptions,
    FairOptions,
    FcfsOptions,
    TokenBudgetOptions,
)
from stoker_plugins.policies.token_budget import TokenBudget
from stoker_policy_priority import Options as PriorityOptions
from stoker_policy_priority import Priority

# With all policies, also one of contrib/, it is a quarter of the fast suite.
pytestmark = [pytest.mark.slow, pytest.mark.contrib]

BUDGET = 90
AGEING = 500.0

POLICIES: dict[str, Callable[[], SchedulingPolicy]] = {
    "fcfs": lambda: FirstComeFirstServed(FcfsOptions(max_passed=3)),
    "token-budget": lambda: TokenBudget(
        TokenBudgetOptions(budget_tokens=BUDGET, ageing_tokens_per_s=AGEING)
    ),
    "fair": FairShare,
    "deadline": lambda: EarliestDeadlineFirst(DeadlineOptions(default_deadline_s=0.5)),
    "priority": lambda: Priority(PriorityOptions(ageing_s=0.05)),
}
every_policy = pytest.mark.parametrize("name", POLICIES)

TENANTS = [TenantConfig(name="a"), TenantConfig(name="b", weight=2.0), TenantConfig(name="c")]


@dataclass(frozen=True)
class Job:
    """A request of a random load, and how many steps pass before the next one comes."""

    tenant: str
    priority: int
    num_prompt: int
    num_output: int
    timeout_s: float | None
    steps: int


jobs = st.builds(
    Job,
    tenant=st.sampled_from("abc"),
    priority=st.integers(-2, 2),
    num_prompt=st.integers(1, 60),
    num_output=st.integers(1, 20),
    timeout_s=st.sampled_from([None, 50.0, 100.0]),
    steps=st.sampled_from([0, 0, 0, 1, 2, 7]),
)
loads = st.lists(jobs, min_size=1, max_size=20)


@dataclass
class Run(Observer):
    """A load on an engine, and what was seen of it."""

    name: str
    lanes: int
    capacity: int | None = None
    tenants: list[TenantConfig] = field(default_factory=lambda: TENANTS)
    chunk: int = 16
    steps: list[StepRecord] = field(default_factory=list)
    requests: list[Submitted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = ScriptedRuntime(
            lanes=self.lanes,
            context_length=100,
            options=ScriptedOptions(kv_capacity_tokens=self.capacity),
        )
        self.runtime.before_step = self._before_step
        self.harness = EngineHarness(
            POLICIES[self.name](),
            runtime=self.runtime,
            scheduler=SchedulerConfig(
                policy=self.name,
                max_num_batched_tokens=2 * self.chunk,
                max_prefill_tokens_while_decoding=self.chunk,
            ),
            observers=[self],
            tenants=self.tenants,
            step_s=0.0,
        )
        # Called once for each planned step; says what is wrong with it.
        self.on_plan: Callable[[], str | None] = lambda: None
        self.problems: list[str] = []

    def _before_step(self, step: StepInput) -> None:
        # Steps take time, so that there are costs to measure.
        self.harness.fake_clock.advance(0.002 + 0.0002 * len(step.token_ids))
        problem = self.on_plan()
        if problem is not None:
            self.problems.append(problem)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def submit(self, job: Job) -> Submitted:
        number = len(self.requests)
        prompt = [(number * 31 + i) % 251 for i in range(job.num_prompt)]
        deadline_s = None if job.timeout_s is None else self.harness.clock() + job.timeout_s
        submitted = self.harness.submit(
            prompt,
            tenant=job.tenant,
            priority=job.priority,
            max_tokens=job.num_output,
            deadline_s=deadline_s,
        )
        self.requests.append(submitted)
        return submitted

    def play(self, load: list[Job], max_steps: int = 3000) -> None:
        for job in load:
            self.submit(job)
            for _ in range(job.steps):
                self.harness.step()
        self.harness.run(max_steps)

    def check(self) -> None:
        """Everybody got the model's text, no plan was wrong, and the policy made no mistake."""
        assert self.problems == []
        for submitted in self.requests:
            request = submitted.request
            asked = request.sampling.max_tokens
            assert asked is not None
            prompt = list(request.prompt_token_ids)
            assert submitted.text() == self.runtime.expected_text(prompt, asked)
        assert self.harness.engine.scheduler.policy.num_errors == 0
        assert self.harness.engine.scheduler.lanes.num_free == self.lanes


@every_policy
@settings(max_examples=40, deadline=None)
@given(load=loads, lanes=st.integers(1, 4), capacity=st.one_of(st.none(), st.integers(101, 200)))
def test_every_request_of_a_finite_load_ends_with_the_models_text(
    name: str, load: list[Job], lanes: int, capacity: int | None
) -> None:
    """With preemption by the policy and, where KV memory is short, by the core."""
    run = Run(name, lanes, capacity)
    # Alone, one after the other, with every token computed twice, it would take no more than this.
    total = sum(2 * job.num_prompt + 2 * job.num_output for job in load)
    run.play(load, max_steps=total + len(load) + 10)
    run.check()


@every_policy
@settings(max_examples=40, deadline=None)
@given(load=loads, lanes=st.integers(1, 4))
def test_no_lane_is_idle_while_something_waits_that_may_start(
    name: str, load: list[Job], lanes: int
) -> None:
    run = Run(name, lanes)
    scheduler = run.harness.engine.scheduler

    def look() -> str | None:
        if not scheduler.lanes.num_free or not scheduler.waiting:
            return None
        if name != "token-budget" or not scheduler.running:
            return "only a budget may keep a lane idle"
        predicted = [s.num_prompt + s.max_tokens for s in scheduler.waiting.values()]
        taken = sum(s.num_prompt + s.max_tokens for s in scheduler.running.values())
        now_s = run.harness.clock()
        aged = any(
            AGEING * (now_s - s.request.arrival_s) >= s.num_prompt + s.max_tokens
            for s in scheduler.waiting.values()
        )
        return None if aged or taken + min(predicted) > BUDGET else "there was budget left"

    run.on_plan = look
    run.play(load)
    run.check()


@every_policy
@settings(max_examples=25, deadline=None)
@given(load=loads, lanes=st.integers(2, 4), capacity=st.integers(101, 160))
def test_with_little_memory_a_lane_is_idle_only_because_of_what_does_not_fit(
    name: str, load: list[Job], lanes: int, capacity: int
) -> None:
    run = Run(name, lanes, capacity)
    scheduler = run.harness.engine.scheduler
    before = 0

    def look() -> str | None:
        nonlocal before
        preempted, before = scheduler.num_preemptions > before, scheduler.num_preemptions
        if preempted or name == "token-budget" or not scheduler.lanes.num_free:
            return None
        held = sum(s.num_tokens for s in scheduler.running.values())
        waiting = scheduler.waiting.values()
        if not waiting or any(held + s.num_tokens >= capacity for s in waiting):
            return None
        return "everything that waits fits"

    run.on_plan = look
    run.play(load)
    run.check()


def scheduled(run: Run) -> list[list[ScheduledTokens]]:
    """What was computed in each step, with the sequences numbered from 0."""
    first = min(item.sequence_id for record in run.steps for item in record.scheduled)
    return [
        [item._replace(sequence_id=item.sequence_id - first) for item in record.scheduled]
        for record in run.steps
    ]


@every_policy
@settings(max_examples=25, deadline=None)
@given(load=loads, lanes=st.integers(1, 4), capacity=st.one_of(st.none(), st.integers(101, 200)))
def test_the_same_load_gives_the_same_schedule(
    name: str, load: list[Job], lanes: int, capacity: int | None
) -> None:
    runs = [Run(name, lanes, capacity) for _ in range(2)]
    for run in runs:
        run.play(load)
    assert scheduled(runs[0]) == scheduled(runs[1])


# What each policy prefers to the request that must not starve.
PREFERRED = {
    "fcfs": Job("b", 0, 12, 5, None, 0),  # fits where the other one does not
    "token-budget": Job("b", 0, 12, 5, None, 0),  # much less work
    "fair": Job("b", 0, 12, 5, None, 0),  # of a tenant with twice the weight
    "deadline": Job("b", 0, 12, 5, 0.3, 0),  # due sooner
    "priority": Job("b", -10, 12, 5, None, 0),  # more urgent
}


@every_policy
@settings(max_examples=30, deadline=None)
@given(lanes=st.integers(1, 4), backlog=st.integers(1, 12), ahead=st.integers(0, 8))
def test_nothing_starves_while_what_the_policy_prefers_keeps_coming(
    name: str, lanes: int, backlog: int, ahead: int
) -> None:
    patient_job, capacity = Job("a", 5, 60, 20, None, 0), None
    if name == "fcfs":  # it does not fit beside any other, or there is nothing to prefer
        patient_job, capacity = Job("a", 5, 40, 9, None, 0), 50
    run = Run(name, lanes, capacity)

    def newcomer() -> Job:  # of varying lengths, so that they do not all end at once
        return replace(PREFERRED[name], num_output=3 + len(run.requests) * 7 % 6)

    for _ in range(ahead):
        run.submit(newcomer())
    patient = run.submit(patient_job)
    for _ in range(1500):
        while len(run.harness.engine.scheduler.waiting) < backlog:
            run.submit(newcomer())
        run.harness.step()
        if patient.finish() is not None:
            break
    else:
        pytest.fail("it starved")
    prompt = list(patient.request.prompt_token_ids)
    assert patient.text() == run.runtime.expected_text(prompt, patient_job.num_output)
    assert run.harness.engine.scheduler.policy.num_errors == 0


# --------------------------------------------------------------------------- bounded unfairness


class Gaps:
    """How far the service of two tenants moved apart while both waited.

    Args:
        run: The load, under ``fair``.
        weight: The tenants' weights.
    """

    def __init__(self, run: Run, weight: dict[str, float]) -> None:
        self.run = run
        self.weight = weight
        self.service = dict.fromkeys(weight, 0.0)
        self.widest = 0.0
        # For each pair that waits: the least and greatest difference since both began to.
        self._ranges: dict[tuple[str, ...], tuple[float, float]] = {}

    def step(self) -> None:
        self._compare()  # what has just arrived waits already
        self.run.harness.step()
        for item in self.run.steps[-1].scheduled:
            self.service[item.tenant] += price(item.prefill, item.decode) / self.weight[item.tenant]
        self._compare()

    def _compare(self) -> None:
        waiting = {s.request.tenant for s in self.run.harness.engine.scheduler.waiting.values()}
        for pair in itertools.combinations(self.weight, 2):
            if not waiting.issuperset(pair):
                self._ranges.pop(pair, None)
                continue
            difference = self.service[pair[0]] - self.service[pair[1]]
            low, high = self._ranges.get(pair, (difference, difference))
            self._ranges[pair] = low, high = min(low, difference), max(high, difference)
            self.widest = max(self.widest, high - low)


def price(prefill: int, decode: int) -> float:
    options = FairOptions()
    return options.prefill_price * prefill + options.decode_price * decode


@settings(max_examples=80, deadline=None)
@given(
    load=st.lists(jobs, min_size=10, max_size=60),
    lanes=st.integers(1, 5),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    chunk=st.sampled_from([4, 16, 64]),
)
def test_tenants_that_wait_get_the_same_service_within_the_bound(
    load: list[Job], lanes: int, weights: list[float], chunk: int
) -> None:
    """|W_f / w_f - W_g / w_g| <= 2 K (p L + q N) / w, over every interval in which both wait."""
    weight = dict(zip("abc", weights, strict=True))
    tenants = [TenantConfig(name=n, weight=w) for n, w in weight.items()]
    run = Run("fair", lanes, tenants=tenants, chunk=chunk)
    gaps = Gaps(run, weight)
    for job in load:
        run.submit(job)
        for _ in range(job.steps):
            if run.harness.engine.has_work:
                gaps.step()
    while run.harness.engine.has_work:
        gaps.step()
    run.check()
    largest = max(price(job.num_prompt, job.num_output) for job in load)
    assert gaps.widest <= 2 * lanes * largest / min(weights) + 1e-6


@pytest.mark.parametrize(("name", "is_fair"), [("fair", True), ("fcfs", False)])
def test_the_bound_does_not_depend_on_how_long_both_wait(name: str, is_fair: bool) -> None:
    """A flood of long requests and one of short ones, for long: only ``fair`` keeps to the bound."""
    run = Run(name, lanes=2, tenants=[])
    gaps = Gaps(run, {"a": 1.0, "b": 1.0})
    long, short = Job("a", 0, 60, 20, None, 0), Job("b", 0, 5, 5, None, 0)
    for _ in range(150):
        run.submit(long)
        run.submit(short)
    waiting = run.harness.engine.scheduler.waiting
    while {s.request.tenant for s in waiting.values()} == {"a", "b"}:
        gaps.step()
    assert sum(gaps.service.values()) > 2000
    assert (gaps.widest <= 2 * 2 * price(60, 20)) == is_fair
    assert run.harness.engine.scheduler.policy.num_errors == 0


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    """One tenant is served alone for long; who comes then shares with it, and does not take everything."""
    run = Run("fair", lanes=2, tenants=[])
    gaps = Gaps(run, {"a": 1.0, "b": 1.0})
    job = Job("a", 0, 20, 10, None, 0)
    for _ in range(200):
        run.submit(job)
    while gaps.service["a"] < 4000:
        gaps.step()
    for _ in range(100):
        run.submit(replace(job, tenant="b"))
    while {s.request.tenant for s in run.harness.engine.scheduler.waiting.values()} == {"a", "b"}:
        gaps.step()
    assert gaps.service["b"] > 1000
    assert gaps.widest <= 2 * 2 * price(20, 10)
