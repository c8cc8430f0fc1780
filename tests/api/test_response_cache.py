"""The response cache over HTTP, through OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from conftest import Running

MODEL = "org/scripted"
MESSAGES: Any = [{"role": "user", "content": "tell me"}]


@pytest.fixture(scope="module")
def cached(start_server: Callable[..., Running]) -> Running:
    return start_server(plugins={"response-cache": {}})


@pytest.fixture(scope="module")
def slow_cached(start_server: Callable[..., Running]) -> Running:
    return start_server({"step_s": 0.004}, plugins={"response-cache": {}})


@pytest.fixture
def api(cached: Running) -> Any:
    with openai.OpenAI(base_url=f"{cached.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def headers_of(response: Any) -> tuple[str | None, str | None]:
    return response.headers.get("x-stoker-cache"), response.headers.get("age")


def content(body: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs between two answers anyway, and without what it cost."""
    kept = {k: v for k, v in body.items() if k not in ("id", "created")}
    if kept.get("usage"):
        kept["usage"] = {k: v for k, v in kept["usage"].items() if k != "prompt_tokens_details"}
    return kept


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.startswith("data: {")]
    return [content(json.loads(line[6:])) for line in lines]


def joined(parts: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in parts:
        for choice in event["choices"]:
            new = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + new
    return texts


def counted(server: Running, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]
    assert values, f"no metric {name}"
    return sum(values)


# --------------------------------------------------------------------------- hits


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 11},
        {"temperature": 0, "n": 3},
        {"temperature": 0, "stop": ["e"]},
    ],
    ids=str,
)
def test_the_second_answer_is_the_first(
    cached: Running, api: openai.OpenAI, fields: dict[str, Any]
) -> None:
    create = api.chat.completions.with_raw_response.create
    first = create(model=MODEL, messages=MESSAGES, max_tokens=40, **fields)
    cached.wait_until_idle()
    steps = cached.runtime.num_steps
    second = create(model=MODEL, messages=MESSAGES, max_tokens=40, **fields)
    assert headers_of(first) == ("miss", None)
    assert headers_of(second) == ("hit", "0")
    bodies = [json.loads(response.text) for response in (first, second)]
    assert content(bodies[1]) == content(bodies[0])
    assert bodies[1]["id"] != bodies[0]["id"]
    usage = bodies[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert cached.runtime.num_steps == steps
    streamed = api.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    texts: dict[int, str] = {}
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        last = chunk
    assert [texts[i] for i in sorted(texts)] == [
        choice["message"]["content"] for choice in bodies[0]["choices"]
    ]
    assert last.usage is not None
    assert last.usage.total_tokens == usage["total_tokens"]
    assert cached.runtime.num_steps == steps


async def test_what_was_streamed_is_a_hit_for_who_does_not_stream(cached: Running) -> None:
    body: dict[str, Any] = {"prompt": "streamed first", "max_tokens": 30, "temperature": 0}
    async with httpx.AsyncClient(base_url=cached.url) as raw:
        first = await raw.post("/v1/completions", json={**body, "stream": True})
        assert headers_of(first) == ("miss", None)
    cached.wait_until_idle()
    async with openai.AsyncOpenAI(base_url=f"{cached.url}/v1", api_key="x") as api:
        second = await api.completions.with_raw_response.create(model=MODEL, **body)
    assert headers_of(second) == ("hit", "0")
    text = second.parse().choices[0].text
    assert text == cached.expected("streamed first", 30)
    assert joined(events(first.text)) == {0: text}


def test_several_prompts_are_several_requests(cached: Running) -> None:
    body = {"prompt": ["one prompt", "two prompts"], "max_tokens": 9, "temperature": 0}
    with httpx.Client(base_url=cached.url) as client:
        first = client.post("/v1/completions", json=body)
        cached.wait_until_idle()
        steps = cached.runtime.num_steps
        second = client.post("/v1/completions", json=body)
        alone = client.post("/v1/completions", json={**body, "prompt": "two prompts"})
    assert content(second.json()) == content(first.json())
    assert second.headers["x-stoker-cache"] == alone.headers["x-stoker-cache"] == "hit"
    assert alone.json()["choices"][0]["text"] == first.json()["choices"][1]["text"]
    assert cached.runtime.num_steps == steps


def test_what_is_not_repeatable_is_skipped_and_bad_headers_are_refused(cached: Running) -> None:
    body = {"prompt": "again", "max_tokens": 4, "temperature": 1}
    url = f"{cached.url}/v1/completions"
    assert httpx.post(url, json=body).headers["x-stoker-cache"] == "skip"
    refused = httpx.post(url, json={**body, "temperature": 0}, headers={"x-stoker-cache": "fresh"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-stoker-cache"
    cached.wait_until_idle()


def test_a_hit_is_a_request_like_any_other(cached: Running) -> None:
    body = {"prompt": "explained", "max_tokens": 4, "temperature": 0}
    url = f"{cached.url}/v1/completions"
    queries = counted(cached, "stoker_response_cache_queries_total")
    hits = counted(cached, "stoker_response_cache_hits_total")
    assert httpx.post(url, json=body).headers["x-stoker-cache"] == "miss"
    cached.wait_until_idle()
    finished = counted(cached, "stoker_request_success_total")
    answer = httpx.post(url, json=body, headers={"x-request-id": "hit-1", "x-stoker-explain": "1"})
    explained = json.loads(answer.headers["x-stoker-explain"])
    told = httpx.get(f"{cached.url}/v1/requests/hit-1").json()
    for found in (explained, told):
        assert found["status"] == "finished"
        (sequence,) = found["sequences"]
        assert sequence["admitted_by"] == "its answer was stored in the response cache"
        assert sequence["completion_tokens"] == 4
        assert sequence["cached_tokens"] == sequence["prompt_tokens"]
    assert counted(cached, "stoker_response_cache_queries_total") == queries + 2
    assert counted(cached, "stoker_response_cache_hits_total") == hits + 1
    assert counted(cached, "stoker_request_success_total") == finished, "the engine did nothing"
    assert 0 < counted(cached, "stoker_response_cache_bytes") <= 64 * 2**20
    assert counted(cached, "stoker_response_cache_joins_total") >= 0
    assert counted(cached, "stoker_response_cache_evictions_total") == 0


@pytest.mark.slow
def test_hits_count_as_requests_and_as_tokens(start_server: Callable[..., Running]) -> None:
    limits = {"name": "*", "requests_per_minute": 3, "tokens_per_minute": 1000}
    limited = start_server(plugins={"response-cache": {}}, tenants=[limits])
    body = {"prompt": "limited", "max_tokens": 10, "temperature": 0}
    left: list[tuple[str, ...]] = []
    for outcome in ("miss", "hit", "hit"):
        answer = httpx.post(f"{limited.url}/v1/completions", json=body)
        assert answer.headers["x-stoker-cache"] == outcome
        names = [f"x-ratelimit-remaining-{of}" for of in ("requests", "tokens")]
        left.append(tuple(answer.headers[name] for name in names))
        total = answer.json()["usage"]["total_tokens"]
        limited.wait_until_idle()
    assert left == [(str(2 - i), str(1000 - (i + 1) * total)) for i in range(3)]
    assert httpx.post(f"{limited.url}/v1/completions", json=body).status_code == 429


# --------------------------------------------------------------------------- sharing


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
async def test_twenty_clients_at_once_are_computed_once(slow_cached: Running, stream: bool) -> None:
    body = {"prompt": f"all at once {stream}", "max_tokens": 40, "temperature": 0, "stream": stream}
    steps = slow_cached.runtime.num_steps
    async with httpx.AsyncClient(base_url=slow_cached.url, timeout=60) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for _ in range(20))
        )
    slow_cached.wait_until_idle()
    assert slow_cached.runtime.num_steps == steps + 40
    outcomes = [answer.headers["x-stoker-cache"] for answer in answers]
    assert outcomes.count("miss") == 1
    assert "joined" in outcomes  # who comes after the end gets a hit
    wanted = slow_cached.expected(f"all at once {stream}", 40)
    for answer in answers:
        text = joined(events(answer.text))[0] if stream else answer.json()["choices"][0]["text"]
        assert text == wanted


@pytest.mark.slow
async def test_clients_that_leave_hurt_nobody_and_the_last_one_ends_it(
    slow_cached: Running,
) -> None:
    body = {"prompt": "leaving", "max_tokens": 900, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=slow_cached.url, timeout=60) as client:
        async with client.stream("POST", "/v1/completions", json=body) as leader:
            assert leader.headers["x-stoker-cache"] == "miss"
            follower = client.stream("POST", "/v1/completions", json=body)
            following = await follower.__aenter__()
            assert following.headers["x-stoker-cache"] == "joined"
            steps = slow_cached.runtime.num_steps
        # The leader has gone; more comes for the follower.
        async for _ in following.aiter_bytes():
            if slow_cached.runtime.num_steps > steps + 50:
                break
        assert slow_cached.num_running == 1
        await follower.__aexit__(None, None, None)
    slow_cached.wait_until_idle()
    assert slow_cached.runtime.num_steps < steps + 890
    slow_cached.check_still_serves()


# --------------------------------------------------------------------------- off


def test_it_is_off_by_default(server: Running) -> None:
    body = {"prompt": "off", "max_tokens": 4, "temperature": 0}
    for _ in range(2):
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert "x-stoker-cache" not in answer.headers
    assert "stoker_response_cache" not in httpx.get(f"{server.url}/metrics").text
    names = [type(middleware).__name__ for middleware in server.server.router.middleware]
    assert "ResponseCache" not in names
