"""How ``stoker bench`` speaks to servers: good ones, odd ones, broken ones; all of them real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_plugins.bench.runner import Plan, run_load, run_plan
from stoker_plugins.bench.target import Answer, Target, TargetError
from stoker_plugins.bench.wire import Response
from stoker_plugins.bench.workload import Load, Session, Shot, user

SHOT = Shot((user("hello"),), 8)
DONE = b"data: [DONE]\n\n"


def event(text: str | None = None, *, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


# ------------------------------------------------------------------ the reader alone


class Heard:
    def __init__(self) -> None:
        self.events: list[bytes] = []

    def on_event(self, data: bytes, now_s: float) -> None:
        self.events.append(data)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    borders = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in itertools.pairwise(borders):
        yield data[start:end]


@pytest.mark.slow
@given(
    texts=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=40),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=10),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_are_found_whatever_the_borders(
    texts: list[str], cuts: list[int], chunks: list[int], line_end: bytes
) -> None:
    body = b": a comment\n\n" + b"".join(event(text) for text in texts) + DONE
    body = body.replace(b"\n", line_end)
    coded, rest, turn = b"", body, 0
    while rest:
        size = chunks[turn % len(chunks)]
        part, rest, turn = rest[:size], rest[size:], turn + 1
        coded += b"%x\r\n%s\r\n" % (len(part), part)
    raw = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"
    )
    loop = asyncio.new_event_loop()
    try:
        heard = Heard()
        response = Response(loop.create_future(), heard)
        for piece in pieces(raw, cuts):
            response.data_received(piece)
        assert response.done.done()
    finally:
        loop.close()
    assert heard.events[-1] == b"[DONE]"
    seen = [json.loads(data)["choices"][0]["delta"]["content"] for data in heard.events[:-1]]
    assert seen == texts


# ------------------------------------------------------------------ servers on sockets


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(script: Script) -> AsyncIterator[str]:
    """A server that says what the test wants, byte by byte."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        await server.wait_closed()


def saying(*parts: bytes, head: bytes | None = None) -> Script:
    start = head or b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in (start, *parts):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return script


async def ask(*parts: bytes, head: bytes | None = None, **options: Any) -> Answer:
    async with listening(saying(*parts, head=head)) as url:
        return await Target("t", url, "m", **options).ask(SHOT, keep_text=True)


async def test_a_stream_without_length_ends_with_its_connection() -> None:
    answer = await ask(event("a"), event("b"), event(finish="stop"), usage(9, 5, 4), DONE)
    assert (answer.failure, answer.texts) == ("", ["a", "b"])
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (9, 5, 4)
    assert answer.sent_s <= answer.stamps[0] <= answer.stamps[1] <= answer.end_s


async def test_without_usage_events_are_tokens() -> None:
    answer = await ask(event("a"), event("b"), event("c", finish="length"))
    assert (answer.failure, answer.completion_tokens, answer.output_tokens) == ("", None, 3)


async def test_reasoning_is_output_too() -> None:
    thought = b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
    answer = await ask(thought, event("a", finish="stop"))
    assert answer.texts == ["hm", "a"]


@pytest.mark.parametrize(
    ("parts", "failure"),
    [
        ([event("a")], "cut short"),
        ([], "no stream"),
        ([event(finish="stop"), DONE], "no text"),
        ([event("a"), b"data: {nonsense}\n\n"], "malformed event"),
        (
            [event("a"), b'data: {"error": {"code": "engine_died"}}\n\n'],
            "stream error: engine_died",
        ),
        ([b'data: {"error": "as text"}\n\n'], "stream error: as text"),
        ([b"data: " + b"x" * (5 << 20)], "an event is too long"),
    ],
)
async def test_streams_that_go_wrong(parts: list[bytes], failure: str) -> None:
    assert (await ask(*parts)).failure == failure


@pytest.mark.parametrize(
    ("head", "failure"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf", "disconnected"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "http 500"),
        (
            b'HTTP/1.1 429 No\r\nContent-Length: 31\r\n\r\n{"error": {"code": "too_many"}}',
            "http 429 too_many",
        ),
    ],
)
async def test_answers_that_are_none(head: bytes, failure: str) -> None:
    assert (await ask(head=head)).failure == failure


async def test_a_connection_that_is_closed_at_once() -> None:
    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with listening(script) as url:
        assert (await Target("t", url, "m").ask(SHOT)).failure == "disconnected"


