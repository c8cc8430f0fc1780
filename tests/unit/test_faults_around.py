"""Faults around the engine's thread: middleware, readers that come and go, a loop that dies."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from stoker import (
    DeltaStream,
    FinishReason,
    Middleware,
    Request,
    RequestCancelledError,
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
from stoker.engine.readers import ReaderLimits
from stoker.errors import DeadlineError, EngineError, UnavailableError
from stoker.router import Call, Generation, RoutedModel, Router
from stoker.testing import Fault, FaultyRuntime, ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


class Fleet:
    """Two faulty models of different weight on one loop, with a router."""

    def __init__(self, *middleware: Middleware, max_unread: int = 4096) -> None:
        self.loop = EngineLoop("cpu", time.monotonic)
        self.runtimes: dict[str, FaultyRuntime] = {}
        self.inner: dict[str, ScriptedRuntime] = {}
        routed = []
        for name, weight in (("a", 1.0), ("b", 3.0)):
            inner = self.inner[name] = ScriptedRuntime(lanes=4, context_length=400)
            runtime = self.runtimes[name] = FaultyRuntime(inner)
            engine = ModelEngine(
                name,
                runtime,
                FirstComeFirstServed(),
                SchedulerConfig(),
                CacheConfig(),
                [],
                time.monotonic,
                weight=weight,
                reader_limits=ReaderLimits(max_unread, 60.0),
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
            client = EngineClient(engine, self.loop)
            routed.append(RoutedModel(served, client, template, lambda: self.loop.heartbeat_s))
        admission = AdmissionConfig(queue_timeout_s=0)
        self.router = Router(routed=routed, middleware=middleware, admission=admission)
        self.loop.start()

    async def start(
        self, text: str, model: str = "a", max_tokens: int = 20, n: int = 1, **call: Any
    ) -> Generation:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return await self.router.generate(
            Call(request_id=text, model=model, prompt=text, sampling=sampling, n=n, **call)
        )

    def truth(self, generation: Generation) -> str:
        request = generation.request
        tokens = list(request.prompt_token_ids)
        limit = request.sampling.max_tokens or 0
        return self.inner[request.model].expected_text(tokens, limit)

    async def assert_serves(self) -> None:
        """Everything is free, and a newcomer to each model gets its text."""
        await eventually(lambda: self.router.num_active == 0)
        for name, engine in zip("ab", self.loop.engines, strict=True):
            load = self.router.load(name)
            assert (load.num_running, load.num_waiting, load.num_paused) == (0, 0, 0)
            assert not engine._sequences
            assert not engine._waiting._entries
            generation = await self.start("are you well?", model=name)
            assert await read(generation) == [self.truth(generation)]
        await eventually(lambda: self.router.num_active == 0)
        assert self.router.health().status == "ok"


async def read(generation: Generation) -> list[str]:
    """The text of each sequence; raises what ended it."""
    texts = [""] * generation.request.n
    async for batch in generation:
        for delta in batch:
            texts[delta.index] += delta.text
            if delta.error is not None:
                raise delta.error
    return texts


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet(max_unread=15)
    yield made
    assert made.loop.stop()


# --------------------------------------------------------------------------- readers


class Client:
    """A client of a fleet, whatever becomes of it.

    Args:
        fleet: Where it asks.
        dice: Decides.
        number: Which one it is.
    """

    FATES = ("read", "read", "dawdle", "vanish", "break_off", "die", "cancel", "be_late")

    def __init__(self, fleet: Fleet, dice: random.Random, number: int) -> None:
        self.fleet = fleet
        self.dice = dice
        self.number = number
        self.fate = dice.choice(self.FATES)
        self.texts: list[str] = []

    async def live(self) -> str:
        """Ask, and leave in its own way; returns that way, or the name of the error it was told."""
        generation = await self.fleet.start(
            f"client {self.number}",
            self.dice.choice("ab"),
            max_tokens=self.dice.randint(1, 120),
            n=self.dice.choice([1, 1, 2]),
            timeout_s=0.005 if self.fate == "be_late" else None,
        )
        self.texts = [""] * generation.request.n
        outcome = self.fate
        try:
            await getattr(self, f"_{self.fate}")(generation)
        except (RequestCancelledError, DeadlineError) as error:
            outcome = type(error).__name__
        generation.abort()
        await generation.stream.wait_until_over()
        truth = self.fleet.truth(generation)
        assert all(truth.startswith(text) for text in self.texts)
        if outcome in ("read", "dawdle"):
            assert set(self.texts) == {truth}
        assert len(generation.stream.records) == generation.request.n
        assert {trace.status for trace in generation.stream.traces()} == {"finished"}
        return outcome

    async def _read(self, generation: Generation, pause_s: float = 0.0) -> None:
        async for batch in generation:
            for delta in batch:
                self.texts[delta.index] += delta.text
                if delta.error is not None:
                    raise delta.error
            if pause_s:
                await asyncio.sleep(pause_s * self.dice.random())

    async def _dawdle(self, generation: Generation) -> None:
        await self._read(generation, 0.005)

    async def _be_late(self, generation: Generation) -> None:
        await self._read(generation, 0.005)

    async def _vanish(self, generation: Generation) -> None:
        generation.abort()

    async def _break_off(self, generation: Generation) -> None:
        async for _ in generation:
            if self.dice.random() < 0.2:
                break

    async def _die(self, generation: Generation) -> None:
        task = asyncio.ensure_future(self._read(generation))
        await asyncio.sleep(self.dice.random() * 0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _cancel(self, generation: Generation) -> None:
        await asyncio.sleep(self.dice.random() * 0.02)
        generation.stream.cancel(RequestCancelledError("enough"))
        await self._read(generation)


@pytest.mark.slow
async def test_readers_that_come_and_go_at_random_leave_nothing_behind(fleet: Fleet) -> None:
    dice = random.Random(7)
    tally: list[str] = []
    for wave in range(8):
        clients = [Client(fleet, dice, 100 * wave + i) for i in range(40)]
        tally += await asyncio.gather(*(client.live() for client in clients))
    assert tally.count("read") > 60
    assert tally.count("RequestCancelledError") > 5
    assert {"dawdle", "vanish", "break_off", "die"} <= set(tally)
    await fleet.assert_serves()


@pytest.mark.slow
async def test_models_that_fail_now_and_then_do_not_disturb_each_other(fleet: Fleet) -> None:
    """Every step of several sequences of ``a`` fails; ``b`` is not touched by it."""

    def crowd(step: StepInput) -> Fault | None:
        return Fault.RAISE_AFTER if len(set(step.lanes.tolist())) > 1 else None

    fleet.runtimes["a"].script = crowd
    started = [await fleet.start(f"{i}", "ab"[i % 2], max_tokens=25, n=2) for i in range(60)]
    answers = await asyncio.gather(*(read(g) for g in started))
    assert answers == [[fleet.truth(g)] * 2 for g in started]
    assert fleet.loop.engines[0].num_runtime_errors > 0
    assert fleet.loop.engines[1].num_runtime_errors == 0
    await fleet.assert_serves()


async def test_a_truncate_that_fails_at_an_abort_does_not_end_the_loop(fleet: Fleet) -> None:
    works = {"truncate": True}
    fleet.runtimes["a"].truncates = lambda _: works["truncate"]
    fleet.loop.engines[0].scheduler.lanes._prefix_reuse = False
    other = await fleet.start("another", model="b", max_tokens=300)
    generation = await fleet.start("goes away", max_tokens=300)
    async for _ in generation:
        break
    works["truncate"] = False
    generation.abort()
    await generation.stream.wait_until_over()
    assert await read(other) == [fleet.truth(other)]
    assert fleet.loop.alive
    works["truncate"] = True
    await fleet.assert_serves()


async def test_a_loop_that_dies_leaves_nobody_waiting(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def exits(_: StepInput) -> None:
        raise SystemExit(3)

    running = await fleet.start("runs", model="b", max_tokens=390)
    fleet.inner["a"].before_step = exits
    with pytest.raises(UnavailableError):
        await read(await fleet.start("the last one"))
    with pytest.raises(UnavailableError):
        await read(running)
    await eventually(lambda: not fleet.loop.alive)
    assert fleet.router.health().status == "stalled"
    with pytest.raises(UnavailableError):
        await fleet.start("too late")
    assert "the loop of cpu died" in caplog.text


# --------------------------------------------------------------------------- middleware


class Meter(Middleware):
    """An innocent one, before the faulty one: counts what it let pass and how it ended."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.ends: list[tuple[str, int]] = []

    async def on_request(self, request: Request) -> Request:
        self.open.append(request.request_id)
        return request

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        self.open.remove(request.request_id)
        self.ends.append((request.request_id, len(records)))


