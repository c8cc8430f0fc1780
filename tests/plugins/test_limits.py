"""Limits of tenants: what is charged, given back, refused, and when it may come again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import (
    EngineSnapshot,
    FinishReason,
    LoadSnapshot,
    Observer,
    RateLimitError,
    Request,
    RequestRecord,
    SamplingParams,
    SchedulingPolicy,
    SequenceTrace,
    ServedModel,
    ServerContext,
    TenantConfig,
    TenantLoad,
    UnavailableError,
)
from stoker.config import AdmissionConfig, Config
from stoker.errors import ConfigError
from stoker.tenants import Tenants
from stoker.testing import FakeClock
from stoker_plugins.limits import Limits
from stoker_plugins.limits_counters import (
    Change,
    Counters,
    CountersError,
    LocalCounters,
    SharedCounters,
    make_counters,
)
from stoker_plugins.limits_options import LimitsOptions
from stoker_plugins.limits_windows import Window, duration


class Context(ServerContext):
    """A server with nothing but tenants."""

    def __init__(self, *tenants: TenantConfig, **admission: Any) -> None:
        self.config = Config(admission=AdmissionConfig(**admission))
        self.observers: Mapping[str, Observer] = {}
        self.tenants = Tenants(tenants)

    def tenant(self, name: str) -> TenantConfig:
        return self.tenants.get(name)

    def models(self) -> Sequence[ServedModel]:
        return []

    def load(self, model: str) -> LoadSnapshot:
        return LoadSnapshot()

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        return TenantLoad()

    def snapshot(self, model: str) -> EngineSnapshot:
        raise KeyError(model)

    def policy(self, model: str) -> SchedulingPolicy:
        raise KeyError(model)

    @property
    def uptime_s(self) -> float:
        return 1.0


def limits(
    *tenants: TenantConfig,
    clock: Callable[[], float] | None = None,
    counters: Counters | None = None,
    options: LimitsOptions | None = None,
    **admission: Any,
) -> Limits:
    clock = clock or FakeClock(6000.0)
    counters = counters or LocalCounters(clock)
    return Limits(Context(*tenants, **admission), options, counters=counters, clock=clock)


def ask(tenant: str = "a", *, prompt: int = 10, max_tokens: int | None = 90, n: int = 1) -> Request:
    return Request(
        request_id="r",
        model="m",
        prompt_token_ids=[1] * prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        n=n,
        tenant=tenant,
    )


def ended(request: Request, *generated: int, computed: int | None = None) -> list[RequestRecord]:
    """The records of a request's sequences."""
    trace = None
    if computed is not None:
        prompt = len(request.prompt_token_ids)
        trace = SequenceTrace(
            status="finished",
            queue_s=0.5,
            total_s=1.0,
            prompt_tokens=prompt,
            computed_tokens=computed,
        )
    return [
        RequestRecord(
            request_id="r",
            model="m",
            tenant=request.tenant,
            finish_reason=FinishReason.STOP,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=3,
            completion_tokens=tokens,
            queue_s=0.0,
            time_to_first_token_s=None,
            total_s=1.0,
            num_preemptions=0,
            trace=trace,
        )
        for tokens in generated
    ]


async def refusal(middleware: Limits, request: Request) -> RateLimitError:
    with pytest.raises(RateLimitError) as refused:
        await middleware.on_request(request)
    return refused.value


def left(request: Request, unit: str = "tokens") -> int:
    return int(request.response_headers[f"x-ratelimit-remaining-{unit}"])


# --------------------------------------------------------------------------- charging


async def test_without_limits_nothing_is_counted_or_said() -> None:
    middleware = limits(TenantConfig(name="other", requests_per_minute=1))
    for _ in range(100):
        request = ask()
        assert await middleware.on_request(request) is request
        assert request.response_headers == {}


async def test_requests_of_a_minute_are_bounded_and_come_back_when_said() -> None:
    clock = FakeClock(6000.0)
    middleware = limits(TenantConfig(name="a", requests_per_minute=3), clock=clock)
    for remaining in (2, 1, 0):
        request = ask()
        await middleware.on_request(request)
        assert request.response_headers["x-ratelimit-limit-requests"] == "3"
        assert left(request, "requests") == remaining
        clock.advance(5.0)
    error = await refusal(middleware, ask())
    assert error.code == "rate_limit_exceeded"
    assert "limit of 3 requests per minute: 3 used, 1 requested" in error.message
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "1m45s"
    # 45 s until the window ends, then a third of it must have slid out.
    assert error.retry_after_s == pytest.approx(65.0)
    clock.advance(64.99)
    await refusal(middleware, ask())
    clock.advance(0.01)
    await middleware.on_request(ask())


