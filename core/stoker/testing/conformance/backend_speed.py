"""The backend suite: whether batching pays. A measurement, so it runs only when it is asked for."""

from __future__ import annotations

import time

import pytest

from stoker.testing.conformance.backend_base import BackendSuite, lanes_needed, some
from stoker.testing.conformance.base import check
from stoker.testing.conformance.driving import LaneDriver, Reference, Run
from stoker.testing.conformance.subjects import BackendUnderTest
from stoker.testing.pytest_plugin import SPEED_OPTION

__all__ = ["BackendSpeed"]

_ROUNDS = 5
_LEAST_GAIN = 0.8


class BackendSpeed(BackendSuite):
    """Decoding several lanes in a step must not be slower than one after another."""

    def test_batching_pays(
        self,
        backend: BackendUnderTest,
        driver: LaneDriver,
        references: list[Reference],
        request: pytest.FixtureRequest,
    ) -> None:
        """Steps over all lanes give clearly fewer tokens per second than steps over one.

        Rounds of both take turns, and the best of each counts, so that neighbours on the machine do not
        decide. Only a clear loss fails.

        To fix: compute the lanes of a step in one pass; look for a Python loop over lanes, for copies of
        whole KV memories, and at the number of threads.
        """
        if not request.config.getoption(SPEED_OPTION, default=False):
            pytest.skip(
                f"a measurement: run it with -p stoker.testing.pytest_plugin {SPEED_OPTION}"
            )
        lanes_needed(driver, 2)
        mine = some(references, driver.info.num_lanes)
        rates: dict[int, list[float]] = {1: [], len(mine): []}
        for _ in range(_ROUNDS):
            for count, measured in rates.items():
                measured.append(_tokens_per_s(driver, mine[:count], backend.num_tokens))
        one, many = (max(measured) for measured in rates.values())
        check(
            many >= _LEAST_GAIN * one,
            f"batching loses: {len(mine)} lanes give {many:.1f} tokens/s in the best of {_ROUNDS} rounds, "
            f"one lane gives {one:.1f}",
            "Compute all lanes of a step in one pass.",
        )


def _tokens_per_s(driver: LaneDriver, references: list[Reference], num_steps: int) -> float:
    """Tokens per second of steps that decode all of these at once."""
    for lane, one in enumerate(references):
        driver.truncate(lane, 0)
        driver.prefill(lane, one.prompt)
    started_s = time.perf_counter()
    for at in range(num_steps):
        driver.step(*(Run(lane, [one.tokens[at]]) for lane, one in enumerate(references)))
    return num_steps * len(references) / (time.perf_counter() - started_s)
