"""The bundled middleware under the suite."""

from __future__ import annotations

from typing import Any

import pytest

import stoker_plugins
from stoker.testing import MiddlewareConformance, MiddlewareUnderTest, Refusal

pytestmark = pytest.mark.slow

BUNDLED = {info.name: info for info in stoker_plugins.stoker_register_middleware()}
POLICIES = {info.name: info for info in stoker_plugins.stoker_register_policies()}


def body(prompt: str, max_tokens: int = 5, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}


class TestLimits(MiddlewareConformance):
    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        def tenant(**limits: int) -> dict[str, Any]:
            return {"tenants": [{"name": "anonymous", **limits}]}

        return MiddlewareUnderTest(
            info=BUNDLED["limits"],
            # What is held for a request must be given back when it ends.
            config=tenant(max_concurrent_requests=12),
            refusals=[
                Refusal(
                    body=body("the second one"),
                    status=429,
                    code="rate_limit_exceeded",
                    before=[body("the first one")],
                    config=tenant(requests_per_minute=1),
                ),
                Refusal(
                    body=body("the second one"),
                    status=429,
                    code="concurrency_limit_exceeded",
                    during=[body("the first one", 200)],
                    config=tenant(max_concurrent_requests=1),
                ),
            ],
        )


class TestQueueLimit(MiddlewareConformance):
    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        return MiddlewareUnderTest(
            info=BUNDLED["queue-limit"],
            refusals=[
                Refusal(
                    body=body("no room for this"),
                    status=429,
                    code="queue_full",
                    during=[body(f"number {i}", 200) for i in range(5)],
                    config={"admission": {"max_queue_requests": 1}},
                )
            ],
        )


class TestDeadlineAdmission(MiddlewareConformance):
    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        return MiddlewareUnderTest(
            info=BUNDLED["deadline-admission"],
            config={"scheduler": {"policy": "deadline"}},
            policies=[POLICIES["deadline"]],
            refusals=[
                Refusal(
                    body=body("too much for so little time", 500, timeout=0.2),
                    status=400,
                    code="deadline_unreachable",
                    before=[body(f"so that costs are known {i}", 30) for i in range(3)],
                )
            ],
        )


class TestResponseCache(MiddlewareConformance):
    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        return MiddlewareUnderTest(info=BUNDLED["response-cache"])