async def test_tokens_are_charged_as_asked_for_and_settled_as_used() -> None:
    middleware = limits(TenantConfig(name="a", tokens_per_minute=1000))
    first, second = ask(max_tokens=200, n=3), ask()
    await middleware.on_request(first)
    assert left(first) == 1000 - 610
    await middleware.on_finish(first, ended(first, 5, 7, 0))
    await middleware.on_request(second)
    # Cached or not, the prompt counts, and once for all three.
    assert left(second) == 1000 - (10 + 12) - 100
    assert second.response_headers["x-ratelimit-limit-tokens"] == "1000"
    assert second.response_headers["x-ratelimit-reset-tokens"] == "2m0s"


async def test_a_request_without_max_tokens_is_charged_a_guess_and_then_the_truth() -> None:
    options = LimitsOptions(default_output_tokens=100)
    middleware = limits(TenantConfig(name="a", tokens_per_minute=1000), options=options)
    first, second = ask(max_tokens=None), ask(max_tokens=None)
    await middleware.on_request(first)
    assert left(first) == 890
    await middleware.on_finish(first, ended(first, 500))
    await middleware.on_request(second)
    assert left(second) == 1000 - 510 - 110


async def test_what_was_refused_elsewhere_or_never_computed_is_not_paid_for() -> None:
    tenant = TenantConfig(name="a", tokens_per_minute=1000, requests_per_minute=10)
    middleware = limits(tenant)
    refused, starved, last = ask(), ask(), ask()
    await middleware.on_request(refused)
    await middleware.on_finish(refused, ())
    await middleware.on_request(starved)
    assert (left(starved), left(starved, "requests")) == (900, 9)
    await middleware.on_finish(starved, ended(starved, 0, computed=0))
    await middleware.on_request(last)
    assert (left(last), left(last, "requests")) == (900, 8)
    # A prompt that was computed counts although nothing came of it.
    await middleware.on_finish(last, ended(last, 0, computed=10))
    again = ask()
    await middleware.on_request(again)
    assert left(again) == 1000 - 10 - 100


async def test_nothing_is_charged_if_any_limit_has_no_room() -> None:
    tenant = TenantConfig(
        name="a", requests_per_minute=10, tokens_per_minute=150, tokens_per_day=10_000
    )
    middleware = limits(tenant)
    first, second, third = ask(), ask(), ask(prompt=1, max_tokens=9)
    await middleware.on_request(first)
    error = await refusal(middleware, second)
    assert "150 tokens per minute: 100 used, 100 requested" in error.message
    assert second.response_headers == {}
    assert error.headers["x-ratelimit-remaining-tokens"] == "50"
    assert error.headers["x-ratelimit-remaining-requests"] == "9"
    await middleware.on_request(third)
    assert left(third, "requests") == 8
    assert left(third) == 40


async def test_the_longest_wait_of_several_limits_is_told() -> None:
    clock = FakeClock(86400.0 * 3)
    tenant = TenantConfig(name="a", tokens_per_minute=100, tokens_per_day=150)
    middleware = limits(tenant, clock=clock)
    await middleware.on_request(ask())
    error = await refusal(middleware, ask())
    assert "150 tokens per day" in error.message
    assert error.headers["x-ratelimit-limit-tokens"] == "100", "which has the least left"
    assert error.retry_after_s == pytest.approx(86400 + 86400 / 2)
    clock.advance(86400 * 1.5)
    await middleware.on_request(ask())


async def test_what_can_never_fit_is_told_so() -> None:
    middleware = limits(TenantConfig(name="a", tokens_per_minute=50))
    error = await refusal(middleware, ask())
    assert error.status_code == 429
    assert error.code == "request_too_large_for_limit"
    assert error.retry_after_s is None
    assert error.headers["x-should-retry"] == "false"
    assert "may take 100 tokens" in error.message
    assert "the limit is 50 tokens per minute" in error.message
    await middleware.on_request(ask(prompt=10, max_tokens=40))


async def test_tenants_do_not_share_counts_and_star_stands_for_each_of_the_others() -> None:
    middleware = limits(
        TenantConfig(name="a", requests_per_minute=1), TenantConfig(name="*", requests_per_minute=2)
    )
    await middleware.on_request(ask("a"))
    await refusal(middleware, ask("a"))
    for name in ("b", "c"):
        await middleware.on_request(ask(name))
        await middleware.on_request(ask(name))
        await refusal(middleware, ask(name))


