"""The bundled policies and those of the documentation under the suite."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import stoker_plugins
from stoker.testing import PolicyConformance, PolicyUnderTest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BUNDLED = {info.name: info for info in stoker_plugins.stoker_register_policies()}


def example(name: str, max_steps: int = 3000) -> PolicyUnderTest:
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (info,) = module.stoker_register_policies()
    return PolicyUnderTest(info=info, entry_module=path, max_steps=max_steps)


class TestBundled(PolicyConformance):
    @pytest.fixture(params=sorted(BUNDLED))
    def policy(self, request: pytest.FixtureRequest) -> PolicyUnderTest:
        return PolicyUnderTest(info=BUNDLED[request.param])


class TestLeastServed(PolicyConformance):
    @pytest.fixture
    def policy(self) -> PolicyUnderTest:
        return example("least_served")


class TestShortestPrompt(PolicyConformance):
    @pytest.fixture
    def policy(self) -> PolicyUnderTest:
        return example("shortest_prompt", max_steps=300)

    @pytest.mark.xfail(reason="in 20 lines there is no ageing: short prompts go first", strict=True)
    def test_nothing_starves(self, policy: PolicyUnderTest, build: Any) -> None:
        super().test_nothing_starves(policy, build)
