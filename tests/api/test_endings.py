"""Clients that leave, runtimes that fail, servers that stop."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

TEXT = "/v1/completions"
LONG = {"prompt": "hi", "max_tokens": 1000, "temperature": 0}


def post_raw(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent, and nothing read yet."""
    payload = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    connection.sendall(head.encode() + payload)
    return connection


# --------------------------------------------------------------------------- clients that leave


def test_streams_closed_midway_are_aborted(slow_server: Running) -> None:
    connections = [post_raw(slow_server.port, {**LONG, "stream": True}) for _ in range(12)]
    slow_server.wait_until(lambda: (slow_server.num_running, slow_server.num_waiting) == (8, 4))
    for connection in connections:
        connection.close()
    slow_server.check_still_serves()


def test_stream_closed_before_its_first_chunk(slow_server: Running) -> None:
    for _ in range(5):
        post_raw(slow_server.port, {**LONG, "stream": True}).close()
    slow_server.check_still_serves()


@pytest.mark.parametrize("body", [LONG, {**LONG, "n": 4}, {**LONG, "prompt": ["a", "b"]}])
def test_plain_request_is_aborted_when_its_client_leaves(
    slow_server: Running, body: dict[str, Any]
) -> None:
    connection = post_raw(slow_server.port, body)
    slow_server.wait_until(lambda: slow_server.num_running > 0)
    connection.close()
    slow_server.check_still_serves()


def test_stream_of_several_prompts_is_aborted(slow_server: Running) -> None:
    connection = post_raw(slow_server.port, {**LONG, "prompt": ["a", "b", "c"], "stream": True})
    while b"data: " not in connection.recv(65536):
        pass
    connection.close()
    slow_server.wait_until_idle()


@pytest.mark.slow
def test_reader_that_stops_reading_holds_up_nobody(server: Running) -> None:
    body = {**LONG, "prompt": ["x"] * 8, "n": 8, "max_tokens": 900, "stream": True}
    connection = post_raw(server.port, body)  # megabytes, and nobody takes them
    short = {"prompt": "hi", "max_tokens": 3}
    server_side = httpx.post(server.url + TEXT, json=short, timeout=60)  # 64 others share its steps
    connection.close()
    assert server_side.status_code == 200
    server.check_still_serves()


# --------------------------------------------------------------------------- runtimes that fail


@contextmanager
def failing(server: Running, after: int) -> Iterator[None]:
    """The runtime raises from its n-th step on."""
    num_steps = 0

    def before_step(_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps > after:
            raise OSError("a secret path of the machine")

    server.runtime.before_step = before_step
    try:
        yield
    finally:
        server.runtime.before_step = None


@pytest.mark.parametrize("body", [LONG, {**LONG, "n": 3}, {**LONG, "prompt": ["a", "b"]}])
def test_failing_runtime_is_a_500(server: Running, body: dict[str, Any]) -> None:
    with failing(server, after=3):
        response = httpx.post(server.url + TEXT, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    server.check_still_serves()


def test_failing_runtime_ends_a_stream_with_an_error_event(server: Running) -> None:
    with failing(server, after=5):
        response = httpx.post(server.url + TEXT, json={**LONG, "stream": True})
    assert response.status_code == 200
    *texts, last, end = response.text.split("\n\n")
    assert end == ""
    assert "[DONE]" not in response.text
    assert texts
    error = json.loads(last.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    server.check_still_serves()


# --------------------------------------------------------------------------- servers that stop


@pytest.mark.slow
def test_shutdown_tells_the_clients(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.02}, server={"drain_timeout_s": 0.05})
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, body: dict[str, Any]) -> None:
        answers[name] = httpx.post(server.url + TEXT, json=body, timeout=60)

    bodies = {"plain": LONG, "stream": {**LONG, "stream": True}}
    threads = [threading.Thread(target=ask, args=item) for item in bodies.items()]
    for thread in threads:
        thread.start()
    server.wait_until(lambda: server.num_running == 2)
    assert server.loop is not None
    draining = asyncio.run_coroutine_threadsafe(server.server.drain(), server.loop)
    server.wait_until(lambda: server.server.router.draining)

    refused = httpx.post(server.url + TEXT, json=LONG)
    assert refused.status_code == 503
    ready = httpx.get(server.url + "/ready")
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    health = httpx.get(server.url + "/health")
    assert health.json()["status"] in {"draining", "stalled"}

    for thread in threads:
        thread.join()
    draining.result(timeout=30)
    assert answers["plain"].status_code == 503
    assert answers["plain"].json()["error"]["code"] == "server_shutdown"
    assert answers["stream"].status_code == 200
    *_, last, end = answers["stream"].text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_shutdown"


@pytest.mark.slow
def test_full_queue_is_a_429_with_retry_after(start_server: Callable[..., Running]) -> None:
    admission = {"max_queue_requests": 2}
    server = start_server({"step_s": 0.02}, admission=admission, plugins={"queue-limit": {}})
    streams = []
    for running, waiting in [*((n, 0) for n in range(1, 9)), (8, 1), (8, 2)]:
        streams.append(post_raw(server.port, {**LONG, "stream": True}))
        server.wait_until(
            lambda r=running, w=waiting: (server.num_running, server.num_waiting) == (r, w)
        )
    response = httpx.post(server.url + TEXT, json=LONG)
    assert response.status_code == 429
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    server.wait_until_idle()
    server.check_still_serves()
