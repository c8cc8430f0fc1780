"""Explaining and cancelling requests, and what tenants may see of each other."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from conftest import Running

TEXT = "/v1/completions"
LONG = {"prompt": "hi", "max_tokens": 1000, "temperature": 0}
SHORT = {"prompt": "hi", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def narrow(start_server: Callable[..., Running]) -> Running:
    """One lane, slow; whoever asks says which tenant it is."""
    models = [
        {"model": "scripted:org/scripted", "lanes": 1, "context": 1024, "options": {"step_s": 0.01}}
    ]
    proxy = {"trusted_proxies": ["127.0.0.1"], "history": 3}
    return start_server(models=models, server=proxy)


class Asked:
    """A request that is being answered on a thread of its own."""

    def __init__(self, server: Running, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._ask, args=(server.url + TEXT, body, headers))
        self._thread.start()

    def _ask(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.answer = httpx.post(url, json=body, headers=headers, timeout=60)

    def result(self) -> httpx.Response:
        self._thread.join()
        assert self.answer is not None
        return self.answer


def ask(
    server: Running, request_id: str, body: dict[str, Any] = LONG, tenant: str = "a", **more: str
) -> Asked:
    return Asked(server, body, {"x-request-id": request_id, "x-stoker-tenant": tenant, **more})


def details(server: Running, request_id: str, tenant: str = "a") -> dict[str, Any]:
    response = httpx.get(
        f"{server.url}/v1/requests/{request_id}", headers={"x-stoker-tenant": tenant}
    )
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def cancel(server: Running, request_id: str, tenant: str = "a") -> httpx.Response:
    return httpx.delete(
        f"{server.url}/v1/requests/{request_id}", headers={"x-stoker-tenant": tenant}
    )


@contextmanager
def lane_taken(server: Running) -> Iterator[None]:
    """Another tenant's request holds the lane."""
    holder = ask(server, "holder", tenant="holder")
    server.wait_until(lambda: server.num_running == 1)
    yield
    assert cancel(server, "holder", "holder").json()["cancelled"] is True
    assert holder.result().status_code == 499
    server.wait_until_idle()


# --------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("stream", [False, True])
def test_a_waiting_request_is_cancelled(narrow: Running, stream: bool) -> None:
    with lane_taken(narrow):
        asked = ask(narrow, "queued", {**LONG, "stream": stream})
        narrow.wait_until(lambda: narrow.num_waiting == 1)
        assert details(narrow, "queued")["status"] == "waiting"
        answer = cancel(narrow, "queued")
        assert (answer.status_code, answer.json()) == (
            200,
            {"id": "queued", "object": "request.cancelled", "cancelled": True},
        )
        response = asked.result()
        # Also a stream, for nothing of it was sent yet.
        assert response.status_code == 499
        assert response.json()["error"]["code"] == "request_cancelled"
        assert narrow.num_running == 1  # the other tenant's goes on
    ended = details(narrow, "queued")
    assert ended["status"] == "cancelled"
    (trace,) = ended["sequences"]
    assert (trace["status"], trace["finish_reason"]) == ("finished", "error")
    assert trace["completion_tokens"] == 0
    assert trace["time_to_first_token_s"] is None
    assert "cancelled through the API" in trace["error"]
    again = cancel(narrow, "queued")
    assert (again.status_code, again.json()["cancelled"]) == (200, False)


