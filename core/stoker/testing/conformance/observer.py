"""The observer suite."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.errors import RequestCancelledError
from stoker.interfaces import Observer, PolicyContext, SchedulingPolicy
from stoker.testing.conformance.base import check, default_options, fail
from stoker.testing.conformance.descriptors import DescriptorConformance
from stoker.testing.conformance.effort import num_reachable, operations
from stoker.testing.conformance.policy_loads import quietly
from stoker.testing.conformance.subjects import ObserverUnderTest
from stoker.testing.harness import EngineHarness
from stoker.testing.scripted import ScriptedRuntime
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import (
    FinishReason,
    RequestRecord,
    ScheduledTokens,
    SequenceTrace,
    SequenceView,
    StepRecord,
)

__all__ = ["ObserverConformance"]

_METHODS = ("on_step", "on_finish", "on_refuse")
_ADVICE = (
    "An observer that raises is counted (stoker_observer_errors_total) and told nothing of it."
)
_MOST_NEW_OBJECTS = 500

Call = tuple[str, tuple[Any, ...]]
"""A method's name and its arguments."""


class ObserverConformance(DescriptorConformance):
    """Proves an observer right::

    class TestMine(ObserverConformance):
        @pytest.fixture
        def observer(self):
            (info,) = my_package.stoker_register_observers()
            return ObserverUnderTest(info=info)
    """

    kind = "observer"

    @pytest.fixture
    def observer(self) -> ObserverUnderTest:
        """What is under test: fill this in."""
        fail(
            f"{type(self).__name__} says nothing of the observer to test",
            "Override the fixture `observer`; it returns an ObserverUnderTest.",
        )

    @pytest.fixture
    def subject(self, observer: ObserverUnderTest) -> ObserverUnderTest:
        """The same, under the name that all suites know."""
        return observer

    @pytest.fixture
    def build(self, observer: ObserverUnderTest) -> Callable[[], Observer]:
        """Builds the observer, as a server does."""
        options = default_options(observer.info) if observer.options is None else observer.options
        factory: Callable[..., Observer] = observer.info.factory
        return factory if options is None else lambda: factory(options)

    def test_methods_are_plain_functions(self, build: Callable[[], Observer]) -> None:
        """A method is ``async``: nobody awaits it, so it would never run.

        To fix: write ``def``; hand what takes time to a thread or a queue of your own.
        """
        for name in _METHODS:
            method = getattr(type(build()), name)
            check(
                not inspect.iscoroutinefunction(method) and not inspect.isgeneratorfunction(method),
                f"{name} is async or a generator, but it is only called",
                "Write a plain `def`.",
            )

    def test_it_takes_whatever_happens(self, build: Callable[[], Observer]) -> None:
        """The observer raises: at a record with empty fields, an unknown model, or a name it did not expect.

        To fix: times and errors may be ``None``, models and tenants have any name, and a refused request may
        be of no model (an empty string).
        """

        @quietly
        @given(st.lists(_calls(), max_size=12))
        def run(calls: list[Call]) -> None:
            observer = build()
            for name, arguments in calls:
                before = msgspec.to_builtins(arguments)
                try:
                    returned = getattr(observer, name)(*arguments)
                except Exception as error:  # noqa: BLE001 - whatever it raises
                    fail(f"{name}{arguments} raised {error!r}", _ADVICE)
                check(returned is None, f"{name} returned {returned!r}; nobody takes it")
                check(
                    msgspec.to_builtins(arguments) == before,
                    f"{name} changed the record that it was given",
                    "Others are told with the same record: never write to it.",
                )

        run()

    def test_an_engine_that_works_and_fails(self, build: Callable[[], Observer]) -> None:
        """The observer fails in a real engine, beside another observer, or keeps that from being told.

        Among what it is told of: chunks, preemptions, aborts, cancelled requests, missed deadlines, failures.

        To fix: see ``test_it_takes_whatever_happens``.
        """
        other = _Listener()
        runtime = ScriptedRuntime(
            lanes=2, context_length=100, options=ScriptedOptions(kv_capacity_tokens=110)
        )
        harness = EngineHarness(_InOrder(), runtime=runtime, observers=[build(), other])
        requests = [harness.submit(f"request {i} " * 4, max_tokens=20) for i in range(6)]
        late = harness.submit("too late", queue_deadline_s=harness.clock() + 0.01)
        for _ in range(3):
            harness.step()
        harness.abort(requests[5])
        harness.cancel(requests[4], RequestCancelledError("cancelled by the suite"))
        faults = iter([True])
        runtime.before_step = lambda _: _fail_once(faults)
        harness.run()
        check(late.finish_reason is FinishReason.ERROR, "the suite's own load has changed")
        errors = harness.engine.reporter.num_observer_errors
        check(errors == 0, f"the observer failed {errors} times; the log says how", _ADVICE)
        told = sorted(record.request_id for record in other.finished)
        check(
            told == sorted(r.request.request_id for r in [*requests, late]) and other.num_steps > 0,
            f"the observer beside it was told of the ends of {told}",
        )

    def test_refusals_come_from_another_thread(self, build: Callable[[], Observer]) -> None:
        """The observer fails when it is told of steps and of refusals at the same time.

        To fix: ``on_refuse`` is called on the event loop's thread, the others on the engine's: guard what
        they share.
        """
        observer = build()
        refuse = partial(observer.on_refuse, "model", "tenant", "queue_full")
        tell = partial(observer.on_step, _step(0))
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(_repeat, action, 300) for action in (refuse, tell)]:
                error = done.exception()
                check(error is None, f"it raised {error!r}", _ADVICE)

    def test_effort_does_not_grow(self, build: Callable[[], Observer]) -> None:
        """The longer the server runs, the longer a step's record takes, or the more memory it costs.

        Operations and objects are counted, not seconds and bytes.

        To fix: count and add up instead of keeping records; bound what is kept (``deque(maxlen=...)``).
        """
        observer = build()
        efforts, sizes = [], []
        for number in range(1, 6001):
            observer.on_step(_step(number))
            observer.on_finish(_record(number))
            observer.on_refuse("model", "tenant", "queue_full")
            if number in (2000, 6000):
                efforts.append(operations(partial(observer.on_step, _step(number))))
                sizes.append(num_reachable(observer))
        check(
            efforts[1] <= 2 * efforts[0] + 50,
            f"a step's record costs {efforts[0]} operations after 2,000 records, {efforts[1]} after 6,000",
            "Add up as you go instead of going over the past.",
        )
        check(
            sizes[1] <= 1.5 * sizes[0] + _MOST_NEW_OBJECTS,
            f"{sizes[0]:,} objects hang on the observer after 2,000 records, {sizes[1]:,} after 6,000",
            "Keep no records, or at most a thousand.",
        )


