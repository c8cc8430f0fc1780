"""The bounded queue, on the real engine and a clock that only its steps move."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from stoker import (
    EngineSnapshot,
    LoadSnapshot,
    Observer,
    RateLimitError,
    Request,
    SamplingParams,
    SchedulingPolicy,
    ServedModel,
    ServerContext,
    TenantConfig,
    TenantLoad,
)
from stoker.config import AdmissionConfig, Config
from stoker.tenants import Tenants
from stoker.testing import EngineHarness, ScriptedRuntime
from stoker.types import StepInput
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.queue_limit import QueueLimit

BASE_S, TOKEN_S = 0.01, 0.001


class Served(ServerContext):
    """A server with one engine that is stepped by hand."""

    def __init__(self, *tenants: TenantConfig, lanes: int = 4, **admission: Any) -> None:
        self.config = Config(admission=AdmissionConfig(**admission))
        self.observers: Mapping[str, Observer] = {}
        self.tenants = Tenants(tenants)
        self.num_snapshots = 0
        self.lanes_are_free = True
        runtime = ScriptedRuntime(lanes=lanes)
        runtime.before_step = self.take_time
        self.harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, step_s=0.0)
        self.limit = QueueLimit(self, self.harness.clock)

    def take_time(self, step: StepInput) -> None:
        self.harness.fake_clock.advance(BASE_S + TOKEN_S * len(step.token_ids))

    def models(self) -> Sequence[ServedModel]:
        return []

    def load(self, model: str) -> LoadSnapshot:
        load = self.harness.engine.load()
        return load if self.lanes_are_free else msgspec.structs.replace(load, num_free_lanes=0)

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        return self.harness.engine.tenant_load(tenant)

    def snapshot(self, model: str) -> EngineSnapshot:
        self.num_snapshots += 1
        return self.harness.engine.snapshot()

    def policy(self, model: str) -> SchedulingPolicy:
        return FirstComeFirstServed()

    def tenant(self, name: str) -> TenantConfig:
        return self.tenants.get(name)

    @property
    def uptime_s(self) -> float:
        return 1.0

    def submit(
        self, count: int, tenant: str = "a", *, prompt: int = 10, max_tokens: int = 20
    ) -> None:
        for index in range(count):
            tokens = [index % 250, *range(100, 99 + prompt)]
            self.harness.submit(tokens, max_tokens=max_tokens, tenant=tenant)

    def warm_up(self) -> None:
        """Let it learn what steps cost and how long answers are."""
        self.submit(12)
        self.harness.run()

    async def refusal(self, request: Request) -> RateLimitError:
        with pytest.raises(RateLimitError) as refused:
            await self.limit.on_request(request)
        return refused.value

    async def until_let_in_s(self, request: Request) -> float:
        """Step on until the request is let in; how long that took."""
        began_s = self.harness.clock()
        for _ in range(100_000):
            try:
                await self.limit.on_request(request)
            except RateLimitError:
                self.harness.step()
            else:
                return self.harness.clock() - began_s
        raise AssertionError("it was never let in")


def ask(tenant: str = "a", *, prompt: int = 10, max_tokens: int | None = 20, n: int = 1) -> Request:
    return Request(
        request_id="r",
        model="model",
        prompt_token_ids=[1] * prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        n=n,
        tenant=tenant,
    )


async def test_a_queue_with_room_lets_requests_pass() -> None:
    served = Served(max_queue_requests=4)
    served.submit(3)
    request = ask()
    assert await served.limit.on_request(request) is request
    assert served.num_snapshots == 0


async def test_a_full_queue_refuses_by_requests() -> None:
    served = Served(max_queue_requests=4)
    served.lanes_are_free = False
    served.submit(3)
    error = await served.refusal(ask(n=2))
    assert error.status_code == 429
    assert error.code == "queue_full"
    assert "3 requests are waiting, of at most 4" in error.message
    assert error.retry_after_s == 1.0, "nothing was measured yet"


async def test_what_the_next_step_will_give_a_lane_does_not_count() -> None:
    """A burst into an idle server is posted between two steps: it does not wait, but for that step."""
    served = Served(max_queue_requests=1, max_queue_tokens=1, lanes=4)
    for _ in range(4):
        await served.limit.on_request(ask())
        served.submit(1)
    await served.refusal(ask(n=2))
    served = Served(max_queue_requests=2, lanes=4)
    served.submit(6)
    error = await served.refusal(ask())
    assert "2 requests are waiting, of at most 2" in error.message


async def test_a_full_queue_refuses_by_tokens() -> None:
    served = Served(max_queue_tokens=100)
    served.lanes_are_free = False
    served.submit(3)
    error = await served.refusal(ask())
    assert "90 tokens are waiting, of at most 100" in error.message


async def test_a_request_larger_than_a_bound_may_wait_alone() -> None:
    served = Served(
        TenantConfig(name="a", max_queue_requests=1, max_queue_tokens=5),
        max_queue_tokens=5,
        max_queue_requests=1,
    )
    served.lanes_are_free = False
    assert (await served.limit.on_request(ask(n=3))).n == 3
    served.submit(1)
    error = await served.refusal(ask(n=3))
    assert error.message.count("of at most") == 4


async def test_a_tenants_part_of_the_queue_is_bounded_by_itself() -> None:
    served = Served(
        TenantConfig(name="a", max_queue_requests=2), TenantConfig(name="b", max_queue_tokens=70)
    )
    served.submit(2, "a")
    served.submit(2, "b")
    error = await served.refusal(ask("a"))
    assert "2 requests of tenant 'a' are waiting, of at most 2" in error.message
    error = await served.refusal(ask("b"))
    assert "60 tokens of tenant 'b' are waiting, of at most 70" in error.message
    await served.limit.on_request(ask("b", max_tokens=None))
    await served.limit.on_request(ask("c"))
    served.tenants.replace([])  # read again
    await served.limit.on_request(ask("a"))


CASES: dict[str, tuple[dict[str, int], Request]] = {
    "by requests": ({"max_queue_requests": 20}, ask()),
    "by requests, several": ({"max_queue_requests": 20}, ask(n=8)),
    "by tokens": ({"max_queue_tokens": 700}, ask(max_tokens=190)),
    "by a tenant's requests": ({}, ask("few")),
    "by a tenant's tokens": ({}, ask("little", max_tokens=100)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [0, 7, 15, 31])
async def test_retry_after_is_between_half_and_twice_the_truth(case: str, steps: int) -> None:
    admission, request = CASES[case]
    served = Served(
        TenantConfig(name="few", max_queue_requests=4),
        TenantConfig(name="little", max_queue_tokens=150),
        **admission,
    )
    served.warm_up()
    chance = random.Random(steps)
    for _ in range(24):
        served.submit(1, chance.choice(["few", "little", "a"]), max_tokens=chance.randint(5, 40))
    for _ in range(steps):
        served.harness.step()
    served.submit(6, request.tenant)
    error = await served.refusal(request)
    assert error.retry_after_s is not None
    true_s = await served.until_let_in_s(request)
    slack_s = 2 * (BASE_S + 44 * TOKEN_S)
    assert true_s / 2 - slack_s <= error.retry_after_s <= 2 * true_s + slack_s


async def test_a_wait_that_is_too_long_is_refused_and_the_rest_of_it_told() -> None:
    served = Served(max_queue_s=1.0)
    await served.limit.on_request(ask())
    served.warm_up()
    served.submit(60, max_tokens=40)
    served.harness.step()
    error = await served.refusal(ask())
    assert error.code == "queue_too_slow"
    assert "at most 1 s are allowed" in error.message
    assert error.retry_after_s is not None
    true_s = await served.until_let_in_s(ask())
    assert error.retry_after_s == pytest.approx(true_s, rel=0.2)
    # Who is let in now waits about as long as is allowed.
    last = served.harness.submit([9] * 10, max_tokens=5)
    served.harness.run()
    assert last.records[0].queue_s == pytest.approx(1.0, rel=0.2)


async def test_many_refusals_share_one_look_at_the_queue() -> None:
    served = Served(max_queue_requests=20)
    served.warm_up()
    served.submit(24)
    for _ in range(50):
        await served.refusal(ask())
    assert served.num_snapshots == 1
    for _ in range(4):
        served.harness.step()
    await served.refusal(ask(n=20))
    assert served.num_snapshots == 2


async def test_a_burst_between_two_looks_counts_for_the_time_in_the_queue() -> None:
    served = Served(max_queue_s=3.0)
    served.warm_up()
    served.submit(4, max_tokens=20)
    served.harness.step()
    num_passed = 0
    for _ in range(500):
        try:
            await served.limit.on_request(ask())
        except RateLimitError:
            break
        served.submit(1)
        num_passed += 1
    assert served.num_snapshots == 1
    # Four lanes: four prompts of ten tokens, and twenty steps of base and four tokens.
    four_s = 40 * TOKEN_S + 20 * (BASE_S + 4 * TOKEN_S)
    assert num_passed == pytest.approx(4 * 3.0 / four_s, rel=0.3)
