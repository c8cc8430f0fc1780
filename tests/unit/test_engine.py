"""The engine on the scripted runtime: batching changes nothing but the speed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import FinishReason, Observer, RequestRecord, StepInput, StepOutput, StepRecord
from stoker.config import CacheConfig, SchedulerConfig
from stoker.errors import DeadlineError, EngineError
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed


def make(*, lanes: int = 4, scheduler: SchedulerConfig | None = None, **options) -> EngineHarness:
    runtime = ScriptedRuntime(
        lanes=lanes, context_length=600, options=ScriptedOptions(**options) if options else None
    )
    return EngineHarness(FirstComeFirstServed(), runtime=runtime, scheduler=scheduler)


def truth(harness: EngineHarness, request: Submitted) -> str:
    sampling = request.request.sampling
    assert isinstance(harness.runtime, ScriptedRuntime)
    return harness.runtime.expected_text(
        list(request.request.prompt_token_ids), sampling.max_tokens or 0
    )


class Recorder(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.ends: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.ends.append(record)


def test_one_request_gets_the_models_text() -> None:
    harness = make()
    request = harness.submit("hello", max_tokens=20)
    harness.run()
    assert request.text() == truth(harness, request)
    assert len(request.text()) == 20
    last = request.finish()
    assert last is not None
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 20)


def test_many_requests_get_the_same_text_as_alone() -> None:
    harness = make(lanes=8)
    requests = [
        harness.submit(f"prompt number {i} " * (i % 25 + 1), max_tokens=5 + i) for i in range(40)
    ]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


def test_sequences_of_one_request_are_independent_streams() -> None:
    harness = make()
    request = harness.submit("tell me", n=3, max_tokens=12)
    harness.run()
    assert [request.text(i) for i in range(3)] == [truth(harness, request)] * 3
    assert len(request.records) == 3


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    lanes=st.integers(1, 5),
    budget=st.integers(5, 40),
    chunk=st.integers(1, 40),
    capacity=st.one_of(st.none(), st.integers(90, 300)),
    truncation=st.sampled_from(["any", "reset"]),
    data=st.data(),
)
def test_any_interleaving_of_arrivals_and_aborts(
    lanes: int, budget: int, chunk: int, capacity: int | None, truncation: str, data: st.DataObject
) -> None:
    """No lost, doubled or foreign token, no leaked lane, whatever arrives and leaves when."""
    runtime = ScriptedRuntime(
        lanes=lanes,
        context_length=80,
        options=ScriptedOptions(kv_capacity_tokens=capacity, end_every=23, truncation=truncation),
    )
    recorder = Recorder()
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime,
        scheduler=SchedulerConfig(
            max_num_batched_tokens=budget, max_prefill_tokens_while_decoding=chunk
        ),
        observers=[recorder],
    )
    requests: list[Submitted] = []
    aborted: set[tuple[int, int]] = set()
    shared = "the same beginning "
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit shared", "step", "step", "abort"]))
        if action.startswith("submit"):
            text = data.draw(st.text(st.characters(codec="ascii"), min_size=1, max_size=30))
            prompt = shared + text if action == "submit shared" else text
            n = data.draw(st.integers(1, 2))
            requests.append(harness.submit(prompt, n=n, max_tokens=data.draw(st.integers(1, 30))))
        elif action == "step":
            harness.step()
        elif requests:
            at = data.draw(st.integers(0, len(requests) - 1))
            unfinished = [
                i for i in range(requests[at].request.n) if requests[at].finish(i) is None
            ]
            aborted |= {(at, index) for index in unfinished}
            harness.abort(requests[at])
    harness.run()
    for at, request in enumerate(requests):
        expected = truth(harness, request)
        for index in range(request.request.n):
            text = request.text(index)
            assert expected.startswith(text)
            if (at, index) not in aborted:
                assert text == expected
                assert request.finish(index) is not None
    assert len(recorder.ends) == sum(request.request.n for request in requests)
    lanes_after = harness.engine.scheduler.lanes
    assert lanes_after.num_free == lanes
    assert lanes_after.used_tokens == 0
    load = harness.engine.load()
    assert (load.num_running, load.num_waiting, load.waiting_tokens) == (0, 0, 0)


def test_decodes_go_first_and_prefill_is_chunked_and_shared() -> None:
    recorder = Recorder()
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=8, context_length=1000),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_prefill_tokens_while_decoding=20),
        observers=[recorder],
    )
    streams = [harness.submit(f"s{i}", max_tokens=60) for i in range(3)]
    harness.step()
    long = [harness.submit(f"{i}" * 200, max_tokens=4, tenant=f"long-{i}") for i in range(2)]
    harness.run()
    mixed = [r for r in recorder.steps if r.num_prefill_tokens and r.num_decode_tokens >= 3]
    assert len(mixed) >= 19  # 400 prompt tokens at 20 a step, but the first step
    assert all(r.num_prefill_tokens <= 20 for r in mixed)
    shared = [{s.tenant: s.prefill for s in r.scheduled if s.prefill} for r in mixed]
    assert shared[0] == {"long-0": 20}, "it is the oldest, and no other is done sooner"
    assert all(stream.text() == truth(harness, stream) for stream in streams + long)
    # The streams got a token in every step in which the long prompts were computed.
    assert all(r.num_generated_tokens >= 3 for r in mixed)


def test_idle_lane_with_the_longest_common_prefix_is_taken_over() -> None:
    harness = make(lanes=3)
    first = harness.submit("system prompt A, long enough. question one")
    second = harness.submit("system prompt B, something else. question")
    harness.run()
    third = harness.submit("system prompt A, long enough. question two")
    harness.run()
    usage = third.finish()
    assert usage is not None
    assert usage.usage is not None
    assert usage.usage.cached_tokens == len("system prompt A, long enough. question ")
    assert [r.text() for r in (first, second, third)] == [
        truth(harness, r) for r in (first, second, third)
    ]
    again = harness.submit("system prompt B, something else. question")
    harness.run()
    last = again.finish()
    assert last is not None
    assert last.usage is not None
    assert last.usage.cached_tokens == len("system prompt B, something else. question") - 1


def test_prefix_reuse_can_be_switched_off() -> None:
    harness = EngineHarness(FirstComeFirstServed(), cache=CacheConfig(prefix_reuse=False))
    for _ in range(2):
        request = harness.submit("the very same prompt")
        harness.run()
    last = request.finish()
    assert last is not None
    assert last.usage is not None
    assert last.usage.cached_tokens == 0
    assert harness.engine.load().kv_tokens_retained == 0


def test_abort_frees_the_lane_at_once_in_queue_prefill_and_decode() -> None:
    harness = make(lanes=1, scheduler=SchedulerConfig(max_num_batched_tokens=8))
    running = harness.submit("x" * 20, max_tokens=50)
    queued = harness.submit("y", max_tokens=5)
    harness.step()  # prefill, a part of it
    assert harness.engine.load().num_running == 1
    harness.abort(queued)
    assert harness.engine.load().num_waiting == 0
    harness.abort(running)
    assert harness.engine.load().num_running == 0
    decoding = harness.submit("z", max_tokens=50)
    harness.step()
    harness.step()
    assert len(decoding.text()) == 2
    harness.abort(decoding)
    assert harness.engine.load().num_running == 0
    assert not harness.engine.has_work


def test_preempted_sequences_go_on_where_they_were() -> None:
    """KV memory for about two of four sequences: the others yield, and lose nothing."""
    recorder = Recorder()
    runtime = ScriptedRuntime(
        lanes=4, context_length=100, options=ScriptedOptions(kv_capacity_tokens=130)
    )
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, observers=[recorder])
    requests = [harness.submit(f"{i}" * 30, max_tokens=50) for i in range(4)]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert sum(r.num_preemptions for r in recorder.steps) > 0
    assert max(r.num_preemptions for r in recorder.ends) > 0


def test_a_step_that_fails_for_one_sequence_fails_that_one_alone() -> None:
    harness = make()
    poison = ord("#")

    def before_step(step: StepInput) -> None:
        if poison in step.token_ids:
            raise RuntimeError("poisoned token")

    assert isinstance(harness.runtime, ScriptedRuntime)
    harness.runtime.before_step = before_step
    good = [harness.submit(f"good {i}", max_tokens=10) for i in range(3)]
    harness.step()
    bad = harness.submit("bad # prompt", max_tokens=10)
    harness.run()
    assert bad.finish_reason is FinishReason.ERROR
    last = bad.finish()
    assert last is not None
    assert isinstance(last.error, EngineError)
    assert [r.text() for r in good] == [truth(harness, r) for r in good]
    assert harness.engine.num_runtime_errors > 0
    after = harness.submit("still serving")
    harness.run()
    assert after.text() == truth(harness, after)


@pytest.mark.parametrize("truncation", ["any", "reset"])
def test_a_step_that_fails_once_costs_nobody_anything(truncation: str) -> None:
    harness = make(truncation=truncation)
    requests = [harness.submit(f"prompt {i}", max_tokens=12) for i in range(4)]
    harness.step()
    harness.step()
    failures = iter([True])

    def before_step(step: StepInput) -> None:
        if next(failures, False):
            raise RuntimeError("once")

    assert isinstance(harness.runtime, ScriptedRuntime)
    harness.runtime.before_step = before_step
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]


def test_a_runtime_that_always_fails_fails_every_request_and_nothing_else() -> None:
    harness = make()

    def before_step(step: StepInput) -> None:
        raise RuntimeError("always")

    assert isinstance(harness.runtime, ScriptedRuntime)
    harness.runtime.before_step = before_step
    requests = [harness.submit(f"prompt {i}") for i in range(6)]
    harness.run()
    assert {r.finish_reason for r in requests} == {FinishReason.ERROR}
    harness.runtime.before_step = None
    after = harness.submit("recovered")
    harness.run()
    assert after.text() == truth(harness, after)


def test_logits_that_are_not_finite_fail_their_sequence_alone() -> None:
    class NaNs(ScriptedRuntime):
        def step(self, step: StepInput):  # type: ignore[no-untyped-def]
            output = super().step(step)
            lanes = step.lanes[step.wants_logits]
            output.logits[lanes == 0] = np.nan
            return output

    harness = EngineHarness(FirstComeFirstServed(), runtime=NaNs(lanes=2, context_length=100))
    bad = harness.submit("goes to lane 0")
    good = harness.submit("goes to lane 1")
    harness.run()
    assert bad.finish_reason is FinishReason.ERROR
    assert good.text() == truth(harness, good)


def test_deadlines_end_waiting_and_running_requests_with_a_clear_error() -> None:
    harness = make(lanes=1)
    now_s = harness.clock()
    running = harness.submit("runs", max_tokens=500, deadline_s=now_s + 0.055)
    waiting = harness.submit("waits", queue_deadline_s=now_s + 0.025)
    patient = harness.submit("is patient", max_tokens=3)
    harness.run()
    for request, where in ((running, "generated"), (waiting, "queue")):
        last = request.finish()
        assert last is not None
        assert last.finish_reason is FinishReason.ERROR
        assert isinstance(last.error, DeadlineError)
        assert where in str(last.error)
    assert truth(harness, running).startswith(running.text())
    assert len(running.text()) >= 4
    assert waiting.text() == ""
    assert patient.text() == truth(harness, patient)


def test_end_token_stops_unless_ignored() -> None:
    harness = make(end_every=7)
    stopped = harness.submit("a prompt", max_tokens=200)
    ignoring = harness.submit("a prompt", max_tokens=200, ignore_eos=True)
    harness.run()
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text() == truth(harness, stopped)
    last = ignoring.finish()
    assert last is not None
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert last.usage.completion_tokens == 200


def test_a_policy_is_told_what_every_step_cost_whom() -> None:
    class Accounting(FirstComeFirstServed):
        def __init__(self) -> None:
            self.spent: dict[str, list[int]] = {}

        def on_step(self, record: StepRecord) -> None:
            for item in record.scheduled:
                account = self.spent.setdefault(item.tenant, [0, 0])
                account[0] += item.prefill
                account[1] += item.decode

    policy = Accounting()
    harness = EngineHarness(policy)
    harness.submit("a" * 30, max_tokens=5, tenant="one")
    harness.submit("b" * 10, max_tokens=9, tenant="two")
    harness.run()
    # The first token of each comes out of its prefill.
    assert policy.spent == {"one": [30, 4], "two": [10, 8]}


def test_half_of_a_steps_prompt_tokens_are_the_oldests_and_half_go_to_who_is_done_soonest() -> None:
    recorder = Recorder()
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=8, context_length=1000),
        scheduler=SchedulerConfig(max_num_batched_tokens=40),
        cache=CacheConfig(share_in_flight=False),
        observers=[recorder],
    )
    for name, length in (("old", 500), ("long", 400), ("short", 30)):
        harness.submit("x" * length, max_tokens=2, tenant=name)
    harness.run()
    steps = [{s.tenant: s.prefill for s in r.scheduled if s.prefill} for r in recorder.steps]
    assert steps[0] == {"old": 20, "short": 20}
    assert steps[1] == {"old": 20, "short": 10, "long": 10}
    assert sum(step.get("old", 0) for step in steps) == 500
    assert {"old": 20, "long": 20} in steps or {"old": 20, "long": 19} in steps


@pytest.mark.parametrize(
    "kind", ["raises", "drops one", "invents one", "returns nothing", "bad victims", "bad shares"]
)
def test_a_policy_that_fails_costs_a_counter_and_nothing_else(kind: str) -> None:
    class Bad(FirstComeFirstServed):
        def admission_order(self, waiting, context):  # type: ignore[no-untyped-def]
            if kind == "raises":
                raise ZeroDivisionError
            if kind == "returns nothing":
                return None
            if kind == "drops one":
                return waiting[1:]
            return [*waiting[1:], waiting[-1]] if kind == "invents one" else waiting

        def victims(self, candidate, running, context):  # type: ignore[no-untyped-def]
            return [candidate] if kind == "bad victims" else ()

        def prefill_shares(self, prefilling, budget, context):  # type: ignore[no-untyped-def]
            return (
                {view.sequence_id: budget + 1 for view in prefilling} if "shares" in kind else None
            )

    harness = EngineHarness(Bad(), runtime=ScriptedRuntime(lanes=2, context_length=600))
    requests = [harness.submit(f"{i}" * 400, max_tokens=6) for i in range(7)]
    harness.run()
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert harness.engine.scheduler.policy.num_errors > 0


def test_a_runtime_that_has_no_room_for_a_single_request_says_so() -> None:
    class Full(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            return StepOutput(np.empty((0, self.info.vocab_size), np.float32), no_room=True)

    harness = EngineHarness(FirstComeFirstServed(), runtime=Full(lanes=2, context_length=100))
    requests = [harness.submit(f"request {i}") for i in range(3)]
    harness.run()
    for request in requests:
        last = request.finish()
        assert last is not None
        assert "cannot hold" in str(last.error)


def test_an_observer_that_raises_harms_nobody() -> None:
    class Broken(Observer):
        def on_step(self, record: StepRecord) -> None:
            raise ValueError("observer")

        def on_finish(self, record: RequestRecord) -> None:
            raise ValueError("observer")

    recorder = Recorder()
    harness = EngineHarness(FirstComeFirstServed(), observers=[Broken(), recorder])
    request = harness.submit("hello")
    harness.run()
    assert request.text() == truth(harness, request)
    assert recorder.steps
    assert recorder.ends
    assert harness.engine.num_observer_errors > 1
