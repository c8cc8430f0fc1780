"""``/v1/batches`` over HTTP: what runs, when, in whose name, and what becomes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import openai
import pytest

from stoker.keys import digest_of
from stoker_plugins.batches import batch_routes

if TYPE_CHECKING:
    from openai.types import Batch

    from conftest import Running

MODEL = "org/scripted"
KEY = {"authorization": "Bearer sk-of-a"}
OVER = {"completed", "failed", "expired", "cancelled"}
SCHEMAS = json.loads((Path(__file__).parents[1] / "data" / "openai_batches.json").read_text())
TENANTS = [
    {"name": "a", "keys": [digest_of("sk-of-a")]},
    {"name": "narrow", "keys": [digest_of("sk-of-narrow")], "max_concurrent_requests": 1},
    {"name": "small", "keys": [digest_of("sk-of-small")], "tokens_per_minute": 10},
]


def check(body: Any, name: str) -> None:
    """An answer is what OpenAI's document says."""
    schema = {"$ref": f"#/components/schemas/{name}", **SCHEMAS}
    jsonschema.validate(body, schema, jsonschema.Draft202012Validator)


class Office:
    """A client, and what it does with batches."""

    def __init__(self, running: Running, key: str = "none") -> None:
        self.running = running
        self.client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)

    def upload(self, lines: Iterable[Any]) -> str:
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        return self.client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id

    def submit(self, lines: Iterable[Any], endpoint: Any = "/v1/completions") -> Batch:
        return self.client.batches.create(
            input_file_id=self.upload(lines), endpoint=endpoint, completion_window="24h"
        )

    def wait(self, batch: Batch, until: set[str] = OVER) -> Batch:
        def reached() -> bool:
            nonlocal batch
            batch = self.client.batches.retrieve(batch.id)
            return batch.status in until

        self.running.wait_until(reached)
        return batch

    def read(self, file_id: str | None) -> dict[str, Any]:
        """The lines of a result file by their ``custom_id``; there is one for each."""
        if file_id is None:
            return {}
        lines = [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
        return found


def line(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "prompt": f"prompt {number}", "max_tokens": 6, "temperature": 0}
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": asked | body}


@pytest.fixture(scope="module")
def running(
    start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    folder = tmp_path_factory.mktemp("batches")
    return start_server(
        plugins={"batches": {"directory": str(folder), "max_requests": 200}}, tenants=TENANTS
    )


@pytest.fixture
def office(running: Running) -> Office:
    return Office(running, "sk-of-a")


@pytest.mark.slow
def test_a_batch_gives_what_its_requests_would(office: Office) -> None:
    batch = office.submit(line(i) for i in range(50))
    assert batch.status == "validating"
    done = office.wait(batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 50, "completed": 50, "failed": 0}
    assert done.error_file_id is None
    assert done.model == MODEL
    assert done.in_progress_at is not None
    assert done.finalizing_at is not None
    assert done.completed_at is not None
    results = office.read(done.output_file_id)
    for i in range(50):
        response = results[f"r{i}"]["response"]
        assert results[f"r{i}"]["error"] is None
        assert response["status_code"] == 200
        assert response["request_id"].startswith("batch_req_")
        wanted = office.running.expected(f"prompt {i}", 6)
        assert response["body"]["choices"][0]["text"] == wanted
    used = [result["response"]["body"]["usage"] for result in results.values()]
    assert done.usage is not None
    assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in used)
    assert (done.usage.output_tokens, done.usage.total_tokens) == (
        300,
        sum(usage["total_tokens"] for usage in used),
    )
    for path, name in (
        (f"batches/{done.id}", "Batch"),
        ("batches", "ListBatchesResponse"),
        (f"files/{done.output_file_id}", "OpenAIFile"),
    ):
        check(httpx.get(f"{office.running.url}/v1/{path}", headers=KEY).json(), name)


def test_chat_and_metadata_and_the_list(office: Office) -> None:
    messages = [{"role": "user", "content": "hi"}]
    url = "/v1/chat/completions"
    asked = [{**line(i, url), "body": {"messages": messages, "max_tokens": 3}} for i in range(3)]
    file_id = office.upload(asked)
    made = office.client.batches.create(
        input_file_id=file_id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"mine": "yes"},
        extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 7200}},
    )
    done = office.wait(made)
    assert (done.status, done.metadata) == ("completed", {"mine": "yes"})
    results = office.read(done.output_file_id)
    assert {r["response"]["body"]["object"] for r in results.values()} == {"chat.completion"}
    assert done.output_file_id is not None
    file = office.client.files.retrieve(done.output_file_id)
    assert file.purpose == "batch_output"
    assert file.expires_at == file.created_at + 7200
    second = office.wait(office.submit([line(0)]))
    assert [batch.id for batch in office.client.batches.list(limit=1)][:2] == [second.id, done.id]
    page = office.client.batches.list(limit=1, after=second.id)
    assert [batch.id for batch in page.data] == [done.id]
    assert office.client.files.list(purpose="batch_output").data[0].purpose == "batch_output"