class Faulty(Middleware):
    """Does to each request what its prompt asks for."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.num_hanging = 0

    async def on_request(self, request: Request) -> Any:
        word = request.request_id.split()[0]
        if word == "raise":
            raise ZeroDivisionError("a bug in the middleware")
        if word == "hang":
            self.num_hanging += 1
            try:
                await self.let_go.wait()
            finally:
                self.num_hanging -= 1
        if word == "empty":
            request.prompt_token_ids = []
        if word == "zero":
            request.n = 0
        answers: dict[str, Any] = {"none": None, "text": "a request", "thing": object()}
        return answers.get(word, request)

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        if request.request_id.startswith("late"):
            raise ZeroDivisionError("a bug in the middleware")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("raise", ZeroDivisionError),
        ("none", TypeError),
        ("text", TypeError),
        ("thing", TypeError),
        ("empty", ValueError),
        ("zero", ValueError),
    ],
)
async def test_middleware_that_fails_ends_its_request_alone(
    word: str, error: type[Exception]
) -> None:
    before, after = Meter(), Meter()
    fleet = Fleet(before, Faulty(), after)
    good = await fleet.start("good", max_tokens=200)
    with pytest.raises(error) as raised:
        await fleet.start(word)
    if error is not ZeroDivisionError:
        assert "Faulty.on_request returned" in str(raised.value)
    assert await read(good) == [fleet.truth(good)]
    await fleet.assert_serves()
    # Who let it pass is told that it is over; who never saw it is not.
    assert before.ends[0] == (word, 0)
    assert (word, 0) not in after.ends
    assert not before.open
    assert not after.open
    assert fleet.loop.stop()


async def test_middleware_that_fails_at_the_end_hides_it_from_nobody() -> None:
    after = Meter()
    fleet = Fleet(Faulty(), after)
    generation = await fleet.start("late", n=2)
    assert await read(generation) == [fleet.truth(generation)] * 2
    await eventually(lambda: after.ends == [("late", 2)])
    await fleet.assert_serves()
    assert fleet.loop.stop()


async def test_middleware_that_hangs_holds_up_nobody_else_and_lets_go_of_who_leaves() -> None:
    before, faulty = Meter(), Faulty()
    fleet = Fleet(before, faulty)
    hanging = [asyncio.ensure_future(fleet.start(f"hang {i}")) for i in range(5)]
    await eventually(lambda: faulty.num_hanging == 5)
    good = await fleet.start("good")
    assert await read(good) == [fleet.truth(good)]
    assert fleet.router.num_accepted == 1
    for task in hanging[1:]:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert faulty.num_hanging == 1
    await eventually(lambda: before.open == ["hang 0"])
    faulty.let_go.set()
    patient = await hanging[0]
    assert await read(patient) == [fleet.truth(patient)]
    await fleet.assert_serves()
    assert not before.open
    assert fleet.loop.stop()


@pytest.mark.parametrize("fault", [Fault.RAISE_AFTER, Fault.NAN])
async def test_a_runtime_that_always_fails_tells_every_reader(fleet: Fleet, fault: Fault) -> None:
    fleet.runtimes["a"].script = lambda _: fault
    started = [await fleet.start(f"{i}") for i in range(10)]
    answers = await asyncio.gather(*(read(g) for g in started), return_exceptions=True)
    assert all(isinstance(answer, EngineError) for answer in answers)
    reasons = {r.finish_reason for g in started for r in g.stream.records}
    assert reasons == {FinishReason.ERROR}
    fleet.runtimes["a"].script = lambda _: None
    await fleet.assert_serves()


@pytest.mark.parametrize("stage", ["posted", "queued", "running", "paused", "over"])
async def test_a_loop_that_is_stopped_ends_requests_of_every_stage(stage: str) -> None:
    fleet = Fleet(max_unread=5 if stage == "paused" else 4096)
    fleet.inner["a"].before_step = lambda _: time.sleep(0.002)
    crowd = [
        await fleet.start(f"crowd {i}", max_tokens=390) for i in range(4 * (stage == "queued"))
    ]
    generation = await fleet.start("me", max_tokens=2 if stage == "over" else 380)
    if stage == "running":
        crowd.append(generation)
    if stage == "paused":
        await eventually(lambda: fleet.router.load("a").num_paused == 1)
    if stage == "over":
        await generation.stream.wait_until_over()
    if stage in ("queued", "running"):
        await eventually(lambda: fleet.router.load("a").num_running > 0)
    assert await asyncio.to_thread(fleet.loop.stop)
    if stage == "over":
        assert await read(generation) == [fleet.truth(generation)]
    else:
        for each in {id(g): g for g in [*crowd, generation]}.values():
            with pytest.raises(UnavailableError):
                await read(each)
    await eventually(lambda: fleet.router.num_active == 0)
    with pytest.raises(UnavailableError):
        await fleet.start("too late")


# --------------------------------------------------------------------------- middleware that answers


class Between(Middleware):
    """Notes what it is asked, and refuses or passes it on."""

    def __init__(self, name: str, log: list[str], *, refuses: bool = False) -> None:
        self.name = name
        self.log = log
        self.refuses = refuses

    def submit(self, request: Request, forward: Callable[[Request], DeltaStream]) -> DeltaStream:
        self.log.append(self.name)
        if self.refuses:
            raise UnavailableError("not now")
        stream = forward(request)
        request.response_headers["x-by"] = self.name
        return stream

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        self.log.append(f"{self.name} is told of {len(records)}")


async def test_middleware_stands_between_in_its_order() -> None:
    log: list[str] = []
    fleet = Fleet(Between("outer", log), Middleware(), Between("inner", log))
    generation = await fleet.start("hello")
    assert await read(generation) == [fleet.truth(generation)]
    await eventually(lambda: fleet.router.num_active == 0 and len(log) == 4)
    assert log == ["outer", "inner", "outer is told of 1", "inner is told of 1"]
    assert generation.request.response_headers == {"x-by": "outer"}
    assert fleet.loop.stop()


async def test_middleware_that_refuses_late_is_told_of_the_end_like_the_others() -> None:
    log: list[str] = []
    fleet = Fleet(Between("outer", log), Between("inner", log, refuses=True))
    with pytest.raises(UnavailableError, match="not now"):
        await fleet.start("hello")
    assert log == ["outer", "inner", "outer is told of 0", "inner is told of 0"]
    assert fleet.router.num_active == 0
    assert not fleet.loop.engines[0]._sequences
    assert fleet.loop.stop()
