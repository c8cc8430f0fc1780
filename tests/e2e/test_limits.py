"""Limits of tenants in a real server, through OpenAI's client."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.slow

KEYS = {name: f"sk-{name}-0123456789abcdef" for name in ("few", "tokens", "narrow", "free")}
TENANTS = {
    "few": "requests_per_minute = 5",
    "tokens": "tokens_per_minute = 5000\ntokens_per_day = 100000",
    "narrow": "max_concurrent_requests = 1",
    "free": "",
}
# One in eight tokens ends an answer.
CONFIG = "[plugins.scripted]\nstep_s = 0.002\nend_every = 8\n" + "".join(
    f'[[tenants]]\nname = "{name}"\n{limits}\n'
    f'keys = ["sha256:{hashlib.sha256(KEYS[name].encode()).hexdigest()}"]\n'
    for name, limits in TENANTS.items()
)


@pytest.fixture(scope="module")
def served(serve_once: Any) -> Iterator[Any]:
    with serve_once("scripted:m", config=CONFIG) as server:
        yield server


def client(served: Any, tenant: str, **options: Any) -> openai.OpenAI:
    base_url = f"{served.url}/v1"
    return openai.OpenAI(base_url=base_url, api_key=KEYS[tenant], max_retries=0, **options)


def complete(api: openai.OpenAI, prompt: str = "hello", max_tokens: int = 4, **fields: Any) -> Any:
    return api.completions.with_raw_response.create(
        model="m", prompt=prompt, max_tokens=max_tokens, temperature=0, **fields
    )


def test_requests_per_minute_are_counted_down_and_then_refused(served: Any) -> None:
    with client(served, "few") as api:
        left = [complete(api).headers["x-ratelimit-remaining-requests"] for _ in range(5)]
        assert left == ["4", "3", "2", "1", "0"]
        with pytest.raises(openai.RateLimitError) as refused:
            complete(api, stream=True)
        response = refused.value.response
        assert refused.value.code == "rate_limit_exceeded"
        assert "limit of 5 requests per minute" in refused.value.message
        assert response.headers["x-ratelimit-limit-requests"] == "5"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert response.headers["x-ratelimit-reset-requests"].endswith("s")
        assert "x-ratelimit-limit-tokens" not in response.headers
        # A fifth of them must slide out of a minute: at least 12 s, at most a minute more.
        assert 12 <= int(response.headers["retry-after"]) <= 72
        assert 12_000 <= float(response.headers["retry-after-ms"]) <= 72_000
    with client(served, "free") as api:
        assert "x-ratelimit-limit-requests" not in complete(api).headers


def test_tokens_are_settled_with_what_was_generated(served: Any) -> None:
    with client(served, "tokens") as api:
        first = complete(api, max_tokens=1000)
        usage = first.parse().usage
        assert usage.completion_tokens < 1000, "it stopped by itself"
        assert (
            int(first.headers["x-ratelimit-remaining-tokens"]) == 5000 - 1000 - usage.prompt_tokens
        )
        assert first.headers["x-ratelimit-limit-tokens"] == "5000"
        streamed = api.completions.create(
            model="m",
            prompt="hello",
            max_tokens=1000,
            stream=True,
            stream_options={"include_usage": True},
        )
        used = (
            usage.total_tokens + [chunk.usage for chunk in streamed if chunk.usage][-1].total_tokens
        )

        def is_settled() -> bool:
            # What is too much is given back when the request is over, a moment after its last byte.
            nonlocal used
            answer = complete(api, max_tokens=1)
            used += answer.parse().usage.total_tokens
            left = int(answer.headers["x-ratelimit-remaining-tokens"])
            return left >= 5000 - int(used) - 5

        served.wait_for(is_settled)
        with pytest.raises(openai.RateLimitError) as refused:
            complete(api, prompt="hello", max_tokens=3900, n=2)
        assert refused.value.code == "request_too_large_for_limit"
        assert "retry-after" not in refused.value.response.headers


def test_a_place_is_free_when_a_request_ends_or_its_client_leaves(served: Any) -> None:
    def is_taken() -> bool:
        body = {"prompt": "hello", "max_tokens": 1}
        headers = {"authorization": f"Bearer {KEYS['narrow']}"}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers)
        if answer.status_code == 200:
            return False
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert answer.headers["retry-after"].isdecimal()
        return True

    endless = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    with client(served, "narrow") as api:
        stream = api.completions.create(model="m", prompt="go", stream=True, **endless)  # type: ignore[call-overload]
        next(iter(stream))
        assert is_taken()
        with client(served, "free") as free:
            assert complete(free).status_code == 200
        stream.close()
        served.wait_for(lambda: not is_taken())
        ending = api.completions.create(
            model="m", prompt="go", stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
        )
        next(iter(ending))
        assert is_taken()
        assert [chunk.choices[0].finish_reason for chunk in ending][-1] == "length"
        served.wait_for(lambda: not is_taken())


def test_the_whole_server_may_be_bounded_too(serve: Any) -> None:
    config = "[plugins.scripted]\nstep_s = 0.01\n[admission]\nmax_concurrent_requests = 2\n"
    with serve("scripted:m", config=config) as served, contextlib.ExitStack() as streams:
        url = f"{served.url}/v1/completions"
        body = {"prompt": "go", "max_tokens": 4000, "stream": True}
        first, second = (
            streams.enter_context(httpx.stream("POST", url, json=body, timeout=60))
            for _ in range(2)
        )
        assert (first.status_code, second.status_code) == (200, 200)
        refused = httpx.post(url, json=body)
        assert refused.status_code == 429
        assert "the server has 2 requests under way" in refused.json()["error"]["message"]
        first.close()
        short = {"prompt": "go", "max_tokens": 2}
        served.wait_for(lambda: httpx.post(url, json=short).status_code == 200)
