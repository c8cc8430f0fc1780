"""Embedding in the loop: batches, turns, fairness, failures; with generation beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker import (
    FinishReason,
    Observer,
    Request,
    RequestCancelledError,
    RequestRecord,
    SamplingParams,
    StepInput,
    StepRecord,
    TenantConfig,
)
from stoker.config import CacheConfig, SchedulerConfig
from stoker.embeddings import unit_vectors
from stoker.engine.client import EngineClient, RequestStream
from stoker.engine.embedding import EmbeddingEngine
from stoker.engine.embedding_jobs import EmbeddingStream
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.errors import DeadlineError, EngineError, UnavailableError
from stoker.tenants import Tenants
from stoker.testing import FakeClock, ScriptedRuntime
from stoker.testing.scripted_options import ScriptedOptions
from stoker_plugins.fcfs import FirstComeFirstServed

BUDGET = 64
BAD = 250  # a token that the runtime fails on, if it is told to


class Recorder(Observer):
    """What observers are told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.records: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.records.append(record)


class Bench:
    """A scripted model's loop, driven by hand; every step takes a second of its clock."""

    def __init__(
        self,
        tenants: Sequence[TenantConfig] = (),
        budget: int = BUDGET,
        options: ScriptedOptions | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.runtime = ScriptedRuntime(lanes=4, context_length=500, options=options)
        self.recorder = Recorder()
        self.batches: list[list[list[int]]] = []
        self.bad: int | None = None
        self.loop = EngineLoop("cpu", self.clock)
        made = Tenants(tenants)
        self.engine = ModelEngine(
            "model",
            self.runtime,
            FirstComeFirstServed(),
            SchedulerConfig(max_num_batched_tokens=budget, target_step_s=0.0),
            CacheConfig(),
            [self.recorder],
            self.clock,
            made,
        )
        self.embedder = EmbeddingEngine(self.engine, made)
        self.loop.engines.append(self.engine)
        self.loop.embedders.append(self.embedder)
        self.client = EngineClient(self.engine, self.loop, embedder=self.embedder)
        self.runtime.before_embed = self._before_embed
        self.runtime.before_step = lambda _: self.clock.advance(1.0)
        self._number = 0

    def _before_embed(self, inputs: Sequence[Sequence[int]]) -> None:
        self.clock.advance(1.0)
        self.batches.append([list(tokens) for tokens in inputs])
        if self.bad is not None and any(self.bad in tokens for tokens in inputs):
            raise RuntimeError("a bad token")

    def _request(self, tokens: list[int], **fields: Any) -> Request:
        self._number += 1
        return Request(
            request_id=f"request-{self._number}",
            model="model",
            prompt_token_ids=tokens,
            arrival_s=self.clock(),
            **fields,
        )

    def embed(self, *inputs: Sequence[int], **fields: Any) -> EmbeddingStream:
        request = self._request(
            [token for tokens in inputs for token in tokens],
            inputs=inputs,
            sampling=SamplingParams(max_tokens=0),
            endpoint="embedding",
            **fields,
        )
        return self.client.embed(request)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> RequestStream:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        return self.client.submit(self._request(list(prompt), sampling=sampling))

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.loop.step():
                return
        raise RuntimeError("it does not come to an end")

    def check(self, stream: EmbeddingStream) -> None:
        """Every input has its own vector."""
        for tokens, vector in zip(stream.request.inputs, stream.vectors, strict=True):
            np.testing.assert_array_equal(vector, self.runtime.expected_vector(tokens))

    def check_empty(self) -> None:
        """Nothing is left of anything."""
        load = self.engine.load()
        assert (load.num_waiting, load.waiting_tokens, load.num_running) == (0, 0, 0)
        assert not self.embedder._jobs
        assert not self.embedder._queue
        assert not self.embedder._queue._served
        assert self.embedder._batch is None


async def last_of(stream: RequestStream) -> Any:
    """The last delta, with the text of all."""
    text, last = "", None
    async for batch in stream:
        for delta in batch:
            text, last = text + delta.text, delta
    assert last is not None
    return text, last


async def test_several_requests_share_a_batch() -> None:
    bench = Bench()
    streams = [bench.embed([i] * 10, [i + 100] * 10) for i in range(5)]
    bench.run()
    for stream in streams:
        _, last = await last_of(stream)
        assert last.finish_reason is FinishReason.STOP
        assert last.usage.prompt_tokens == 20
        bench.check(stream)
    # 10 inputs of 10 tokens, 6 of them within the budget: one of each request, then a second of the first.
    assert [len(batch) for batch in bench.batches] == [6, 4]
    assert [tokens[0] for tokens in bench.batches[0]] == [0, 1, 2, 3, 4, 100]
    bench.check_empty()


async def test_a_long_input_is_computed_in_pieces_between_steps() -> None:
    bench = Bench()
    long, reading = bench.embed([7] * 400), bench.generate([1, 2, 3], 60)
    bench.run()
    bench.check(long)
    _, last = await last_of(long)
    assert last.finish_reason is FinishReason.STOP
    text, _ = await last_of(reading)
    assert text == bench.runtime.expected_text([1, 2, 3], 60)
    assert len(bench.batches) >= 400 // BUDGET
    gaps = [gap for record in bench.recorder.steps for gap in record.token_gaps_s]
    assert max(gaps) <= 2.0  # a step, and one piece before it
    embedded = [record for record in bench.recorder.steps if record.num_prefill_tokens == 400]
    assert len(embedded) == 1
    bench.check_empty()


async def test_a_large_job_and_a_stream_take_turns() -> None:
    bench = Bench()
    job = bench.embed(*([i % 250] * 60 for i in range(100)))
    reading = bench.generate([9, 8], 50)
    gaps_before = len(bench.recorder.steps)
    bench.run()
    bench.check(job)
    text, _ = await last_of(reading)
    assert text == bench.runtime.expected_text([9, 8], 50)
    steps = bench.recorder.steps[gaps_before:]
    assert max(gap for record in steps for gap in record.token_gaps_s) <= 2.0


async def test_a_model_without_lanes_only_embeds() -> None:
    bench = Bench(
        [TenantConfig(name="a", reserved_lanes=1)], options=ScriptedOptions(generates=False)
    )
    bench.bad = BAD
    fine = [bench.embed([i] * 30, [i + 100] * 90, tenant="a") for i in range(5)]
    culprit, gone = bench.embed([1], [BAD]), bench.embed(*([7] * 50 for _ in range(9)))
    bench.loop.step()
    gone.abort()
    bench.run()
    for stream in fine:
        _, last = await last_of(stream)
        assert last.finish_reason is FinishReason.STOP
        bench.check(stream)
    _, last = await last_of(culprit)
    assert isinstance(last.error, EngineError)
    await gone.wait_until_over()
    bench.check_empty()
    assert bench.runtime.num_steps == 0
    with pytest.raises(TypeError, match="only embeds"):
        bench.runtime.step(StepInput(*(np.zeros(1, np.int32) for _ in range(4))))


async def test_tenants_get_tokens_by_weight() -> None:
    bench = Bench([TenantConfig(name="heavy", weight=3.0)])
    streams = [
        bench.embed(*([5] * 16 for _ in range(200)), tenant="heavy"),
        bench.embed(*([6] * 16 for _ in range(200)), tenant="light"),
        bench.embed(*([6] * 16 for _ in range(200)), tenant="light"),
    ]
    for _ in range(20):
        bench.loop.step()
    taken = [tokens[0] for batch in bench.batches for tokens in batch]
    assert taken.count(5) == pytest.approx(3 * taken.count(6), abs=4)
    bench.run()
    for stream in streams:
        bench.check(stream)
    bench.check_empty()


async def test_who_comes_late_is_not_behind_a_large_job() -> None:
    bench = Bench()
    large = bench.embed(*([5] * 60 for _ in range(100)))
    for _ in range(5):
        bench.loop.step()
    small = bench.embed([6] * 60)
    for _ in range(3):
        bench.loop.step()
    assert small.job is not None
    assert small.job.is_over
    assert large.job is not None
    assert not large.job.is_over
    bench.run()
    bench.check(large)


async def test_lower_priorities_come_first() -> None:
    bench = Bench()
    bench.embed(*([1] * 60 for _ in range(5)), priority=5)
    bench.embed(*([2] * 60 for _ in range(5)), priority=-1)
    bench.run()
    assert [batch[0][0] for batch in bench.batches] == [2] * 5 + [1] * 5


async def test_it_counts_as_waiting_until_all_of_it_is_taken() -> None:
    bench = Bench()
    stream = bench.embed(*([1] * 60 for _ in range(3)))
    assert bench.engine.load().num_waiting == 1
    assert bench.engine.load().waiting_tokens == 180
    assert stream.traces()[0].status == "waiting"
    bench.loop.step()
    assert bench.engine.load().num_waiting == 1
    assert stream.traces()[0].status == "prefill"
    assert stream.traces()[0].computed_tokens == 60
    bench.run()
    trace = stream.traces()[0]
    assert (trace.status, trace.computed_tokens, trace.num_prefill_steps) == ("finished", 180, 3)
    assert bench.recorder.records[0].prompt_tokens == 180
    bench.check_empty()


async def test_aborted_and_cancelled_jobs_are_not_computed() -> None:
    bench = Bench()
    jobs = [bench.embed(*([i] * 60 for _ in range(20))) for i in range(3)]
    for _ in range(4):
        bench.loop.step()
    jobs[0].abort()
    jobs[1].cancel(RequestCancelledError("enough"))
    num_batches = len(bench.batches)
    bench.run()
    assert {batch[0][0] for batch in bench.batches[num_batches:]} == {2}
    _, last = await last_of(jobs[1])
    assert isinstance(last.error, RequestCancelledError)
    bench.check(jobs[2])
    reasons = {record.finish_reason for record in bench.recorder.records}
    assert reasons == {FinishReason.ABORT, FinishReason.ERROR, FinishReason.STOP}
    bench.check_empty()


async def test_a_long_input_is_given_up_with_its_request() -> None:
    bench = Bench()
    stream = bench.embed([3] * 400)
    bench.loop.step()
    stream.abort()
    other = bench.embed([4] * 5)
    bench.run()
    assert len(bench.batches) == 2
    bench.check(other)
    bench.check_empty()


async def test_deadlines() -> None:
    bench = Bench()
    late = bench.embed(*([1] * 60 for _ in range(20)), deadline_s=bench.clock() + 5)
    never = bench.embed([2] * 60, priority=9, queue_deadline_s=bench.clock() + 3)
    bench.run()
    for stream, word in ((late, "while it was embedded"), (never, "in the queue")):
        _, last = await last_of(stream)
        assert isinstance(last.error, DeadlineError)
        assert word in str(last.error)
    bench.check_empty()


async def test_a_bad_input_fails_its_own_request_only() -> None:
    bench = Bench()
    bench.bad = 66
    good = bench.embed([1] * 5, [2] * 5)
    bad = bench.embed([3] * 5, [66], [4] * 5)
    reading = bench.generate([1, 2], 20)
    bench.run()
    bench.check(good)
    _, last = await last_of(bad)
    assert isinstance(last.error, EngineError)
    assert "RuntimeError" in str(last.error)
    text, _ = await last_of(reading)
    assert text == bench.runtime.expected_text([1, 2], 20)
    bench.check_empty()


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda inputs: np.zeros((len(inputs), 3), np.float32), "shape"),
        (lambda inputs: np.full((len(inputs), 32), np.nan, np.float32), "finite"),
    ],
)
async def test_a_runtime_that_answers_nonsense(
    answer: Callable[[Any], Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    monkeypatch.setattr(bench.runtime, "embed", answer)
    stream = bench.embed([1], [2])
    bench.run()
    _, last = await last_of(stream)
    assert isinstance(last.error, EngineError)
    assert word in str(last.error)
    bench.check_empty()


async def test_the_end_of_the_loop_ends_jobs() -> None:
    bench = Bench()
    bench.loop.start()
    stream = bench.embed(*([1] * 60 for _ in range(5000)))
    assert await asyncio.to_thread(bench.loop.stop)
    _, last = await last_of(stream)
    assert isinstance(last.error, UnavailableError)
    with pytest.raises(UnavailableError):
        bench.embed([1])
    bench.check_empty()


def test_unit_vectors() -> None:
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0], [1e20, 0.0, 1e20]], np.float32)
    np.testing.assert_allclose(unit_vectors(vectors)[0], [3 / 13, 4 / 13, 12 / 13])
    np.testing.assert_array_equal(unit_vectors(vectors)[1], [0, 0, 0])
    np.testing.assert_allclose(unit_vectors(vectors)[2], [0.5**0.5, 0, 0.5**0.5])
    np.testing.assert_allclose(unit_vectors(vectors, 2)[0], [0.6, 0.8])


