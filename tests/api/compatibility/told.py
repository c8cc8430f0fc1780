"""Probes of the parameters that tell more than a text."""

from __future__ import annotations

import math
from typing import Any

import pytest

from api.compatibility.cases import works
from api.compatibility.ending import COUNT
from api.compatibility.harness import CHAT, COMPLETIONS, RESPONSES, Ask

LOGPROBS = ["message.output_text.logprobs"]


@works("logprobs", CHAT)
def logprobs_of_a_chat(ask: Ask) -> None:
    answer = ask(logprobs=True)
    tokens = answer.body["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in tokens) == answer.text
    assert all(item["logprob"] < 0 and item["top_logprobs"] == [] for item in tokens)


@works("top_logprobs", CHAT)
def top_logprobs_of_a_chat(ask: Ask) -> None:
    are_likeliest(ask(logprobs=True, top_logprobs=3).body["choices"][0]["logprobs"]["content"])


@works("top_logprobs include", RESPONSES)
def logprobs_of_a_response(ask: Ask) -> None:
    (item,) = ask(include=LOGPROBS, top_logprobs=3).body["output"]
    (part,) = item["content"]
    are_likeliest(part["logprobs"])
    assert "".join(token["token"] for token in part["logprobs"]) == part["text"]


def are_likeliest(tokens: list[dict[str, Any]]) -> None:
    """Greedily chosen tokens are the likeliest ones, and the probabilities are no more than 1 in sum."""
    assert tokens
    for item in tokens:
        first, *others = item["top_logprobs"]
        assert len(others) == 2
        assert first["token"] == item["token"]
        assert first["logprob"] == pytest.approx(item["logprob"])
        assert first["logprob"] >= others[0]["logprob"] >= others[1]["logprob"]
        assert sum(math.exp(top["logprob"]) for top in item["top_logprobs"]) <= 1 + 1e-6


@works("logprobs", COMPLETIONS)
def logprobs(ask: Ask) -> None:
    answer = ask(about=COUNT, logprobs=2)
    told = answer.body["choices"][0]["logprobs"]
    assert "".join(told["tokens"]) == answer.text
    for token, value, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert max(top, key=top.__getitem__) == token
        assert top[token] == value < 0


@works("prompt_logprobs", CHAT, COMPLETIONS)
def prompt_logprobs(ask: Ask) -> None:
    answer = ask(about=COUNT, prompt_logprobs=1, return_token_ids=True)
    at = answer.body if ask.endpoint is CHAT else answer.body["choices"][0]
    assert len(at["prompt_logprobs"]) == answer.num_prompt_tokens
    for token, told in list(zip(at["prompt_token_ids"], at["prompt_logprobs"], strict=True))[1:]:
        assert told[str(token)]["logprob"] <= 0


@works("return_token_ids", CHAT, COMPLETIONS)
def return_token_ids(ask: Ask) -> None:
    answer = ask(about=COUNT, return_token_ids=True)
    (choice,) = answer.body["choices"]
    written = ask.client.post("/detokenize", json={"tokens": choice["token_ids"]}).json()["content"]
    assert written.removesuffix("<|im_end|>") == answer.text


@works("timings timings_per_token", CHAT, COMPLETIONS)
def timings(ask: Ask) -> None:
    for name in ("timings", "timings_per_token"):
        answer = ask(tokens=3, **{name: True})
        told = answer.body["timings"]
        assert told["predicted_n"] == 3
        assert told["prompt_n"] + told["cache_n"] == answer.num_prompt_tokens
    assert "timings" not in ask(tokens=3).body


@works("return_progress", CHAT, COMPLETIONS)
def return_progress(ask: Ask) -> None:
    events = ask.stream(about="A long text to read. " * 50, return_progress=True, tokens=1)
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert told
    assert all(0 <= item["processed"] <= item["total"] for item in told)
