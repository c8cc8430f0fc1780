"""Who leaves the queue: what does not fit, what is reserved, what is given back, what a policy sees."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest

from stoker import (
    MAX_PASSED,
    MAX_VIEWS,
    PolicyContext,
    SchedulingPolicy,
    SequenceView,
    TenantConfig,
)
from stoker.config import SchedulerConfig
from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker.testing.scripted_options import ScriptedOptions


class Arrival(SchedulingPolicy):
    """Arrival order, and nothing else but the defaults."""

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        return sorted(waiting, key=lambda view: (view.arrival_s, view.sequence_id))


def make(
    policy: SchedulingPolicy | None = None,
    *,
    lanes: int = 2,
    kv: int = 0,
    tenants: Sequence[TenantConfig] = (),
    **scheduler: object,
) -> EngineHarness:
    runtime = ScriptedRuntime(
        lanes=lanes, context_length=2000, options=ScriptedOptions(kv_capacity_tokens=kv)
    )
    return EngineHarness(
        policy or Arrival(),
        runtime=runtime,
        tenants=tenants,
        scheduler=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
    )


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


def running(harness: EngineHarness) -> list[str]:
    return [s.request.tenant for s in harness.engine.scheduler.running.values()]


# --------------------------------------------------------------------------- what does not fit


def test_what_fits_passes_what_does_not() -> None:
    harness = make(lanes=4, kv=300)
    first = harness.submit("a" * 200, max_tokens=30)
    harness.step()
    big = harness.submit("b" * 150, max_tokens=5)
    small = harness.submit("c" * 20, max_tokens=5)
    harness.step()
    assert small.text() != ""
    assert big.text() == ""
    harness.run()
    (trace,) = big.traces()
    assert trace.passed_by == 1
    assert [r.text() for r in (first, big, small)] == [
        truth(harness, r) for r in (first, big, small)
    ]


def test_what_does_not_fit_is_passed_by_so_many_and_no_more() -> None:
    """A steady stream of small requests would else keep a big one out for ever."""
    harness = make(lanes=4, kv=300)
    harness.submit("a" * 100, max_tokens=40)
    harness.step()
    big = harness.submit("b" * 250, max_tokens=5)
    small: list[Submitted] = []
    for _ in range(200):
        if big.finish() is not None:
            break
        if harness.engine.load().num_waiting < 3:
            small.append(harness.submit("c" * 30, max_tokens=3))
        harness.step()
    assert big.text() == truth(harness, big)
    assert big.traces()[0].passed_by == MAX_PASSED
    assert len(small) > MAX_PASSED


def test_a_policy_may_let_nothing_pass() -> None:
    class Strict(Arrival):
        def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
            return False

    harness = make(Strict(), lanes=4, kv=300)
    harness.submit("a" * 200, max_tokens=30)
    harness.step()
    harness.submit("b" * 150, max_tokens=5)
    small = harness.submit("c" * 20, max_tokens=5)
    harness.step()
    assert small.text() == ""
    harness.run()
    assert small.text() == truth(harness, small)


def test_a_policy_may_hold_back_but_not_stop_everything() -> None:
    class OneAtATime(Arrival):
        def admits(self, candidate: SequenceView, context: PolicyContext) -> bool:
            return not context.running

    harness = make(OneAtATime(), lanes=4)
    requests = [harness.submit(f"r{i}", max_tokens=4) for i in range(5)]
    while harness.engine.has_work:
        harness.step()
        assert len(harness.engine.scheduler.running) <= 1
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


# --------------------------------------------------------------------------- reservations

CHAT = TenantConfig(name="chat", reserved_lanes=1)


def test_reserved_lanes_are_lent_and_given_back() -> None:
    harness = make(lanes=3, tenants=[CHAT])
    batch = [harness.submit(f"batch {i}", tenant="batch", max_tokens=30) for i in range(5)]
    for _ in range(3):
        harness.step()
    assert running(harness) == ["batch"] * 3
    chat = harness.submit("hello", tenant="chat", max_tokens=5)
    harness.step()
    assert chat.text() != ""
    assert sorted(running(harness)) == ["batch", "batch", "chat"]
    harness.run()
    everybody = [*batch, chat]
    assert [r.text() for r in everybody] == [truth(harness, r) for r in everybody]
    reasons = [p.reason for r in everybody for t in r.traces() for p in t.preemptions]
    assert reasons == ["reservation"]
    assert chat.traces()[0].admitted_by == "its tenant's reservation"


def test_what_is_not_lent_stays_free() -> None:
    harness = make(lanes=3, tenants=[CHAT], lend_reserved=False)
    for i in range(5):
        harness.submit(f"batch {i}", tenant="batch", max_tokens=30)
    for _ in range(3):
        harness.step()
    assert running(harness) == ["batch"] * 2
    chat = [harness.submit(f"c{i}", tenant="chat", max_tokens=5) for i in range(2)]
    harness.step()
    assert sorted(running(harness)) == ["batch", "batch", "chat"]
    harness.run()
    assert all(r.text() == truth(harness, r) for r in chat)
    assert harness.engine.scheduler.num_preemptions == 0


def test_beyond_its_reservation_a_tenant_waits_like_anybody() -> None:
    harness = make(lanes=2, tenants=[CHAT])
    harness.submit("batch", tenant="batch", max_tokens=50)
    harness.step()
    for i in range(3):
        harness.submit(f"chat {i}", tenant="chat", max_tokens=50)
    for _ in range(5):
        harness.step()
    assert sorted(running(harness)) == ["batch", "chat"]


def test_kv_is_reserved_as_well() -> None:
    tenants = [TenantConfig(name="chat", reserved_kv=0.5)]
    harness = make(lanes=4, kv=400, tenants=tenants)
    batch = [harness.submit("x" * 120, tenant="batch", max_tokens=60) for _ in range(3)]
    for _ in range(3):
        harness.step()
    assert running(harness) == ["batch"] * 3
    chat = harness.submit("y" * 150, tenant="chat", max_tokens=20)
    harness.step()
    assert "chat" in running(harness)
    while chat.finish() is None:
        harness.step()
    assert chat.traces()[0].num_preemptions == 0, "it lost a lane within its reservation"
    harness.run()
    assert [r.text() for r in (*batch, chat)] == [truth(harness, r) for r in (*batch, chat)]


def test_reservations_change_while_it_runs() -> None:
    harness = make(lanes=2)
    for i in range(4):
        harness.submit(f"batch {i}", tenant="batch", max_tokens=40)
    harness.step()
    chat = harness.submit("hello", tenant="chat", max_tokens=3)
    harness.step()
    assert chat.text() == ""
    harness.engine.scheduler.tenants.replace([CHAT])
    harness.step()
    assert chat.text() != ""


# --------------------------------------------------------------------------- preemption by policy


def test_two_that_want_one_lane_cannot_take_it_from_each_other_for_ever() -> None:
    class Envious(Arrival):
        """Whoever waits is worth more than whoever runs."""

        def victims(
            self,
            candidate: SequenceView,
            running: Sequence[SequenceView],
            context: PolicyContext,
        ) -> Sequence[SequenceView]:
            return running

    harness = make(Envious(), lanes=1)
    requests = [harness.submit("long prompt " * 100, max_tokens=6) for _ in range(3)]
    steps = harness.run(max_steps=2000)
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    # Each change of hands but the first of each is paid for by a token.
    assert harness.engine.scheduler.num_preemptions <= 3 + 3 * 6
    assert steps < 200


@pytest.mark.slow
def test_a_policy_sees_a_bounded_part_of_the_queue_in_which_every_tenant_appears() -> None:
    seen: list[PolicyContext] = []

    class Watching(Arrival):
        def admission_order(
            self, waiting: Sequence[SequenceView], context: PolicyContext
        ) -> Sequence[SequenceView]:
            seen.append(context)
            assert waiting == context.waiting
            return super().admission_order(waiting, context)

    weights = [TenantConfig(name="small", weight=3.0)]
    harness = make(Watching(), lanes=1, tenants=weights)
    for i in range(MAX_VIEWS + 500):
        harness.submit(f"{i}", tenant="big", max_tokens=1)
    small = [harness.submit(f"s{i}", tenant="small", max_tokens=1) for i in range(3)]
    harness.step()
    (context,) = seen
    assert len(context.waiting) == MAX_VIEWS
    assert sum(view.tenant == "small" for view in context.waiting) == len(small)
    assert context.tenants["small"].weight == 3.0
    assert context.tenants["big"].num_waiting == MAX_VIEWS + 500
    assert harness.engine.scheduler.policy.num_errors == 0
    harness.run()
    assert all(r.finish() is not None for r in small)


def test_left_out_decodes_come_back_after_a_bounded_number_of_steps() -> None:
    class Unfair(Arrival):
        def decodes(
            self,
            decoding: Sequence[SequenceView],
            prefilling: Sequence[SequenceView],
            context: PolicyContext,
        ) -> Sequence[SequenceView]:
            return ()

    harness = make(Unfair(), lanes=2, max_prefill_tokens_while_decoding=8)
    stream = harness.submit("a", max_tokens=12)
    harness.step()
    long = harness.submit("b" * 100, max_tokens=2)
    lengths: list[int] = []
    while long.text() == "":
        harness.step()
        lengths.append(len(stream.deltas))
    assert lengths[-1] > lengths[0] >= 1, "the stream stood still"
    harness.run()
    assert stream.traces()[0].num_deferred_steps > 4
    assert [r.text() for r in (stream, long)] == [truth(harness, r) for r in (stream, long)]


# --------------------------------------------------------------------------- the length of a step


@pytest.mark.parametrize("target_s", [0.05, 0.2])
def test_prompts_are_cut_so_that_a_step_takes_as_long_as_it_should(target_s: float) -> None:
    runtime = ScriptedRuntime(lanes=4, context_length=2000)
    harness = EngineHarness(
        Arrival(),
        runtime=runtime,
        scheduler=SchedulerConfig(
            target_step_s=target_s,
            max_num_batched_tokens=512,
            max_prefill_tokens_while_decoding=512,
        ),
        step_s=0.0,
    )
    took: list[float] = []

    def compute(step: object) -> None:
        seconds = 0.01 + 0.001 * len(step.token_ids)  # type: ignore[attr-defined]
        took.append(seconds)
        harness.fake_clock.advance(seconds)

    runtime.before_step = compute
    requests = [harness.submit(letter * 1500, max_tokens=20) for letter in "wxyz"]
    harness.run()
    assert took[0] > target_s, "nothing was known of the first step"
    settled = [seconds for seconds in took[6:] if seconds > 0.015]
    assert statistics.median(settled) == pytest.approx(target_s, rel=0.1)
    # Three times as long at most, where that ends prompts and few wait for anything else.
    assert max(settled) <= 1.1 * 3 * target_s
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


def test_a_short_prompt_is_not_cut_for_a_little_rest() -> None:
    runtime = ScriptedRuntime(lanes=2, context_length=2000)
    harness = EngineHarness(
        Arrival(), runtime=runtime, scheduler=SchedulerConfig(target_step_s=0.05), step_s=0.0
    )
    runtime.before_step = lambda step: harness.fake_clock.advance(
        0.01 + 0.001 * len(step.token_ids)
    )
    harness.submit("y" * 500, max_tokens=1)
    harness.run()  # now costs are known: a step of 40 tokens takes 0.05 s
    short = harness.submit("a" * 55, max_tokens=1)
    harness.run()
    longer = harness.submit("b" * 75, max_tokens=1)
    harness.run()
    assert short.traces()[0].num_prefill_steps == 1
    assert longer.traces()[0].num_prefill_steps == 2


def test_a_waiting_request_knows_what_it_waits_behind() -> None:
    harness = make(lanes=1)
    harness.submit("runs", tenant="a", max_tokens=10)
    harness.step()
    harness.submit("one", tenant="a", max_tokens=7)
    harness.submit("two", tenant="b", max_tokens=5)
    last = harness.submit("three", tenant="b", max_tokens=5)
    harness.run()
    (trace,) = last.traces()
    assert (trace.running_at_arrival, trace.waiting_ahead, trace.waiting_ahead_own) == (1, 2, 1)
    assert trace.waiting_ahead_tokens == 3 + 7 + 3 + 5
    assert trace.admitted_by == "fcfs"
    assert trace.queue_s > 0
    assert trace.computed_tokens + trace.cached_tokens == trace.prompt_tokens == 5
    assert (trace.num_prefill_steps, trace.num_decode_steps) == (1, 4)


def test_what_is_computed_again_after_a_preemption_is_told_apart() -> None:
    class ForTheNewest(Arrival):
        def admission_order(
            self, waiting: Sequence[SequenceView], context: PolicyContext
        ) -> Sequence[SequenceView]:
            return sorted(waiting, key=lambda view: -view.sequence_id)

        def victims(
            self,
            candidate: SequenceView,
            running: Sequence[SequenceView],
            context: PolicyContext,
        ) -> Sequence[SequenceView]:
            return [view for view in running if view.sequence_id < candidate.sequence_id]

    spent: dict[str, list[int]] = {}

    class Accounting(ForTheNewest):
        def on_step(self, record: object) -> None:
            for item in record.scheduled:  # type: ignore[attr-defined]
                account = spent.setdefault(item.tenant, [0, 0, 0])
                account[0] += item.prefill
                account[1] += item.decode
                account[2] += item.recomputed

    harness = make(Accounting(), lanes=1)
    old = harness.submit("a" * 40, tenant="old", max_tokens=10)
    for _ in range(4):
        harness.step()
    new = harness.submit("b" * 10, tenant="new", max_tokens=5)
    harness.run()
    assert old.text() == truth(harness, old)
    assert new.text() == truth(harness, new)
    (trace,) = old.traces()
    assert [p.reason for p in trace.preemptions] == ["policy"]
    # 40 prompt tokens and 3 decodes had been computed; the rest of the 9 decodes came after.
    assert spent["old"] == [40, 9, 43]
    assert spent["new"] == [10, 4, 0]
    assert trace.recomputed_tokens == 43


def test_nobody_is_preempted_for_one_that_could_not_start_even_then() -> None:
    class ForTheNewest(Arrival):
        def victims(
            self,
            candidate: SequenceView,
            running: Sequence[SequenceView],
            context: PolicyContext,
        ) -> Sequence[SequenceView]:
            return [view for view in running if view.tenant == "low"]

    harness = make(ForTheNewest(), lanes=3, kv=300)
    low = harness.submit("a" * 60, tenant="low", max_tokens=20)
    harness.submit("b" * 150, tenant="high", max_tokens=20)
    for _ in range(2):
        harness.step()
    big = harness.submit("c" * 180, tenant="high", max_tokens=3)
    for _ in range(3):
        harness.step()
    assert running(harness) == ["low", "high"]
    small = harness.submit("d" * 100, tenant="high", max_tokens=3)
    harness.step()
    assert small.text() != "", "the low one's KV makes room for this one"
    harness.run()
    assert low.traces()[0].num_preemptions == 1
    assert [r.text() for r in (low, big, small)] == [truth(harness, r) for r in (low, big, small)]
