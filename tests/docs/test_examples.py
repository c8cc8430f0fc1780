"""The second policy of the tutorial does what its page says."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.testing import EngineHarness, ScriptedRuntime, Submitted

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "least_served.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(lanes: int) -> EngineHarness:
    (info,) = load().stoker_register_policies()
    return EngineHarness(info.factory(), runtime=ScriptedRuntime(lanes=lanes, context_length=500))


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


def test_who_comes_second_gets_its_half_of_the_lanes_at_once() -> None:
    harness = make(lanes=4)
    for i in range(8):
        harness.submit(f"prompt {i}", tenant="one", max_tokens=40)
    harness.step()
    for i in range(8):
        harness.submit(f"prompt {i}", tenant="two", max_tokens=40)
    harness.step()
    running = harness.engine.scheduler.running

    def lanes() -> Counter[str]:
        return Counter(sequence.request.tenant for sequence in running.values())

    assert lanes() == {"one": 2, "two": 2}
    harness.run()
    assert harness.engine.scheduler.policy.num_errors == 0


def test_who_has_one_lane_less_takes_none() -> None:
    harness = make(lanes=3)
    for tenant in ("one", "one", "two", "two"):
        harness.submit("hello", tenant=tenant, max_tokens=20)
    harness.run()
    assert harness.engine.scheduler.num_preemptions == 0


def test_it_remembers_only_who_is_there() -> None:
    harness = make(lanes=2)
    for i in range(30):
        harness.submit("hello", tenant=f"tenant-{i}", max_tokens=3)
        harness.run()
    policy = harness.engine.scheduler.policy._policy
    assert len(policy.served) <= 2  # type: ignore[attr-defined]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    lanes=st.integers(1, 3),
    jobs=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 20), st.integers(0, 4)),
        min_size=1,
        max_size=15,
    ),
)
def test_every_request_gets_its_text_whatever_is_preempted(
    lanes: int, jobs: list[tuple[str, int, int]]
) -> None:
    harness = make(lanes)
    requests = []
    for number, (tenant, length, steps) in enumerate(jobs):
        requests.append(harness.submit(f"job {number} " * 3, tenant=tenant, max_tokens=length))
        for _ in range(steps):
            harness.step()
    harness.run(max_steps=2000)
    assert [r.text() for r in requests] == [truth(harness, r) for r in requests]
    assert harness.engine.scheduler.policy.num_errors == 0
