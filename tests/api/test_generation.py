"""Chat and text completions over real HTTP: shapes, streaming, and the official client."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from stoker import __version__

if TYPE_CHECKING:
    from conftest import Running

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi there"}]
MODEL = "org/scripted"


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The decoded events of a stream; checks the framing and the end."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *lines, end = response.text.split("\n\n")
    assert end == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def check_head(body: dict[str, Any], prefix: str, kind: str) -> None:
    assert body["id"].startswith(prefix)
    assert body["object"] == kind
    assert body["model"] == MODEL
    assert body["system_fingerprint"] == f"stoker-{__version__}"
    assert datetime.fromtimestamp(body["created"], UTC).year >= 2026


def test_chat_shape(client: httpx.Client) -> None:
    response = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5, "temperature": 0})
    body = response.json()
    assert set(body) == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage",
    }  # fmt: skip
    check_head(body, "chatcmpl-", "chat.completion")
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["refusal"] is None
    assert len(choice["message"]["content"]) == 5
    usage = body["usage"]
    # <|begin|> <|user|> "hi there" <|end|> <|assistant|>
    assert usage["prompt_tokens"] == 12
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == 17
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


def test_completion_shape(server: Running, client: httpx.Client) -> None:
    body = client.post(
        TEXT, json={"model": MODEL, "prompt": "hi", "max_tokens": 5, "temperature": 0}
    ).json()
    check_head(body, "cmpl-", "text_completion")
    assert body["choices"] == [
        {"index": 0, "text": server.expected("hi", 5), "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"]["prompt_tokens"] == 3


def test_cached_tokens_are_reported(client: httpx.Client) -> None:
    body = {"prompt": "a prompt that comes twice", "max_tokens": 2}
    first = client.post(TEXT, json=body).json()["usage"]
    second = client.post(TEXT, json=body).json()["usage"]
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1


def test_only_the_same_salt_finds_a_prefix(client: httpx.Client) -> None:
    def cached(**salt: str) -> int:
        body = {"prompt": "a prompt that somebody keeps secret", "max_tokens": 1} | salt
        usage = client.post(TEXT, json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    mine = {"cache_salt": "mine"}
    assert cached(**mine) == 0
    assert cached(**mine) > 30
    # What begins all prompts, <|begin|>, is not found either.
    assert cached(cache_salt="yours") == 0
    too_long = {"prompt": "a", "cache_salt": "x" * 257}
    assert client.post(TEXT, json=too_long).json()["error"]["param"] == "cache_salt"


def test_chat_stream_shape(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    plain = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    chunks = events(client, CHAT, body)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for chunk in chunks:
        assert set(chunk) == {
            "id", "object", "created", "model", "system_fingerprint", "choices",
        }  # fmt: skip
        check_head(chunk, "chatcmpl-", "chat.completion.chunk")
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len(deltas) == 8  # role, one for each token, the end
    assert "".join(delta.get("content", "") for delta in deltas) == plain


def test_completion_stream_equals_plain(server: Running, client: httpx.Client) -> None:
    chunks = events(client, TEXT, {"prompt": "hi", "max_tokens": 6, "temperature": 0})
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert "".join(c["choices"][0]["text"] for c in chunks) == server.expected("hi", 6)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_in_streams(client: httpx.Client, path: str) -> None:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    body["max_tokens"] = 3
    *chunks, last = events(client, path, {**body, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 3
    without = events(client, path, {**body, "stream_options": {"include_usage": False}})
    assert all("usage" not in chunk and chunk["choices"] for chunk in without)


def test_several_answers(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "n": 3, "seed": 5}
    plain = client.post(CHAT, json=body).json()
    assert [choice["index"] for choice in plain["choices"]] == [0, 1, 2]
    assert plain["usage"]["prompt_tokens"] == 12
    assert plain["usage"]["completion_tokens"] == 24
    chunks = events(client, CHAT, body)
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["finish_reason"] == "length"
        assembled = "".join(choice["delta"].get("content", "") for choice in mine)
        assert assembled == plain["choices"][index]["message"]["content"]


def test_several_prompts(server: Running, client: httpx.Client) -> None:
    body = {"prompt": ["one", [65, 66], "two"], "max_tokens": 4, "temperature": 0, "n": 2}
    ids = server.runtime.expected_text([65, 66], 4)
    one, two = server.expected("one", 4), server.expected("two", 4)
    expected = [one, one, ids, ids, two, two]
    plain = client.post(TEXT, json=body).json()
    assert [choice["text"] for choice in plain["choices"]] == expected
    assert [choice["index"] for choice in plain["choices"]] == list(range(6))
    assert plain["usage"]["prompt_tokens"] == 4 + 2 + 4
    assert plain["usage"]["completion_tokens"] == 24
    chunks = events(client, TEXT, {**body, "stream_options": {"include_usage": True}})
    assert chunks.pop()["usage"]["completion_tokens"] == 24
    for index in range(6):
        texts = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(texts) == expected[index]


def test_one_wrong_prompt_starts_none(server: Running, client: httpx.Client) -> None:
    response = client.post(TEXT, json={"prompt": ["fine", "x" * 5000], "max_tokens": 50})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    server.check_still_serves()


def test_token_ids_as_prompt(server: Running, client: httpx.Client) -> None:
    expected = server.runtime.expected_text([65, 66, 67], 4)
    for prompt in ([65, 66, 67], [[65, 66, 67]]):
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        assert client.post(TEXT, json=body).json()["choices"][0]["text"] == expected


@pytest.mark.parametrize("as_list", [False, True])
def test_stop(server: Running, client: httpx.Client, as_list: bool) -> None:
    whole = server.expected("hi", 40)
    stop = whole[10:13]
    kept = whole[: whole.index(stop)]
    body = {"prompt": "hi", "max_tokens": 40, "temperature": 0, "stop": [stop] if as_list else stop}
    (choice,) = client.post(TEXT, json=body).json()["choices"]
    assert choice["text"] == kept
    assert choice["finish_reason"] == "stop"
    chunks = events(client, TEXT, body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == kept
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_without_max_tokens_the_context_is_the_limit(client: httpx.Client) -> None:
    # Greedy: a drawn token would end it early once in a hundred runs or so.
    body = {"prompt": "x" * 1000, "temperature": 0}
    usage = client.post(TEXT, json=body).json()["usage"]
    assert usage["total_tokens"] == 1024


def test_seed_makes_draws_repeatable(client: httpx.Client) -> None:
    body = {"prompt": "hi", "max_tokens": 30, "temperature": 2, "seed": 7}
    first, second = (client.post(TEXT, json=body).json()["choices"][0]["text"] for _ in range(2))
    assert first == second
    other = client.post(TEXT, json={**body, "seed": 8}).json()["choices"][0]["text"]
    assert other != first


def test_logit_bias_reaches_the_sampler(client: httpx.Client) -> None:
    body = {"prompt": "hi", "max_tokens": 4, "temperature": 0, "logit_bias": {"90": 100}}
    assert client.post(TEXT, json=body).json()["choices"][0]["text"] == "ZZZZ"


@pytest.mark.parametrize("character", ["\n", "\r", '"', "\\", "\0", "\u007f", "\ufffd"])
def test_any_text_survives_the_framing(client: httpx.Client, character: str) -> None:
    byte = 0xFF if character == "\ufffd" else ord(character)  # 0xff is never part of UTF-8
    body = {"prompt": "hi", "max_tokens": 3, "temperature": 0, "logit_bias": {str(byte): 100}}
    assert client.post(TEXT, json=body).json()["choices"][0]["text"] == character * 3
    texts = [chunk["choices"][0]["text"] for chunk in events(client, TEXT, body)]
    assert "".join(texts) == character * 3


def test_roles_and_content_parts(client: httpx.Client) -> None:
    def answer(*messages: dict[str, Any]) -> str:
        body = {"messages": list(messages), "max_tokens": 8, "temperature": 0}
        response = client.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    user = {"role": "user", "content": "a\nb"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert answer(user) == answer({"role": "user", "content": parts})
    system, developer = ({"role": role, "content": "be brief"} for role in ("system", "developer"))
    assert answer(system, user) == answer(developer, user) != answer(user)
    silent = {"role": "assistant", "content": None}
    assert answer(user, silent, user) == answer(user, {**silent, "content": ""}, user)
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    caller = {"role": "assistant", "content": "let me see", "tool_calls": [call]}
    result = {"role": "tool", "content": "4", "tool_call_id": "x"}
    assert answer(user, caller, result) != answer(user, caller)


def test_max_completion_tokens(client: httpx.Client) -> None:
    for limits in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}):
        body = client.post(CHAT, json={"messages": MESSAGES, **limits}).json()
        assert body["usage"]["completion_tokens"] == 3


def test_timeout_is_an_error(slow_server: Running) -> None:
    body = {"prompt": "hi", "max_tokens": 1000, "timeout": 0.05}
    response = httpx.post(slow_server.url + TEXT, json=body)
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "deadline_exceeded"
    streamed = httpx.post(slow_server.url + TEXT, json={**body, "stream": True})
    *_, last, end = streamed.text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    slow_server.wait_until_idle()


def test_models_and_engines(client: httpx.Client) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    (model,) = listing["data"]
    assert model == client.get(f"/v1/models/{MODEL}").json()
    assert model == client.get("/v1/models/org%2Fscripted").json()
    assert model["id"] == MODEL
    assert model["object"] == "model"
    assert model["owned_by"] == "stoker"
    assert isinstance(model["created"], int)
    assert model["max_model_len"] == 1024
    engines = client.get("/v1/engines")
    assert engines.headers["deprecation"] == "true"
    (engine,) = engines.json()["data"]
    assert engine == client.get(f"/v1/engines/{MODEL}").json()
    assert engine["object"] == "engine"
    assert engine["ready"] is True
    for path in ("/v1/models/other", "/v1/engines/org/other"):
        response = client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_health_and_readiness(client: httpx.Client) -> None:
    health = client.get("/health")
    assert health.status_code == 200
    body = health.json()
    assert body["status"] == "ok"
    assert set(body) == {
        "status", "uptime_seconds", "total_requests", "cache_hit_rate", "memory_usage_mb",
    }  # fmt: skip
    assert client.get("/ready").json() == {"ready": True, "status": "ok"}


def test_openapi_document(client: httpx.Client) -> None:
    document = client.get("/schema/openapi.json").json()
    assert document == client.get("/schema").json()
    operation = document["paths"][CHAT]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schemas = document["components"]["schemas"]
    fields = schemas[reference.removeprefix("#/components/schemas/")]["properties"]
    assert {"messages", "temperature", "max_completion_tokens", "stream_options"} <= set(fields)

    def references(node: Any) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(references, node))
        if not isinstance(node, dict):
            return set()
        found = {node["$ref"]} if "$ref" in node else set()
        return found.union(*map(references, node.values()))

    names = {reference.rpartition("/")[2] for reference in references(document)}
    assert names
    assert names <= set(schemas)


# --------------------------------------------------------------------------- the official client


def test_openai_client(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        arguments: dict[str, Any] = {
            "model": MODEL, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 10,
        }  # fmt: skip
        plain = client.chat.completions.create(**arguments)
        content = plain.choices[0].message.content
        assert content is not None
        assert len(content) == 10
        assert plain.usage is not None
        assert plain.usage.prompt_tokens_details is not None
        stream = client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
        text, tokens = "", 0
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else 0
        assert (text, tokens) == (content, 10)
        completion = client.completions.create(
            model=MODEL, prompt="hi", max_tokens=5, temperature=0, extra_body={"top_k": 5}
        )
        assert completion.choices[0].text == server.expected("hi", 5)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**{**arguments, "model": "other"})
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**{**arguments, "temperature": 9})
        assert wrong.value.param == "temperature"


@pytest.mark.slow
async def test_async_openai_clients_side_by_side(server: Running) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="unused", max_retries=0
    ) as client:

        async def assembled(prompt: str) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=30, temperature=0, stream=True
            )
            return "".join([c.choices[0].text async for c in stream if c.choices])

        prompts = [f"prompt {i}" for i in range(24)]
        texts = await asyncio.gather(*map(assembled, prompts))
        assert texts == [server.expected(prompt, 30) for prompt in prompts]
    server.wait_until_idle()
