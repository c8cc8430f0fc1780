"""Probes of the endpoints that do not generate, and of what is done with an answer afterwards."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from openai_schemas import check

Probe = Callable[[httpx.Client], None]
OTHERS: list[tuple[str, str, str, Probe]] = []
MODEL = "SmolLM2-135M-Instruct"


def serves(endpoint: str, parameters: str = "", outcome: str = "works") -> Callable[[Probe], Probe]:
    """The probe sees what an endpoint does, and what these parameters of it do."""

    def register(probe: Probe) -> Probe:
        OTHERS.append((endpoint, parameters, outcome, probe))
        return probe

    return register


def post(client: httpx.Client, path: str, status: int = 200, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


# --------------------------------------------------------------------------- embeddings


@serves("POST /v1/embeddings", "model input encoding_format")
def embeddings(client: httpx.Client) -> None:
    body = post(client, "/v1/embeddings", model=MODEL, input=["red", "blue"])
    check("CreateEmbeddingResponse", body)
    red, blue = (item["embedding"] for item in body["data"])
    assert sum(x * x for x in red) == pytest.approx(1, abs=1e-3)
    assert red != blue
    coded = post(client, "/v1/embeddings", input="red", encoding_format="base64")
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(red)}f", raw)) == pytest.approx(red, abs=1e-2)
    assert post(client, "/v1/embeddings", 404, model="x", input="a")["error"]["param"] == "model"


@serves("POST /v1/embeddings", "dimensions", "depends")
def dimensions(client: httpx.Client) -> None:
    body = post(client, "/v1/embeddings", 400, input="a", dimensions=8)
    assert body["error"]["param"] == "dimensions"


@serves("POST /v1/embeddings", "user priority timeout")
def embedding_labels(client: httpx.Client) -> None:
    assert post(client, "/v1/embeddings", input="a", user="me", priority=2)["data"]
    post(client, "/v1/embeddings", 408, input=["a long text " * 99] * 40, timeout=0.01)


@serves("POST /v1/rerank", "model query documents top_n return_documents")
def rerank(client: httpx.Client) -> None:
    asked = {"query": "A cat on a mat.", "documents": ["Interest rates rose.", "A cat on a mat."]}
    body = post(client, "/v1/rerank", model=MODEL, **asked)
    assert [item["index"] for item in body["results"]] == [1, 0]
    assert body["results"][0]["document"]["text"] == "A cat on a mat."
    (best,) = post(client, "/v1/rerank", top_n=1, return_documents=False, **asked)["results"]
    assert best["index"] == 1
    assert best.get("document") is None


# --------------------------------------------------------------------------- tokens


@serves("POST /tokenize", "prompt content with_pieces return_token_strs parse_special add_special")
@serves("POST /detokenize", "tokens")
def tokens(client: httpx.Client) -> None:
    body = post(client, "/tokenize", prompt="Hello world", return_token_strs=True)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) == 2
    written = post(client, "/detokenize", tokens=body["tokens"])
    assert written["content"] == written["prompt"] == "Hello world"
    (piece, _) = post(client, "/tokenize", content="Hello world", with_pieces=True)["tokens"]
    assert piece["piece"] == "Hello"
    assert post(client, "/tokenize", content="<|im_end|>")["count"] == 1
    assert post(client, "/tokenize", content="<|im_end|>", parse_special=False)["count"] > 1


@serves("POST /tokenize", "messages tools chat_template_kwargs add_generation_prompt")
@serves("POST /apply-template", "messages")
def templates(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Name three colors."}]
    text = post(client, "/apply-template", messages=messages)["prompt"]
    assert text.endswith("<|im_start|>assistant\n")
    count = post(client, "/tokenize", messages=messages)["count"]
    assert count == post(client, "/tokenize", content=text)["count"]
    chat = {"messages": messages, "max_tokens": 1}
    assert post(client, "/v1/chat/completions", **chat)["usage"]["prompt_tokens"] == count
    assert (
        post(client, "/tokenize", messages=messages, add_generation_prompt=False)["count"] < count
    )
    function = {"name": "get", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    assert post(client, "/tokenize", messages=messages, tools=tools)["count"] > count


@serves("GET /tokenizer_info", "model")
def tokenizer_info(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info", params={"model": MODEL}).json()
    (end,) = post(client, "/tokenize", content=info["eos_token"])["tokens"]
    assert post(client, "/detokenize", tokens=[end])["content"] == info["eos_token"]


@serves("POST /v1/messages/count_tokens", "messages system tools")
@serves("POST /v1/responses/input_tokens", "input instructions tools")
def counts(client: httpx.Client) -> None:
    turns = [{"role": "user", "content": "Name three colors."}]
    count = post(client, "/tokenize", messages=turns)["count"]
    assert post(client, "/v1/messages/count_tokens", messages=turns)["input_tokens"] == count
    counted = post(client, "/v1/responses/input_tokens", input="Name three colors.")
    check("TokenCountsResource", counted)
    assert counted["input_tokens"] == count
    more = post(client, "/v1/messages/count_tokens", messages=turns, system="Be brief and kind.")
    assert more["input_tokens"] != count


# --------------------------------------------------------------------------- models, responses


@serves("GET /v1/models")
@serves("GET /v1/models/{model}")
def models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    check("ListModelsResponse", listed)
    assert [item["id"] for item in listed["data"]] == [MODEL]
    one = client.get(f"/v1/models/{MODEL}").json()
    check("Model", one)
    assert one["id"] == MODEL
    assert client.get("/v1/models/another").status_code == 404


@serves("GET /v1/responses/{id}", "stream starting_after")
@serves("GET /v1/responses/{id}/input_items", "limit order after")
@serves("DELETE /v1/responses/{id}")
def stored_responses(client: httpx.Client) -> None:
    asked = {"input": "Name three colors.", "max_output_tokens": 3, "temperature": 0}
    streamed = {"background": True, "stream": True}
    with client.stream("POST", "/v1/responses", json=asked | streamed) as answer:
        events = read_events(answer.read().decode())
    path = f"/v1/responses/{events[0]['response']['id']}"
    late = client.get(path, params={"stream": "true", "starting_after": 2})
    assert read_events(late.text) == events[3:]
    check("Response", client.get(path).json())
    items = client.get(f"{path}/input_items", params={"limit": 1, "order": "asc"}).json()
    check("ResponseItemList", items)
    assert items["data"][0]["content"][0]["text"] == "Name three colors."
    assert client.delete(path).json()["deleted"] is True
    assert client.get(path).status_code == 404


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each checked."""
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    for event in events:
        check("ResponseStreamEvent", event)
    return events


