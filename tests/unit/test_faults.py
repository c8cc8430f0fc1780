"""What each fault costs: a counter, at most the requests it hits, and never an innocent one's text."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from stoker import (
    Delta,
    FinishReason,
    Observer,
    RequestCancelledError,
    RequestRecord,
    SchedulingPolicy,
    StepInput,
    StepRecord,
    UnavailableError,
)
from stoker.config import CacheConfig, SchedulerConfig, TenantConfig
from stoker.engine.readers import ReaderLimits
from stoker.errors import DeadlineError, EngineError
from stoker.testing import (
    EngineHarness,
    Fault,
    FaultyPolicy,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    Submitted,
)
from stoker_plugins.fcfs import FirstComeFirstServed

METHODS = (
    *("admission_order", "preemption_order", "victims", "prefill_shares", "decodes"),
    *("admits", "may_pass", "explain", "on_step"),
)


class Records(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.ends: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.ends.append(record)


def truth(harness: EngineHarness, request: Submitted) -> str:
    runtime = harness.runtime
    inner = runtime.inner if isinstance(runtime, FaultyRuntime) else runtime
    assert isinstance(inner, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return inner.expected_text(tokens, request.request.sampling.max_tokens or 0)


def assert_served(harness: EngineHarness, requests: list[Submitted]) -> None:
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert {r.finish_reason for r in requests} <= {FinishReason.LENGTH}


def assert_idle(harness: EngineHarness) -> None:
    """Nothing waits, every lane is free, every table is empty."""
    engine = harness.engine
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.waiting_tokens, load.num_paused) == (0,) * 4
    assert load.kv_tokens_used == 0
    assert len(engine.scheduler.lanes._idle) == engine.scheduler.lanes.num_lanes
    assert not engine._sequences
    assert not engine._waiting._entries


# --------------------------------------------------------------------------- policies


def busy(policy: SchedulingPolicy, *observers: Observer) -> tuple[EngineHarness, list[Submitted]]:
    """An engine so short of lanes and KV that it asks its policy everything."""
    runtime = ScriptedRuntime(
        lanes=3, context_length=120, options=ScriptedOptions(kv_capacity_tokens=120)
    )
    harness = EngineHarness(
        policy,
        runtime=runtime,
        scheduler=SchedulerConfig(max_num_batched_tokens=24, max_prefill_tokens_while_decoding=8),
        observers=observers,
    )
    sizes = [(5, 40), (60, 20), (50, 30), (8, 12), (30, 25), (2, 9), (70, 10)]
    requests = [
        harness.submit(chr(97 + i) * prompt, max_tokens=output)
        for i, (prompt, output) in enumerate(sizes)
    ]
    return harness, requests


class Spoiler:
    """Spoils every answer of one method and counts them."""

    def __init__(self, method: str, spoil: Callable[[Any], Any]) -> None:
        self.method = method
        self.spoil = spoil
        self.num_spoilt = 0

    def __call__(self, method: str, honest: Callable[[], Any]) -> Any:
        if method != self.method:
            return honest()
        self.num_spoilt += 1
        return self.spoil(honest())


def raising(_: Any) -> Any:
    raise ZeroDivisionError("a bug in the policy")


def leaving(_: Any) -> Any:
    raise SystemExit(1)


@pytest.mark.parametrize("spoil", [raising, leaving])
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_raises_costs_one_error_a_call_and_nothing_else(
    method: str, spoil: Callable[[Any], Any]
) -> None:
    spoiler = Spoiler(method, spoil)
    records = Records()
    harness, requests = busy(FaultyPolicy(FirstComeFirstServed(), spoiler), records)
    harness.run(500)
    assert_served(harness, requests)
    assert_idle(harness)
    assert spoiler.num_spoilt > 0
    assert harness.engine.scheduler.policy.num_errors == spoiler.num_spoilt
    # The last on_step fails after its own record was made.
    late = method == "on_step"
    assert records.steps[-1].num_policy_errors == spoiler.num_spoilt - late
    assert harness.engine.num_runtime_errors == 0


def midway(answer: Any) -> Iterator[Any]:
    yield from list(answer)[:1]
    raise KeyError("in the middle of a generator")


class Lookalike(msgspec.Struct):
    """A view of a sequence that nobody has."""

    sequence_id: Any = -1


class Fickle:
    """Says another id whenever it is asked."""

    def __init__(self) -> None:
        self._ids = itertools.count(-1, -1)

    @property
    def sequence_id(self) -> int:
        return next(self._ids)


NO_ORDER: dict[str, Callable[[Any], Any]] = {
    "a number": lambda _: 3,
    "text": lambda _: "sequence 1, then 2",
    "foreign views": lambda answer: [*list(answer)[1:], Lookalike()],
    "unhashable ids": lambda _: [Lookalike([1])],
    "things": lambda _: [object()],
    "nothings": lambda _: [None],
    "fickle views": lambda _: [Fickle()],
    "endless": lambda _: itertools.repeat(Lookalike()),
    "huge": lambda _: [Lookalike(i) for i in range(-1, -10_000, -1)],
    "a generator that raises": midway,
}
NO_PERMUTATION = NO_ORDER | {
    "none": lambda _: None,
    "empty": lambda _: [],
    "one missing": lambda answer: list(answer)[1:],
    "doubled": lambda answer: [*answer, *answer],
    "endlessly the same": itertools.cycle,
}
NO_SHARES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda _: 3,
    "a list": lambda _: [1, 2, 3],
    "nothing": lambda _: {},
    "nan": lambda _: AnyKey(math.nan),
    "infinite": lambda _: AnyKey(math.inf),
    "text": lambda _: AnyKey("5"),
    "none": lambda _: AnyKey(None),
    "negative": lambda _: AnyKey(-1),
    "zero": lambda _: AnyKey(0),
}
NO_BOOL: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "text": lambda _: "no",
    "a list": lambda _: [],
    "nan": lambda _: math.nan,
}
NO_WORDS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "bytes": lambda _: b"because",
    "a list": lambda _: ["because"],
}
GARBAGE = {
    "admission_order": NO_PERMUTATION,
    "preemption_order": NO_PERMUTATION,
    "victims": NO_ORDER | {"none": lambda _: None},
    "decodes": NO_ORDER,
    "prefill_shares": NO_SHARES,
    "admits": NO_BOOL,
    "may_pass": NO_BOOL,
    "explain": NO_WORDS,
}


class AnyKey(dict[int, Any]):
    """The same share for everybody."""

    def __init__(self, share: Any) -> None:
        self.share = share

    def get(self, key: int, default: Any = None) -> Any:
        return self.share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"), [(method, kind) for method, kinds in GARBAGE.items() for kind in kinds]
)
def test_a_policy_that_returns_garbage_costs_one_error_a_call_and_nothing_else(
    method: str, kind: str
) -> None:
    spoil = GARBAGE[method][kind]
    # An honest "all of them" has no first one to leave out.
    honest = {"decodes": list, "victims": list}.get(method)
    spoiler = Spoiler(method, lambda answer: spoil(answer or (honest and honest())))
    harness, requests = busy(FaultyPolicy(FirstComeFirstServed(), spoiler))
    harness.run(500)
    assert_served(harness, requests)
    assert_idle(harness)
    assert spoiler.num_spoilt > 0
    assert harness.engine.scheduler.policy.num_errors == spoiler.num_spoilt


def test_shares_that_leave_somebody_out_and_odd_numbers_are_a_policys_right() -> None:
    def first_only(method: str, honest: Callable[[], Any]) -> Any:
        return AnyKey(2.9) if method == "prefill_shares" else honest()

    harness, requests = busy(FaultyPolicy(FirstComeFirstServed(), first_only))
    harness.run(2000)
    assert_served(harness, requests)
    assert harness.engine.scheduler.policy.num_errors == 0


def test_errors_of_a_policy_are_logged_once_and_then_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness, _ = busy(FaultyPolicy(FirstComeFirstServed(), Spoiler("may_pass", raising)))
    harness.run(500)
    lines = [r for r in caplog.records if r.name == "stoker.scheduler"]
    assert len(lines) == 1 + harness.engine.scheduler.policy.num_errors // 1000
    assert "FaultyPolicy.may_pass failed" in lines[0].getMessage()


@pytest.mark.parametrize("method", METHODS)
def test_a_slow_policy_is_timed_counted_and_warned_of(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow = itertools.count()
    harness: EngineHarness

    def spoil(name: str, honest: Callable[[], Any]) -> Any:
        if name == method:
            next(slow)
            harness.fake_clock.advance(1.0)
        return honest()

    records = Records()
    with caplog.at_level(logging.WARNING, "stoker.scheduler"):
        harness, requests = busy(FaultyPolicy(FirstComeFirstServed(), spoil), records)
        harness.run(500)
    assert_served(harness, requests)
    calls = next(slow)
    policy = harness.engine.scheduler.policy
    assert policy.num_slow_calls == calls > 0
    assert policy.num_errors == 0
    assert policy.spent_s == pytest.approx(calls)
    last = records.steps[-1]
    late = method == "on_step"  # it is called with the record
    assert last.num_slow_policy_calls == calls - late
    assert sum(step.policy_s for step in records.steps) == pytest.approx(calls - late)
    warnings = [r.getMessage() for r in caplog.records if r.name == "stoker.scheduler"]
    assert f"FaultyPolicy.{method} took 1.000 s" in warnings[0]
    assert len(warnings) <= 1 + harness.clock() // 60


# --------------------------------------------------------------------------- observers


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(1)])
def test_observers_that_raise_are_counted_and_cost_the_others_nothing(
    error: BaseException,
) -> None:
    class Broken(Observer):
        num_calls = 0

        def on_step(self, record: StepRecord) -> None:
            self.num_calls += 1
            raise error

        def on_finish(self, record: RequestRecord) -> None:
            self.num_calls += 1
            raise error

    broken, records = Broken(), Records()
    harness, requests = busy(FirstComeFirstServed(), broken, records)
    harness.run(500)
    assert_served(harness, requests)
    assert harness.engine.num_observer_errors == broken.num_calls
    assert len(records.ends) == len(requests)
    assert records.steps[-1].num_observer_errors == broken.num_calls - 1


# --------------------------------------------------------------------------- runtimes


def faulty(
    script: Callable[[StepInput], Fault | None] = lambda _: None,
    *observers: Observer,
    truncates: Callable[[int], bool] = lambda _: True,
    lanes: int = 4,
    **options: Any,
) -> EngineHarness:
    inner = ScriptedRuntime(lanes=lanes, context_length=300, options=ScriptedOptions(**options))
    runtime = FaultyRuntime(inner, script, truncates)
    return EngineHarness(FirstComeFirstServed(), runtime=runtime, observers=observers)


def errors_of(harness: EngineHarness) -> int:
    return harness.engine.num_runtime_errors


RAISING = (Fault.RAISE_BEFORE, Fault.RAISE_MIDWAY, Fault.RAISE_AFTER)
MISSHAPEN = (Fault.NO_LOGITS, Fault.FEW_ROWS, Fault.MANY_ROWS, Fault.NARROW, Fault.WIDE)


@pytest.mark.parametrize("truncation", ["any", "reset"])
@pytest.mark.parametrize("fault", [*RAISING, *MISSHAPEN])
def test_a_step_that_fails_for_one_sequence_fails_it_alone(fault: Fault, truncation: str) -> None:
    poison = ord("#")
    harness = faulty(
        lambda step: fault if poison in step.token_ids else None, truncation=truncation
    )
    good = [harness.submit(f"good {i}" * 5, max_tokens=30) for i in range(3)]
    for _ in range(5):
        harness.step()
    bad = harness.submit("bad # prompt", max_tokens=10)
    harness.run(300)
    assert_served(harness, good)
    last = bad.finish()
    assert last is not None
    assert isinstance(last.error, EngineError)
    assert bad.text() == ""
    assert_idle(harness)
    # The step that all were in, perhaps a second one, and the one that the culprit was in alone.
    assert 2 <= errors_of(harness) <= 3
    again = harness.submit("good 1", max_tokens=30)
    harness.run(300)
    assert_served(harness, [again])


@pytest.mark.parametrize("truncation", ["any", "reset"])
@pytest.mark.parametrize("fault", [*RAISING, *MISSHAPEN, Fault.NO_ROOM])
def test_a_step_that_fails_once_for_all_costs_nobody_anything(
    fault: Fault, truncation: str
) -> None:
    failures = iter([None] * 6 + [fault])
    records = Records()
    harness = faulty(lambda _: next(failures, None), records, truncation=truncation)
    requests = [harness.submit(f"prompt {i}", n=1 + i % 2, max_tokens=12) for i in range(6)]
    harness.run(300)
    assert_served(harness, requests)
    assert errors_of(harness) == (fault is not Fault.NO_ROOM)
    assert sum(s.num_generated_tokens for s in records.steps) == 9 * 12
    told = sum(s.num_preemptions for s in records.steps)
    assert told == harness.engine.scheduler.num_preemptions
    reasons = {p.reason for r in requests for t in r.traces() for p in t.preemptions}
    assert reasons <= {"failure", "no_room"}


@pytest.mark.parametrize("truncation", ["any", "reset"])
@pytest.mark.parametrize("fault", [*RAISING, *MISSHAPEN])
def test_a_runtime_that_fails_every_step_of_several_serves_them_one_by_one(
    fault: Fault, truncation: str
) -> None:
    harness = faulty(
        lambda step: fault if len(set(step.lanes.tolist())) > 1 else None, truncation=truncation
    )
    requests = [harness.submit(f"prompt {i}", max_tokens=12) for i in range(6)]
    harness.run(300)
    assert_served(harness, requests)
    assert_idle(harness)


@pytest.mark.parametrize("fault", [f for f in Fault if f is not Fault.INFINITE])
def test_a_runtime_that_always_fails_fails_every_request_and_recovers(fault: Fault) -> None:
    state: dict[str, Fault | None] = {"fault": fault}
    harness = faulty(lambda _: state["fault"])
    requests = [harness.submit(f"prompt {i}", n=2) for i in range(6)]
    harness.run(300)
    for request in requests:
        for index in range(2):
            last = request.finish(index)
            assert last is not None
            assert isinstance(last.error, EngineError)
            assert request.text(index) == ""
    assert_idle(harness)
    state["fault"] = None
    after = [harness.submit(f"prompt {i}") for i in range(6)]
    harness.run(300)
    assert_served(harness, after)


@pytest.mark.parametrize("fault", [Fault.NAN, Fault.INFINITE])
def test_logits_that_are_not_finite_end_who_they_were_for_at_that_token(fault: Fault) -> None:
    harness = faulty(lambda step: fault if 0 in step.lanes and len(step.lanes) == 1 else None)
    bad = harness.submit("the first takes lane 0", max_tokens=9)
    harness.step()
    good = harness.submit("another", max_tokens=3)
    harness.run(300)
    assert_served(harness, [good])
    last = bad.finish()
    assert last is not None
    assert isinstance(last.error, EngineError)
    assert "not finite" in str(last.error)
    assert len(bad.text()) == 4, "one of the first step, three beside the other one"
    assert truth(harness, bad).startswith(bad.text())


def test_no_room_while_a_failed_step_is_looked_into_preempts_and_loses_nobody() -> None:
    """The victim must not be computed any more, as if it still had its lane."""
    # The second time it evicts what the first victim left; the third time there is a second victim.
    no_room = [Fault.NO_ROOM] * 3
    faults = iter([None, None, Fault.RAISE_AFTER, *no_room])
    harness = faulty(lambda _: next(faults, None))
    requests = [harness.submit(f"prompt {i}", max_tokens=12) for i in range(4)]
    harness.run(300)
    assert_served(harness, requests)
    assert [r.records[0].num_preemptions for r in requests] == [0, 0, 1, 1]
    assert errors_of(harness) == 1


def test_one_that_never_finds_room_fails_in_the_end_although_the_policy_lets_it_yield() -> None:
    """It gets all of each step, yields, and is the next to be admitted: nobody would get anywhere."""

    class ItFirst(FirstComeFirstServed):
        def admission_order(self, waiting: Any, context: Any) -> Any:
            return sorted(waiting, key=lambda view: view.priority)

        def preemption_order(self, running: Any, context: Any) -> Any:
            return sorted(running, key=lambda view: view.priority)

        def prefill_shares(self, prefilling: Any, budget: int, context: Any) -> Any:
            first = min(prefilling, key=lambda view: view.priority)
            return {first.sequence_id: budget}

    poison = ord("#")
    inner = ScriptedRuntime(lanes=4, context_length=100)
    runtime = FaultyRuntime(inner, lambda step: Fault.NO_ROOM if poison in step.token_ids else None)
    harness = EngineHarness(ItFirst(), runtime=runtime)
    bad = harness.submit("#", priority=-1, max_tokens=9)
    good = [harness.submit(f"prompt {i}", max_tokens=9) for i in range(4)]
    harness.run(300)
    assert_served(harness, good)
    last = bad.finish()
    assert last is not None
    assert isinstance(last.error, EngineError)
    assert "cannot hold" in str(last.error)
    assert harness.engine.scheduler.policy.num_errors == 0
    assert_idle(harness)


@pytest.mark.slow
def test_kv_exhausted_in_decode_preempts_and_everybody_gets_their_text() -> None:
    records = Records()
    harness = faulty(lambda _: None, records, kv_capacity_tokens=300)
    requests = [harness.submit(f"{i}" * 60, max_tokens=120) for i in range(5)]
    harness.run(3000)
    assert_served(harness, requests)
    assert sum(s.num_preemptions for s in records.steps) == sum(
        r.num_preemptions for r in records.ends
    )
    assert {p.reason for r in requests for t in r.traces() for p in t.preemptions} == {"no_room"}
    assert errors_of(harness) == 0


@pytest.mark.parametrize("how", ["vanishes", "cancelled", "late", "shut down", "finishes"])
def test_a_truncate_that_fails_when_a_request_ends_costs_a_counter(how: str) -> None:
    """Without prefix reuse every end frees its lane."""
    works = {"truncate": True}
    runtime = FaultyRuntime(
        ScriptedRuntime(lanes=3, context_length=300), truncates=lambda _: works["truncate"]
    )
    harness = EngineHarness(
        FirstComeFirstServed(), runtime=runtime, cache=CacheConfig(prefix_reuse=False)
    )
    other = harness.submit("another", max_tokens=60)
    deadline_s = harness.clock() + 5.0
    request = harness.submit("ends while truncate fails", max_tokens=20, deadline_s=deadline_s)
    for _ in range(10):
        harness.step()
    works["truncate"] = False
    if how == "finishes":
        for _ in range(10):
            harness.step()
        assert_served(harness, [request])
    else:
        end_by(how, harness, request)
        assert request.finish() is not None
    failed = runtime.num_failed_truncations
    assert failed > 0
    assert errors_of(harness) == failed
    works["truncate"] = True
    after = [harness.submit(f"after {i}", max_tokens=5) for i in range(6)]
    harness.run(300)
    assert_served(harness, after if how == "shut down" else [*after, other])
    assert_idle(harness)
    assert errors_of(harness) == failed


def test_a_lane_that_cannot_be_freed_is_passed_over_until_it_can() -> None:
    stuck = {0}
    harness = faulty(truncates=lambda lane: lane not in stuck)
    requests = [harness.submit(f"prompt {i}", max_tokens=10) for i in range(9)]
    harness.run(300)
    assert_served(harness, requests)
    assert_idle(harness)
    assert errors_of(harness) > 0
    stuck.clear()
    requests = [harness.submit(f"other {i}", max_tokens=10) for i in range(9)]
    harness.run(300)
    assert_served(harness, requests)
    assert not harness.engine.scheduler.lanes._unknown


def test_when_no_lane_can_be_freed_newcomers_fail_and_who_runs_goes_on() -> None:
    works = {"truncate": True}
    harness = faulty(truncates=lambda _: works["truncate"])
    running = [harness.submit(f"prompt {i}", max_tokens=20) for i in range(2)]
    harness.step()
    works["truncate"] = False
    newcomer = harness.submit("too late", n=2)
    harness.run(300)
    assert_served(harness, running)
    for index in range(2):
        last = newcomer.finish(index)
        assert last is not None
        assert isinstance(last.error, EngineError)
    assert_idle(harness)
    works["truncate"] = True
    after = harness.submit("recovered")
    harness.run(300)
    assert_served(harness, [after])


def test_a_lane_that_cannot_be_brought_back_after_a_failed_step_fails_its_request_alone() -> None:
    faults = iter([None, None, Fault.RAISE_AFTER])
    harness = faulty(lambda _: next(faults, None), truncates=lambda lane: lane != broken)
    broken = -1
    requests = [harness.submit(f"prompt {i}", max_tokens=12) for i in range(4)]
    harness.step()
    broken = requests[2].sequences[0].lane
    harness.run(300)
    bad = requests.pop(2)
    assert_served(harness, requests)
    assert bad.finish_reason is FinishReason.ERROR
    assert len(bad.text()) == 2
    assert_idle(harness)


def test_a_tokenizer_that_raises_for_one_token_fails_who_sampled_it() -> None:
    harness = faulty()
    requests = [harness.submit(f"prompt {i}", max_tokens=30) for i in range(4)]
    texts = [truth(harness, r) for r in requests]
    # A letter that some write and others do not.
    letter = next(
        c for c in "zqxjkvbpgwyfmcuh" if 0 < sum(c in text for text in texts) < len(texts)
    )
    token_bytes = harness.engine._intake.token_text.token_bytes

    def broken(token: int) -> bytes:
        if token == ord(letter):
            raise IndexError("no such piece")
        return token_bytes(token)

    harness.engine._intake.token_text.token_bytes = broken
    harness.run(300)
    for request, text in zip(requests, texts, strict=True):
        last = request.finish()
        assert last is not None
        if letter in text:
            assert isinstance(last.error, EngineError)
            assert request.text() == text[: text.index(letter)]
            assert last.usage is not None
            assert last.usage.completion_tokens == sum(d.num_tokens for d in request.deltas)
        else:
            assert request.text() == text
    assert errors_of(harness) == sum(letter in text for text in texts)
    assert_idle(harness)


def test_a_reservation_that_cannot_be_met_now_takes_nobodys_lane() -> None:
    """What the protected hold is in the way: that others yield would not help."""
    runtime = ScriptedRuntime(
        lanes=4, context_length=190, options=ScriptedOptions(kv_capacity_tokens=200)
    )
    tenants = [TenantConfig(name=name, reserved_lanes=1) for name in ("alice", "bob")]
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, tenants=tenants)
    bob = harness.submit("b" * 100, tenant="bob", max_tokens=40)
    borrower = harness.submit("c" * 10, tenant="carol", max_tokens=30)
    harness.step()
    alice = harness.submit("a" * 100, tenant="alice", max_tokens=20)
    harness.run(300)
    assert_served(harness, [bob, borrower, alice])
    assert [r.records[0].num_preemptions for r in (bob, borrower, alice)] == [0, 0, 0]


# --------------------------------------------------------------------------- ends at every stage


def at_stage(stage: str) -> tuple[EngineHarness, Submitted, list[Submitted]]:
    """An engine with one request at a stage of its life, and others around it."""
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=2, context_length=200),
        scheduler=SchedulerConfig(max_num_batched_tokens=8),
        reader_limits=ReaderLimits(max_unread_tokens=4, timeout_s=1e9),
    )
    # What paused it would have been read by others; these read.
    others = [harness.submit("another", max_tokens=60)]
    deadline_s = harness.clock() + 10.0
    if stage == "queue":
        others.append(harness.submit("one more", max_tokens=60))
    request = harness.submit(
        "x" * 40, n=2 if stage == "half over" else 1, max_tokens=50, deadline_s=deadline_s
    )
    if stage == "half over":
        harness.engine._sequences[request][0].max_tokens = 2  # type: ignore[index]
    request.reads = stage not in ("paused", "paused and read")
    steps = {"queue": 3, "prefill": 3, "decode": 12, "paused": 25, "preempted": 12, "half over": 25}
    for _ in range(steps[stage]):
        harness.step()
    sequence = request.sequences[-1]
    if stage == "preempted":
        harness.engine.scheduler.preempt(sequence, "policy")
    (trace, *_) = (s.trace(harness.clock()) for s in request.sequences[::-1])
    status = {"queue": "waiting", "half over": trace.status}.get(stage, stage)
    assert trace.status == status
    return harness, request, others


STAGES = ("queue", "prefill", "decode", "paused", "preempted", "half over")


def end_by(how: str, harness: EngineHarness, request: Submitted) -> type[Exception] | None:
    """End it; returns the error that its reader must see, ``None`` for an abort."""
    if how == "vanishes":
        harness.abort(request)
        harness.abort(request)
        return None
    if how == "cancelled":
        harness.cancel(request, RequestCancelledError("through the API"))
        return RequestCancelledError
    if how == "late":
        harness.fake_clock.advance(11.0)
        harness.step()
        return DeadlineError
    shutdown = UnavailableError("the server is shutting down")
    harness._deliver(lambda outbox: harness.engine.abort_all(shutdown, outbox))
    return UnavailableError


@pytest.mark.parametrize("how", ["vanishes", "cancelled", "late", "shut down"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_request_ends_at_any_stage_at_once_and_alone(stage: str, how: str) -> None:
    harness, request, others = at_stage(stage)
    before = [request.text(i) for i in range(request.request.n)]
    ended = [request.finish(i) is not None for i in range(request.request.n)]
    error = end_by(how, harness, request)
    lasts = [request.finish(i) for i in range(request.request.n)]
    for index, last in enumerate(lasts):
        assert last is not None, "it ends at once"
        if ended[index]:
            assert last.finish_reason is FinishReason.LENGTH
        elif error is None:
            assert last.finish_reason is FinishReason.ABORT
        else:
            assert isinstance(last.error, error)
        assert truth(harness, request).startswith(request.text(index))
        assert request.text(index).startswith(before[index])
    assert len(request.records) == request.request.n
    assert len([d for d in request.deltas if d.finish_reason]) == request.request.n
    load = harness.engine.load()
    if how == "shut down":
        assert all(isinstance(_last(o).error, UnavailableError) for o in others)
    else:
        harness.run(500)
        assert_served(harness, others)
    assert load.num_paused == 0
    assert_idle(harness)
    # What comes after finds everything in order.
    after = harness.submit("x" * 40, max_tokens=20)
    harness.run(500)
    assert_served(harness, [after])


def _last(request: Submitted) -> Delta:
    last = request.finish()
    assert last is not None
    return last
