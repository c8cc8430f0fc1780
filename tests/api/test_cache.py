"""``/v1/cache`` over real HTTP: what it shows to whom, and how it is emptied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from stoker.keys import digest_of

if TYPE_CHECKING:
    from conftest import Running

KEYS = {"sk-admin": "default", "sk-a": "a", "sk-b": "b"}
SECRET = "a salt that nobody may see"


@pytest.fixture
def tiered(start_server: Callable[..., Running]) -> Running:
    """Has keys of three tenants, two lanes, and host memory for what they lose."""
    server = start_server(
        {"snapshot": True},
        server={"api_keys": ["sk-admin"]},
        tenants=[
            {"name": "a", "keys": [digest_of("sk-a")]},
            {"name": "b", "keys": [digest_of("sk-b")]},
        ],
        cache={"host_bytes": 10_000_000},
    )
    server.auth = {"authorization": "Bearer sk-admin"}
    return server


def ask(server: Running, key: str, prompt: str, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=auth(key))
    assert answer.status_code == 200, answer.text
    server.wait_until_idle()
    return answer.json()


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def look(server: Running, key: str = "sk-admin") -> Any:
    answer = httpx.get(f"{server.url}/v1/cache", headers=auth(key))
    assert answer.status_code == 200, answer.text
    assert SECRET not in answer.text
    (model,) = answer.json()["data"]
    return model


def test_an_administrator_sees_everything_but_secrets(tiered: Running) -> None:
    prompt = "the same beginning " * 5
    ask(tiered, "sk-a", prompt + "one", cache_salt=SECRET)
    ask(tiered, "sk-b", prompt + "two")
    cached = ask(tiered, "sk-b", prompt + "three")["usage"]["prompt_tokens_details"]
    assert cached["cached_tokens"] > 0
    seen = look(tiered)
    assert seen["tenant"] is None
    assert {entry["tenant"] for entry in seen["tenants"]} == {"a", "b"}
    tiers = {tier["tier"]: tier for tier in seen["tiers"]}
    assert set(tiers) == {"lane", "host"}
    assert tiers["lane"]["entries"] >= 2
    assert tiers["host"]["capacity_bytes"] == 10_000_000
    totals = seen["totals"]
    assert totals["queries"] == 3
    assert totals["hits"] == sum(totals["hits_by_way"].values()) == 1
    assert totals["hit_tokens"] == cached["cached_tokens"]


def test_others_see_what_is_theirs(tiered: Running) -> None:
    ask(tiered, "sk-a", "mine, all mine, and long enough")
    ask(tiered, "sk-b", "somebody else's, and longer than that of a")
    seen = look(tiered, "sk-a")
    assert seen["tenant"] == "a"
    assert {entry["tenant"] for entry in seen["tenants"]} == {"a"}
    assert seen["totals"] is None
    assert all(tier["capacity_bytes"] is None for tier in seen["tiers"])
    assert {eviction["tenant"] for eviction in seen["recent"]} <= {"a"}
    whole = {tier["tier"]: tier["tokens"] for tier in look(tiered)["tiers"]}
    own = {tier["tier"]: tier["tokens"] for tier in seen["tiers"]}
    assert 0 < own["lane"] < whole["lane"]


def test_emptying_is_for_administrators_and_says_why(tiered: Running) -> None:
    ask(tiered, "sk-a", "something to forget, long enough to count")
    refused = httpx.delete(f"{tiered.url}/v1/cache", headers=auth("sk-a"))
    assert refused.status_code == 403
    assert "[server] admins" in refused.json()["error"]["message"]
    assert look(tiered)["tiers"][0]["entries"] == 1
    answer = httpx.delete(f"{tiered.url}/v1/cache", headers=auth("sk-admin"))
    assert answer.status_code == 200
    assert answer.json()["data"] == [{"model": "org/scripted", "dropped": 1}]
    seen = look(tiered)
    assert all(tier["entries"] == 0 for tier in seen["tiers"])
    assert seen["recent"][0]["reason"] == "cleared"
    assert seen["recent"][0]["tenant"] == "a"
    tiered.check_still_serves()


def test_one_model_can_be_named(tiered: Running) -> None:
    url = f"{tiered.url}/v1/cache"
    headers = auth("sk-admin")
    assert httpx.get(url, params={"model": "org/scripted"}, headers=headers).status_code == 200
    missing = httpx.get(url, params={"model": "none"}, headers=headers)
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "model"
    assert httpx.delete(url, params={"model": "none"}, headers=headers).status_code == 404


def test_without_keys_everybody_is_an_administrator(server: Running) -> None:
    answer = httpx.get(f"{server.url}/v1/cache").json()
    assert answer["eviction"] == "lru"
    assert answer["data"][0]["totals"] is not None
    assert [tier["tier"] for tier in answer["data"][0]["tiers"]] == ["lane"]


@pytest.mark.slow
def test_the_document_describes_it(server: Running) -> None:
    document = httpx.get(f"{server.url}/schema/openapi.json").json()
    assert set(document["paths"]["/v1/cache"]) == {"get", "delete"}
    assert "CacheTotals" in document["components"]["schemas"]