@serves("POST /v1/responses/{id}/cancel")
def cancelled_response(client: httpx.Client) -> None:
    asked = {"input": "Tell me a long story.", "background": True, "max_output_tokens": 900}
    body = post(client, "/v1/responses", **asked)
    answer = client.post(f"/v1/responses/{body['id']}/cancel")
    assert answer.status_code == 200, answer.text
    check("Response", answer.json())
    assert answer.json()["status"] == "cancelled"


# --------------------------------------------------------------------------- files and batches


@serves("POST /v1/files", "file purpose expires_after")
@serves("GET /v1/files")
@serves("GET /v1/files/{id}")
@serves("GET /v1/files/{id}/content")
@serves("DELETE /v1/files/{id}")
def files(client: httpx.Client) -> None:
    text = b'{"custom_id": "a"}\n'
    sent = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", text)})
    assert sent.status_code == 200, sent.text
    check("OpenAIFile", sent.json())
    path = f"/v1/files/{sent.json()['id']}"
    check("ListFilesResponse", client.get("/v1/files").json())
    assert client.get(path).json()["bytes"] == len(text)
    assert client.get(f"{path}/content").content == text
    deleted = client.delete(path).json()
    check("DeleteFileResponse", deleted)
    assert client.get(path).status_code == 404


@serves(
    "POST /v1/batches", "input_file_id endpoint completion_window metadata output_expires_after"
)
@serves("GET /v1/batches")
@serves("GET /v1/batches/{id}")
@serves("POST /v1/batches/{id}/cancel")
def batches(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Name three colors."}], "temperature": 0}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body | {"max_tokens": 14}}
    lines = "".join(json.dumps({"custom_id": name, **line}) + "\n" for name in ("one", "two"))
    sent = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("b.jsonl", lines)})
    asked = {"input_file_id": sent.json()["id"], "endpoint": "/v1/chat/completions"}
    batch = post(client, "/v1/batches", completion_window="24h", metadata={"a": "b"}, **asked)
    check("Batch", batch)
    deadline = time.monotonic() + 60
    while batch["status"] in {"validating", "in_progress", "finalizing"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        batch = client.get(f"/v1/batches/{batch['id']}").json()
    check("Batch", batch)
    assert (batch["status"], batch["metadata"]) == ("completed", {"a": "b"})
    check("ListBatchesResponse", client.get("/v1/batches").json())
    written = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    answers = {item["custom_id"]: item for item in map(json.loads, written.splitlines())}
    for name in ("one", "two"):
        (choice,) = answers[name]["response"]["body"]["choices"]
        assert choice["message"]["content"] == "1. Red\n2. Blue\n3. Green"
    late = client.post(f"/v1/batches/{batch['id']}/cancel")
    assert late.status_code in {200, 400, 409}, late.text


# --------------------------------------------------------------------------- not served


@serves("/v1/audio/...", outcome="501")
@serves("/v1/images/...", outcome="501")
@serves("/v1/fine_tuning/...", outcome="501")
@serves("/v1/moderations", outcome="501")
def unserved(client: httpx.Client) -> None:
    for path in ("audio/speech", "images/generations", "fine_tuning/jobs", "moderations"):
        body = post(client, f"/v1/{path}", 501, model=MODEL, input="a")
        check("ErrorResponse", body)
        assert f"/v1/{path}" in body["error"]["message"]
