"""Policies with one mistake each, and which tests of the suite say so (run by test_catches.py)."""

from __future__ import annotations

import random
import time
from typing import Any, ClassVar

import pytest

from stoker import PolicyContext, PolicyInfo, SchedulingPolicy, SequenceView, StepRecord
from stoker.testing import PolicyConformance, PolicyUnderTest

Views = Any


def by_arrival(view: SequenceView) -> tuple[float, int]:
    return view.arrival_s, view.sequence_id


class InOrder(SchedulingPolicy):
    """Makes no mistake."""

    def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
        return sorted(waiting, key=by_arrival)


class Broken(PolicyConformance):
    """Base: ``Policy`` is what is broken, ``fails`` the tests that must say so, and no others."""

    Policy: ClassVar[type[SchedulingPolicy]] = InOrder
    fails: ClassVar[set[str]]

    @pytest.fixture
    def policy(self) -> PolicyUnderTest:
        info = PolicyInfo(api_version=1, name="broken", summary="Broken", factory=self.Policy)
        return PolicyUnderTest(info=info, entry_module="stoker_plugins", max_steps=200)


class TestNothingIsWrong(Broken):
    fails: ClassVar = set()


class TestDropsOne(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            return sorted(waiting, key=by_arrival)[: max(1, len(waiting) - 1)]

    fails: ClassVar = {
        "test_answers_are_valid",
        "test_every_request_of_a_load_is_served",
        "test_a_long_queue_is_served",
    }


class TestWritesIntoTheContext(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            context.tenants.pop(waiting[0].tenant, None)  # type: ignore[attr-defined]
            return super().admission_order(waiting, context)

    fails: ClassVar = {"test_nothing_is_mutated"}


class TestThrowsDice(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            order = super().admission_order(waiting, context)
            if len(order) > 1 and len({view.num_prompt_tokens for view in order}) > 3:
                # Else something might starve, by chance.
                random.SystemRandom().shuffle(order)
            return order

    fails: ClassVar = {
        "test_answers_are_deterministic",
        "test_the_same_load_gives_the_same_schedule",
    }


class TestLooksAtTheClock(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            late = time.monotonic() > 2e9
            return sorted(waiting, key=by_arrival, reverse=late)

    fails: ClassVar = {"test_answers_are_deterministic"}


class TestSharesItsBooks(Broken):
    class Policy(InOrder):
        seen: ClassVar[dict[str, int]] = {}

        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            for view in waiting:
                self.seen[view.tenant] = self.seen.get(view.tenant, 0) + 1
                if len(self.seen) > 100:
                    self.seen.clear()
            return sorted(waiting, key=lambda v: (-self.seen[v.tenant] % 5, *by_arrival(v)))

    fails: ClassVar = {
        "test_answers_are_deterministic",
        "test_the_same_load_gives_the_same_schedule",
    }


class TestStarvesTheLong(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            return sorted(waiting, key=lambda view: (view.num_prompt_tokens, *by_arrival(view)))

    fails: ClassVar = {"test_nothing_starves"}


class TestLetsEverybodyPass(Broken):
    class Policy(InOrder):
        def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
            return True

    fails: ClassVar = {"test_nothing_starves"}


class TestSearchesLists(Broken):
    class Policy(InOrder):
        def admission_order(self, waiting: Views, context: PolicyContext) -> Views:
            order: list[SequenceView] = []
            for view in sorted(waiting, key=by_arrival):
                if view not in order:
                    order.append(view)
            return order

    fails: ClassVar = {"test_a_long_queue_costs_little"}


class TestRemembersEverybody(Broken):
    class Policy(InOrder):
        def __init__(self) -> None:
            self.served: dict[str, int] = {}

        def on_step(self, record: StepRecord) -> None:
            for item in record.scheduled:
                self.served[item.tenant] = self.served.get(item.tenant, 0) + item.decode

    fails: ClassVar = {"test_state_stays_bounded"}


class TestTellsTales(Broken):
    class Policy(InOrder):
        def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
            return f"before {', '.join(sorted(context.tenants))}"

    fails: ClassVar = {"test_explanations_name_no_other_tenant"}


class TestGivesAwayMoreThanThereIs(Broken):
    class Policy(InOrder):
        def prefill_shares(self, prefilling: Views, budget: int, context: PolicyContext) -> Any:
            return {view.sequence_id: budget for view in prefilling}

    fails: ClassVar = {
        "test_answers_are_valid",
        "test_every_request_of_a_load_is_served",
    }


class TestNamesStrangers(Broken):
    class Policy(InOrder):
        def victims(self, candidate: SequenceView, running: Views, context: PolicyContext) -> Views:
            return [candidate]

    fails: ClassVar = {
        "test_answers_are_valid",
        "test_every_request_of_a_load_is_served",
    }


class TestIsAGenerator(Broken):
    class Policy(InOrder):
        def on_step(self, record: StepRecord) -> Any:
            yield record

    fails: ClassVar = {
        "test_methods_are_plain_functions",
        "test_answers_are_valid",
        "test_answers_are_deterministic",
    }
