"""The loop's thread and its asyncio side, with the router in front."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from stoker import (
    Delta,
    FinishReason,
    Middleware,
    Request,
    RequestRecord,
    SamplingParams,
    ServedModel,
    StepInput,
)
from stoker.chat_template import ChatTemplate
from stoker.config import AdmissionConfig, CacheConfig, SchedulerConfig
from stoker.engine.client import EngineClient
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    RateLimitError,
    UnavailableError,
)
from stoker.router import Call, Generation, RoutedModel, Router
from stoker.testing import FakeClock, ScriptedRuntime
from stoker.testing.scripted import ScriptedTokenizer
from stoker_plugins.fcfs import FirstComeFirstServed


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


class Fleet:
    """Scripted models on one loop, with a router."""

    def __init__(
        self, *names: str, lanes: int = 4, middleware: tuple[Middleware, ...] = ()
    ) -> None:
        self.loop = EngineLoop("cpu", time.monotonic)
        self.runtimes: dict[str, ScriptedRuntime] = {}
        routed = []
        for name in names:
            runtime = ScriptedRuntime(lanes=lanes, context_length=2000)
            self.runtimes[name] = runtime
            engine = ModelEngine(
                name,
                runtime,
                FirstComeFirstServed(),
                SchedulerConfig(),
                CacheConfig(),
                [],
                time.monotonic,
            )
            self.loop.engines.append(engine)
            served = ServedModel(
                model_id=name,
                reference=name,
                backend="scripted",
                created=0,
                size_bytes=0,
                info=runtime.info,
            )
            template = ChatTemplate(runtime.info.chat_template, runtime.tokenizer)
            routed.append(
                RoutedModel(
                    served, EngineClient(engine, self.loop), template, lambda: self.loop.heartbeat_s
                )
            )
        self.router = Router(routed=routed, middleware=middleware, admission=AdmissionConfig())
        self.loop.start()

    async def start(
        self, text: str, model: str = "a", n: int = 1, **sampling: object
    ) -> Generation:
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 50} | sampling))  # type: ignore[arg-type]
        return await self.router.generate(
            Call(request_id=text, model=model, prompt=text, sampling=params, n=n)
        )

    def truth(self, generation: Generation) -> str:
        runtime = self.runtimes[generation.request.model]
        request = generation.request
        return runtime.expected_text(
            list(request.prompt_token_ids), request.sampling.max_tokens or 0
        )


async def read(generation: Generation) -> tuple[str, Delta]:
    text, last = "", None
    async for batch in generation:
        for delta in batch:
            text += delta.text
            last = delta
    assert last is not None
    return text, last


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet("a", "b")
    yield made
    assert made.loop.stop()


async def test_many_requests_to_two_models_of_one_loop(fleet: Fleet) -> None:
    started = [
        await fleet.start(f"request {i}", model="ab"[i % 2], max_tokens=10 + i) for i in range(40)
    ]
    answers = await asyncio.gather(*(read(g) for g in started))
    assert [text for text, _ in answers] == [fleet.truth(g) for g in started]
    assert {last.finish_reason for _, last in answers} == {FinishReason.LENGTH}
    await eventually(lambda: fleet.router.num_active == 0)


class Shared:
    """Two models on one device, driven by hand on a clock that their steps move."""

    def __init__(self, weights: dict[str, float], step_s: dict[str, float]) -> None:
        self.clock = FakeClock()
        self.loop = EngineLoop("cpu", self.clock)
        self.spent = dict.fromkeys(weights, 0.0)
        self.order: list[str] = []
        self.engines: dict[str, ModelEngine] = {}
        for name, weight in weights.items():
            runtime = ScriptedRuntime(lanes=2, context_length=20_000)
            runtime.before_step = lambda _, name=name: self._compute(name, step_s[name])  # type: ignore[misc]
            engine = ModelEngine(
                name,
                runtime,
                FirstComeFirstServed(),
                SchedulerConfig(),
                CacheConfig(),
                [],
                self.clock,
                weight=weight,
            )
            self.engines[name] = engine
            self.loop.engines.append(engine)

    def _compute(self, name: str, seconds: float) -> None:
        self.clock.advance(seconds)
        self.spent[name] += seconds
        self.order.append(name)

    def submit(self, name: str, max_tokens: int) -> None:
        request = Request(
            request_id=name,
            model=name,
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        )
        EngineClient(self.engines[name], self.loop).submit(request)


async def test_models_of_a_device_take_turns() -> None:
    shared = Shared({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1})
    for name in "ab":
        shared.submit(name, 50)
    while shared.loop.step():
        pass
    assert all(x != y for x, y in itertools.pairwise(shared.order[:100]))


@pytest.mark.slow
async def test_models_share_the_devices_time_by_weight_whatever_their_steps_cost() -> None:
    shared = Shared({"a": 1.0, "b": 3.0}, {"a": 0.3, "b": 0.02})
    for name in "ab":
        shared.submit(name, 10_000)
    while sum(shared.spent.values()) < 100:
        shared.loop.step()
    assert shared.spent["b"] / shared.spent["a"] == pytest.approx(3.0, rel=0.05)


async def test_a_model_that_was_idle_has_saved_up_nothing() -> None:
    shared = Shared({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1})
    shared.submit("a", 10_000)
    for _ in range(500):
        shared.loop.step()
    shared.submit("b", 10_000)
    shared.order.clear()
    for _ in range(100):
        shared.loop.step()
    assert shared.order.count("a") == pytest.approx(50, abs=1)


async def test_what_a_model_had_while_others_were_idle_is_not_held_against_it() -> None:
    shared = Shared({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1})
    shared.submit("a", 300)
    while shared.loop.step():
        pass
    shared.submit("b", 10_000)
    for _ in range(5):
        shared.loop.step()
    shared.submit("a", 10_000)
    shared.order.clear()
    for _ in range(100):
        shared.loop.step()
    assert shared.order.count("a") == pytest.approx(50, abs=1)


async def test_a_model_that_comes_and_goes_gets_no_more_than_its_share() -> None:
    """One with long steps and a pause after each against one that always has work."""
    shared = Shared({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.05})
    shared.submit("b", 10_000)
    shared.loop.step()
    while shared.spent["b"] < 20:
        shared.submit("a", 1)
        while shared.engines["a"].has_work:
            shared.loop.step()
        shared.loop.step()  # a's client thinks for a moment
    assert shared.spent["a"] == pytest.approx(shared.spent["b"], rel=0.1)


async def test_closing_16_readers_midway_frees_their_lanes_within_one_step() -> None:
    fleet = Fleet("a", lanes=16)
    proceed = threading.Semaphore(0)
    runtime = fleet.runtimes["a"]
    runtime.before_step = lambda _: proceed.acquire() and None  # type: ignore[assignment, func-returns-value]
    started = [await fleet.start(f"{i}", max_tokens=1000) for i in range(16)]
    readers = [aiter(g) for g in started]
    proceed.release(50)
    for reader in readers:
        await anext(reader)
    load = fleet.router.load("a")
    assert load.num_running == 16
    await eventually(lambda: runtime.num_steps == 50)
    for generation in started:
        generation.abort()
    proceed.release(1)  # the step that was under way when they left
    await eventually(lambda: fleet.router.load("a").num_running == 0)
    assert runtime.num_steps <= 51  # it may not have begun that one
    assert fleet.router.load("a").kv_tokens_used == 0
    fleet.loop.stop()


async def test_a_reader_that_breaks_off_aborts(fleet: Fleet) -> None:
    fleet.runtimes["a"].before_step = lambda _: time.sleep(0.001)
    generation = await fleet.start("hello", max_tokens=1900)
    async for _ in generation:
        break
    generation.abort()
    generation.abort()
    await eventually(lambda: fleet.router.load("a").num_running == 0)
    await eventually(lambda: fleet.router.num_active == 0)
    assert generation.stream.records[0].finish_reason is FinishReason.ABORT


async def test_stopping_the_loop_ends_requests_with_an_error() -> None:
    fleet = Fleet("a", lanes=1)
    fleet.runtimes["a"].before_step = lambda _: time.sleep(0.002)
    running, queued = [await fleet.start("x", max_tokens=1900), await fleet.start("y")]
    readers = [asyncio.ensure_future(read(g)) for g in (running, queued)]
    await eventually(lambda: fleet.router.load("a").num_running == 1)
    assert await asyncio.to_thread(fleet.loop.stop)
    for _, last in await asyncio.gather(*readers):
        assert last.finish_reason is FinishReason.ERROR
        assert isinstance(last.error, UnavailableError)
    with pytest.raises(UnavailableError):
        await fleet.start("too late")
    await eventually(lambda: fleet.router.num_active == 0)


@pytest.mark.slow
async def test_the_heart_beats_when_idle_and_health_tells_when_it_does_not(fleet: Fleet) -> None:
    before = fleet.loop.heartbeat_s
    await eventually(lambda: fleet.loop.heartbeat_s > before)
    assert fleet.router.health().status == "ok"
    assert fleet.router.ready()
    fleet.router.clock = lambda: time.monotonic() + 1000
    assert fleet.router.health().status == "stalled"
    assert not fleet.router.ready()


async def test_a_request_the_engine_cannot_queue_fails_alone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fleet.loop.engines[0]
    submit = engine.submit

    def failing(stream) -> None:  # type: ignore[no-untyped-def]
        if stream.request.request_id == "bad":
            raise MemoryError("no room for the tokens")
        submit(stream)

    monkeypatch.setattr(engine, "submit", failing)
    good, bad = await fleet.start("good"), await fleet.start("bad", n=2)
    _, last = await read(bad)
    assert last.finish_reason is FinishReason.ERROR
    assert (await read(good))[0] == fleet.truth(good)


async def test_a_bug_in_the_loop_ends_the_models_requests_and_not_the_loop(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = fleet.loop.engines[0].scheduler
    schedule = scheduler.schedule
    failures = iter([True])

    def failing():  # type: ignore[no-untyped-def]
        if next(failures, False):
            raise KeyError("bug")
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", failing)
    _, last = await read(await fleet.start("first"))
    assert last.finish_reason is FinishReason.ERROR
    second = await fleet.start("second")
    assert (await read(second))[0] == fleet.truth(second)


async def test_what_the_router_refuses_starts_nothing(fleet: Fleet) -> None:
    with pytest.raises(ModelNotFoundError, match="served: a, b") as unknown:
        await fleet.start("x", model="c")
    assert unknown.value.param == "model"
    with pytest.raises(ContextLengthError) as too_long:
        await fleet.start("x" * 2001)
    assert (too_long.value.param, too_long.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ContextLengthError) as too_much:
        await fleet.start("x", max_tokens=2000)
    assert too_much.value.param == "max_tokens"
    sampling = SamplingParams(max_tokens=1)
    with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
        await fleet.router.generate(
            Call(request_id="r", model="a", prompt=[5, 100_000], sampling=sampling)
        )
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a tokenizer that has grown, and a model that has not
        patch.setattr(ScriptedTokenizer, "encode", lambda *_, **__: [5, 100_000])
        with pytest.raises(
            InvalidRequestError, match=r"a token \(100000\) that the model does not know"
        ):
            await fleet.start("x")
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        await fleet.router.generate(Call(request_id="r", model="a", prompt=[], sampling=sampling))
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        await fleet.start("x", logit_bias={99999: 1.0})
    fleet.router.draining = True
    with pytest.raises(UnavailableError):
        await fleet.start("x")
    assert fleet.router.num_accepted == 0


async def test_middleware_edits_refuses_and_is_told_of_the_end() -> None:
    class Shortener(Middleware):
        def __init__(self) -> None:
            self.ends: list[tuple[str, int | None]] = []

        async def on_request(self, request: Request) -> Request:
            if request.request_id == "refused":
                raise RateLimitError("no more today", retry_after_s=3.0)
            if request.request_id == "lengthened":
                request.prompt_token_ids = [65] * 5000
            request.sampling = SamplingParams(temperature=0.0, max_tokens=2)
            return request

        async def on_finish(self, request: Request, records: tuple[RequestRecord, ...]) -> None:
            completed = records[0].completion_tokens if records else None
            self.ends.append((request.request_id, completed))
            raise ValueError("must harm nobody")

    shortener = Shortener()
    fleet = Fleet("a", middleware=(shortener,))
    text, _ = await read(await fleet.start("hello", max_tokens=500))
    assert len(text) == 2
    with pytest.raises(RateLimitError):
        await fleet.start("refused")
    with pytest.raises(ContextLengthError):
        await fleet.start("lengthened")
    # Of what it refused itself it is not told; of what was refused after it, it is.
    await eventually(lambda: sorted(shortener.ends) == [("hello", 2), ("lengthened", None)])
    await eventually(lambda: fleet.router.num_active == 0)
    fleet.loop.stop()


async def test_what_was_generated_before_an_abort_is_known_at_the_end() -> None:
    class Meter(Middleware):
        def __init__(self) -> None:
            self.records: list[RequestRecord] = []

        async def on_finish(self, request: Request, records: tuple[RequestRecord, ...]) -> None:
            self.records += records

    meter = Meter()
    fleet = Fleet("a", middleware=(meter,))
    fleet.runtimes["a"].before_step = lambda _: time.sleep(0.001)
    generation = await fleet.start("hello", n=3, max_tokens=1900)
    async for _ in generation:
        break
    generation.abort()
    await eventually(lambda: len(meter.records) == 3)
    assert {record.finish_reason for record in meter.records} == {FinishReason.ABORT}
    assert all(record.completion_tokens >= 1 for record in meter.records)
    fleet.loop.stop()


async def test_a_failing_step_reaches_the_reader_as_an_error(fleet: Fleet) -> None:
    def fail(_: StepInput) -> None:
        raise RuntimeError("native trouble")

    fleet.runtimes["a"].before_step = fail
    _, last = await read(await fleet.start("x"))
    assert last.finish_reason is FinishReason.ERROR
    fleet.runtimes["a"].before_step = None
    generation = await fleet.start("y")
    assert (await read(generation))[0] == fleet.truth(generation)
