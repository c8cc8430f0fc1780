"""Requests with one prefix that arrive together: one computes it, the others wait for it and copy it."""

from __future__ import annotations

from typing import Any

import pytest

from stoker import Observer, StepRecord
from stoker.config import CacheConfig, SchedulerConfig
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed

SYSTEM = "s" * 900


class Prefilled(Observer):
    def __init__(self) -> None:
        self.num_tokens = 0

    def on_step(self, record: StepRecord) -> None:
        self.num_tokens += record.num_prefill_tokens


def make(
    lanes: int = 12, *, options: ScriptedOptions | None = None, **cache: Any
) -> tuple[EngineHarness, Prefilled]:
    seen = Prefilled()
    runtime = ScriptedRuntime(lanes=lanes, context_length=1200, options=options)
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime,
        observers=[seen],
        scheduler=SchedulerConfig(max_num_batched_tokens=256),
        cache=CacheConfig(**cache),
        step_s=0.0,
    )
    runtime.before_step = lambda step: harness.fake_clock.advance(
        0.01 + 0.001 * len(step.token_ids)
    )
    return harness, seen


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    return harness.runtime.expected_text(list(request.request.prompt_token_ids), 8)


def crowd(harness: EngineHarness, number: int = 24, **how: Any) -> list[Submitted]:
    return [
        harness.submit(SYSTEM + f"user {i:02}", max_tokens=8, **({"tenant": f"t{i}"} | how))
        for i in range(number)
    ]


@pytest.mark.parametrize("block", [1, 64])
def test_a_system_prompt_is_computed_once(block: int) -> None:
    harness, seen = make(options=ScriptedOptions(exact_block=block))
    requests = crowd(harness)
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    rest = 7 + (len(SYSTEM) % block)
    assert seen.num_tokens <= len(SYSTEM) + 24 * rest
    traces = [r.traces()[0] for r in requests]
    waited = [t for t in traces if t.shared_wait_s > 0]
    assert len(waited) == 23
    assert all("for a shared prefix" in t.admitted_by for t in waited)
    stats = harness.engine.scheduler.lanes.stats()
    assert stats.num_shared_waits == 23
    assert stats.shared_wait_s == pytest.approx(sum(t.shared_wait_s for t in traces))
    # Waiting is not slower than computing it with everybody else.
    alone, _ = make(share_in_flight=False, prefix_reuse=False)
    others = crowd(alone)
    alone.run()
    slowest = max(t.time_to_first_token_s or 0 for r in others for t in r.traces())
    assert all((t.time_to_first_token_s or 0) < slowest for t in traces)


def test_a_request_that_shares_nothing_passes() -> None:
    harness, _ = make(lanes=3)
    first, second, stranger = (
        harness.submit(SYSTEM + "a", max_tokens=8),
        harness.submit(SYSTEM + "b", max_tokens=8),
        harness.submit("x" * 50, max_tokens=8),
    )
    harness.step()
    scheduler = harness.engine.scheduler
    assert [s.request.request_id for s in scheduler.waiting.values()] == [second.request.request_id]
    harness.run()
    assert all(r.text() == truth(harness, r) for r in (first, second, stranger))


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_when_who_computes_it_goes_another_one_does(how: str) -> None:
    harness, seen = make()
    requests = crowd(harness, 4)
    harness.step()
    (leader,) = harness.engine.scheduler.running.values()
    if how == "abort":
        harness.abort(requests[0])
    else:
        harness.engine.scheduler.preempt(leader, "policy")
    harness.run()
    served = requests[1:] if how == "abort" else requests
    assert all(r.text() == truth(harness, r) for r in served)
    assert seen.num_tokens <= len(SYSTEM) + 4 * 8


def test_nobody_waits_for_one_that_does_not_move() -> None:
    class Mean(FirstComeFirstServed):
        """The first prompt gets nothing as long as there is anything else."""

        def prefill_shares(self, prefilling: Any, budget: int, context: Any) -> dict[int, int]:
            last = prefilling[-1]
            return {
                last.sequence_id: min(budget, last.num_prompt_tokens - last.num_computed_tokens)
            }

    harness = EngineHarness(
        Mean(),
        runtime=ScriptedRuntime(lanes=4, context_length=1200),
        scheduler=SchedulerConfig(max_num_batched_tokens=32),
    )
    leader = harness.submit(SYSTEM + "a", max_tokens=8)
    other = harness.submit("x" * 900, max_tokens=8)
    harness.step()
    follower = harness.submit(SYSTEM + "b", max_tokens=8)
    harness.run()
    assert all(r.text() == truth(harness, r) for r in (leader, other, follower))
    assert follower.traces()[0].shared_wait_s < 0.2


@pytest.mark.parametrize("why", ["off", "cannot copy", "other salts"])
def test_nobody_waits_where_it_is_of_no_use(why: str) -> None:
    options = ScriptedOptions(copy_prefix=why != "cannot copy")
    harness, _ = make(share_in_flight=why != "off", options=options)
    requests = [
        harness.submit(SYSTEM, max_tokens=8, cache_salt=str(i) if why == "other salts" else "")
        for i in range(4)
    ]
    harness.step()
    assert len(harness.engine.scheduler.running) == 4
    harness.run()
    assert all(r.text() == truth(harness, r) for r in requests)


def test_a_deadline_is_kept_while_waiting() -> None:
    harness, _ = make()
    first = harness.submit(SYSTEM + "a", max_tokens=8)
    late = harness.submit(SYSTEM + "b", max_tokens=8, queue_deadline_s=harness.clock() + 0.2)
    harness.run()
    assert first.text() == truth(harness, first)
    assert late.finish() is not None
    assert late.finish_reason == "error"
