"""Batches in real server processes, which are killed, drained, and started again."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import httpx
import pytest

CONFIG = """
[plugins.batches]
directory = "batches"
"""
NUM_LINES = 120


def make_batch(served: Any, lines: list[dict[str, Any]], endpoint: str = "/v1/completions") -> str:
    content = "".join(
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": endpoint, "body": body}) + "\n"
        for i, body in enumerate(lines)
    )
    file = httpx.post(
        f"{served.url}/v1/files",
        data={"purpose": "batch"},
        files={"file": ("in.jsonl", content.encode())},
    )
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": endpoint, "completion_window": "24h"}
    batch = httpx.post(f"{served.url}/v1/batches", json=body)
    assert batch.status_code == 200, batch.text
    return str(batch.json()["id"])


def find(served: Any, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{served.url}/v1/batches/{batch_id}").json()
    return found


def num_done(served: Any, batch_id: str) -> int:
    return int(find(served, batch_id)["request_counts"]["completed"])


def results(served: Any, batch: dict[str, Any]) -> dict[str, str]:
    """The texts by ``custom_id``; each is there once."""
    text = httpx.get(f"{served.url}/v1/files/{batch['output_file_id']}/content").text
    lines = [json.loads(line) for line in text.splitlines()]
    found = {x["custom_id"]: x["response"]["body"]["choices"][0]["text"] for x in lines}
    assert len(found) == len(lines)
    return found


def wait_for_more(served: Any, batch_id: str, number: int) -> int:
    served.wait_for(lambda: num_done(served, batch_id) > number)
    return num_done(served, batch_id)


@pytest.mark.slow
def test_a_batch_outlives_servers_that_are_killed(serve: Any) -> None:
    """Three kills in the middle; all lines are there in the end, each once, each with its own text."""
    arguments = ("scripted:m", "--lanes", "4")
    config = CONFIG + "[plugins.scripted]\nstep_s = 0.005\n"
    bodies: list[dict[str, Any]] = [
        {"prompt": f"prompt {i}", "max_tokens": 10 + i % 20, "temperature": 0}
        for i in range(NUM_LINES)
    ]
    batch_id, done = "", 0
    for _ in range(3):
        with serve(*arguments, config=config) as served:
            batch_id = batch_id or make_batch(served, bodies)
            done = wait_for_more(served, batch_id, done + 5)
            assert done < NUM_LINES
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
    with serve(*arguments, config=config) as served:
        served.wait_for(lambda: num_done(served, batch_id) >= done)  # nothing is forgotten
        served.wait_for(lambda: find(served, batch_id)["status"] == "completed", 60)
        batch = find(served, batch_id)
        counts = {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert batch["request_counts"] == counts
        assert batch["usage"]["output_tokens"] == sum(body["max_tokens"] for body in bodies)
        texts = results(served, batch)
        assert len(texts) == NUM_LINES
        for i in range(0, NUM_LINES, 7):
            answer = httpx.post(f"{served.url}/v1/completions", json=bodies[i]).json()
            assert texts[f"r{i}"] == answer["choices"][0]["text"]


@pytest.mark.slow
def test_a_drain_does_not_wait_for_batches(serve: Any) -> None:
    config = CONFIG + "[plugins.scripted]\nstep_s = 0.2\n[server]\ndrain_timeout_s = 600\n"
    with serve("scripted:m", "--lanes", "4", "--context", "4096", config=config) as served:
        batch_id = make_batch(served, [{"prompt": "long", "max_tokens": 4000}] * 3)
        served.wait_for(lambda: served.metric("stoker_num_requests_running") == 3)
        served.process.send_signal(signal.SIGTERM)
        # Each of the three would take more than ten minutes; the test's own limit is five.
        assert served.process.wait() == 0
    with serve("scripted:m", "--lanes", "4", config=CONFIG) as served:
        # As nobody's fault has it: run again, by a faster server with a context that is too short.
        served.wait_for(lambda: find(served, batch_id)["status"] == "completed")
        assert find(served, batch_id)["request_counts"]["total"] == 3


@pytest.mark.model
def test_the_default_model_works_through_a_batch_beside_its_clients(
    serve: Any,
) -> None:
    question = {"max_tokens": 12, "temperature": 0}
    bodies = [
        {**question, "messages": [{"role": "user", "content": f"What is {i} plus {i}?"}]}
        for i in range(10)
    ]
    with serve("--context", "2048", config=CONFIG) as served:
        batch_id = make_batch(served, bodies, "/v1/chat/completions")
        answered = 0
        while find(served, batch_id)["status"] not in {"completed", "failed", "expired"}:
            body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200
            answered += 1
            time.sleep(0.1)
        assert answered > 0
        batch = find(served, batch_id)
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
        text = httpx.get(f"{served.url}/v1/files/{batch['output_file_id']}/content").text
        lines = [json.loads(line) for line in text.splitlines()]
        assert {line["custom_id"] for line in lines} == {f"r{i}" for i in range(10)}
        for line in lines:
            body = line["response"]["body"]
            assert body["object"] == "chat.completion"
            assert body["choices"][0]["message"]["content"].strip()
        assert batch["usage"]["output_tokens"] == sum(
            line["response"]["body"]["usage"]["completion_tokens"] for line in lines
        )