def test_what_an_endpoint_refuses_is_a_line_of_the_error_file(office: Office) -> None:
    wrong = [line(1, temperature=9), line(2, prompt="x" * 5000), line(3, n=99)]
    done = office.wait(office.submit([line(0), *wrong]))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 4, "completed": 1, "failed": 3}
    assert set(office.read(done.output_file_id)) == {"r0"}
    errors = office.read(done.error_file_id)
    for name, param in (("r1", "temperature"), ("r2", "prompt"), ("r3", "n")):
        assert errors[name]["error"] is None
        assert errors[name]["response"]["status_code"] == 400
        assert errors[name]["response"]["body"]["error"]["param"] == param


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], [("empty_file", None, None)]),
        (["", "  "], [("empty_file", None, None)]),
        (["{", "[]", line(1)], [("invalid_json_line", 1, None), ("invalid_json_line", 2, None)]),
        (['{"custom_id": "\\ud800"}'], [("invalid_json_line", 1, None)]),
        (["[" * 20_000], [("invalid_json_line", 1, None)]),
        ([line(1), "", line(1)], [("duplicate_custom_id", 3, "custom_id")]),
        ([{**line(1), "custom_id": 1}], [("invalid_custom_id", 1, "custom_id")]),
        ([{**line(1), "custom_id": "x" * 600}], [("invalid_custom_id", 1, "custom_id")]),
        ([{"method": "POST"}], [("missing_required_parameter", 1, "custom_id")]),
        ([{**line(1), "method": "GET"}], [("invalid_method", 1, "method")]),
        ([line(1, "/v1/embeddings")], [("invalid_url", 1, "url")]),
        ([{**line(1), "body": "x"}], [("invalid_body", 1, "body")]),
        ([line(1, stream=True)], [("unsupported_parameter", 1, "body.stream")]),
        ([line(1, background=True)], [("unsupported_parameter", 1, "body.background")]),
        ([line(1, model="gpt-9")], [("model_not_found", 1, "body.model")]),
        ([line(1, model=["x"])], [("model_not_found", 1, "body.model")]),
        ([line(i) for i in range(201)], [("too_many_requests", 201, None)]),
        ([line(1, prompt="x" * 5_000_000)], [("line_too_long", 1, None)]),
    ],
)  # fmt: skip
def test_an_input_file_with_errors_fails_as_a_whole(
    office: Office, lines: list[Any], found: list[tuple[str, int | None, str | None]]
) -> None:
    failed = office.wait(office.submit(lines))
    assert failed.status == "failed"
    assert failed.failed_at is not None
    assert failed.in_progress_at is None
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(e.code, e.line, e.param) for e in failed.errors.data] == found
    assert all(error.message for error in failed.errors.data)
    assert (failed.output_file_id, failed.error_file_id) == (None, None)


