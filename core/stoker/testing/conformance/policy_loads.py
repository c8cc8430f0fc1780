"""Loads that policies are tried with: views made up at random, and requests on an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from stoker.config import SchedulerConfig, TenantConfig
from stoker.interfaces import (
    Observer,
    PolicyContext,
    SchedulingPolicy,
    StepCost,
    TenantShare,
)
from stoker.testing.harness import EngineHarness, Submitted
from stoker.testing.scripted import ScriptedRuntime
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import ScheduledTokens, SequenceView, StepInput, StepRecord

__all__ = ["Job", "Load", "Moment", "crowds", "jobs", "moments", "quietly"]

TENANTS = ("tenant-ash", "tenant-birch", "tenant-cedar")

# Reproducible and without deadlines: a suite that a stranger runs must not depend on luck or load. Nothing
# is shrunk: on an engine that takes minutes.
quietly = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Moment:
    """What a policy is asked at one time: the views and the context."""

    waiting: tuple[SequenceView, ...]
    running: tuple[SequenceView, ...]
    context: PolicyContext
    budget: int
    record: StepRecord


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    """A moment of a server: up to 12 waiting and 6 running sequences of three tenants."""
    now_s = draw(st.floats(10.0, 500.0))
    ids = iter(draw(st.permutations(range(100, 118))))
    waiting = tuple(draw(_view(ids, now_s, running=False)) for _ in range(draw(st.integers(1, 12))))
    running = tuple(draw(_view(ids, now_s, running=True)) for _ in range(draw(st.integers(0, 6))))
    context = PolicyContext(
        now_s=now_s,
        model="model",
        num_lanes=6,
        num_free_lanes=6 - len(running),
        token_budget=draw(st.integers(1, 512)),
        kv_tokens_capacity=6000,
        kv_tokens_used=sum(view.num_computed_tokens for view in running),
        waiting=waiting,
        running=running,
        tenants={
            name: TenantShare(
                name=name,
                weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
                num_running=sum(view.tenant == name for view in running),
                num_waiting=sum(view.tenant == name for view in waiting),
            )
            for name in sorted({view.tenant for view in (*waiting, *running)})
        },
        cost=draw(
            st.sampled_from([StepCost(), StepCost(base_s=0.01, prefill_s=1e-4, decode_s=1e-3)])
        ),
    )
    record = StepRecord(
        model="model",
        started_s=now_s,
        duration_s=0.01,
        runtime_s=0.008,
        num_prefill_tokens=8 * len(running),
        num_decode_tokens=len(running),
        num_generated_tokens=len(running),
        num_running=len(running),
        num_waiting=len(waiting),
        num_preemptions=0,
        scheduled=[ScheduledTokens(view.tenant, 8, 1, 0, view.sequence_id) for view in running],
    )
    return Moment(waiting, running, context, draw(st.integers(1, 256)), record)


@st.composite
def _view(draw: st.DrawFn, ids: Iterator[int], now_s: float, *, running: bool) -> SequenceView:
    arrival_s = now_s - draw(st.floats(0.0, 9.0))
    prompt = draw(st.integers(1, 2000))
    number = next(ids)
    return SequenceView(
        sequence_id=number,
        request_id=f"request-{number}",
        tenant=draw(st.sampled_from(TENANTS)),
        priority=draw(st.integers(-3, 3)),
        arrival_s=arrival_s,
        num_prompt_tokens=prompt,
        num_computed_tokens=draw(st.integers(0, prompt - 1)) if running else 0,
        num_output_tokens=draw(st.integers(0, 50)) if running else 0,
        max_tokens=draw(st.integers(51, 500)),
        num_preemptions=draw(st.integers(0, 2)),
        deadline_s=draw(st.sampled_from([None, now_s + 0.5, now_s + 60.0])),
        admitted_s=arrival_s if running else None,
        waiting_since_s=arrival_s,
        num_passed=draw(st.integers(0, 20)),
        expected_output_tokens=draw(st.integers(1, 50)),
    )


@dataclass(frozen=True)
class Job:
    """A request of a load, and how many steps pass before the next one comes."""

    tenant: str = TENANTS[0]
    priority: int = 0
    num_prompt: int = 12
    num_output: int = 5
    timeout_s: float | None = None
    steps: int = 0


_job = st.builds(
    Job,
    tenant=st.sampled_from(TENANTS),
    priority=st.integers(-2, 2),
    num_prompt=st.integers(1, 60),
    num_output=st.integers(1, 20),
    timeout_s=st.sampled_from([None, 5000.0, 9000.0]),
    steps=st.sampled_from([0, 0, 0, 1, 2, 7]),
)
jobs = st.lists(_job, min_size=1, max_size=20)
crowds = st.lists(_job, min_size=10, max_size=20)


@dataclass
class Load(Observer):
    """Requests on an engine with a policy, the scripted runtime, and a clock that each step moves.

    Attributes:
        policy: The policy.
        lanes: Lanes of the runtime.
        capacity: Its KV memory, in tokens; ``None`` for as much as the lanes can hold.
        step_s: Seconds that a step takes, beside what its tokens take.
        steps: What was told of each step.
        requests: What was submitted.
    """

    policy: SchedulingPolicy
    lanes: int = 2
    capacity: int | None = None
    step_s: float = 0.01
    steps: list[StepRecord] = field(default_factory=list)
    requests: list[Submitted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = ScriptedRuntime(
            lanes=self.lanes,
            context_length=100,
            options=ScriptedOptions(kv_capacity_tokens=self.capacity, embed=False),
        )
        self.runtime.before_step = self._take_time
        self.harness = EngineHarness(
            self.policy,
            runtime=self.runtime,
            scheduler=SchedulerConfig(
                max_num_batched_tokens=32, max_prefill_tokens_while_decoding=16
            ),
            observers=[self],
            tenants=[TenantConfig(name=TENANTS[0]), TenantConfig(name=TENANTS[1], weight=2.0)],
            step_s=0.0,
        )

    def _take_time(self, step: StepInput) -> None:
        self.harness.fake_clock.advance(self.step_s + 1e-4 * len(step.token_ids))

    def on_step(self, record: StepRecord) -> None:
        """Keep what was told."""
        self.steps.append(record)

    def submit(self, job: Job, **fields: Any) -> Submitted:
        """Queue a request; each has another prompt."""
        number = len(self.requests)
        deadline_s = None if job.timeout_s is None else self.harness.clock() + job.timeout_s
        submitted = self.harness.submit(
            [(number * 31 + i) % 251 for i in range(job.num_prompt)],
            tenant=job.tenant,
            priority=job.priority,
            max_tokens=job.num_output,
            deadline_s=deadline_s,
            **fields,
        )
        self.requests.append(submitted)
        return submitted

    def play(self, load: list[Job]) -> bool:
        """Run a load to its end; whether it ended within twice the steps that it takes alone."""
        for job in load:
            self.submit(job)
            for _ in range(job.steps):
                self.harness.step()
        # Alone, one after the other, with every token computed twice, it would take no more than this.
        most = sum(2 * job.num_prompt + 2 * job.num_output for job in load) + len(load) + 10
        try:
            self.harness.run(most)
        except RuntimeError:
            return False
        return True

    def num_errors(self) -> int:
        """How often the policy raised or returned nonsense (``stoker_policy_errors_total``)."""
        return self.harness.engine.scheduler.policy.num_errors

    def schedule(self) -> list[list[ScheduledTokens]]:
        """What was computed in each step, with the sequences numbered from 0."""
        ids = [item.sequence_id for record in self.steps for item in record.scheduled]
        first = min(ids, default=0)
        return [
            [item._replace(sequence_id=item.sequence_id - first) for item in record.scheduled]
            for record in self.steps
        ]


Factory = Callable[[], SchedulingPolicy]