async def test_a_server_that_never_answers_times_out() -> None:
    async def script(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with listening(script) as url:
        answer = await Target("t", url, "m", timeout_s=0.05).ask(SHOT)
    assert answer.failure == "timeout"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert (await Target("t", url, "m").ask(SHOT)).failure == "connection refused"
    with pytest.raises(TargetError, match=r"target t: .*connection refused; is the server running"):
        await Target("t", url).prepare()


# ------------------------------------------------------------------ an OpenAI server that is strict


class Fake:
    """An ASGI application that speaks the API, and refuses what it does not know.

    Attributes:
        refuses: Parameters it refuses.
        names_them: Whether its refusals say which.
        models: What it serves.
        bodies: What it was asked.
        with_usage: Whether it reports usage.
        active: Requests that run, and the most that ever did.
    """

    def __init__(self, *, refuses: set[str] | None = None, names_them: bool = True) -> None:
        self.refuses = refuses or set()
        self.names_them = names_them
        self.models = ["small"]
        self.bodies: list[dict[str, Any]] = []
        self.with_usage = True
        self.key = ""
        self.active = [0, 0]
        self.delay_s = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.key:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if given != b"Bearer " + self.key.encode():
                await self._answer(send, 401, {"error": {"message": "no such key"}})
                return
        if scope["path"] == "/v1/models":
            await self._answer(send, 200, {"data": [{"id": name} for name in self.models]})
            return
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(data)
        self.bodies.append(body)
        if body["model"] not in self.models:
            await self._answer(send, 404, {"error": {"message": "no such model"}})
        elif found := self.refuses & body.keys():
            which = min(found) if self.names_them else "something"
            await self._answer(send, 400, {"error": {"message": f"unknown parameter: {which}"}})
        else:
            await self._stream(send, body)

    async def _answer(self, send: Any, status: int, body: Any) -> None:
        head = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def _stream(self, send: Any, body: dict[str, Any]) -> None:
        self.active[0] += 1
        self.active[1] = max(self.active)
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        words = body["messages"][-1]["content"].split() if "messages" in body else []
        count = body["max_tokens"]
        data = b"".join(event(f"w{n} ") for n in range(count)) + event(finish="length")
        if self.with_usage and "stream_options" in body:
            data += usage(10 + 3 * len(words), count, 2)
        data += DONE
        for start in range(0, len(data), 37):  # borders in the middle of everything
            more = {"type": "http.response.body", "more_body": True}
            await send({**more, "body": data[start : start + 37]})
        await asyncio.sleep(self.delay_s)
        await send({"type": "http.response.body", "body": b""})
        self.active[0] -= 1


@contextlib.asynccontextmanager
async def serving(fake: Fake) -> AsyncIterator[str]:
    config = uvicorn.Config(fake, port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            await task


@pytest.mark.parametrize("names_them", [True, False])
async def test_parameters_that_are_refused_are_left_out(names_them: bool) -> None:
    fake = Fake(refuses={"ignore_eos", "top_k"}, names_them=names_them)
    async with serving(fake) as url:
        target = Target("t", url)
        await target.prepare(["top_k"])
        answer = await target.ask(Shot((user("a"),), 3, extra={"top_k": 5, "top_p": 0.5}))
    assert target.model == "small"
    assert answer.failure == ""
    assert answer.output_tokens == 3
    sent = fake.bodies[-1]
    assert not {"ignore_eos", "top_k"} & sent.keys()
    assert sent["top_p"] == 0.5
    assert sent["stream_options"] == {"include_usage": True}
    assert "does not take ignore_eos: sent without it" in target.notes


async def test_all_of_it_where_all_of_it_is_taken() -> None:
    fake = Fake()
    async with serving(fake) as url:
        target = Target("t", url)
        await target.prepare()
        words = await target.measure_words()
    assert target.notes == []
    assert fake.bodies[0]["ignore_eos"] is True
    assert (words.slope, words.overhead) == (3.0, 10.0)


async def test_a_server_without_usage() -> None:
    fake = Fake()
    fake.with_usage = False
    async with serving(fake) as url:
        target = Target("t", url)
        await target.prepare()
        assert (await target.measure_words()).slope == 1.0
    assert any("reports no usage" in note for note in target.notes)


@pytest.mark.parametrize(
    ("model", "key", "said"),
    [
        ("large", "", "answered 404: no such model .it lists small"),
        (None, "secret", "answered 401: no such key .--api-key"),
    ],
)
async def test_refusals_say_what_to_do(model: str | None, key: str, said: str) -> None:
    fake = Fake()
    fake.key = key
    async with serving(fake) as url:
        with pytest.raises(TargetError, match=said):
            await Target("t", url, model, api_key="wrong").prepare()


async def test_a_server_that_refuses_everything() -> None:
    async with serving(Fake(refuses={"model"})) as url:
        with pytest.raises(TargetError, match="answered 400: unknown parameter: model"):
            await Target("t", url).prepare()


async def test_a_server_that_lists_nothing() -> None:
    fake = Fake()
    fake.models = []
    async with serving(fake) as url:
        with pytest.raises(TargetError, match="lists no model"):
            await Target("t", url).prepare()


async def test_a_page_that_is_no_api() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>hello</p>"
    async with listening(saying(head=head)) as url:
        with pytest.raises(TargetError, match="not the OpenAI API"):
            await Target("t", url).prepare()


# ------------------------------------------------------------------ loads on servers


def closed(shots: int, clients: int) -> Load:
    return Load(iter([Session((Shot((user(f"{n}"),), n + 1),)) for n in range(shots)]), clients)


@pytest.mark.slow
@given(shots=st.integers(0, 12), clients=st.integers(1, 15))
@settings(max_examples=15, deadline=None)
def test_every_request_is_sent_once_and_no_more_at_once_than_clients(
    shots: int, clients: int
) -> None:
    fake = Fake()
    answers: dict[int, Answer] = {}

    async def main() -> None:
        async with serving(fake) as url:
            await run_load(Target("t", url, "small"), closed(shots, clients), answers.__setitem__)

    asyncio.run(main())
    assert sorted(answers) == list(range(shots))
    # Numbered in order: request n asked for n + 1 tokens.
    assert [answers[n].output_tokens for n in range(shots)] == [n + 1 for n in range(shots)]
    assert fake.active[1] <= clients


@pytest.mark.slow
async def test_an_open_loop_waits_for_nobody_but_its_bound() -> None:
    fake = Fake()
    fake.delay_s = 0.1
    for bound, most in ((100, 6), (2, 2)):
        fake.active = [0, 0]
        load = Load(iter([Session((SHOT,), 0.001 * n) for n in range(6)]))
        answers: dict[int, Answer] = {}
        async with serving(fake) as url:
            target = Target("t", url, "small")
            await run_load(target, load, answers.__setitem__, max_in_flight=bound)
        assert len(answers) == 6
        assert fake.active[1] == most
        lags = [answer.sent_s - answer.due_s for answer in answers.values()]
        assert min(lags) >= 0


async def test_after_max_seconds_nothing_more_is_sent() -> None:
    endless = Load(Session((SHOT,)) for _ in iter(int, 1))
    answers: dict[int, Answer] = {}
    async with serving(Fake()) as url:
        await run_load(Target("t", url, "small"), endless, answers.__setitem__, max_seconds=0.1)
    assert answers
    assert not any(answer.failure for answer in answers.values())


async def test_the_shots_of_a_session_follow_each_other() -> None:
    fake = Fake()
    session = Session(tuple(Shot((user(f"{n}"),), 1) for n in range(4)))
    async with serving(fake) as url:
        await run_load(Target("t", url, "small"), Load(iter([session]), 3), lambda *_: None)
    assert [body["messages"][0]["content"] for body in fake.bodies] == list("0123")
    assert fake.active[1] == 1


async def test_rounds_are_interleaved_and_get_the_same_prompts() -> None:
    order: list[tuple[str, str]] = []

    class Spy(Target):
        async def ask(self, shot: Shot, *args: Any, **kwargs: Any) -> Answer:
            order.append((self.name, shot.messages[0]["content"]))
            return await super().ask(shot, *args, **kwargs)

    def load(seed: str) -> Load:
        return Load(iter([Session((Shot((user(seed),), 2),))]))

    async with serving(Fake()) as url:
        targets = [Spy(name, url, "small") for name in "ab"]
        results: list[Any] = []
        plan = Plan({"x": load, "y": load}, rounds=2, seed=7, compare_texts=True)
        await run_plan(plan, targets, results, lambda _: None)
    assert order == [("a", "7 0"), ("b", "7 0"), ("a", "7 1"), ("b", "7 1")] * 2
    assert [len(each.rounds["b"]) for each in results] == [2, 2]
    assert (results[0].texts["b"].identical, results[0].texts["b"].compared) == (2, 2)


async def test_what_was_measured_before_an_interruption_is_kept() -> None:
    fake = Fake()
    results: list[Any] = []
    load = lambda _: Load(Session((SHOT,)) for _ in iter(int, 1))  # noqa: E731
    async with serving(fake) as url:
        plan = Plan({"endless": load}, rounds=1)
        target = Target("t", url, "small")
        task = asyncio.create_task(run_plan(plan, [target], results, lambda _: None))
        while len(fake.bodies) < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (only,) = results[0].counted("t")
    assert only.is_whole is False
    assert only.total.completed >= 3