async def test_limits_that_change_apply_at_once_to_what_was_used() -> None:
    context = Context(TenantConfig(name="a", requests_per_minute=5))
    middleware = Limits(context, counters=LocalCounters(FakeClock(6000.0)))
    for _ in range(3):
        await middleware.on_request(ask())
    context.tenants.replace([TenantConfig(name="a", requests_per_minute=3)])
    await refusal(middleware, ask())
    context.tenants.replace([TenantConfig(name="a", requests_per_minute=4)])
    await middleware.on_request(ask())
    context.tenants.replace([])
    await middleware.on_request(ask())


async def test_a_refund_goes_to_the_window_that_was_charged() -> None:
    clock = FakeClock(6000.0)
    middleware = limits(TenantConfig(name="a", tokens_per_minute=1000), clock=clock)
    long = ask(prompt=10, max_tokens=890)
    await middleware.on_request(long)
    clock.advance(90.0)  # half of the charge has slid out
    between = ask()
    await middleware.on_request(between)
    assert left(between) == 1000 - 450 - 100
    await middleware.on_finish(long, ended(long, 90))
    after = ask()
    await middleware.on_request(after)
    assert left(after) == 1000 - 50 - 200
    # What is over long after its window does not count any more, either way.
    clock.advance(200.0)
    await middleware.on_finish(between, ended(between, 0))
    late = ask()
    await middleware.on_request(late)
    assert left(late) == 900


# --------------------------------------------------------------------------- requests at once


async def test_requests_at_once_are_bounded_per_tenant_and_in_all() -> None:
    clock = FakeClock()
    middleware = limits(
        TenantConfig(name="a", max_concurrent_requests=2), clock=clock, max_concurrent_requests=3
    )
    first, second, other = ask(), ask(), ask("b")
    await middleware.on_request(first)
    await middleware.on_request(second)
    error = await refusal(middleware, ask())
    assert error.code == "concurrency_limit_exceeded"
    assert "'a' has 2 requests under way, of at most 2" in error.message
    assert error.retry_after_s == 1.0
    await middleware.on_request(other)
    error = await refusal(middleware, ask("b"))
    assert "the server has 3 requests under way, of at most 3" in error.message
    clock.advance(4.0)
    await middleware.on_finish(first, ended(first, 1))
    await middleware.on_finish(first, ended(first, 1))
    third = ask()
    await middleware.on_request(third)
    # The oldest has run for 4 s as others did; then the ends are spread over as long.
    error = await refusal(middleware, ask())
    assert error.retry_after_s == pytest.approx(2.0)
    await middleware.on_finish(second, ended(second, 1))
    clock.advance(1.0)
    await middleware.on_request(ask())
    error = await refusal(middleware, ask())
    assert error.retry_after_s == pytest.approx(3.0)


