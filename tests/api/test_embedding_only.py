"""A model that only embeds, without lanes, beside one that writes: in one server, over real HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import numpy as np
import openai
import pytest

from stoker import TenantConfig
from stoker.banner import print_banner
from stoker.discovery import load_plugins
from stoker.engine.draft_model import check_draft_model
from stoker.errors import ConfigError, ModelError
from stoker.server import build_server
from stoker.testing import ScriptedOptions, ScriptedRuntime

if TYPE_CHECKING:
    from conftest import Running

MODELS = [
    {"model": "scripted:vectors", "options": {"generates": False, "max_input_tokens": 100}},
    {"model": "scripted:org/scripted", "lanes": 4, "context": 512, "options": {"embed": False}},
]
BEGIN = 256
SAID = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def both(start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Running:
    """The one that embeds is the default. What is warmed up is for the other."""
    file = tmp_path_factory.mktemp("warm") / "prompts.jsonl"
    file.write_text('{"prompt": "Once upon a time"}\n')
    cache = {"pin": ["Be brief."], "warm_up": [str(file)], "disk_bytes": 0}
    tenants = [{"name": "a", "reserved_lanes": 1}]
    return start_server(models=MODELS, cache=cache, tenants=tenants)


@pytest.fixture
def at(both: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=both.url, timeout=60) as client:
        yield client


def test_it_embeds_and_reranks(both: Running, at: httpx.Client) -> None:
    runtime = both.runtime
    answer = openai.OpenAI(base_url=f"{both.url}/v1", api_key="none").embeddings.create(
        model="vectors", input=["one", "two words"]
    )
    for item, text in zip(answer.data, ["one", "two words"], strict=True):
        vector = runtime.expected_vector([BEGIN, *text.encode()])
        np.testing.assert_allclose(
            item.embedding, vector / np.linalg.norm(vector), rtol=1e-5, atol=1e-6
        )
    body = {"query": "two", "documents": ["zzz", "two"], "top_n": 1}
    ranked = at.post("/v1/rerank", json=body).json()
    assert [result["index"] for result in ranked["results"]] == [1]
    assert runtime.num_steps == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", SAID),
        ("/v1/chat/completions", {**SAID, "stream": True}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/responses", {"input": "Hello", "truncation": "auto"}),
        ("/v1/responses/input_tokens", {"input": "Hello"}),
        ("/v1/messages", {**SAID, "max_tokens": 5}),
        ("/v1/messages/count_tokens", SAID),
        ("/apply-template", SAID),
    ],
)
def test_whatever_writes_is_refused(at: httpx.Client, path: str, body: dict[str, Any]) -> None:
    for model in ({}, {"model": "vectors"}):
        if not model and "messages" in path:
            continue  # Anthropic's API has no default model
        answer = at.post(path, json=body | model)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert "'vectors' only makes embeddings" in error["message"]
        assert error.get("code", "generation_not_supported") == "generation_not_supported"
        assert error.get("param", "model") == "model"


def test_the_other_writes(both: Running, at: httpx.Client) -> None:
    body = {"model": "org/scripted", "prompt": "Say", "max_tokens": 5, "temperature": 0}
    text = at.post("/v1/completions", json=body).json()["choices"][0]["text"]
    writer: Any = both.server._loader.runtimes[1]
    assert text == writer.expected_text([BEGIN, *b"Say"], 5)
    refused = at.post("/v1/embeddings", json={"model": "org/scripted", "input": "x"})
    assert refused.json()["error"]["code"] == "embeddings_not_supported"


def test_what_the_server_says_of_it(both: Running, at: httpx.Client) -> None:
    models = {item["id"]: item["max_model_len"] for item in at.get("/v1/models").json()["data"]}
    assert models == {"vectors": 100, "org/scripted": 512}
    at.post("/v1/embeddings", json={"input": ["a text", "and one more"]}).raise_for_status()
    both.wait_until(lambda: not both.server.router.num_active)
    lines = at.get("/metrics").text.splitlines()
    figures = dict(
        line.replace('{model_name="vectors"}', "").rsplit(" ", 1)
        for line in lines
        if '{model_name="vectors"}' in line
    )
    assert float(figures["stoker_prompt_tokens_total"]) >= 20
    for name in ("kv_cache_usage_ratio", "kv_cache_retained_ratio", "num_requests_running"):
        assert float(figures[f"stoker_{name}"]) == 0
    load = both.server.load("vectors")
    assert (load.num_free_lanes, load.kv_tokens_capacity, load.num_waiting) == (0, 0, 0)
    snapshot = both.server.snapshot("vectors")
    assert (snapshot.num_lanes, snapshot.kv_tokens_capacity) == (0, 0)
    assert both.server.cache("vectors").store is None
    tokens = at.post("/tokenize", json={"prompt": "abc", "model": "vectors"}).json()["tokens"]
    assert tokens == [BEGIN, *b"abc"]


async def test_its_cache_can_be_cleared(both: Running) -> None:
    assert both.server.router.cache_entries("vectors") == []
    assert await both.server.router.clear_cache("vectors") == 0


def test_only_the_other_is_warmed_up(both: Running, at: httpx.Client) -> None:
    both.wait_until(lambda: at.get("/ready").status_code == 200)
    assert both.server.warm_up.summary.startswith("2 prompts are computed, 1 of them pinned")


def test_the_banner_has_no_lanes(both: Running, capsys: pytest.CaptureFixture[str]) -> None:
    print_banner(both.server, both.url)
    told = capsys.readouterr().err
    assert "embeds     texts of up to 100 tokens, 32 numbers each; writes none" in told
    assert told.count("lanes  ") == 1


def test_tenants_that_are_read_again(both: Running, at: httpx.Client) -> None:
    server = both.server
    config, keys = server.config, server.app.keys
    tenants = [TenantConfig(name="a", reserved_lanes=2, reserved_kv=0.5, weight=2.0)]
    server.apply(server.config.__class__(tenants=tenants), keys)
    assert at.post("/v1/embeddings", json={"input": "x"}).status_code == 200
    server.apply(config, keys)


def refused(config: Any, match: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=match):
        build_server(config, load_plugins(only=[]))


@pytest.fixture
def configured(config: Any) -> Callable[..., Any]:
    def make(**sections: Any) -> Any:
        return msgspec.convert(
            msgspec.to_builtins(config) | {"models": MODELS[:1]} | sections, type(config)
        )

    return make


def test_what_it_could_not_warm_up_stops_the_start(
    configured: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x"}) + "\n")
    refused(configured(cache={"pin": ["Be brief."]}), "cache.pin: no model that is served writes")
    refused(configured(cache={"warm_up": [str(file)]}), "line 1: no model that is served writes")
    file.write_text(json.dumps({"prompt": "x", "model": "vectors"}) + "\n")
    refused(
        configured(models=MODELS, cache={"warm_up": [str(file)]}), "line 1: .*'vectors' only embeds"
    )


def test_nobody_drafts_for_it_or_with_it(configured: Callable[..., Any]) -> None:
    model = MODELS[0] | {"draft_model": "scripted:org/scripted"}
    refused(configured(models=[model]), "vectors only embeds; leave models.draft_model", ModelError)
    embeds, writes = ScriptedRuntime(options=ScriptedOptions(generates=False)), ScriptedRuntime()
    with pytest.raises(ModelError, match="draft only embeds"):
        check_draft_model(writes, embeds, "target", "draft")


def test_alone_it_needs_no_lanes_and_says_nothing_of_them(
    configured: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Reservations, stores of snapshots and exact prefixes are about lanes: no word of them here."""
    config = configured(
        tenants=[{"name": "a", "reserved_lanes": 3, "reserved_kv": 0.5}],
        cache={"host_bytes": 1, "disk_bytes": 1},
        scheduler={"lend_reserved": False},
    )
    with caplog.at_level(logging.WARNING):
        server = build_server(config, load_plugins(only=[]))
    assert not caplog.records
    assert server.router.health().status == "ok"
    assert server.models()[0].info.num_lanes == 0
    server.stop()
