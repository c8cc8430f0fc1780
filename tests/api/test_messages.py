"""``/v1/messages`` over real HTTP: what it answers and streams, and Anthropic's official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    import anthropic

    from conftest import Running

MODEL = "org/scripted"
PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi there"}]
BODY = {"model": MODEL, "max_tokens": 6, "messages": HI, "temperature": 0}


@pytest.fixture
def official(server: Running) -> Iterator[anthropic.Anthropic]:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as official:
        yield official


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(PATH, json=BODY | fields)


def answer(client: httpx.Client, **fields: Any) -> Any:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def text(message: Any) -> str:
    return "".join(block["text"] for block in message["content"])


def events(client: httpx.Client, **fields: Any) -> list[tuple[str, Any]]:
    """The names and data of a stream's events; checks the framing."""
    response = post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


# --------------------------------------------------------------------------- shapes


def test_a_message(client: httpx.Client, server: Running) -> None:
    response = post(client)
    body = response.json()
    assert set(body) == {
        *("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
    }
    assert body["id"] == f"msg_{response.headers['x-request-id']}"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", MODEL)
    (block,) = body["content"]
    chat = client.post(
        "/v1/chat/completions", json={"messages": HI, "max_tokens": 6, "temperature": 0}
    ).json()
    assert block == {"type": "text", "text": chat["choices"][0]["message"]["content"]}
    assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
    usage = body["usage"]
    assert usage["output_tokens"] == 6
    assert usage["cache_creation_input_tokens"] == 0
    assert usage["output_tokens_details"] == {"thinking_tokens": 0}
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 12


def test_cached_tokens_are_told_apart(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a message that comes twice"}]
    first = answer(client, messages=messages)["usage"]
    second = answer(client, messages=messages)["usage"]
    total = first["input_tokens"] + first["cache_read_input_tokens"]
    assert second["cache_read_input_tokens"] == total - 1
    assert second["input_tokens"] == 1


def test_the_events_of_a_stream(client: httpx.Client) -> None:
    plain = answer(client)
    found = events(client)
    names = [name for name, _ in found]
    texts = [data["delta"]["text"] for name, data in found if name == "content_block_delta"]
    assert names == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * len(texts),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert "".join(texts) == text(plain)
    started = found[0][1]["message"]
    assert (started["content"], started["stop_reason"]) == ([], None)
    assert started["usage"]["input_tokens"] + started["usage"]["cache_read_input_tokens"] == 12
    assert found[2][1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    ending = found[-2][1]
    assert ending["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert ending["usage"]["output_tokens"] == 6
    assert found[-1][1] == {"type": "message_stop"}


def test_stop_sequences(client: httpx.Client) -> None:
    whole = text(answer(client, max_tokens=30))
    stop = whole[8:11]
    for fields in ({"stop_sequences": [stop]}, {"stop_sequences": ["\0", stop, *"0123456789"]}):
        body = answer(client, max_tokens=30, **fields)
        assert text(body) == whole[: whole.index(stop)]
        assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)
        delta = events(client, max_tokens=30, **fields)[-2][1]["delta"]
        assert delta == {"stop_reason": "stop_sequence", "stop_sequence": stop}


def test_an_end_of_turn(start_server: Any) -> None:
    server = start_server({"end_every": 20})
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = answer(client, max_tokens=900)
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)


@pytest.mark.slow
def test_more_tokens_than_fit_are_as_many_as_fit(client: httpx.Client) -> None:
    body = answer(client, max_tokens=64_000)
    assert body["stop_reason"] == "model_context_window_exceeded"
    usage = body["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert prompt + usage["output_tokens"] == 1024
    exact = answer(client, max_tokens=1024 - prompt)
    assert exact["stop_reason"] == "max_tokens"
    assert text(exact) == text(body)


def test_no_tokens_at_all(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "only to be read"}]
    body = answer(client, messages=messages, max_tokens=0)
    assert (body["content"], body["stop_reason"]) == ([], "max_tokens")
    assert body["usage"]["output_tokens"] == 0
    assert answer(client, messages=messages)["usage"]["cache_read_input_tokens"] > 10


def test_a_final_assistant_message_is_continued(client: httpx.Client) -> None:
    whole = text(answer(client, max_tokens=20))
    prefilled = [*HI, {"role": "assistant", "content": [{"type": "text", "text": whole[:8]}]}]
    assert text(answer(client, messages=prefilled, max_tokens=12)) == whole[8:]
    empty = [*HI, {"role": "assistant", "content": ""}]
    assert text(answer(client, messages=empty, max_tokens=20)) == whole


def test_the_conversation_is_that_of_a_chat_completion(client: httpx.Client) -> None:
    long_way = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "user", "content": "two"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "four"}, {"type": "text", "text": "5"}],
        },
    ]
    system = [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}]
    chat = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four\n5"},
    ]
    asked = {"messages": chat, "max_tokens": 6, "temperature": 0}
    expected = client.post("/v1/chat/completions", json=asked).json()
    body = answer(client, messages=long_way, system=system)
    assert text(body) == expected["choices"][0]["message"]["content"]


