"""What the parameters of chat and text completions do, as far as the scripted model shows it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi there"}]
GREEDY = {"max_tokens": 8, "temperature": 0}


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    given = {"messages": USER} if path == CHAT else {"prompt": "hi there"}
    response = client.post(path, json={**given, **GREEDY, **body})
    assert response.status_code == 200, response.text
    assert "x-stoker-warning" not in response.headers
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    given = {"messages": USER} if path == CHAT else {"prompt": "hi there"}
    response = client.post(path, json={**given, **GREEDY, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    given = {"messages": USER} if path == CHAT else {"prompt": "hi there"}
    response = client.post(path, json={**given, **GREEDY, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


# --------------------------------------------------------------------------- log-probabilities


def test_logprobs_of_a_chat(client: httpx.Client) -> None:
    (choice,) = ask(client, CHAT, logprobs=True, top_logprobs=3)["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(item["token"] for item in tokens) == choice["message"]["content"]
    for item in tokens:
        assert bytes(item["bytes"]).decode() == item["token"]
        # The scripted model gives 8 to one token and 0 to the 260 others.
        assert item["logprob"] == pytest.approx(8 - math.log(math.exp(8) + 260), abs=1e-4)
        assert len(item["top_logprobs"]) == 3
        assert item["top_logprobs"][0]["token"] == item["token"]
    (bare,) = ask(client, CHAT, logprobs=True)["choices"]
    assert all(item["top_logprobs"] == [] for item in bare["logprobs"]["content"])


def test_streamed_logprobs_are_those_of_the_whole_answer(client: httpx.Client) -> None:
    body = {"logprobs": True, "top_logprobs": 2, "stop": ["zz"]}
    (choice,) = ask(client, CHAT, **body)["choices"]
    chunks = [chunk["choices"][0] for chunk in stream(client, CHAT, **body)]
    parts = [part for chunk in chunks if chunk["logprobs"] for part in chunk["logprobs"]["content"]]
    assert parts == choice["logprobs"]["content"]
    assert "".join(c["delta"].get("content", "") for c in chunks) == choice["message"]["content"]


def test_logprobs_of_an_echoed_text(client: httpx.Client) -> None:
    (choice,) = ask(client, TEXT, logprobs=2, echo=True)["choices"]
    told = choice["logprobs"]
    assert choice["text"].startswith("hi there")
    assert "".join(told["tokens"][1:]) == choice["text"]  # the first one is <|begin|>
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    for token, offset in list(zip(told["tokens"], told["text_offset"], strict=True))[1:]:
        assert choice["text"][offset : offset + len(token)] == token
    scored = ask(client, TEXT, logprobs=2, echo=True, max_tokens=0)
    assert scored["choices"][0]["text"] == "hi there"
    assert scored["choices"][0]["finish_reason"] == "length"
    assert scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["logprobs"]["tokens"] == told["tokens"][: len(told["tokens"]) - 8]
    events = stream(client, TEXT, logprobs=2, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    streamed = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for part in streamed for item in part[name]] == told[name]


def test_prompt_logprobs_are_by_token_id(client: httpx.Client) -> None:
    answer = ask(client, CHAT, prompt_logprobs=1, return_token_ids=True)
    told, tokens = answer["prompt_logprobs"], answer["prompt_token_ids"]
    assert len(told) == len(tokens) == answer["usage"]["prompt_tokens"]
    assert told[0] is None
    for token, item in zip(tokens[1:], told[1:], strict=True):
        assert item[str(token)]["logprob"] < 0
        assert any(entry.get("rank") == 1 for entry in item.values())
    assert (
        bytes(answer["choices"][0]["token_ids"]).decode()
        == (answer["choices"][0]["message"]["content"])
    )
    (choice,) = ask(client, TEXT, prompt_logprobs=0, return_token_ids=True)["choices"]
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])


def test_what_cannot_be_told(client: httpx.Client) -> None:
    assert refused(client, CHAT, top_logprobs=2)["param"] == "top_logprobs"
    assert refused(client, CHAT, logprobs=True, top_logprobs=21)["param"] == "top_logprobs"
    assert refused(client, TEXT, logprobs=21)["param"] == "logprobs"
    assert refused(client, TEXT, max_tokens=0)["param"] == "max_tokens"


# --------------------------------------------------------------------------- ends


def test_stop_tokens_and_what_stopped(client: httpx.Client) -> None:
    text = ask(client, TEXT)["choices"][0]["text"]
    at = text.index(text[4])
    (choice,) = ask(client, TEXT, stop_token_ids=[ord(text[4])])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")
    assert choice["stop_reason"] == ord(text[4])
    (kept,) = ask(client, TEXT, stop=[text[at]], include_stop_str_in_output=True)["choices"]
    assert (kept["text"], kept["stop_reason"]) == (text[: at + 1], text[at])
    (late,) = ask(client, TEXT, stop=[text[at]], min_tokens=8)["choices"]
    assert late["text"] == text
    *_, last = stream(client, CHAT, stop_token_ids=list(range(97, 123)))
    assert last["choices"][0]["stop_reason"] in range(97, 123)
    assert refused(client, TEXT, stop_token_ids=[261])["param"] == "stop_token_ids"
    assert refused(client, TEXT, min_tokens=9)["param"] == "min_tokens"


def test_best_of_gives_the_likeliest(client: httpx.Client) -> None:
    answer = ask(client, TEXT, best_of=4, n=2, temperature=2, seed=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 32
    all_of_them = ask(client, TEXT, n=4, temperature=2, seed=3, logprobs=0)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values) / len(values))

    best = sorted(all_of_them, key=mean, reverse=True)[:2]
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in best]
    assert refused(client, TEXT, best_of=1, n=2)["param"] == "best_of"
    assert refused(client, TEXT, best_of=10**9)["param"] == "best_of"
    assert refused(client, TEXT, best_of=2, stream=True)["param"] == "best_of"


def test_a_gap_needs_tokens_for_it(client: httpx.Client) -> None:
    assert refused(client, TEXT, suffix="end")["param"] == "suffix"


# --------------------------------------------------------------------------- accounting


def test_usage_in_every_chunk(client: httpx.Client) -> None:
    options = {"continuous_usage_stats": True}
    *chunks, last = stream(client, CHAT, stream_options=options, n=2)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 16
    assert last["choices"] == []


def test_timings_and_progress(client: httpx.Client) -> None:
    timings = ask(client, CHAT, timings=True)["timings"]
    assert timings["predicted_n"] == 8
    assert timings["cache_n"] + timings["prompt_n"] > 0
    prompt = "x" * 900
    body = {"prompt": prompt, "max_tokens": 2, "return_progress": True, "cache_salt": "progress"}
    events = stream(client, TEXT, **body, timings_per_token=True)
    progress = [e["prompt_progress"] for e in events if "prompt_progress" in e]
    assert all(0 < p["processed"] <= p["total"] == 901 for p in progress)
    assert progress
    assert [p["processed"] for p in progress] == sorted(p["processed"] for p in progress)
    assert events[-1]["timings"]["prompt_n"] == 901


def test_labels_are_given_back_and_logged(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stoker.access")
    with httpx.Client(base_url=server.url) as client:
        answer = ask(client, CHAT, metadata={"job": "7"}, user="old", safety_identifier="me\n")
        assert answer["metadata"] == {"job": "7"}

    def users() -> list[str]:
        fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
        return [found["user"] for found in fields if "user" in found]

    server.wait_until(lambda: bool(users()))  # the line comes after the answer
    assert users() == ["me\n"]
    with httpx.Client(base_url=server.url) as client:
        assert (
            refused(client, CHAT, metadata={str(i): "" for i in range(17)})["param"] == "metadata"
        )
        assert refused(client, CHAT, user="x" * 513)["param"] == "user"


def test_service_tiers(client: httpx.Client) -> None:
    assert ask(client, CHAT, service_tier="auto")["service_tier"] == "default"
    body = {"messages": USER, **GREEDY, "service_tier": "flex"}
    response = client.post(CHAT, json=body)
    assert response.json()["service_tier"] == "flex"
    # The policy is fcfs.
    assert "priority and service_tier have no effect" in response.headers["x-stoker-warning"]
    assert "service_tier" not in ask(client, CHAT)
    assert refused(client, CHAT, service_tier="gold")["param"] == "service_tier"


def test_predictions(client: httpx.Client) -> None:
    text = ask(client, CHAT)["choices"][0]["message"]["content"]
    parts = [{"type": "text", "text": text}]
    for content in (text, parts):
        answer = ask(client, CHAT, prediction={"type": "content", "content": content})
        assert answer["choices"][0]["message"]["content"] == text
    assert (
        refused(client, CHAT, prediction={"type": "x", "content": ""})["param"] == "prediction.type"
    )


# --------------------------------------------------------------------------- shapes of answers

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "shape",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "c", "schema": COLOUR},
            }
        },
        {"guided_json": COLOUR},
        {"guided_json": json.dumps(COLOUR)},
        {"json_schema": COLOUR},
        {"structured_outputs": {"json": COLOUR}},
    ],
    ids=lambda shape: next(iter(shape)),
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_schema_by_any_name(client: httpx.Client, path: str, shape: dict[str, Any]) -> None:
    if "json_schema" in shape.get("response_format", {}):
        shape["response_format"]["json_schema"]["strict"] = True
    (choice,) = ask(client, path, max_tokens=200, temperature=1, seed=1, **shape)["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(text)["colour"] in {"red", "green"}


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ({"guided_regex": "[a-f]{3}-[0-9]{2}"}, r"[a-f]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "(ab)+c"}}, r"(ab)+c"),
        ({"guided_choice": ["yes", "no, never"]}, r"yes|no, never"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, r"a|b"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, r"x[0-9]y"),
        ({"guided_grammar": 'root ::= ("u" | "v") "w"'}, r"[uv]w"),
        ({"guided_grammar": 'start: "u" /[0-9]+/ "w"'}, r"u[0-9]+w"),
        ({"structured_outputs": {"grammar": 'start: "k"'}}, r"k"),
    ],
)
def test_other_shapes(client: httpx.Client, shape: dict[str, Any], pattern: str) -> None:
    import re

    (choice,) = ask(client, TEXT, max_tokens=400, temperature=1, seed=2, **shape)["choices"]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(pattern, choice["text"])


def test_any_object(client: httpx.Client) -> None:
    body = {"max_tokens": 400, "temperature": 0.2, "seed": 5}
    for shape in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        (choice,) = ask(client, CHAT, **body, **shape)["choices"]
        content = choice["message"]["content"]
        assert content.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize(
    ("shape", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": True}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        (
            {"guided_json": {"type": "object"}, "response_format": {"type": "json_object"}},
            "guided_json",
        ),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
    ],
)
def test_bad_shapes_are_named(client: httpx.Client, shape: dict[str, Any], param: str) -> None:
    assert refused(client, CHAT, **shape)["param"] == param


# --------------------------------------------------------------------------- waiting


@pytest.mark.slow
def test_a_silent_stream_is_kept_alive(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.4}, server={"keep_alive_s": 0.1})
    body = {"prompt": "hi", "max_tokens": 2, "temperature": 0, "stream": True}
    response = httpx.post(server.url + TEXT, json=body, timeout=60)
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert lines[0] == ": keep-alive"
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    assert "".join(event["choices"][0]["text"] for event in events) == server.expected("hi", 2)
    late = httpx.post(server.url + TEXT, json={**body, "timeout": 0.3}, timeout=60)
    assert late.status_code == 200
    *_, error, end = late.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    server.wait_until_idle()