async def test_a_place_is_free_again_when_a_limit_refuses() -> None:
    middleware = limits(
        TenantConfig(name="a", tokens_per_minute=100, max_concurrent_requests=1),
        max_concurrent_requests=1,
    )
    await refusal(middleware, ask(prompt=1000))
    request = ask()
    await middleware.on_request(request)
    await middleware.on_finish(request, ())
    await middleware.on_request(ask())


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_places_and_charges_add_up_whatever_happens(chance: random.Random) -> None:
    async def scenario() -> None:
        clock = FakeClock(6000.0)
        counters = LocalCounters(clock)
        tenants = [
            TenantConfig(
                name=name,
                requests_per_minute=20,
                tokens_per_minute=1500,
                max_concurrent_requests=4,
            )
            for name in "ab"
        ]
        middleware = limits(*tenants, clock=clock, counters=counters, max_concurrent_requests=6)
        inside: list[Request] = []
        used = {"a": 0, "b": 0}
        for _ in range(100):
            if chance.random() < 0.6:
                request = ask(
                    chance.choice("ab"),
                    prompt=chance.randint(1, 50),
                    max_tokens=chance.randint(1, 200),
                )
                with contextlib.suppress(RateLimitError):
                    inside.append(await middleware.on_request(request))
            elif inside:
                request = inside.pop(chance.randrange(len(inside)))
                records: list[RequestRecord] = []
                if chance.random() < 0.7:
                    records = ended(request, chance.randint(0, request.sampling.max_tokens or 0))
                    used[request.tenant] += records[0].completion_tokens
                    used[request.tenant] += len(request.prompt_token_ids)
                await middleware.on_finish(request, records)
            assert len(inside) <= 6
            for name in "ab":
                assert sum(request.tenant == name for request in inside) <= 4
        for request in inside:
            await middleware.on_finish(request, ())
        window = int(clock() // 60)
        for name in "ab":
            assert list(await counters.get([f"{name}/tpm/{window}"])) == [used[name]]
            assert used[name] <= 1500

    asyncio.run(scenario())


# --------------------------------------------------------------------------- arithmetic


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 10**6),
    st.floats(0, 59.99),
    st.integers(0, 2 * 10**6),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
)
def test_the_wait_is_exactly_as_long_as_needed(
    limit: int, into_s: float, previous: int, current: int, cost: int
) -> None:
    window = Window(limit, 60.0, into_s, previous, current)
    wait_s = window.wait_s(cost)
    if cost > limit:
        assert wait_s == float("inf")
        return
    assert 0 <= wait_s <= 120

    def later(seconds: float) -> Window:
        if into_s + seconds < 60:
            return window._replace(into_s=into_s + seconds)
        if into_s + seconds < 120:
            return Window(limit, 60.0, into_s + seconds - 60, current, 0)
        return Window(limit, 60.0, 0.0, 0, 0)

    assert later(wait_s + 1e-6).wait_s(cost) <= 1e-6
    if wait_s > 0.001:
        assert later(wait_s - 0.001).wait_s(cost) > 0
    assert window.remaining == 0 or window.wait_s(window.remaining) == 0
    assert window.wait_s(window.remaining + 1) > 0
    assert later(window.reset_s + 1e-6).used == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3661.25, "1h1m1.25s"),
        (86400 * 2, "48h0m0s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_counters_that_are_over_are_forgotten() -> None:
    clock = FakeClock()
    counters = LocalCounters(clock)
    for index in range(5000):
        await counters.add([Change(f"tenant-{index}", 1, 60.0)])
        clock.advance(1.0)
    assert len(counters._values) < 600


# --------------------------------------------------------------------------- shared storages


class Broken(LocalCounters):
    """Fails when it is told to."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.broken = True

    async def get(self, keys: Sequence[str]) -> Sequence[int]:
        if self.broken:
            raise CountersError("ConnectionError: nobody there")
        return await super().get(keys)

    async def add(self, changes: Sequence[Change]) -> Sequence[int]:
        await self.get([])
        return await super().add(changes)


@pytest.fixture
def stoker_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("stoker.limits")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


async def test_a_storage_that_fails_lets_pass_and_says_so_now_and_then(
    stoker_log: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    counters = Broken(clock)
    tenant = TenantConfig(name="a", requests_per_minute=1, max_concurrent_requests=5)
    middleware = limits(tenant, clock=clock, counters=counters)
    for _ in range(3):
        request = ask()
        await middleware.on_request(request)
        await middleware.on_finish(request, ended(request, 5))
    assert middleware.num_storage_errors == 3
    messages = {record.getMessage() for record in stoker_log.records}
    assert len(messages) == 1
    assert (
        "(ConnectionError: nobody there; 1 times so far); requests are let pass" in messages.pop()
    )
    clock.advance(61.0)
    await middleware.on_request(ask())
    assert "4 times so far" in stoker_log.records[-1].getMessage()
    counters.broken = False
    request = ask()
    await middleware.on_request(request)
    await refusal(middleware, ask())
    counters.broken = True
    await middleware.on_finish(request, ())  # it cannot be given back; nothing else happens
    assert middleware.num_storage_errors == 5


async def test_a_storage_that_fails_refuses_if_that_is_configured() -> None:
    clock = FakeClock()
    options = LimitsOptions(on_storage_error="refuse")
    tenant = TenantConfig(name="a", requests_per_minute=1, max_concurrent_requests=1)
    counters = Broken(clock)
    middleware = limits(tenant, clock=clock, counters=counters, options=options)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="storage does not answer") as refused:
            await middleware.on_request(ask())
        assert refused.value.code == "limits_unavailable"
    await middleware.on_request(ask("b"))  # who has no such limits needs no storage
    counters.broken = False
    await middleware.on_request(ask())


class Racing(LocalCounters):
    """Another server charges the same tenant between our look and our charge."""

    theirs = 0

    async def add(self, changes: Sequence[Change]) -> Sequence[int]:
        theirs, self.theirs = self.theirs, 0
        await super().add([change._replace(amount=theirs) for change in changes])
        return await super().add(changes)


async def test_servers_that_share_counters_never_exceed_a_limit_together() -> None:
    counters = Racing(FakeClock(6000.0))
    middleware = limits(TenantConfig(name="a", tokens_per_minute=250), counters=counters)
    counters.theirs = 200
    error = await refusal(middleware, ask())
    assert "250 tokens per minute: 200 used, 100 requested" in error.message
    request = ask(max_tokens=40)
    await middleware.on_request(request)
    assert left(request) == 0


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("async+nothing://localhost", "async[+]nothing: there is no such storage"),
        ("redis://user:secret@localhost", "redis would block the server; write async[+] before it"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(uri: str, words: str) -> None:
    pytest.importorskip("limits")
    with pytest.raises(ConfigError, match=f"plugins.limits.storage: {words}") as refused:
        make_counters(uri, 0.5)
    assert "secret" not in str(refused.value)


def test_the_default_storage_is_this_process() -> None:
    assert isinstance(make_counters(LimitsOptions().storage, 0.5), LocalCounters)


async def test_the_librarys_memory_storage_counts_like_ours() -> None:
    pytest.importorskip("limits")
    await behaves_like_counters(SharedCounters("async+memory://", 0.5))


async def behaves_like_counters(counters: Counters) -> None:
    assert list(await counters.get(["x", "y"])) == [0, 0]
    assert list(await counters.add([Change("x", 5, 60.0), Change("y", 1, 60.0)])) == [5, 1]
    assert list(await counters.add([Change("x", -3, 60.0)])) == [2]
    assert list(await counters.get(["y", "x"])) == [1, 2]


async def test_a_storage_that_does_not_answer_in_time_has_failed() -> None:
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"async+redis://127.0.0.1:{silent.getsockname()[1]}"
        async with connected(uri, FakeClock(), timeout_s=0.05) as counters:
            for attempt in (counters.get(["x"]), counters.add([Change("x", 1, 60.0)])):
                with pytest.raises(CountersError, match="no answer in time"):
                    await attempt


def test_every_option_stands_in_the_documentation_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "admission.md").read_text()
    for name in LimitsOptions.__struct_fields__:
        default = getattr(LimitsOptions(), name)
        shown = f'"{default}"' if isinstance(default, str) else default
        assert f"| `{name}` | `{shown}` |" in page
        assert f"{name}: " in (LimitsOptions.__doc__ or "")


# Runs where a redis-server is on PATH.
REDIS = shutil.which("redis-server")


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    assert REDIS is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        REDIS,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"async+redis://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def connected(
    uri: str, clock: Callable[[], float], timeout_s: float = 5.0
) -> AsyncIterator[SharedCounters]:
    counters = SharedCounters(uri, timeout_s, clock)
    try:
        yield counters
    finally:
        # The library has no way to say goodbye; a server keeps its connections until it ends.
        await counters._storage.bridge.storage.aclose()  # type: ignore[attr-defined]


@pytest.mark.skipif(REDIS is None, reason="no redis-server on PATH")
async def test_two_servers_share_limits_through_redis(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    clock = FakeClock(6000.0)
    tenant = TenantConfig(name="a", tokens_per_minute=1000, requests_per_minute=100)
    with redis_server(tmp_path) as (uri, process):
        async with connected(uri, clock) as one, connected(uri, clock) as two:
            await behaves_like_counters(one)
            first = limits(tenant, clock=clock, counters=one)
            second = limits(tenant, clock=clock, counters=two)
            request = ask(max_tokens=500)
            await first.on_request(request)
            other = ask()
            await second.on_request(other)
            assert left(other) == 1000 - 510 - 100
            assert left(other, "requests") == 98
            error = await refusal(second, ask(max_tokens=500))
            assert error.retry_after_s == pytest.approx(60 + 60 * (1 - 490 / 610))
            await first.on_finish(request, ended(request, 20))
            last = ask(max_tokens=500)
            await second.on_request(last)
            assert left(last) == 1000 - 30 - 100 - 510
            # All at once from both: together they stay within the limit.
            small = [(chosen, ask(prompt=1, max_tokens=49)) for chosen in (first, second) * 20]
            answers = await asyncio.gather(
                *(chosen.on_request(item) for chosen, item in small), return_exceptions=True
            )
            passed = [answer for answer in answers if isinstance(answer, Request)]
            assert all(isinstance(answer, Request | RateLimitError) for answer in answers)
            assert len(passed) <= 360 // 50
            # What was refused was given back.
            window = int(clock() // 60)
            assert list(await one.get([f"a/tpm/{window}"])) == [640 + 50 * len(passed)]
            process.kill()
            process.wait()
            assert isinstance(await first.on_request(ask()), Request)
            assert first.num_storage_errors == 1