class _InOrder(SchedulingPolicy):
    def admission_order(self, waiting: Any, context: PolicyContext) -> list[SequenceView]:
        return sorted(waiting, key=lambda view: (view.arrival_s, view.sequence_id))


class _Listener(Observer):
    """Takes note.

    Attributes:
        num_steps: Steps it was told of.
        finished: Sequences it was told of.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.finished: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.num_steps += 1

    def on_finish(self, record: RequestRecord) -> None:
        self.finished.append(record)


def _fail_once(faults: Any) -> None:
    if next(faults, False):
        raise RuntimeError("failed on purpose")


def _repeat(action: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        action()


def _step(number: int) -> StepRecord:
    return StepRecord(
        model="model",
        started_s=float(number),
        duration_s=0.01,
        runtime_s=0.008,
        num_prefill_tokens=4,
        num_decode_tokens=2,
        num_generated_tokens=2,
        num_running=2,
        num_waiting=1,
        num_preemptions=0,
        num_cache_queries=number,
        token_gaps_s=(0.01, 0.02),
        scheduled=[ScheduledTokens("tenant", 4, 2, 0, number)],
    )


def _record(number: int) -> RequestRecord:
    return RequestRecord(
        request_id=f"request-{number}",
        model="model",
        tenant="tenant",
        finish_reason=FinishReason.STOP,
        prompt_tokens=4,
        cached_tokens=0,
        completion_tokens=2,
        queue_s=0.1,
        time_to_first_token_s=0.2,
        total_s=0.5,
        num_preemptions=0,
    )


_names = st.sampled_from(["", "model", "org/model:Q4", 'quote"\\back', "zwölf", "x" * 300])
_seconds = st.sampled_from([0.0, 1e-9, 0.5, 1e6])
_counts = st.sampled_from([0, 1, 7, 10**9])


def _calls() -> st.SearchStrategy[Call]:
    steps = st.builds(
        StepRecord,
        model=_names,
        started_s=_seconds,
        duration_s=_seconds,
        runtime_s=_seconds,
        num_prefill_tokens=_counts,
        num_decode_tokens=_counts,
        num_generated_tokens=_counts,
        num_running=_counts,
        num_waiting=_counts,
        num_preemptions=_counts,
        token_gaps_s=st.lists(_seconds, max_size=3),
        scheduled=st.lists(
            st.builds(ScheduledTokens, _names, _counts, _counts, _counts, _counts), max_size=3
        ),
        num_drafts=_counts,
        accepted_per_position=st.lists(_counts, max_size=3),
    )
    finished = st.builds(
        RequestRecord,
        request_id=_names,
        model=_names,
        tenant=_names,
        finish_reason=st.sampled_from(FinishReason),
        prompt_tokens=_counts,
        cached_tokens=_counts,
        completion_tokens=_counts,
        queue_s=_seconds,
        time_to_first_token_s=st.none() | _seconds,
        total_s=_seconds,
        num_preemptions=_counts,
        error=st.none() | _names,
        error_code=st.none() | _names,
        trace=st.none()
        | st.builds(
            SequenceTrace,
            status=st.just("finished"),
            queue_s=_seconds,
            total_s=_seconds,
            prompt_tokens=_counts,
        ),
    )
    return st.one_of(
        st.tuples(st.just("on_step"), st.tuples(steps)),
        st.tuples(st.just("on_finish"), st.tuples(finished)),
        st.tuples(st.just("on_refuse"), st.tuples(_names, _names, _names)),
    )
