"""Speculative decoding behind the API: configured, explained, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from stoker.config import Config
from stoker.discovery import load_plugins
from stoker.errors import ModelError
from stoker.server import build_server

if TYPE_CHECKING:
    from conftest import Running

MODEL = "org/scripted"
PERIOD = {"period": 12}
BODY = {"prompt": "twelve bytes" * 3, "max_tokens": 80, "temperature": 0}
ALWAYS = {"adaptive": False, "max_draft_tokens": 8}


def complete(server: Running, **body: Any) -> tuple[str, dict[str, Any]]:
    """The text of a completion, and the trace of its sequence."""
    headers = {"x-stoker-explain": "1", "x-request-id": "drafted"}
    url = f"{server.url}/v1/completions"
    response = httpx.post(url, json={**BODY, **body}, headers=headers)
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    (trace,) = json.loads(response.headers["x-stoker-explain"])["sequences"]
    assert response.json()["usage"]["completion_tokens"] == trace["completion_tokens"]
    return text, trace


def model(**fields: Any) -> list[dict[str, Any]]:
    return [{"model": f"scripted:{MODEL}", "lanes": 4, "context": 1024, **fields}]


def test_prompt_lookup_is_on_by_default_and_explained(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(PERIOD, speculation=ALWAYS)
    text, trace = complete(server)
    assert text == server.expected(BODY["prompt"], 80)  # type: ignore[arg-type]
    assert trace["accepted_tokens"] > 40
    assert trace["draft_tokens"] >= trace["accepted_tokens"]
    assert trace["num_decode_steps"] < 40
    remembered = httpx.get(f"{server.url}/v1/requests/drafted").json()["sequences"][0]
    assert remembered["accepted_tokens"] == trace["accepted_tokens"]
    document = httpx.get(f"{server.url}/schema/openapi.json").json()
    shown = document["components"]["schemas"]["SequenceTrace"]["properties"]
    assert {"draft_tokens", "accepted_tokens"} <= set(shown)


def test_the_stream_of_a_drafted_text_is_the_text(start_server: Callable[..., Running]) -> None:
    server = start_server(PERIOD, speculation=ALWAYS)
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        events = [
            json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
        ]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == server.expected(BODY["prompt"], 80)  # type: ignore[arg-type]
    assert events[-1]["usage"]["completion_tokens"] == 80
    assert len(events) < 60


@pytest.mark.slow
def test_it_can_be_switched_off(start_server: Callable[..., Running]) -> None:
    server = start_server(PERIOD, speculation={"method": "none"})
    text, trace = complete(server)
    assert text == server.expected(BODY["prompt"], 80)  # type: ignore[arg-type]
    assert trace["draft_tokens"] == 0


@pytest.mark.slow
def test_a_draft_model_guesses_for_its_model(start_server: Callable[..., Running]) -> None:
    models = model(draft_model="scripted:small")
    server = start_server(models=models, speculation={**ALWAYS, "method": "none"})
    text, trace = complete(server)
    assert text == server.expected(BODY["prompt"], 80)  # type: ignore[arg-type]
    assert trace["accepted_tokens"] == trace["draft_tokens"] > 40
    served = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [entry["id"] for entry in served] == [MODEL], "a draft model is not served itself"


def test_a_draft_model_that_does_not_fit_stops_the_start() -> None:
    models = model(draft_model="scripted:small", options={"truncation": "reset"})
    config = msgspec.convert({"models": models}, Config)
    with pytest.raises(ModelError, match=f"scripted:small does not fit scripted:{MODEL}"):
        build_server(config, load_plugins(only=[]))
