"""The fixtures of the backend suite: one loaded model for all of its tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from stoker.interfaces import Backend, LoadSettings, Runtime
from stoker.testing.conformance.base import check, default_options, fail
from stoker.testing.conformance.descriptors import DescriptorConformance
from stoker.testing.conformance.driving import LaneDriver, Reference
from stoker.testing.conformance.subjects import BackendUnderTest

__all__ = ["BackendSuite", "load", "settings_of"]

_RUNTIME = pytest.StashKey[Runtime]()
_REFUSAL = pytest.StashKey[str]()
_REFERENCES = pytest.StashKey[list[Reference]]()
_MAX_PROMPT = 40


class BackendSuite(DescriptorConformance):
    """What the parts of the backend suite share."""

    kind = "backend"

    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        """What is under test: fill this in."""
        fail(
            f"{type(self).__name__} says nothing of the backend to test",
            "Override the fixture `backend`; it returns a BackendUnderTest.",
        )

    @pytest.fixture
    def subject(self, backend: BackendUnderTest) -> BackendUnderTest:
        """The same, under the name that all suites know."""
        return backend

    @pytest.fixture
    def build(self, backend: BackendUnderTest) -> Callable[[], Backend]:
        """Builds the backend."""
        return backend.info.factory

    @pytest.fixture
    def runtime(self, backend: BackendUnderTest, request: pytest.FixtureRequest) -> Runtime:
        """The loaded model, once for all tests of the class."""
        owner = request.node.getparent(pytest.Class)
        runtime: Runtime | None = owner.stash.get(_RUNTIME, None)
        if runtime is None:
            if refusal := owner.stash.get(
                _REFUSAL, ""
            ):  # large models are not tried again and again
                fail("the model was not loaded", refusal)
            try:
                runtime = owner.stash[_RUNTIME] = load(backend)
            except (Exception, pytest.fail.Exception) as error:
                owner.stash[_REFUSAL] = f"{type(error).__name__}: {error}"
                raise
            owner.addfinalizer(runtime.close)
        return runtime

    @pytest.fixture
    def driver(self, runtime: Runtime) -> LaneDriver:
        """Drives its lanes, which are empty."""
        if not runtime.info.capabilities.generates:
            pytest.skip("the model embeds and generates nothing (Capabilities.generates)")
        return LaneDriver(runtime)

    @pytest.fixture
    def references(
        self, backend: BackendUnderTest, driver: LaneDriver, request: pytest.FixtureRequest
    ) -> list[Reference]:
        """What each prompt is answered with alone, computed once."""
        owner = request.node.getparent(pytest.Class)
        found: list[Reference] | None = owner.stash.get(_REFERENCES, None)
        if found is None:
            found = [
                Reference.compute(driver, prompt, backend.num_tokens)
                for prompt in prompts(backend, driver.runtime)
            ]
            owner.stash[_REFERENCES] = found
        return found


def prompts(backend: BackendUnderTest, runtime: Runtime) -> list[list[int]]:
    """The prompts' tokens, cut to what lanes hold."""
    most = min(_MAX_PROMPT, (runtime.info.context_length - backend.num_tokens) // 2)
    encoded = [
        list(runtime.tokenizer.encode(text, add_special=True, parse_special=False))[:most]
        for text in backend.texts
    ]
    short = [text for text, tokens in zip(backend.texts, encoded, strict=True) if len(tokens) < 8]
    check(
        len(encoded) >= 2 and not short,
        f"the suite needs two texts of 8 tokens at least; these have fewer: {short}",
        "Give longer `texts`, or a longer context, to BackendUnderTest.",
    )
    return encoded


def settings_of(backend: BackendUnderTest, **changes: Any) -> LoadSettings:
    """The settings to load with; default options where there are none."""
    settings = msgspec.structs.replace(backend.settings, **changes)
    if settings.options is None:
        settings = msgspec.structs.replace(settings, options=default_options(backend.info))
    return settings


def load(backend: BackendUnderTest, **changes: Any) -> Runtime:
    """Load the model."""
    runtime = backend.info.factory().load(backend.model, settings_of(backend, **changes))
    check(
        isinstance(runtime, Runtime),
        f"load() returned a {type(runtime).__name__}",
        "Derive what it returns from stoker.Runtime: later versions may add methods.",
    )
    return runtime


def lanes_needed(driver: LaneDriver, count: int) -> None:
    """Skip the test if the runtime has fewer lanes."""
    if driver.info.num_lanes < count:
        pytest.skip(f"the runtime has {driver.info.num_lanes} lanes; this needs {count}")


def some(references: Sequence[Reference], count: int) -> list[Reference]:
    """So many references, the first ones again if there are fewer."""
    return [references[i % len(references)] for i in range(count)]
