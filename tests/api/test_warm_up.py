"""Pins and warm-up files: computed before anybody asks, and checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from stoker.discovery import load_plugins
from stoker.errors import ConfigError
from stoker.server import build_server

if TYPE_CHECKING:
    from conftest import Running

SYSTEM = "You are a stoker. You feed the fire and you say little. " * 3


def write(path: Path, *lines: Any) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n")
    return str(path)


def chat(server: Running, system: str, user: str, **fields: Any) -> Any:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0, **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    server.wait_until_idle()
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def wait_until_warm(server: Running) -> None:
    server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)


def test_prompts_of_a_file_are_found_by_the_first_who_asks(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello"}]
    file = write(
        tmp_path / "prompts.jsonl",
        {"messages": messages},
        "",
        {"prompt": "Once upon a time there was a", "cache_salt": "s"},
    )
    server = start_server(cache={"warm_up": [file]})
    wait_until_warm(server)
    assert server.server.warm_up.summary == "2 prompts are computed; /ready waits for them"
    assert chat(server, SYSTEM, "Hello there") > len(SYSTEM)
    body = {"prompt": "Once upon a time there was a fire", "max_tokens": 1}
    answers = [
        httpx.post(f"{server.url}/v1/completions", json=body | salt).json()["usage"]
        for salt in ({"cache_salt": "s"}, {"cache_salt": "other"})
    ]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in answers]
    assert cached == [len("Once upon a time there was a") + 1, 0]


@pytest.mark.slow
def test_a_pinned_prompt_stays_when_all_else_goes(start_server: Callable[..., Running]) -> None:
    server = start_server(cache={"pin": [SYSTEM], "max_tokens": 400})
    wait_until_warm(server)
    for i in range(12):
        chat(server, f"{i} another system prompt that takes its room " * 4, "Hello")
    assert chat(server, SYSTEM, "Hello") > len(SYSTEM)
    tiers = httpx.get(f"{server.url}/v1/cache").json()["data"][0]["tiers"]
    assert tiers[0]["pinned"] == 1
    httpx.delete(f"{server.url}/v1/cache")
    assert chat(server, SYSTEM, "Once more") > len(SYSTEM)


@pytest.mark.slow
def test_requests_are_taken_meanwhile_and_readiness_waits(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    file = write(tmp_path / "many.jsonl", *({"prompt": f"{i} " * 200} for i in range(30)))
    server = start_server({"step_s": 0.02}, cache={"warm_up": [file]})
    ready = httpx.get(f"{server.url}/ready")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "status": "warming"}
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    body = {"prompt": "urgent", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == server.expected("urgent", 3)
    assert httpx.get(f"{server.url}/ready").status_code == 503
    # Broken off at the end of the test session: nothing waits for it.


@pytest.mark.slow
def test_a_prompt_that_fails_costs_a_warning_only(
    start_server: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "two"})
    server = start_server({"step_s": 0.01}, cache={"warm_up": [file]})

    def fail(_: Any) -> None:
        raise RuntimeError("no")

    server.runtime.before_step = fail
    wait_until_warm(server)
    server.runtime.before_step = None
    assert "could not be computed" in caplog.text
    server.check_still_serves()


MISTAKES = {
    "no JSON": ("{", r"line 2: .*"),
    "no object": ("[]", r"line 2: .*"),
    "unknown field": ({"promt": "x"}, r"line 2: .*promt"),
    "neither": ({}, "line 2: give either `messages` or `prompt`"),
    "both": ({"prompt": "a", "messages": []}, "line 2: give either"),
    "no tenant": ({"prompt": "a", "tenant": "not a name"}, "line 2: 'not a name' is no name"),
    "no model": ({"prompt": "a", "model": "org/scriptet"}, "Did you mean 'org/scripted'"),
    "unknown role": ({"messages": [{"role": "king", "content": "x"}]}, "line 2: .*unknown role"),
    "too long": ({"prompt": "x" * 5000}, "line 2: .*context holds"),
    "empty": ({"prompt": ""}, "line 2: "),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_stops_the_start_and_names_file_and_line(
    start_server: Callable[..., Running], tmp_path: Path, what: str
) -> None:
    line, message = MISTAKES[what]
    file = write(tmp_path / "bad.jsonl", {"prompt": "good"}, line)
    with pytest.raises(ConfigError, match=message) as caught:
        start_server(cache={"warm_up": [file]})
    assert str(caught.value).startswith(f"cache.warm_up[0]: {file}, ")


def test_files_that_cannot_be_used(start_server: Callable[..., Running], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warm_up\[0\]: .*cannot be read"):
        start_server(cache={"warm_up": [str(tmp_path / "none")]})
    empty = write(tmp_path / "empty.jsonl", "", "  ")
    with pytest.raises(ConfigError, match="holds no prompt"):
        start_server(cache={"warm_up": [empty]})
    file = write(tmp_path / "p.jsonl", {"prompt": "x"})
    with pytest.raises(ConfigError, match="name its `tenant`"):
        start_server(cache={"warm_up": [file], "isolation": "tenant"})
    with pytest.raises(ConfigError, match=r"cache.pin\[1\]: .*context holds"):
        start_server(cache={"pin": ["short", "long " * 1000]})


def test_under_isolation_it_belongs_to_the_tenant_that_is_named(
    config: Any, tmp_path: Path
) -> None:
    import msgspec

    file = write(tmp_path / "p.jsonl", {"prompt": "x", "tenant": "a"})
    cache = {"warm_up": [file], "isolation": "tenant"}
    raw = {**msgspec.to_builtins(config), "cache": cache}
    server = build_server(msgspec.convert(raw, type(config)), load_plugins(only=[]))
    (job,) = server.warm_up._jobs
    assert job.request.tenant == "a"
    server.stop()