def test_no_more_than_a_hundred_errors_are_told(office: Office) -> None:
    failed = office.wait(office.submit(["x"] * 150))
    assert failed.errors is not None
    assert len(failed.errors.data or ()) == 100


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input_file_id": "file-none"}, "file_not_found", "input_file_id"),
        ({"input_file_id": None}, "invalid_type", "input_file_id"),
        ({"endpoint": "/v1/images"}, "invalid_value", "endpoint"),
        ({"completion_window": "1h"}, "invalid_value", "completion_window"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": {"x" * 65: ""}}, "invalid_value", "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "invalid_value",
            "output_expires_after.seconds",
        ),
    ],
)
def test_batches_that_cannot_be_made(
    office: Office, change: dict[str, Any], code: str, param: str
) -> None:
    body = {
        "input_file_id": office.upload([line(1)]),
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        office.client.post("/batches", body=body | change, cast_to=object)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_an_endpoint_that_is_not_served_is_named(
    running: Running, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = set(httpx.get(f"{running.url}/schema/openapi.json", headers=KEY).json()["paths"])
    missing = {"/v1/embeddings", "/v1/responses"} - served
    for endpoint in missing:
        with pytest.raises(openai.BadRequestError) as caught:
            office.submit([line(1, endpoint)], endpoint)
        assert (caught.value.code, caught.value.param) == ("unsupported_value", "endpoint")


def test_bodies_that_are_none(running: Running) -> None:
    url = f"{running.url}/v1/batches"
    for content, headers in (
        (b"", {"content-type": "application/json"}),
        (b"[]", {"content-type": "application/json"}),
        (b"\xff", {"content-type": "application/json"}),
        (b"[" * 100_000, {"content-type": "application/json"}),
        (b"{}", {"content-type": "text/plain"}),
    ):
        response = httpx.post(url, content=content, headers=KEY | headers)
        assert response.status_code == 400, response.text
    large = httpx.post(url, json={"x": "y" * 300_000}, headers=KEY)
    assert large.status_code == 413


def test_nobody_sees_or_cancels_what_another_tenant_has(running: Running, office: Office) -> None:
    batch = office.submit([line(1)])
    other = Office(running, "sk-of-narrow")
    assert batch.id not in [b.id for b in other.client.batches.list()]
    for call in (other.client.batches.retrieve, other.client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    assert office.wait(batch).status == "completed"


@pytest.mark.slow
def test_what_a_limit_refuses_for_now_is_asked_for_again(running: Running) -> None:
    office = Office(running, "sk-of-narrow")  # one request at once
    done = office.wait(office.submit(line(i) for i in range(6)))
    assert (done.status, done.error_file_id) == ("completed", None)
    assert len(office.read(done.output_file_id)) == 6


def test_what_no_limit_will_ever_allow_is_an_error(running: Running) -> None:
    office = Office(running, "sk-of-small")
    done = office.wait(office.submit([line(1, max_tokens=500)]))
    error = office.read(done.error_file_id)["r1"]["response"]
    assert error["status_code"] == 429
    assert error["body"]["error"]["code"] == "request_too_large_for_limit"


# --------------------------------------------------------------------------- slow models


@pytest.fixture(scope="module")
def slow(start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Has all of its eight lanes taken by long requests of a batch."""
    options = {
        "directory": str(tmp_path_factory.mktemp("slow")),
        "reserve_lanes": 0,
        "give_way_s": 0.02,
        "max_open_batches": 3,
    }
    return start_server({"step_s": 0.004}, plugins={"batches": options})


def test_a_cancelled_batch_stops_and_keeps_what_is_done(slow: Running) -> None:
    office = Office(slow)
    batch = office.submit([line(0, max_tokens=1)] + [line(i, max_tokens=900) for i in range(1, 30)])

    def one_is_done() -> bool:
        counts = office.client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed == 1 and slow.num_running == 8

    slow.wait_until(one_is_done)
    with pytest.raises(openai.BadRequestError) as caught:
        office.client.files.delete(batch.input_file_id)
    assert caught.value.code == "file_in_use"
    assert office.client.batches.cancel(batch.id).status in {"cancelling", "cancelled"}
    done = office.wait(batch)
    assert done.status == "cancelled"
    assert done.cancelling_at is not None
    assert done.cancelled_at is not None
    slow.wait_until_idle()
    assert set(office.read(done.output_file_id)) == {"r0"}
    errors = office.read(done.error_file_id)
    assert set(errors) == {f"r{i}" for i in range(1, 30)}
    assert {e["error"]["code"] for e in errors.values()} == {"batch_cancelled"}
    assert {e["response"] for e in errors.values()} == {None}
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 30, "completed": 1, "failed": 29}
    assert office.client.batches.cancel(batch.id).status == "cancelled"
    office.client.files.delete(batch.input_file_id)


def test_what_is_over_cannot_be_cancelled(slow: Running) -> None:
    office = Office(slow)
    done = office.wait(office.submit([line(1)]))
    with pytest.raises(openai.BadRequestError) as caught:
        office.client.batches.cancel(done.id)
    assert caught.value.code == "batch_not_cancellable"


@pytest.mark.slow
def test_what_is_not_done_in_time_expires(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "_WINDOW_S", 2)
    office = Office(slow)
    done = office.wait(office.submit([line(1, max_tokens=1), line(2, max_tokens=900)]))
    assert done.status == "expired"
    assert done.expired_at is not None
    assert set(office.read(done.output_file_id)) == {"r1"}
    assert office.read(done.error_file_id)["r2"]["error"]["code"] == "batch_expired"
    slow.wait_until_idle()


@pytest.mark.slow
def test_requests_of_a_batch_make_way_for_others_and_are_run_again(slow: Running) -> None:
    office = Office(slow)
    batch = office.submit(line(i, max_tokens=300) for i in range(10))
    slow.wait_until(lambda: slow.num_running == 8)
    texts: list[str] = []

    def ask() -> None:
        body = {"prompt": "me first", "max_tokens": 5, "temperature": 0}
        response = httpx.post(f"{slow.url}/v1/completions", json=body, timeout=60)
        texts.append(response.json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [slow.expected("me first", 5)] * 3
    counts = office.client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    assert counts.completed == 0  # nobody waited until a lane fell free by itself
    done = office.wait(batch)
    results = office.read(done.output_file_id)
    assert len(results) == 10
    for i in range(10):
        text = results[f"r{i}"]["response"]["body"]["choices"][0]["text"]
        assert text == slow.expected(f"prompt {i}", 300)


@pytest.mark.slow
def test_batches_take_turns(slow: Running) -> None:
    office = Office(slow)
    long = office.submit(line(i, max_tokens=40) for i in range(120))
    short = office.wait(office.submit(line(i, max_tokens=40) for i in range(4)))
    assert short.status == "completed"
    assert office.client.batches.retrieve(long.id).status == "in_progress"
    others = [office.submit([line(1, max_tokens=900)]) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        office.submit([line(1)])
    assert caught.value.code == "too_many_batches"
    for batch in (long, *others):
        office.client.batches.cancel(batch.id)
        assert office.wait(batch).status == "cancelled"


def test_batches_have_the_lowest_priority_and_their_tenants_name(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    plugins = {"batches": {"directory": str(tmp_path)}}
    server = start_server({"step_s": 0.004}, plugins=plugins, tenants=TENANTS)
    office = Office(server, "sk-of-a")
    batch = office.submit([line(1, max_tokens=900, priority=-5)])
    server.wait_until(lambda: server.num_running == 1)
    (view,) = server.server.snapshot(MODEL).running
    assert (view.priority, view.tenant) == (2**31 - 1, "a")
    office.client.batches.cancel(batch.id)
    office.wait(batch)


def test_a_client_cannot_pose_as_the_server_itself(running: Running) -> None:
    for name in ("stoker.caller", "x-stoker-caller"):
        response = httpx.get(f"{running.url}/v1/files", headers={name: "a"})
        assert response.status_code == 401
