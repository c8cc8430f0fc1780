"""The policy suite."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.interfaces import MAX_VIEWS, PolicyContext, SchedulingPolicy, TenantShare
from stoker.testing.conformance.base import check, default_options, fail
from stoker.testing.conformance.descriptors import DescriptorConformance
from stoker.testing.conformance.effort import CountedView, num_reachable, operations
from stoker.testing.conformance.policy_loads import (
    TENANTS,
    Factory,
    Job,
    Load,
    Moment,
    crowds,
    jobs,
    moments,
    quietly,
)
from stoker.testing.conformance.subjects import PolicyUnderTest
from stoker.types import StepRecord

__all__ = ["PolicyConformance"]

_METHODS = (
    "admission_order", "preemption_order", "victims", "prefill_shares", "admits", "decodes", "may_pass",
    "explain", "on_step",
)  # fmt: skip
# Sorting grows by 8 x 10/7 from 128 to 1,024 views; looking at every pair by 64.
_MOST_GROWTH = 20.0
_MOST_NEW_OBJECTS = 200

# What may be preferred to a patient request, each of them coming without end.
_FLOODS = {
    "short prompts": Job(num_prompt=2, num_output=5),
    "long prompts": Job(num_prompt=60, num_output=5),
    "short answers": Job(num_output=1),
    "urgent priorities": Job(priority=-2),
    "near deadlines": Job(timeout_s=20.0),
    "another tenant's requests": Job(tenant=TENANTS[1]),
    "a third tenant's short requests": Job(tenant=TENANTS[2], num_prompt=2, num_output=2),
}
_PATIENT = Job(priority=2, num_prompt=40, num_output=9)


class PolicyConformance(DescriptorConformance):
    """Proves a scheduling policy right::

    class TestMine(PolicyConformance):
        @pytest.fixture
        def policy(self):
            (info,) = my_package.stoker_register_policies()
            return PolicyUnderTest(info=info)
    """

    kind = "policy"

    @pytest.fixture
    def policy(self) -> PolicyUnderTest:
        """What is under test: fill this in."""
        fail(
            f"{type(self).__name__} says nothing of the policy to test",
            "Override the fixture `policy`; it returns a PolicyUnderTest.",
        )

    @pytest.fixture
    def subject(self, policy: PolicyUnderTest) -> PolicyUnderTest:
        """The same, under the name that all suites know."""
        return policy

    @pytest.fixture
    def build(self, policy: PolicyUnderTest) -> Factory:
        """Builds the policy, as stoker does for each model."""
        options = default_options(policy.info) if policy.options is None else policy.options
        factory: Callable[..., SchedulingPolicy] = policy.info.factory
        return factory if options is None else lambda: factory(options)

    # ------------------------------------------------------------------ answers

    def test_methods_are_plain_functions(self, build: Factory) -> None:
        """A method is ``async``, or does not take what the core passes.

        To fix: write ``def``, with the arguments of ``stoker.SchedulingPolicy``.
        """
        for name in _METHODS:
            method = getattr(type(build()), name)
            check(
                not inspect.iscoroutinefunction(method) and not inspect.isgeneratorfunction(method),
                f"{name} is async or a generator, but it is called and its answer used at once",
                "Write a plain `def` that returns.",
            )

    def test_answers_are_valid(self, build: Factory) -> None:
        """An ordering is no permutation, victims do not run, shares exceed the budget, or a method raises.

        Each answer is checked as the engine does it, which would count an error and fall back to arrival
        order.

        To fix: return all the views that were given, each once (``victims``, ``decodes``: some of them).
        """

        @quietly
        @given(st.lists(moments(), min_size=1, max_size=3))
        def run(history: list[Moment]) -> None:
            policy = build()
            for moment in history:
                for name, answer in _answers(policy, moment):
                    _check_answer(name, answer, moment)

        run()

    def test_nothing_is_mutated(self, build: Factory) -> None:
        """The policy changes what it was given: views, the context, the tenants, a record.

        To fix: sort copies (``sorted``), and keep books in the policy itself.
        """

        @quietly
        @given(moments())
        def run(moment: Moment) -> None:
            before = _copy(moment)
            for name, _ in _answers(build(), moment):
                check(
                    _copy(moment) == before,
                    f"{name} changed what it was given",
                    "Views and contexts are shared: never write to them.",
                )

        run()

    def test_answers_are_deterministic(
        self, build: Factory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two instances with the same history answer differently: by chance, a clock, or state they share.

        To fix: no randomness, the context's ``now_s`` instead of a clock, no mutable class attributes, and
        ties broken by ``arrival_s`` and ``sequence_id``.
        """

        @quietly
        @given(st.lists(moments(), min_size=1, max_size=4))
        def run(history: list[Moment]) -> None:
            first = _transcript(build(), history)
            with monkeypatch.context() as patch:
                for number, name in enumerate(("time", "monotonic", "perf_counter")):
                    patch.setattr(time, name, lambda number=number: 1e9 * (number + 2))
                second = _transcript(build(), history)
            for (name, one), (_, other) in zip(first, second, strict=True):
                check(
                    one == other,
                    f"{name} answered {one} once, and {other} to the same question of a new instance",
                    "Use no randomness, no clock but context.now_s, and no state outside the instance.",
                )

        run()

    # ------------------------------------------------------------------ on an engine

    def test_every_request_of_a_load_is_served(self, build: Factory) -> None:
        """A finite load does not end, somebody gets another text, or the policy failed in the engine.

        With preemption by the policy and, where memory is short, by the core.

        To fix: leave nobody out of ``admission_order``, let ``admits`` become true, and keep ``decodes`` and
        ``prefill_shares`` from putting everything off.
        """

        @settings(parent=quietly, max_examples=20)
        @given(jobs, st.integers(1, 4), st.sampled_from([None, 110, 180]))
        def run(load: list[Job], lanes: int, capacity: int | None) -> None:
            engine = Load(build(), lanes, capacity)
            ended = engine.play(load)
            check(
                engine.num_errors() == 0,
                f"the policy failed {engine.num_errors()} times; the log says how",
                "test_answers_are_valid says what the engine expects.",
            )
            check(
                ended,
                f"{len(load)} requests on {lanes} lanes did not end in twice the steps that they need",
                "Nobody may be put off for ever: look at admits, victims, decodes and prefill_shares.",
            )
            for submitted in engine.requests:
                prompt = list(submitted.request.prompt_token_ids)
                limit = submitted.request.sampling.max_tokens or 0
                check(
                    submitted.text() == engine.runtime.expected_text(prompt, limit),
                    f"{submitted.request.request_id} got another text than alone",
                )

        run()

    def test_the_same_load_gives_the_same_schedule(self, build: Factory) -> None:
        """The same requests at the same times are scheduled differently.

        To fix: see ``test_answers_are_deterministic``.
        """

        @settings(parent=quietly, max_examples=8)
        @given(crowds, st.integers(1, 4))
        def run(load: list[Job], lanes: int) -> None:
            schedules = []
            for _ in range(2):
                engine = Load(build(), lanes)
                engine.play(load)
                schedules.append(engine.schedule())
            check(
                schedules[0] == schedules[1],
                "two runs of the same load computed other tokens for others",
                "Use no randomness, no clock but context.now_s, and no state outside the instance.",
            )

        run()

    def test_nothing_starves(self, policy: PolicyUnderTest, build: Factory) -> None:
        """A request is never admitted while others, which the policy prefers, keep coming.

        Tried with short and long prompts, urgent ones, near deadlines, other tenants, and small ones that
        pass a large one which does not fit.

        To fix: let waiting count: order by something that time changes, or by a counter that serving
        changes, and let ``may_pass`` and ``admits`` change their answer.
        """
        starved = []
        for name, flood in _FLOODS.items():
            if not _is_admitted(Load(build(), step_s=0.1), flood, policy.max_steps):
                starved.append(name)
        # It needs nearly all of the memory, and some of the others always run.
        large, engine = replace(_PATIENT, num_prompt=88), Load(build(), 8, 100, step_s=0.1)
        if not _is_admitted(engine, Job(num_prompt=8), policy.max_steps, large):
            starved.append("small requests that fit where it does not")
        check(
            not starved,
            f"a request was not admitted within {policy.max_steps} steps of 0.1 s because of endless "
            f"{', '.join(starved)}",
            "Let waiting count (ageing), or, if that is the policy's purpose, say so with xfail.",
        )

    def test_a_long_queue_costs_little(self, build: Factory) -> None:
        """Ordering 1,024 waiting sequences takes far more than eight times the work for 128.

        Operations are counted, not seconds. While a policy thinks, nothing is computed.

        To fix: sort by a key; look nothing up in lists (``in``, ``index``, ``remove``).
        """
        efforts = {}
        for count in (MAX_VIEWS // 8, MAX_VIEWS):
            policy, views, context = build(), *_queue(count)
            policy.admission_order(views, context)  # what is done once
            efforts[count] = operations(partial(policy.admission_order, views, context))
        few, many = efforts.values()
        check(
            many <= _MOST_GROWTH * few + MAX_VIEWS,
            f"admission_order does {few:,} operations for {MAX_VIEWS // 8} waiting sequences and {many:,} "
            f"for {MAX_VIEWS}: {many / few:.0f} times as many",
            "Sort once by a key, and use dicts and sets instead of searching lists.",
        )

    def test_a_long_queue_is_served(self, build: Factory) -> None:
        """With more waiting than a policy is shown at once, something fails.

        To fix: order what is shown, and nothing else; whoever is not shown now is shown later.
        """
        engine = Load(build(), lanes=64)
        for number in range(MAX_VIEWS + 80):
            engine.submit(Job(tenant=TENANTS[number % 3], num_prompt=1, num_output=1))
        engine.harness.run(400)
        check(engine.num_errors() == 0, f"the policy failed {engine.num_errors()} times")

    def test_state_stays_bounded(self, build: Factory) -> None:
        """The policy keeps something of every tenant or sequence that was ever there.

        To fix: forget whoever is not in ``context.tenants``, ``waiting`` or ``running`` any more.
        """
        policy = build()
        engine, sizes = Load(policy, lanes=20), []
        for number in range(1, 3001):
            engine.submit(Job(tenant=f"tenant-{number}", num_prompt=1, num_output=1))
            if number % 20 == 0:
                engine.harness.run(100)
                engine.steps.clear()
                engine.requests.clear()
            if number in (1000, 3000):
                sizes.append(num_reachable(policy))
        few, many = sizes
        check(
            many <= 1.5 * few + _MOST_NEW_OBJECTS,
            f"{few:,} objects hang on the policy after 1,000 tenants came and went, {many:,} after 3,000",
            "Forget tenants and sequences that have left; a thousand may be remembered.",
        )

    def test_explanations_name_no_other_tenant(self, build: Factory) -> None:
        """``explain`` tells somebody who else uses the server.

        To fix: speak of "another tenant", or of numbers.
        """

        @settings(parent=quietly, max_examples=8)
        @given(crowds)
        def run(load: list[Job]) -> None:
            engine = Load(build())
            engine.play(load)
            for submitted in engine.requests:
                own = submitted.request.tenant
                for trace in submitted.traces():
                    named = [t for t in TENANTS if t != own and t in trace.admitted_by]
                    check(
                        not named,
                        f"{own} was told {trace.admitted_by!r}",
                        "An explanation is for its owner: never name another tenant.",
                    )

        run()


def _answers(policy: SchedulingPolicy, moment: Moment) -> Iterator[tuple[str, Any]]:
    """What a policy says to everything that the engine may ask in a moment, in the engine's order."""
    waiting, running, context = moment.waiting, moment.running, moment.context
    order = tuple(policy.admission_order(waiting, context))
    yield "admission_order", order
    candidate = waiting[0]
    yield "may_pass", policy.may_pass(candidate, context)
    if running:
        yield "admits", policy.admits(candidate, context)
        yield "victims", tuple(policy.victims(candidate, running, context))
        yield "preemption_order", tuple(policy.preemption_order(running, context))
        prefilling = tuple(v for v in running if v.num_computed_tokens < v.num_prompt_tokens)
        shares = policy.prefill_shares(prefilling, moment.budget, context)
        yield "prefill_shares", None if shares is None else dict(shares)
        chosen = policy.decodes(running, waiting[:1], context)
        yield "decodes", None if chosen is None else tuple(chosen)
    yield "explain", policy.explain(candidate, context)
    told: Callable[[StepRecord], Any] = policy.on_step
    yield "on_step", told(moment.record)


def _transcript(policy: SchedulingPolicy, history: list[Moment]) -> list[tuple[str, Any]]:
    """All answers to a history, with sequences as their ids."""
    return [(name, _ids(answer)) for moment in history for name, answer in _answers(policy, moment)]


def _ids(answer: Any) -> Any:
    if isinstance(answer, tuple):
        return [view.sequence_id for view in answer]
    return answer


def _check_answer(name: str, answer: Any, moment: Moment) -> None:
    advice = f"See stoker.SchedulingPolicy.{name}."
    given_views = moment.waiting if name == "admission_order" else moment.running
    if name in ("admission_order", "preemption_order"):
        got, want = sorted(_ids(answer)), sorted(view.sequence_id for view in given_views)
        check(got == want, f"{name} of {want} returned {got}, no permutation", advice)
    elif name in ("victims", "decodes") and answer is not None:
        got = _ids(answer)
        known = {view.sequence_id for view in given_views}
        check(
            len(set(got)) == len(got) and known.issuperset(got),
            f"{name} returned {got}; there are {sorted(known)}",
            advice,
        )
    elif name in ("admits", "may_pass"):
        check(isinstance(answer, bool), f"{name} returned {answer!r}, not a bool", advice)
    elif name == "explain":
        check(
            isinstance(answer, str) and "\n" not in answer and len(answer) <= 200,
            f"explain returned {answer!r}, not a line of at most 200 characters",
            advice,
        )
    elif name == "prefill_shares" and answer is not None:
        total = sum(answer.values())
        check(
            all(isinstance(n, int) and n >= 0 for n in answer.values())
            and 0 < total <= moment.budget,
            f"prefill_shares returned {answer} for a budget of {moment.budget} tokens",
            advice,
        )
    elif name == "on_step":
        check(answer is None, f"on_step returned {answer!r}; it is only told", advice)


def _copy(moment: Moment) -> Any:
    parts = (moment.waiting, moment.running, moment.context, moment.record)
    return msgspec.to_builtins(parts)


def _is_admitted(engine: Load, flood: Job, max_steps: int, patient: Job = _PATIENT) -> bool:
    """Whether a patient request gets a lane while others keep coming."""
    for _ in range(4):
        engine.submit(flood)
    request = engine.submit(patient)
    waiting = engine.harness.engine.scheduler.waiting
    for _ in range(max_steps):
        while len(waiting) < 5:
            # Of varying lengths, so that they do not all end at once.
            extra = len(engine.requests) * 7 % 5
            engine.submit(replace(flood, num_output=flood.num_output + extra))
        engine.harness.step()
        engine.steps.clear()
        if request.deltas or request.records:
            return True
    return False


def _queue(count: int) -> tuple[tuple[CountedView, ...], PolicyContext]:
    """So many waiting sequences of three tenants."""
    views = tuple(
        CountedView(
            sequence_id=number,
            request_id=f"request-{number}",
            tenant=TENANTS[number % 3],
            priority=number * 7 % 5 - 2,
            arrival_s=float(number * 37 % count),
            num_prompt_tokens=1 + number * 13 % 200,
            num_computed_tokens=0,
            num_output_tokens=0,
            max_tokens=50,
            num_preemptions=0,
            deadline_s=None if number % 2 else 2000.0 + number,
            waiting_since_s=float(number),
            expected_output_tokens=20,
        )
        for number in range(count)
    )
    return views, PolicyContext(
        now_s=1500.0,
        model="model",
        num_lanes=4,
        num_free_lanes=4,
        token_budget=512,
        kv_tokens_capacity=10_000,
        waiting=views,
        tenants={
            name: TenantShare(name=name, weight=1.0, num_running=0, num_waiting=count // 3)
            for name in TENANTS
        },
    )
