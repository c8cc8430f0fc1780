"""Identical requests under way: who computes, who reads, and what becomes of them when one goes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest

from stoker import (
    DeadlineError,
    Delta,
    EngineError,
    EngineSnapshot,
    FinishReason,
    LoadSnapshot,
    Middleware,
    Observer,
    Request,
    RequestCancelledError,
    RequestRecord,
    SamplingParams,
    SchedulingPolicy,
    ServedModel,
    ServerContext,
    SlowReaderError,
    StepInput,
    TenantConfig,
    TenantLoad,
    UnavailableError,
)
from stoker.chat_template import ChatTemplate
from stoker.config import AdmissionConfig, CacheConfig, Config, SchedulerConfig
from stoker.engine.client import EngineClient, RequestStream
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.engine.readers import ReaderLimits
from stoker.router import Call, Generation, RoutedModel, Router
from stoker.testing import ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed
from stoker_plugins.response_cache.middleware import ResponseCache
from stoker_plugins.response_cache.options import ResponseCacheOptions

OPEN = 1_000_000


class Context(ServerContext):
    """A server with one model."""

    def __init__(self, served: ServedModel) -> None:
        self.config = Config()
        self.observers: Mapping[str, Observer] = {}
        self._served = served

    def models(self) -> Sequence[ServedModel]:
        return [self._served]

    def load(self, model: str) -> LoadSnapshot:
        raise KeyError(model)

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        raise KeyError(model)

    def snapshot(self, model: str) -> EngineSnapshot:
        raise KeyError(model)

    def policy(self, model: str) -> SchedulingPolicy:
        raise KeyError(model)

    def tenant(self, name: str) -> TenantConfig:
        raise KeyError(name)

    @property
    def uptime_s(self) -> float:
        return 0.0


class Ledger(Middleware):
    """Notes how requests ended."""

    def __init__(self) -> None:
        self.records: dict[str, Sequence[RequestRecord]] = {}

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        self.records[request.request_id] = records


class Rig:
    """A router with the cache before a model that takes as many steps as it is allowed to."""

    def __init__(
        self, *, max_unread: int = 4096, reader_timeout_s: float = 60.0, **options: Any
    ) -> None:
        self.runtime = ScriptedRuntime(lanes=4, context_length=400)
        self.runtime.before_step = self._before_step
        self.failure: Exception | None = None
        self.allowed = OPEN
        self._moved = threading.Condition()
        self.engine = ModelEngine(
            "m",
            self.runtime,
            FirstComeFirstServed(),
            SchedulerConfig(),
            CacheConfig(),
            [],
            time.monotonic,
            reader_limits=ReaderLimits(max_unread, reader_timeout_s),
        )
        self.loop = EngineLoop("cpu", time.monotonic)
        self.loop.engines.append(self.engine)
        info = self.runtime.info
        served = ServedModel(
            model_id="m", reference="m", backend="b", created=0, size_bytes=0, info=info
        )
        self.ledger = Ledger()
        self.later_s = 0.0
        self.cache = ResponseCache(
            Context(served),
            ResponseCacheOptions(**options),
            clock=lambda: time.monotonic() + self.later_s,
        )
        template = ChatTemplate(info.chat_template, self.runtime.tokenizer)
        client = EngineClient(self.engine, self.loop)
        self.router = Router(
            routed=[RoutedModel(served, client, template, lambda: self.loop.heartbeat_s)],
            middleware=[self.ledger, self.cache],
            admission=AdmissionConfig(queue_timeout_s=0),
        )
        self.num_started = 0
        self.loop.start()

    def _before_step(self, step: StepInput) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self.allowed > 0)
            self.allowed -= 1
        if self.failure is not None:
            raise self.failure

    def allow(self, steps: int) -> None:
        """Let the model take so many steps from now on."""
        with self._moved:
            self.allowed = steps
            self._moved.notify_all()

    async def start(self, prompt: str = "hello", max_tokens: int = 20, **call: Any) -> Generation:
        self.num_started += 1
        sampling = SamplingParams(
            temperature=call.pop("temperature", 0.0),
            max_tokens=max_tokens,
            seed=call.pop("seed", None),
        )
        request_id = f"r{self.num_started}"
        return await self.router.generate(
            Call(request_id=request_id, model="m", prompt=prompt, sampling=sampling, **call)
        )

    def truth(self, generation: Generation) -> str:
        request = generation.request
        limit = request.sampling.max_tokens or 0
        return self.runtime.expected_text(list(request.prompt_token_ids), limit)

    async def stop(self) -> None:
        self.allow(OPEN)
        assert await asyncio.to_thread(self.loop.stop)

    async def idle(self) -> None:
        """Nothing is left of anything."""
        await eventually(lambda: not self.router.num_active and not self.cache.num_running)
        assert not self.cache._flights
        assert not self.engine._sequences
        assert not self.engine._waiting._entries


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


async def read(
    generation: Generation, batches: AsyncIterator[list[Delta]] | None = None
) -> list[str]:
    """The text of each sequence, or what ``batches`` has left of it; raises what ended it."""
    texts = [""] * generation.request.n
    ends = 0
    async for batch in batches or generation:
        for delta in batch:
            texts[delta.index] += delta.text
            if delta.error is not None:
                raise delta.error
            ends += delta.finish_reason is not None
    assert ends == generation.request.n
    return texts


def outcome(generation: Generation) -> str:
    return generation.request.response_headers["x-stoker-cache"]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    await made.stop()


# --------------------------------------------------------------------------- hits and misses


@pytest.mark.parametrize("n", [1, 3])
async def test_the_second_time_nothing_is_computed(rig: Rig, n: int) -> None:
    first = await rig.start(n=n, temperature=1.0, seed=7)
    texts = await read(first)
    await rig.idle()
    steps = rig.runtime.num_steps
    second = await rig.start(n=n, temperature=1.0, seed=7)
    assert await read(second) == texts
    assert (outcome(first), outcome(second)) == ("miss", "hit")
    assert "age" not in first.request.response_headers
    assert second.request.response_headers["age"] == "0"
    assert rig.runtime.num_steps == steps
    await rig.idle()
    records = rig.ledger.records["r2"]
    assert [record.request_id for record in records] == ["r2"] * n
    assert {record.finish_reason for record in records} == {FinishReason.LENGTH}
    assert {record.completion_tokens for record in records} == {20}
    assert {record.cached_tokens for record in records} == {len(first.request.prompt_token_ids)}
    trace = second.stream.traces()[0]
    assert (trace.status, trace.admitted_by) == (
        "finished",
        "its answer was stored in the response cache",
    )
    assert second.tracked.status() == "finished"


async def test_what_is_drawn_without_a_seed_is_left_alone(rig: Rig) -> None:
    for _ in range(2):
        generation = await rig.start(temperature=1.0)
        await read(generation)
        assert outcome(generation) == "skip"
        assert isinstance(generation.stream, RequestStream)
    assert rig.cache.counts["m"].queries == 0
    assert len(rig.cache.store) == 0


async def test_no_store_and_no_cache(rig: Rig) -> None:
    skipped = await rig.start(headers={"x-stoker-cache": "No-Store"})
    await read(skipped)
    assert outcome(skipped) == "skip"
    for header, wanted in (
        ("", "miss"),
        ("no-cache", "miss"),
        ("no-store, no-cache", "skip"),
        ("", "hit"),
    ):
        generation = await rig.start(headers={"x-stoker-cache": header})
        assert await read(generation) == [rig.truth(generation)]
        assert outcome(generation) == wanted
        await rig.idle()


async def test_an_answer_tells_its_age_and_is_computed_again_when_it_is_too_old() -> None:
    rig = Rig(ttl_s=100.0)
    await read(await rig.start())
    await rig.idle()
    for later_s, wanted in ((0.0, ("hit", "0")), (90.0, ("hit", "90")), (101.0, ("miss", None))):
        rig.later_s = later_s
        generation = await rig.start()
        assert await read(generation) == [rig.truth(generation)]
        assert (outcome(generation), generation.request.response_headers.get("age")) == wanted
        await rig.idle()
    await rig.stop()


async def test_what_cannot_be_compared_is_computed(rig: Rig, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **more: Any) -> bytes:
        raise TypeError("a set")

    monkeypatch.setattr("stoker_plugins.response_cache.middleware.request_key", refuse)
    generation = await rig.start()
    assert await read(generation) == [rig.truth(generation)]
    assert outcome(generation) == "skip"


# --------------------------------------------------------------------------- sharing


async def test_twenty_at_once_are_computed_once(rig: Rig) -> None:
    rig.allow(0)
    started = [await rig.start() for _ in range(20)]
    assert [outcome(g) for g in started] == ["miss"] + ["joined"] * 19
    rig.allow(OPEN)
    texts = await asyncio.gather(*(read(generation) for generation in started))
    assert texts == [[rig.truth(started[0])]] * 20
    assert rig.runtime.num_steps == 20  # the prefill gives the first token
    await rig.idle()
    assert rig.cache.counts["m"].joins == 19
    assert len(rig.ledger.records) == 20
    shared = rig.ledger.records["r5"][0]
    assert shared.cached_tokens == shared.prompt_tokens
    assert shared.completion_tokens == 20
    assert shared.trace is not None
    assert shared.trace.admitted_by == "an identical request was under way"


async def test_who_joins_late_gets_what_has_come_and_then_follows(rig: Rig) -> None:
    rig.allow(12)
    leader = await rig.start()
    reading = asyncio.ensure_future(read(leader))
    await eventually(lambda: rig.runtime.num_steps == 12)
    follower = await rig.start()
    batches = aiter(follower)
    first = await anext(batches)
    truth = rig.truth(leader)
    while sum(len(delta.text) for delta in first) < 12:
        first += await anext(batches)
    assert "".join(delta.text for delta in first) == truth[:12]
    rig.allow(OPEN)
    rest = [delta async for batch in batches for delta in batch]
    assert "".join(delta.text for delta in first + rest) == truth
    assert await reading == [truth]
    await rig.idle()


async def test_a_leader_that_goes_leaves_the_answer_to_the_others(rig: Rig) -> None:
    rig.allow(5)
    leader = await rig.start()
    follower = await rig.start()
    batches = aiter(leader)
    assert await anext(batches)
    leader.abort()
    await leader.stream.wait_until_over()
    assert leader.tracked.status() in {"aborted", "running"}
    rig.allow(OPEN)
    assert await read(follower) == [rig.truth(follower)]
    await rig.idle()
    assert rig.runtime.num_steps == 20
    assert rig.ledger.records["r1"][0].finish_reason is FinishReason.ABORT
    assert leader.tracked.status() == "aborted"
    assert rig.ledger.records["r2"][0].finish_reason is FinishReason.LENGTH


async def test_the_last_one_that_goes_ends_it_within_a_step(rig: Rig) -> None:
    rig.allow(3)
    started = [await rig.start(max_tokens=200) for _ in range(3)]
    await eventually(lambda: rig.runtime.num_steps == 3)
    for generation in started:
        generation.abort()
    later = await rig.start(max_tokens=200)
    assert outcome(later) == "miss", "what nobody wanted any more cannot be joined"
    later.abort()
    rig.allow(1)  # the step that may be under way
    await rig.idle()
    assert rig.runtime.num_steps <= 4
    assert {r.finish_reason for records in rig.ledger.records.values() for r in records} == {
        FinishReason.ABORT
    }
    assert len(rig.cache.store) == 0


async def test_a_cancelled_follower_is_told_and_nobody_else(rig: Rig) -> None:
    rig.allow(4)
    leader = await rig.start()
    follower = await rig.start()
    await eventually(lambda: rig.runtime.num_steps == 4)
    assert rig.router.cancel("r2", "anonymous")
    with pytest.raises(RequestCancelledError):
        await read(follower)
    rig.allow(OPEN)
    assert await read(leader) == [rig.truth(leader)]
    await rig.idle()
    assert follower.tracked.status() == "cancelled"
    assert rig.ledger.records["r2"][0].error_code == "request_cancelled"


async def test_a_cancelled_leader_is_told_and_nobody_else(rig: Rig) -> None:
    rig.allow(4)
    leader = await rig.start()
    follower = await rig.start()
    await eventually(lambda: rig.runtime.num_steps == 4)
    assert rig.router.cancel("r1", "anonymous")
    with pytest.raises(RequestCancelledError):
        await read(leader)
    rig.allow(OPEN)
    assert await read(follower) == [rig.truth(leader)]
    await rig.idle()
    assert rig.runtime.num_steps == 20
    assert leader.tracked.status() == "cancelled"


async def test_cancelling_the_only_one_cancels_it_in_the_engine(rig: Rig) -> None:
    rig.allow(4)
    leader = await rig.start(max_tokens=200)
    await eventually(lambda: rig.runtime.num_steps == 4)
    assert rig.router.cancel("r1", "anonymous")
    rig.allow(1)
    with pytest.raises(RequestCancelledError):
        await read(leader)
    await rig.idle()
    assert rig.ledger.records["r1"][0].error_code == "request_cancelled"
    assert rig.runtime.num_steps <= 5


async def test_a_more_urgent_one_does_not_wait_behind_a_less_urgent_one(rig: Rig) -> None:
    rig.allow(0)
    lazy = await rig.start(priority=5)
    urgent = await rig.start(priority=1)
    also = await rig.start(priority=3)
    assert [outcome(g) for g in (lazy, urgent, also)] == ["miss", "miss", "joined"]
    assert also.stream._answer is urgent.stream._answer  # type: ignore[attr-defined]
    rig.allow(OPEN)
    await asyncio.gather(*(read(generation) for generation in (lazy, urgent, also)))
    await rig.idle()


# --------------------------------------------------------------------------- tenants


@pytest.mark.parametrize(("isolation", "wanted"), [("tenant", "miss"), ("none", "hit")])
async def test_tenants_share_only_if_they_may(isolation: str, wanted: str) -> None:
    rig = Rig(isolation=isolation)
    await read(await rig.start(tenant="a"))
    await rig.idle()
    other = await rig.start(tenant="b")
    await read(other)
    assert outcome(other) == wanted
    await rig.idle()
    await rig.stop()


# --------------------------------------------------------------------------- slow readers


async def test_a_slow_leader_does_not_hold_up_its_follower() -> None:
    rig = Rig(max_unread=15)
    leader = await rig.start(max_tokens=200)
    batches = aiter(leader)
    begin = "".join(delta.text for delta in await anext(batches))  # and no more
    follower = await rig.start(max_tokens=200)
    assert await read(follower) == [rig.truth(leader)]
    (rest,) = await read(leader, batches)
    assert begin + rest == rig.truth(leader), "all of it is still there for it"
    await rig.idle()
    await rig.stop()


@pytest.mark.slow
async def test_readers_of_whom_none_reads_are_paused_and_dropped_like_a_single_one() -> None:
    rig = Rig(max_unread=15, reader_timeout_s=0.3)
    started = [await rig.start(max_tokens=300) for _ in range(3)]
    batches = [aiter(generation) for generation in started]
    for each in batches:
        assert await anext(each)
    await eventually(lambda: rig.router.load("m").num_paused == 1)
    assert rig.runtime.num_steps < 60
    await asyncio.gather(*(generation.stream.wait_until_over() for generation in started))
    for generation, rest in zip(started, batches, strict=True):
        codes = {record.error_code for record in generation.stream.records}
        assert codes == {"reader_stalled"}
        with pytest.raises(SlowReaderError):
            await read(generation, rest)
        generation.abort()
    await rig.idle()
    assert len(rig.cache.store) == 0
    await rig.stop()


# --------------------------------------------------------------------------- failures


async def test_a_leaders_deadline_is_its_own(rig: Rig) -> None:
    rig.allow(6)
    leader = await rig.start(timeout_s=0.05)
    follower = await rig.start()
    batches = aiter(follower)
    begin = "".join(delta.text for delta in await anext(batches))
    assert begin
    await asyncio.sleep(0.06)
    rig.allow(OPEN)
    with pytest.raises(DeadlineError):
        await read(leader)
    (rest,) = await read(follower, batches)
    assert begin + rest == rig.truth(follower)
    await rig.idle()
    assert rig.ledger.records["r1"][0].error_code == "deadline_exceeded"
    assert rig.ledger.records["r2"][0].finish_reason is FinishReason.LENGTH
    assert rig.cache.counts["m"].moves == 1
    hit = await rig.start()
    assert (await read(hit), outcome(hit)) == ([rig.truth(hit)], "hit")


async def test_a_followers_deadline_is_its_own(rig: Rig) -> None:
    rig.allow(3)
    leader = await rig.start()
    follower = await rig.start(timeout_s=0.05)
    with pytest.raises(DeadlineError, match="identical request"):
        await read(follower)
    rig.allow(OPEN)
    assert await read(leader) == [rig.truth(leader)]
    await rig.idle()
    assert follower.tracked.status() == "failed"
    assert rig.ledger.records["r2"][0].error_code == "deadline_exceeded"


async def test_a_failure_is_not_kept_and_followers_try_once_more(rig: Rig) -> None:
    rig.allow(0)
    started = [await rig.start() for _ in range(4)]
    rig.failure = EngineError("broken")
    reading = [asyncio.ensure_future(read(generation)) for generation in started]
    rig.allow(1)
    with pytest.raises(EngineError):
        await reading[0]
    rig.failure = None
    rig.allow(OPEN)
    assert await asyncio.gather(*reading[1:]) == [[rig.truth(started[0])]] * 3
    await rig.idle()
    counts = rig.cache.counts["m"]
    assert (counts.moves, counts.stores) == (3, 1)
    assert rig.runtime.num_steps == 20, "those three shared their second answer, too"


async def test_a_model_that_is_broken_is_tried_twice_and_no_more(rig: Rig) -> None:
    attempts = 0

    def fail(step: StepInput) -> None:
        nonlocal attempts
        attempts += 1
        raise EngineError("broken")

    started = [rig.start() for _ in range(6)]
    rig.runtime.before_step = fail
    generations = [await start for start in started]
    results = await asyncio.gather(*map(read, generations), return_exceptions=True)
    assert {type(result) for result in results} == {EngineError}
    await rig.idle()
    assert attempts <= 6
    assert len(rig.cache.store) == 0
    rig.runtime.before_step = None
    again = await rig.start()
    assert (await read(again), outcome(again)) == ([rig.truth(again)], "miss")
    await rig.idle()


async def test_a_second_answer_that_begins_differently_is_an_error_not_a_mixture(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.allow(6)
    leader = await rig.start(timeout_s=0.05)
    follower = await rig.start()
    batches = aiter(follower)
    await anext(batches)
    await asyncio.sleep(0.06)
    shifted = type(rig.runtime)._next_tokens
    monkeypatch.setattr(
        rig.runtime,
        "_next_tokens",
        lambda states, earlier: (shifted(rig.runtime, states, earlier) + 1) % 120,
    )
    rig.allow(OPEN)
    with pytest.raises(DeadlineError):
        await read(leader)
    last = [delta async for batch in batches for delta in batch][-1]
    assert isinstance(last.error, UnavailableError)
    assert last.error.code == "shared_answer_failed"
    follower.abort()
    await rig.idle()
    assert rig.ledger.records["r2"][0].error_code == "shared_answer_failed"


async def test_a_server_that_stops_tells_everybody(rig: Rig) -> None:
    rig.allow(3)
    started = [await rig.start(max_tokens=200) for _ in range(3)]
    reading = [asyncio.ensure_future(read(generation)) for generation in started]
    await eventually(lambda: rig.runtime.num_steps == 3)
    stopping = asyncio.ensure_future(asyncio.to_thread(rig.loop.stop))
    await asyncio.sleep(0.01)
    rig.allow(OPEN)
    assert await stopping
    results = await asyncio.gather(*reading, return_exceptions=True)
    assert {type(result) for result in results} == {UnavailableError}
    await eventually(lambda: rig.router.num_active == 0)
    with pytest.raises(UnavailableError):
        await rig.start()
    assert not rig.cache._flights


# --------------------------------------------------------------------------- whatever happens


class Client:
    """A client that asks for one of a few answers, and does as it likes.

    Args:
        rig: Where it asks.
        dice: Decides.
    """

    FATES = ("read", "read", "read", "dawdle", "vanish", "break_off", "cancel", "be_late")

    def __init__(self, rig: Rig, dice: random.Random) -> None:
        self.rig = rig
        self.dice = dice
        self.fate = dice.choice(self.FATES)
        self.texts: list[str] = []
        self.num_ends = 0

    async def live(self) -> str:
        """Returns its fate, or the name of the error that it was told."""
        dice, fate = self.dice, self.fate
        await asyncio.sleep(dice.random() * 0.05)
        generation = await self.rig.start(
            f"prompt {dice.randint(0, 3)}",
            max_tokens=dice.choice([1, 30, 120]),
            n=dice.choice([1, 2]),
            timeout_s=dice.random() * 0.03 if fate == "be_late" else None,
            priority=dice.choice([0, 0, 1]),
        )
        num = generation.request.n
        truth = self.rig.truth(generation)
        self.texts = [""] * num
        try:
            if fate != "vanish":
                await self._read(generation)
        except (RequestCancelledError, DeadlineError) as error:
            fate = type(error).__name__
        generation.abort()
        await generation.stream.wait_until_over()
        assert all(truth.startswith(text) for text in self.texts)
        if fate in ("read", "dawdle"):
            assert set(self.texts) == {truth}
            assert self.num_ends == num
        assert len(generation.stream.records) == num
        assert {trace.status for trace in generation.stream.traces()} == {"finished"}
        return fate

    async def _read(self, generation: Generation) -> None:
        async for batch in generation:
            for delta in batch:
                self.texts[delta.index] += delta.text
                self.num_ends += delta.finish_reason is not None
                if delta.error is not None:
                    raise delta.error
            if self.fate == "dawdle":
                await asyncio.sleep(self.dice.random() * 0.02)
            elif self.fate == "break_off" and self.dice.random() < 0.3:
                return
            elif self.fate == "cancel" and self.dice.random() < 0.3:
                generation.stream.cancel(RequestCancelledError("enough"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
async def test_whatever_clients_do_nobody_gets_a_wrong_text_and_nothing_is_left(seed: int) -> None:
    dice = random.Random(seed)
    rig = Rig(max_unread=12, max_bytes=4000, eviction=dice.choice(["lru", "lfu", "fifo"]))
    clients = [Client(rig, dice) for _ in range(60)]
    fates = await asyncio.gather(*(client.live() for client in clients))
    assert "read" in fates
    await rig.idle()
    assert rig.cache.store.size_bytes <= 4000
    await rig.stop()
