"""Whoever cancels, wherever the request is: its lane is freed, and nobody else notices. Over real sockets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stoker.testing import ScriptedRuntime

pytestmark = pytest.mark.slow

BEGIN = 256
CONTEXT = 60_000
STAGES = ["queue", "prefill", "decode"]
# A prompt of 3,000 tokens takes 3 s to compute, in steps of 0.1 s while others decode.
PACE = "[plugins.scripted]\nstep_s = 0.002\ntoken_s = 0.001\n"
LONG_PROMPT = "long " * 600


def expected(prompt: str, num_tokens: int) -> str:
    return ScriptedRuntime(context_length=CONTEXT).expected_text(
        [BEGIN, *prompt.encode()], num_tokens
    )


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line[:7] == "data: {"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ()))


def send(
    served: Any, body: dict[str, Any], request_id: str, receive_buffer: int = 0
) -> socket.socket:
    """A connection on which a request was sent, and nothing read yet."""
    port = int(served.url.rsplit(":", 1)[1])
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"x-request-id: {request_id}\r\nconnection: close\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    connection.sendall(head.encode() + payload)
    return connection


def read_all(connection: socket.socket) -> tuple[int, str]:
    """Status and body of an answer, up to wherever the connection ends."""
    data = bytearray()
    # A window that was kept small on purpose would let what the kernel still holds trickle for minutes.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    with connection, contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            data += chunk
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        body = unchunked(body)
    return int(head.split(b" ", 2)[1]), body.decode()


def unchunked(body: bytes) -> bytes:
    parts, at = [], 0
    while (end := body.find(b"\r\n", at)) > 0:
        size = int(body[at:end], 16)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


def trace(served: Any, request_id: str) -> tuple[str, dict[str, Any]]:
    """A request's status and its only sequence's trace; nothing while it is not there yet."""
    response = httpx.get(f"{served.url}/v1/requests/{request_id}")
    if response.status_code == 404:
        return "", {}
    body = response.json()
    return body["status"], body["sequences"][0]


def wait_for_stage(served: Any, request_id: str, stage: str) -> None:
    def reached() -> bool:
        status, facts = trace(served, request_id)
        if stage == "queue":
            return status == "waiting"
        if stage == "prefill":
            return bool(facts) and facts["status"] == "prefill" and facts["computed_tokens"] > 0
        return bool(facts) and facts["completion_tokens"] > 2

    served.wait_for(reached)


class Bystander:
    """A stream that runs all the time, read on a thread of its own."""

    def __init__(self, served: Any) -> None:
        self.lines: list[str] = []
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = {"prompt": "bystander", "max_tokens": 50_000, "temperature": 0, "stream": True}
        url = f"{self._served.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                self.lines.append(line)
                if self._stop.is_set():
                    return

    def check(self) -> None:
        """It goes on, and every token so far is right."""
        before = len(self.lines)
        self._served.wait_for(lambda: len(self.lines) > before)
        text = text_of(self.lines[:])
        assert text
        assert text == expected("bystander", len(text))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def served(serve_once: Any) -> Iterator[Any]:
    options = ("scripted:m", "--lanes", "2", "--context", str(CONTEXT))
    with serve_once(*options, config=PACE) as served:
        yield served


@pytest.fixture(scope="module")
def bystander(served: Any) -> Iterator[Bystander]:
    running = Bystander(served)
    served.wait_for(lambda: bool(running.lines))
    yield running
    running.stop()


@contextlib.contextmanager
def lane_taken(served: Any, *, wanted: bool) -> Iterator[None]:
    """The second lane is taken by another request, if that is wanted."""
    if not wanted:
        yield
        return
    request_id = uuid.uuid4().hex
    body = {"prompt": "blocker", "max_tokens": 50_000, "temperature": 0, "stream": True}
    blocker = send(served, body, request_id)
    wait_for_stage(served, request_id, "decode")
    yield
    blocker.close()


def counts(served: Any) -> dict[str, float]:
    """Ends by reason, and errors by code: from ``/metrics``."""
    found = {}
    for line in httpx.get(f"{served.url}/metrics").text.splitlines():
        if line.startswith(("stoker_request_success_total", "stoker_request_errors_total")):
            label = re.search(r'(?:finished_reason|code)="([^"]+)"', line)
            assert label is not None
            found[label[1]] = float(line.rsplit(" ", 1)[1])
    return found


def differences(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    changed = {name: value - before.get(name, 0) for name, value in after.items()}
    return {name: difference for name, difference in changed.items() if difference}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["gone", "deadline", "delete"])
def test_cancelled(served: Any, bystander: Bystander, way: str, stage: str, stream: bool) -> None:
    request_id = f"{way}/{stage}/{stream}"
    body = {
        "prompt": f"{request_id} {LONG_PROMPT}" if stage == "prefill" else "short",
        "max_tokens": 40_000,
        "temperature": 0,
        "stream": stream,
        **({"timeout": 1.0} if way == "deadline" else {}),
    }
    with lane_taken(served, wanted=stage == "queue"):
        others = 2 if stage == "queue" else 1
        before = counts(served)
        with send(served, body, request_id) as victim:
            if way == "gone":
                wait_for_stage(served, request_id, stage)
                victim.close()
            elif way == "delete":
                wait_for_stage(served, request_id, stage)
                answer = httpx.delete(f"{served.url}/v1/requests/{request_id}")
                assert answer.json()["cancelled"] is True
            if way != "gone":
                check_answer(*read_all(victim), way, stage, stream=stream)

        def is_over() -> bool:
            return trace(served, request_id)[0] in {"aborted", "failed", "cancelled"}

        served.wait_for(is_over)
        served.wait_for(lambda: served.metric("stoker_num_requests_running") == others)
        assert served.metric("stoker_num_requests_waiting") == 0
        ends = {
            "gone": {"abort": 1},
            "deadline": {"error": 1, "deadline_exceeded": 1},
            "delete": {"error": 1, "request_cancelled": 1},
        }
        assert differences(before, counts(served)) == ends[way]
        status, facts = trace(served, request_id)
        assert status == {"gone": "aborted", "deadline": "failed", "delete": "cancelled"}[way]
        check_facts(facts, stage)
    served.wait_for(lambda: served.metric("stoker_num_requests_running") == 1)
    # The lane serves the next one, which finds nothing of its forerunner in it.
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={"prompt": f"next {request_id}", "max_tokens": 8, "temperature": 0},
        timeout=60,
    )
    assert answer.json()["choices"][0]["text"] == expected(f"next {request_id}", 8)
    bystander.check()


def check_answer(status: int, answer: str, way: str, stage: str, *, stream: bool) -> None:
    code, expected_status = {
        "deadline": ("deadline_exceeded", 408),
        "delete": ("request_cancelled", 499),
    }[way]
    if stream and stage == "decode":
        assert status == 200
        *events, last, end = answer.split("\n\n")
        assert end == ""
        assert len(events) > 1
        assert "[DONE]" not in answer
        error = json.loads(last.removeprefix("data: "))["error"]
    else:  # nothing of a stream was sent yet either: a status can say it
        assert status == expected_status
        error = json.loads(answer)["error"]
    assert error["code"] == code


def check_facts(facts: dict[str, Any], stage: str) -> None:
    """What is told of the request is what happened."""
    assert facts["status"] == "finished"
    assert bool(facts["admitted_by"]) is (stage != "queue")
    if stage == "prefill":
        assert 0 < facts["computed_tokens"] < facts["prompt_tokens"]
    assert (facts["computed_tokens"] == 0) is (stage == "queue")
    assert (facts["completion_tokens"] > 0) is (stage == "decode")


@pytest.mark.parametrize("signals", [1, 2], ids=["at-the-limit", "second-signal"])
def test_shutdown_cancels_whatever_the_stage(serve: Any, signals: int) -> None:
    config = f"[server]\ndrain_timeout_s = {30 if signals == 2 else 0}\n{PACE}"
    with (
        serve("scripted:m", "--lanes", "4", config=config) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        answers: dict[tuple[str, bool], Any] = {}
        for stage in ("decode", "prefill", "queue"):
            for stream in (False, True):
                request_id = f"{stage}/{stream}"
                prompt = f"{request_id} {LONG_PROMPT}" if stage == "prefill" else "short"
                body = {"prompt": prompt, "max_tokens": 900, "temperature": 0, "stream": stream}
                connection = send(served, body, request_id)
                answers[stage, stream] = pool.submit(read_all, connection)
                wait_for_stage(served, request_id, stage)
        served.process.send_signal(signal.SIGTERM)
        if signals == 2:
            served.wait_for(lambda: httpx.get(f"{served.url}/ready").status_code == 503)
            served.process.send_signal(signal.SIGTERM)
        for (stage, stream), answer in answers.items():
            status, text = answer.result()
            last = text.rstrip("\n").rpartition("\n\n")[2].removeprefix("data: ")
            assert json.loads(last)["error"]["code"] == "server_shutdown", (stage, stream)
            assert status == (200 if stream and stage == "decode" else 503), (stage, stream)
        assert served.process.wait(20) == 0
        assert "Traceback" not in served.log.read_text()


# --------------------------------------------------------------------------- readers that do not read

FLOOD = {"prompt": "flood", "max_tokens": 55_000, "temperature": 0, "stream": True}


def start_flood(serve: Any, server_options: str) -> Any:
    config = f"[server]\n{server_options}"
    return serve("scripted:m", "--lanes", "1", "--context", str(CONTEXT), config=config)


def test_a_slow_reader_is_paused_and_loses_nothing(serve: Any) -> None:
    with start_flood(serve, "max_unread_tokens = 500\n") as served:
        with send(served, FLOOD, "slow", receive_buffer=4096) as reader:
            served.wait_for(lambda: trace(served, "slow")[1].get("status") == "paused")
            assert trace(served, "slow")[0] == "running"
            # Its lane is for others meanwhile.
            for _ in range(2):
                answer = httpx.post(
                    f"{served.url}/v1/completions",
                    json={"prompt": "other", "max_tokens": 20, "temperature": 0},
                )
                assert answer.json()["choices"][0]["text"] == expected("other", 20)
            assert served.metric("stoker_num_requests_paused") == 1
            assert trace(served, "slow")[1]["completion_tokens"] < FLOOD["max_tokens"]
            _, answer_text = read_all(reader)
        lines = answer_text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        num_tokens = FLOOD["max_tokens"]
        assert isinstance(num_tokens, int)
        assert text_of(lines) == expected("flood", num_tokens)
        served.wait_for(lambda: trace(served, "slow")[0] == "finished")
        (facts,) = httpx.get(f"{served.url}/v1/requests/slow").json()["sequences"]
        assert facts["preemptions"][0]["reason"] == "reader"
        assert facts["paused_s"] > 0
        assert (
            served.metric('stoker_preemptions_by_reason_total{model_name="m",reason="reader"') > 0
        )
        assert served.metric("stoker_num_requests_paused") == 0


def test_a_reader_that_never_reads_on_is_dropped(serve: Any) -> None:
    options = "max_unread_tokens = 500\nreader_timeout_s = 0.5\n"
    with start_flood(serve, options) as served:
        with send(served, FLOOD, "stuck", receive_buffer=4096) as reader:
            served.wait_for(lambda: trace(served, "stuck")[0] == "failed")
            assert counts(served)["reader_stalled"] == 1
            served.wait_for(lambda: "SlowReaderError" in served.log.read_text())
            # The connection is broken off: what the kernel still held comes, and no end.
            _, answer = read_all(reader)
            assert "[DONE]" not in answer
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        assert "Traceback" not in served.log.read_text()


def test_a_reader_that_stops_after_the_last_token_was_generated_is_dropped(serve: Any) -> None:
    options = f"max_unread_tokens = {CONTEXT}\nreader_timeout_s = 0.5\n"
    with start_flood(serve, options) as served:
        with send(served, FLOOD, "late", receive_buffer=4096) as reader:
            served.wait_for(lambda: "SlowReaderError" in served.log.read_text())
            assert trace(served, "late")[0] == "finished"
            _, answer = read_all(reader)
            assert "[DONE]" not in answer
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