def test_a_running_stream_is_cancelled_with_an_error_event(narrow: Running) -> None:
    url = f"{narrow.url}{TEXT}"
    headers = {"x-request-id": "running", "x-stoker-tenant": "a", "x-stoker-explain": "1"}
    with httpx.stream("POST", url, json={**LONG, "stream": True}, headers=headers) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        assert details(narrow, "running")["status"] == "running"
        assert cancel(narrow, "running").json()["cancelled"] is True
        *_, comment, error = [line for line in lines if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_cancelled"
    explained = json.loads(comment.removeprefix(": stoker-explain "))
    assert explained["status"] == "cancelled"
    assert explained["sequences"][0]["completion_tokens"] > 0
    narrow.check_still_serves()


@pytest.mark.parametrize("request_id", ["a/b", "a//b/", "x:y+z=._-", "/a", "a%2Fb"])
def test_all_generations_under_an_id_are_cancelled_whatever_it_looks_like(
    narrow: Running, request_id: str
) -> None:
    chosen = request_id.replace("%2F", "/")
    asked = ask(narrow, chosen, {**LONG, "prompt": ["one", "two", "three"], "n": 2})
    narrow.wait_until(lambda: narrow.num_running + narrow.num_waiting == 6)
    found = details(narrow, request_id)
    assert (found["id"], found["num_sequences"], len(found["sequences"])) == (chosen, 6, 6)
    assert cancel(narrow, request_id).json() == {
        "id": chosen, "object": "request.cancelled", "cancelled": True,
    }  # fmt: skip
    assert asked.result().status_code == 499
    narrow.wait_until_idle()


def test_who_uses_an_id_twice_cancels_both(narrow: Running) -> None:
    asked = [ask(narrow, "twice") for _ in range(2)]
    narrow.wait_until(lambda: (narrow.num_running, narrow.num_waiting) == (1, 1))
    assert cancel(narrow, "twice").json()["cancelled"] is True
    assert [one.result().status_code for one in asked] == [499, 499]
    narrow.wait_until_idle()


def test_other_tenants_requests_are_not_found(narrow: Running) -> None:
    asked = ask(narrow, "mine", tenant="a")
    narrow.wait_until(lambda: narrow.num_running == 1)
    for response in (
        cancel(narrow, "mine", "b"),
        cancel(narrow, "none"),
        httpx.get(f"{narrow.url}/v1/requests/mine", headers={"x-stoker-tenant": "b"}),
        httpx.get(f"{narrow.url}/v1/requests/none"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"
    assert httpx.get(f"{narrow.url}/v1/requests").json() == {"object": "list", "data": []}
    assert narrow.num_running == 1
    # The same id of another tenant is another request.
    theirs = ask(narrow, "mine", tenant="b")
    narrow.wait_until(lambda: narrow.num_waiting == 1)
    assert cancel(narrow, "mine", "b").json()["cancelled"] is True
    assert theirs.result().status_code == 499
    assert narrow.num_running == 1
    cancel(narrow, "mine", "a")
    assert asked.result().status_code == 499
    narrow.wait_until_idle()


def test_the_official_client_does_not_retry_what_was_cancelled(narrow: Running) -> None:
    errors: list[openai.APIStatusError] = []

    def call() -> None:
        headers = {"x-request-id": "official", "x-stoker-tenant": "a"}
        with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="x", max_retries=3) as client:
            try:
                client.completions.create(
                    model="org/scripted", prompt="hi", max_tokens=1000, extra_headers=headers
                )
            except openai.APIStatusError as error:
                errors.append(error)

    before = narrow.server.router.num_accepted
    thread = threading.Thread(target=call)
    thread.start()
    # Not before it is there: another test's request may still be leaving its lane.
    narrow.wait_until(lambda: narrow.server.router.num_accepted > before)
    assert cancel(narrow, "official").json()["cancelled"] is True
    thread.join()
    assert [(error.status_code, error.code) for error in errors] == [(499, "request_cancelled")]
    assert narrow.server.router.num_accepted == before + 1


# --------------------------------------------------------------------------- explain


@pytest.mark.slow
def test_an_answer_is_explained_when_asked_for(narrow: Running) -> None:
    with lane_taken(narrow):
        asked = ask(narrow, "why", {**SHORT, "n": 2}, **{"x-stoker-explain": "1"})
        narrow.wait_until(lambda: narrow.num_waiting == 2)
    response = asked.result()
    assert response.status_code == 200
    explained = json.loads(response.headers["x-stoker-explain"])
    assert explained["status"] == "finished"
    assert explained["policy"] == "fcfs"
    assert explained["tenant"] == "a"
    first, second = explained["sequences"]
    for trace in (first, second):
        assert trace["status"] == "finished"
        assert trace["running_at_arrival"] == 1
        assert trace["prompt_tokens"] == 3
        assert trace["cached_tokens"] + trace["computed_tokens"] == 3
        assert trace["completion_tokens"] == 5
        assert trace["num_decode_steps"] == 4
        assert trace["finish_reason"] == "length"
        assert 0 < trace["queue_s"] < trace["time_to_first_token_s"] < trace["total_s"]
        assert trace["admitted_by"]
    narrow.wait_until_idle()
    remembered = details(narrow, "why")
    assert {**explained, "created": remembered["created"]} == remembered
    assert ask(narrow, "no", SHORT).result().headers.get("x-stoker-explain") is None
    assert (
        not ask(narrow, "no", SHORT, **{"x-stoker-explain": "0"})
        .result()
        .headers.get("x-stoker-explain")
    )


def test_a_stream_is_explained_before_its_end(narrow: Running) -> None:
    body = {**SHORT, "stream": True, "stream_options": {"include_usage": True}}
    response = ask(narrow, "sse", body, **{"x-stoker-explain": "TRUE"}).result()
    *_, usage, comment, done, end = response.text.split("\n\n")
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 5
    assert (done, end) == ("data: [DONE]", "")
    explained = json.loads(comment.removeprefix(": stoker-explain "))
    assert explained["status"] == "finished"
    assert explained["sequences"][0]["completion_tokens"] == 5
    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="x", max_retries=0) as client:
        chunks = client.completions.create(
            model="org/scripted", **SHORT, stream=True, extra_headers={"x-stoker-explain": "1"}
        )
        text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == narrow.expected("hi", 5)


def test_an_error_is_explained_too(narrow: Running) -> None:
    with lane_taken(narrow):
        for stream in (False, True):
            response = ask(
                narrow,
                "late",
                {**SHORT, "timeout": 0.03, "stream": stream},
                **{"x-stoker-explain": "1"},
            ).result()
            # The deadline passed in the queue: not even a stream has begun.
            assert response.status_code == 408
            assert response.json()["error"]["code"] == "deadline_exceeded"
            explained = json.loads(response.headers["x-stoker-explain"])
            assert explained["status"] == "failed"
            assert "time ran out in the queue" in explained["sequences"][0]["error"]


def test_a_long_explanation_still_fits_into_a_header(server: Running) -> None:
    body = {**SHORT, "prompt": ["one", "two", "three", "four"], "n": 8}
    response = httpx.post(
        server.url + TEXT, json=body, headers={"x-request-id": "many", "x-stoker-explain": "1"}
    )
    header = response.headers["x-stoker-explain"]
    assert len(header) <= 4096
    explained = json.loads(header)
    assert explained["num_sequences"] == 32
    assert 0 < len(explained["sequences"]) < 32
    server.wait_until_idle()
    found = httpx.get(f"{server.url}/v1/requests/many").json()
    assert (found["num_sequences"], len(found["sequences"])) == (32, 16)


def test_what_the_server_must_not_tell_is_not_in_an_explanation(server: Running) -> None:
    def fail(_: object) -> None:
        raise OSError("a secret path of the machine")

    server.runtime.before_step = fail
    try:
        headers = {"x-request-id": "secret", "x-stoker-explain": "1"}
        response = httpx.post(server.url + TEXT, json=SHORT, headers=headers)
    finally:
        server.runtime.before_step = None
    assert response.status_code == 500
    explained = json.loads(response.headers["x-stoker-explain"])
    assert explained["status"] == "failed"
    assert "secret path" not in str(response.headers) + response.text
    server.check_still_serves()


@pytest.mark.slow
def test_the_history_is_bounded_and_the_latest_come_first(narrow: Running) -> None:
    for name in ("h1", "h2", "h3", "h4"):
        assert ask(narrow, name, SHORT, "lister").result().status_code == 200
        narrow.wait_until_idle()
    running = ask(narrow, "h5", LONG, "lister")
    narrow.wait_until(lambda: narrow.num_running == 1)
    own = {"x-stoker-tenant": "lister"}
    listed = httpx.get(f"{narrow.url}/v1/requests", headers=own).json()["data"]
    assert [(r["id"], r["status"]) for r in listed] == [
        ("h5", "running"), ("h4", "finished"), ("h3", "finished"), ("h2", "finished"),
    ]  # fmt: skip
    assert listed[0]["object"] == "request"
    assert listed[0]["model"] == "org/scripted"
    assert httpx.get(f"{narrow.url}/v1/requests/h1", headers=own).status_code == 404
    cancel(narrow, "h5", "lister")
    assert running.result().status_code == 499
    narrow.wait_until_idle()


def test_a_client_that_leaves_is_remembered_as_such(narrow: Running) -> None:
    headers = {"x-request-id": "left", "x-stoker-tenant": "a"}
    with httpx.stream(
        "POST", narrow.url + TEXT, json={**LONG, "stream": True}, headers=headers
    ) as response:
        next(response.iter_lines())
    narrow.wait_until_idle()
    found = details(narrow, "left")
    assert found["status"] == "aborted"
    assert found["sequences"][0]["finish_reason"] == "abort"


def test_what_was_refused_is_not_remembered(narrow: Running) -> None:
    body = {**SHORT, "prompt": ["fine", "x" * 5000]}
    assert ask(narrow, "refused", body).result().status_code == 400
    body = {**SHORT, "model": "nonsense"}
    assert ask(narrow, "nothing", body).result().status_code == 404
    narrow.wait_until_idle()
    # The first prompt had started, and was taken back.
    assert details(narrow, "refused")["status"] == "aborted"
    own = {"x-stoker-tenant": "a"}
    assert httpx.get(f"{narrow.url}/v1/requests/nothing", headers=own).status_code == 404


def test_the_openapi_document_tells_of_it(client: httpx.Client) -> None:
    document = client.get("/schema/openapi.json").json()
    assert set(document["paths"]["/v1/requests/{request_id}"]) >= {"get", "delete"}
    parameters = document["paths"][TEXT]["post"]["parameters"]
    assert {p["name"] for p in parameters} == {"x-request-id", "x-stoker-explain"}
    trace = document["components"]["schemas"]["SequenceTrace"]["properties"]
    assert {"queue_s", "admitted_by", "preemptions"} <= set(trace)