def test_a_json_schema(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        body = answer(client, max_tokens=500, **fields)
        assert isinstance(json.loads(text(body))["a"], bool)
        assert body["stop_reason"] == "end_turn"


def test_what_says_who_asks_and_how(client: httpx.Client) -> None:
    plain = text(answer(client))
    body = answer(
        client,
        metadata={"user_id": "someone"},
        service_tier="auto",
        thinking={"type": "disabled"},
        output_config={"effort": "low"},
        speed="standard",
        cache_control={"type": "ephemeral", "ttl": "1h"},
    )
    assert text(body) == plain
    response = post(client, thinking={"type": "enabled", "budget_tokens": 2000})
    assert response.json()["content"]
    warning = "unsupported parameter 'thinking.budget_tokens' ignored"
    assert warning in response.headers["x-stoker-warning"]


def test_counted_tokens_are_those_of_the_prompt(client: httpx.Client) -> None:
    prompt = {"messages": HI, "system": "be brief"}
    counted = client.post(f"{PATH}/count_tokens", json=prompt)
    assert counted.status_code == 200
    assert set(counted.json()) == {"input_tokens"}
    usage = answer(client, **prompt)["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted.json()["input_tokens"] == total


# --------------------------------------------------------------------------- the official client


def test_create(official: anthropic.Anthropic, client: httpx.Client) -> None:
    message = official.messages.create(
        model=MODEL, max_tokens=6, messages=HI, extra_body={"temperature": 0}
    )
    (block,) = message.content
    assert block.type == "text"
    assert block.text == text(answer(client))
    assert message.stop_reason == "max_tokens"
    assert message._request_id
    # What came can be sent back.
    again = [*HI, message.to_param(), {"role": "user", "content": "go on"}]
    assert official.messages.create(model=MODEL, max_tokens=6, messages=again).content


def test_the_beta_client(official: anthropic.Anthropic) -> None:
    message = official.beta.messages.create(
        model=MODEL, max_tokens=6, messages=HI, betas=["some-beta-2025-01-01"]
    )
    assert message.content[0].type == "text"


def test_raw_stream(official: anthropic.Anthropic) -> None:
    stream = official.messages.create(model=MODEL, max_tokens=6, messages=HI, stream=True)
    names = [event.type for event in stream]
    assert names[0] == "message_start"
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_stream_helper(official: anthropic.Anthropic, client: httpx.Client) -> None:
    with official.messages.stream(
        model=MODEL, max_tokens=6, messages=HI, extra_body={"temperature": 0}
    ) as stream:
        told = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert told == text(answer(client))
    assert final.content[0].type == "text"
    assert final.content[0].text == told
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 6
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == 12


def test_count_tokens(official: anthropic.Anthropic) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]
    few = official.messages.count_tokens(model=MODEL, messages=HI)
    more = official.messages.count_tokens(model=MODEL, messages=HI, system="be brief", tools=tools)
    assert 0 < few.input_tokens < more.input_tokens


def test_parse(official: anthropic.Anthropic) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        fits: bool

    parsed = official.messages.parse(model=MODEL, max_tokens=500, messages=HI, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)


async def test_async_client(server: Running) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    async with anthropic.AsyncAnthropic(
        base_url=server.url, auth_token="none", max_retries=0
    ) as official:
        message = await official.messages.create(
            model=MODEL, max_tokens=6, messages=HI, extra_body={"temperature": 0}
        )
        async with official.messages.stream(
            model=MODEL, max_tokens=6, messages=HI, extra_body={"temperature": 0}
        ) as stream:
            told = [part async for part in stream.text_stream]
            final = await stream.get_final_message()
        counted = await official.messages.count_tokens(model=MODEL, messages=HI)
        listed = [model.id async for model in official.models.list()]
    for content in (message.content, final.content):
        assert content[0].type == "text"
        assert content[0].text == "".join(told)
    assert counted.input_tokens == 12
    assert listed == [MODEL]


# --------------------------------------------------------------------------- models


def test_models(official: anthropic.Anthropic, client: httpx.Client) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    (model,) = official.models.list()
    assert (model.id, model.type, model.display_name) == (MODEL, "model", MODEL)
    assert official.models.retrieve(MODEL) == model
    assert client.get("/v1/models").json()["object"] == "list"
    with pytest.raises(anthropic.NotFoundError) as caught:
        official.models.retrieve("other")
    assert caught.value.type == "not_found_error"


def test_pages_of_models(start_server: Any) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    models = [{"model": f"scripted:m{i}", "lanes": 1, "context": 64} for i in range(5)]
    server = start_server(models=models)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as official:
        assert [model.id for model in official.models.list(limit=2)] == [f"m{i}" for i in range(5)]
        page = official.models.list(limit=2, before_id="m3")
        assert ([model.id for model in page.data], page.has_more) == (["m1", "m2"], True)
        for query in ({"limit": 0}, {"after_id": "no"}, {"after_id": "m1", "before_id": "m3"}):
            with pytest.raises(anthropic.BadRequestError):
                official.models.list(**query)


@pytest.mark.slow
def test_pings_in_pauses(start_server: Any) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    server = start_server({"step_s": 0.3}, server={"keep_alive_s": 0.05})
    body = BODY | {"max_tokens": 3, "stream": True}
    raw = httpx.post(f"{server.url}{PATH}", json=body, timeout=60).text
    before, _, after = raw.partition("event: message_start")
    assert set(before.split("\n\n")) == {": keep-alive", ""}
    assert after.count("event: ping\n") > 1
    assert ": keep-alive" not in after
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as official:
        stream = official.messages.create(model=MODEL, max_tokens=3, messages=HI, stream=True)
        assert [event.type for event in stream][-1] == "message_stop"
