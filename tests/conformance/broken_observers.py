"""Observers with one mistake each, and which tests of the suite say so (run by test_catches.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from stoker import Observer, ObserverInfo, RequestRecord, StepRecord
from stoker.testing import ObserverConformance, ObserverUnderTest


class Broken(ObserverConformance):
    """Base: ``Plugin`` is what is broken, ``fails`` the tests that must say so, and no others."""

    Plugin: ClassVar[type[Observer]]
    fails: ClassVar[set[str]]

    @pytest.fixture
    def observer(self) -> ObserverUnderTest:
        info = ObserverInfo(api_version=1, name="broken", summary="Broken", factory=self.Plugin)
        return ObserverUnderTest(info=info, entry_module="stoker_plugins")


class TestExpectsAFirstToken(Broken):
    class Plugin(Observer):
        total_s = 0.0

        def on_finish(self, record: RequestRecord) -> None:
            self.total_s += record.time_to_first_token_s  # type: ignore[operator]

    fails: ClassVar = {"test_it_takes_whatever_happens", "test_an_engine_that_works_and_fails"}


class TestKeepsRecords(Broken):
    class Plugin(Observer):
        def __init__(self) -> None:
            self.records: list[StepRecord] = []

        def on_step(self, record: StepRecord) -> None:
            self.records.append(record)

    fails: ClassVar = {"test_effort_does_not_grow"}


class TestGoesOverThePast(Broken):
    class Plugin(Observer):
        def __init__(self) -> None:
            self.past: list[float] = []
            self.mean = 0.0

        def on_step(self, record: StepRecord) -> None:
            self.past.append(record.duration_s)
            self.mean = sum(min(s, 1.0) for s in self.past) / len(self.past)

    fails: ClassVar = {"test_effort_does_not_grow"}


class TestEmptiesRecords(Broken):
    class Plugin(Observer):
        def on_step(self, record: StepRecord) -> None:
            record.scheduled.clear()  # type: ignore[attr-defined]

    fails: ClassVar = {"test_it_takes_whatever_happens"}


class TestIsAGenerator(Broken):
    class Plugin(Observer):
        def on_step(self, record: StepRecord) -> Any:
            yield record

    fails: ClassVar = {"test_methods_are_plain_functions", "test_it_takes_whatever_happens"}


class TestSharesOneObject(Broken):
    only: ClassVar[list[Observer]] = []

    @pytest.fixture
    def observer(self) -> ObserverUnderTest:
        class Mine(Observer):
            """Makes no other mistake."""

        single = Mine()
        info = ObserverInfo(api_version=1, name="broken", summary="Broken", factory=lambda: single)
        return ObserverUnderTest(info=info, entry_module="stoker_plugins")

    fails: ClassVar = {"test_factory_builds_what_it_says"}
