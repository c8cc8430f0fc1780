"""Signals: new requests are refused, what runs may finish, the rest is told. Over real sockets."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import time
from typing import Any

import httpx
import pytest

from stoker.testing import ScriptedRuntime

pytestmark = pytest.mark.slow

SLOW = "[plugins.scripted]\nstep_s = 0.01\n"


def complete(served: Any, prompt: str, max_tokens: int = 10, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    headers = {"x-request-id": prompt}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)


def expected(prompt: str, num_tokens: int) -> str:
    return ScriptedRuntime().expected_text([256, *prompt.encode()], num_tokens)


def wait_for_load(served: Any, running: int, waiting: int) -> None:
    def reached() -> bool:
        now = (
            served.metric("stoker_num_requests_running"),
            served.metric("stoker_num_requests_waiting"),
        )
        return now == (running, waiting)

    served.wait_for(reached)


def start_draining(served: Any) -> None:
    served.process.send_signal(signal.SIGTERM)
    served.wait_for(lambda: httpx.get(f"{served.url}/ready").status_code == 503)
    assert httpx.get(f"{served.url}/health").json()["status"] == "draining"


def check_ended_well(served: Any) -> None:
    assert served.process.wait(20) == 0
    assert "Traceback" not in served.log.read_text()


def test_what_runs_and_waits_may_finish_and_new_requests_are_refused(serve: Any) -> None:
    with (
        serve("scripted:m", "--lanes", "1", config=SLOW) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(complete, served, "running", 150)
        wait_for_load(served, 1, 0)
        waiting = [pool.submit(complete, served, "waiting", 20, stream=s) for s in (False, True)]
        wait_for_load(served, 1, 2)
        start_draining(served)
        for stream in (False, True):
            refused = complete(served, "too late", stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "service_unavailable"
            assert refused.headers["retry-after"] == "5"
            assert refused.headers["retry-after-ms"] == "5000"
        assert served.metric("stoker_requests_refused_total") == 2
        assert running.result().json()["choices"][0]["text"] == expected("running", 150)
        plain, streamed = (job.result() for job in waiting)
        assert plain.json()["choices"][0]["text"] == expected("waiting", 20)
        assert streamed.text.endswith("data: [DONE]\n\n")
        check_ended_well(served)


def test_what_does_not_finish_in_time_is_cancelled_with_an_error(serve: Any) -> None:
    config = f"[server]\ndrain_timeout_s = 0.3\n{SLOW}"
    with (
        serve("scripted:m", "--lanes", "1", config=config) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        body = {"prompt": "endless", "max_tokens": 3000, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            waiting = pool.submit(complete, served, "waiting", stream=True)
            wait_for_load(served, 1, 1)
            served.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert "[DONE]" not in events[-1]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "server_shutdown"
        told = waiting.result()  # nothing of its stream had been sent
        assert told.status_code == 503
        assert told.json()["error"]["code"] == "server_shutdown"
        assert int(told.headers["retry-after"]) >= 1
        check_ended_well(served)


def test_a_second_signal_stops_at_once(serve: Any) -> None:
    with (
        serve("scripted:m", "--lanes", "1", config=SLOW) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(complete, served, "endless", 3900)
        wait_for_load(served, 1, 0)
        waiting = pool.submit(complete, served, "waiting")
        wait_for_load(served, 1, 1)
        start_draining(served)
        asked = time.monotonic()
        served.process.send_signal(signal.SIGINT)
        # Not after the 30 s that running requests may take.
        assert served.process.wait(20) == 0
        assert time.monotonic() - asked < 20
        for job in (running, waiting):
            assert job.result().json()["error"]["code"] == "server_shutdown"


def test_requests_can_be_cancelled_while_the_server_drains(serve: Any) -> None:
    with (
        serve("scripted:m", "--lanes", "1", config=SLOW) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(complete, served, "endless", 3900)
        wait_for_load(served, 1, 0)
        start_draining(served)
        listed = httpx.get(f"{served.url}/v1/requests").json()["data"]
        assert [request["id"] for request in listed] == ["endless"]
        assert httpx.delete(f"{served.url}/v1/requests/endless").json()["cancelled"] is True
        assert running.result().status_code == 499
        check_ended_well(served)  # well before the 30 s are over: the next would be a kill


def test_a_client_that_does_not_read_does_not_keep_the_server_up(serve: Any) -> None:
    config = "[server]\ndrain_timeout_s = 0.1\nmax_unread_tokens = 500\n"
    with serve("scripted:m", "--context", "60000", config=config) as served:
        body = {"prompt": "x", "max_tokens": 59_000, "temperature": 0, "stream": True}
        payload = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(payload)}\r\n\r\n"
        )
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
            reader.sendall(head.encode() + payload)
            served.wait_for(lambda: served.metric("stoker_num_requests_paused") == 1)
            served.process.send_signal(signal.SIGTERM)
            check_ended_well(served)
