"""Responses that run without their client: polled, followed, cancelled, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from openai_schemas import check
from responses_http import PATH, create, decoded, refused, text_of

if TYPE_CHECKING:
    from conftest import Running


@pytest.fixture(scope="module")
def slow(start_server: Callable[..., Running]) -> Running:
    return start_server({"step_s": 0.004}, responses={"path": ":memory:", "max_background": 3})


@pytest.fixture
def slow_client(slow: Running) -> Any:
    with httpx.Client(base_url=slow.url, timeout=60) as client:
        yield client
    slow.wait_until_idle()


def begin(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = create(client, background=True, **body)
    assert response["status"] == "queued"
    assert response["background"] is True
    assert response["output"] == []
    return response


def poll(client: httpx.Client, response_id: str) -> dict[str, Any]:
    """The response as it is, checked."""
    answer = client.get(f"{PATH}/{response_id}")
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    check("Response", response)
    return response


def wait(client: httpx.Client, response_id: str, *statuses: str) -> dict[str, Any]:
    """Poll until it has one of the statuses."""
    deadline_s = time.monotonic() + 30
    while True:
        response = poll(client, response_id)
        if response["status"] in statuses:
            return response
        assert response["status"] in {"queued", "in_progress"}, response
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.slow
def test_it_runs_on_and_is_polled(slow_client: httpx.Client) -> None:
    response = begin(slow_client, max_output_tokens=60)
    running = wait(slow_client, response["id"], "in_progress")
    assert len(text_of(running)) < 60
    error = refused(slow_client, previous_response_id=response["id"])
    assert "wait until it is over" in error["message"]
    done = wait(slow_client, response["id"], "incomplete")
    assert text_of(done) == text_of(create(slow_client, max_output_tokens=60))
    assert done["usage"]["output_tokens"] == 60
    # Now it can be followed, and cancelling it changes nothing.
    create(slow_client, previous_response_id=response["id"])
    assert slow_client.post(f"{PATH}/{response['id']}/cancel").json() == done


def test_it_is_cancelled(slow: Running, slow_client: httpx.Client) -> None:
    response = begin(slow_client, max_output_tokens=900)
    wait(slow_client, response["id"], "in_progress")
    cancelled = slow_client.post(f"{PATH}/{response['id']}/cancel")
    assert cancelled.status_code == 200
    check("Response", cancelled.json())
    assert cancelled.json()["status"] == "cancelled"
    assert poll(slow_client, response["id"]) == cancelled.json()
    slow.wait_until_idle()
    not_in_background = create(slow_client)
    answer = slow_client.post(f"{PATH}/{not_in_background['id']}/cancel")
    assert answer.status_code == 400
    assert "background" in answer.json()["error"]["message"]


def test_it_is_deleted_while_it_runs(slow: Running, slow_client: httpx.Client) -> None:
    response = begin(slow_client, max_output_tokens=900)
    assert slow_client.delete(f"{PATH}/{response['id']}").json()["deleted"] is True
    assert slow_client.get(f"{PATH}/{response['id']}").status_code == 404
    slow.wait_until_idle()


def test_no_more_than_so_many_of_a_tenant_run(slow_client: httpx.Client) -> None:
    running = [begin(slow_client, max_output_tokens=900) for _ in range(3)]
    answer = slow_client.post(PATH, json={"input": "hi", "background": True})
    assert answer.status_code == 429
    assert answer.json()["error"]["param"] == "background"
    for response in running:
        assert slow_client.delete(f"{PATH}/{response['id']}").status_code == 200
    response = begin(slow_client, max_output_tokens=5)
    wait(slow_client, response["id"], "incomplete")


def test_what_is_wrong_is_told_at_once(slow_client: httpx.Client) -> None:
    assert refused(slow_client, background=True, max_output_tokens=5000)["param"] == (
        "max_output_tokens"
    )
    assert refused(slow_client, background=True, tools=[{"type": "mcp"}])["param"] == "tools.0.type"


@pytest.mark.slow
def test_its_events_are_followed_from_anywhere(slow_client: httpx.Client) -> None:
    body = {"input": "hi", "max_output_tokens": 40, "background": True, "stream": True}
    first: dict[str, Any] = {}
    with slow_client.stream("POST", PATH, json=body) as answer:
        text = ""
        for text_part in answer.iter_text():
            text += text_part
            if text.count("\n\n") >= 6:
                break  # the client goes away in the middle
    first = decoded(text[: text.rindex("\n\n") + 2])[0]
    assert first["type"] == "response.created"
    response_id = first["response"]["id"]

    def follow(**query: Any) -> list[dict[str, Any]]:
        answer = slow_client.get(f"{PATH}/{response_id}", params={"stream": "true", **query})
        assert answer.headers["content-type"].startswith("text/event-stream")
        return decoded(answer.text)

    live = follow()
    assert [event["type"] for event in live[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    assert live[0]["sequence_number"] == 0
    done = wait(slow_client, response_id, "incomplete")
    assert live[-1]["response"] == done
    deltas = [e["delta"] for e in live if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(done)
    # It is over now: they come from the store.
    assert follow() == live
    assert follow(starting_after=0) == live[1:]
    assert follow(starting_after=17) == live[18:]
    last = live[-1]["sequence_number"]
    for beyond in (last, last + 10):
        path = f"{PATH}/{response_id}?stream=true&starting_after={beyond}"
        assert slow_client.get(path).text == ""


@pytest.mark.parametrize(
    "query", ["stream=true", "stream=maybe", "starting_after=1", "stream=true&starting_after=-1"]
)
def test_only_what_was_made_for_it_is_followed(slow_client: httpx.Client, query: str) -> None:
    for response in (create(slow_client), begin(slow_client)):
        answer = slow_client.get(f"{PATH}/{response['id']}?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in {"stream", "starting_after"}


def test_one_that_fails_says_so(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.002})
    num_steps = 0

    def fail(_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise RuntimeError("the device is gone")

    server.runtime.before_step = fail
    with httpx.Client(base_url=server.url) as client:
        response = begin(client, max_output_tokens=50)
        failed = wait(client, response["id"], "failed")
        assert failed["error"]["code"] == "server_error"
    server.runtime.before_step = None
    server.wait_until_idle()


@pytest.mark.slow
def test_what_runs_when_a_server_stops_has_failed(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    responses = {"path": str(tmp_path / "responses.sqlite3")}
    server = start_server({"step_s": 0.01}, responses=responses)
    with httpx.Client(base_url=server.url) as client:
        whole = create(client)
        response = begin(client, max_output_tokens=900)
        wait(client, response["id"], "in_progress")
    server.stop()
    again = start_server(responses=responses)
    with httpx.Client(base_url=again.url) as client:
        assert poll(client, whole["id"]) == whole
        failed = poll(client, response["id"])
        assert failed["status"] == "failed"
        assert failed["error"]["message"]
        create(client, previous_response_id=whole["id"])


@pytest.mark.slow
def test_one_that_cannot_be_stored_at_its_end_is_still_found(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(responses={"path": ":memory:", "max_bytes": 2200})
    with httpx.Client(base_url=server.url) as client:
        response = begin(client, max_output_tokens=900)
        done = wait(client, response["id"], "incomplete")
        assert len(text_of(done)) == 900 or done["usage"]["output_tokens"] == 900
        assert poll(client, response["id"]) == done