# --------------------------------------------------------------------------- any interleaving


@dataclass
class Event:
    """Something that happens before a step.

    Attributes:
        kind: What.
        inputs: Lengths of inputs, or of a prompt.
        which: Which of the requests so far.
    """

    kind: str
    inputs: list[int] = field(default_factory=list)
    which: int = 0


EVENTS = st.builds(
    Event,
    kind=st.sampled_from(["embed", "embed", "generate", "abort", "cancel", "steps", "bad"]),
    inputs=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    which=st.integers(0, 100),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(EVENTS, min_size=1, max_size=25), budget=st.integers(8, 300))
def test_any_interleaving(events: list[Event], budget: int) -> None:
    """Every vector is its own input's and every text its own prompt's, whatever else happens."""
    asyncio.run(_interleave(events, budget))


async def _interleave(events: list[Event], budget: int) -> None:
    story = Story(Bench(budget=budget))
    for number, event in enumerate(events):
        story.happens(number, event)
    story.bench.run()
    await asyncio.sleep(0)
    for stream in story.streams:
        await story.check(stream)
    assert len(story.bench.recorder.records) == len(story.streams)
    story.bench.check_empty()


class Story:
    """Plays events on a bench, and knows how they should end."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.bad = BAD
        self.streams: list[RequestStream] = []
        self.ended: set[RequestStream] = set()
        self.bad: set[RequestStream] = set()

    def happens(self, number: int, event: Event) -> None:
        if event.kind in {"embed", "bad"}:
            self._embed(number, event)
        elif event.kind == "generate":
            prompt = [(number * 5 + j) % 240 for j in range(event.inputs[0])]
            self.streams.append(self.bench.generate(prompt, 1 + event.which % 30))
        elif event.kind == "steps":
            for _ in range(event.which % 7):
                self.bench.loop.step()
        elif self.streams:
            stream = self.streams[event.which % len(self.streams)]
            self.ended.add(stream)
            if event.kind == "abort":
                stream.abort()
            else:
                stream.cancel(RequestCancelledError("enough"))

    def _embed(self, number: int, event: Event) -> None:
        inputs = [
            [(number * 7 + i * 3 + j) % 240 for j in range(length)]
            for i, length in enumerate(event.inputs)
        ]
        if event.kind == "bad":
            inputs[-1][0] = BAD
        stream = self.bench.embed(*inputs, tenant=f"tenant-{event.which % 3}")
        self.streams.append(stream)
        if event.kind == "bad":
            self.bad.add(stream)

    async def check(self, stream: RequestStream) -> None:
        if stream in self.ended:
            await stream.wait_until_over()
            return
        text, last = await last_of(stream)
        if stream in self.bad:
            assert last.finish_reason is FinishReason.ERROR
        elif isinstance(stream, EmbeddingStream):
            assert last.finish_reason is FinishReason.STOP
            self.bench.check(stream)
        else:
            request = stream.request
            num_tokens = request.sampling.max_tokens or 0
            prompt = list(request.prompt_token_ids)
            assert text == self.bench.runtime.expected_text(prompt, num_tokens)
