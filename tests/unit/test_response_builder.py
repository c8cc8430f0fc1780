"""Responses built piece by piece: events assemble to the response, whatever the pieces are."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_schemas import check
from stoker.api.answer_schemas import CompletionTokensDetails, PromptTokensDetails, UsageBody
from stoker.api.responses.answer_schemas import ResponseObject
from stoker.api.responses.builder import ResponseBuilder
from stoker.errors import EngineError, RateLimitError, RequestCancelledError
from stoker.interfaces import CallPiece, Piece, ReasoningPiece, TextPiece
from stoker.types import TokenLogprob

USAGE = UsageBody(
    prompt_tokens=3,
    completion_tokens=4,
    total_tokens=7,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=1),
    completion_tokens_details=CompletionTokensDetails(reasoning_tokens=2),
)


def new(**fields: Any) -> ResponseObject:
    return ResponseObject(
        id="resp_1", created_at=1, model="m", text={"format": {"type": "text"}}, **fields
    )


def decoded(events: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for event in events:
        name, data = event.decode().removesuffix("\n\n").split("\n", 1)
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        check("ResponseStreamEvent", body)
        found.append(body)
    return found


def run(pieces: list[list[Piece]], reason: str = "stop") -> tuple[list[dict[str, Any]], Any]:
    builder = ResponseBuilder(new())
    events = builder.create()
    for some in pieces:
        events += builder.add(some)
    events += builder.close(reason)
    events.append(builder.end(USAGE))
    body = json.loads(msgspec.json.encode(builder.response))
    check("Response", body)
    return decoded(events), body


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client puts it together from deltas alone, checking what is told as done."""
    output: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(output)
            assert event["item"]["status"] == "in_progress"
            output.append(event["item"])
        elif "output_index" in event:
            assert event["output_index"] == len(output) - 1
            assert event.get("item_id", output[-1]["id"]) == output[-1]["id"]
            take(event, output[-1])
    return output


def take(event: dict[str, Any], item: dict[str, Any]) -> None:
    """Bring an item up to date with one of its events."""
    kind = event["type"].removeprefix("response.")
    if kind == "content_part.added":
        assert event["content_index"] == len(item["content"])
        item["content"].append(event["part"])
    elif kind in {"output_text.delta", "reasoning_text.delta"}:
        item["content"][event["content_index"]]["text"] += event["delta"]
    elif kind == "function_call_arguments.delta":
        item["arguments"] += event["delta"]
    else:
        check_done(kind, event, item)


def check_done(kind: str, event: dict[str, Any], item: dict[str, Any]) -> None:
    """What is told as done is what the deltas came to."""
    if kind in {"output_text.done", "reasoning_text.done"}:
        assert item["content"][event["content_index"]]["text"] == event["text"]
    elif kind == "content_part.done":
        assert item["content"][event["content_index"]] == event["part"]
    elif kind == "function_call_arguments.done":
        assert item["arguments"] == event["arguments"]
        assert item["name"] == event["name"]
    else:
        assert kind == "output_item.done"
        item["status"] = event["item"]["status"]
        assert item == event["item"]


@st.composite
def outputs(draw: st.DrawFn) -> list[list[Piece]]:
    pieces: list[Piece] = []
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "call"]), max_size=6)):
        texts = draw(st.lists(st.text(max_size=5), min_size=1, max_size=4))
        if kind == "text":
            pieces += [TextPiece(text) for text in texts if text]
        elif kind == "reasoning":
            pieces += [ReasoningPiece(text) for text in texts if text]
        else:
            pieces.append(CallPiece(num_calls, texts[0], "f"))
            pieces += [CallPiece(num_calls, text) for text in texts[1:]]
            num_calls += 1
    size = draw(st.integers(1, 4))
    return [pieces[at : at + size] for at in range(0, len(pieces), size)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(outputs(), st.sampled_from(["stop", "length"]))
def test_events_assemble_to_the_response(pieces: list[list[Piece]], reason: str) -> None:
    events, body = run(pieces, reason)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert assembled(events) == body["output"]
    assert events[-1]["response"] == body
    assert body["status"] == ("completed" if reason == "stop" else "incomplete")
    told = "".join(
        getattr(piece, "text", "") or getattr(piece, "arguments", "")
        for some in pieces
        for piece in some
    )
    kept = "".join(
        item.get("arguments") or "".join(part["text"] for part in item.get("content", ()))
        for item in body["output"]
    )
    # White space between items says nothing, and is all that may be missing.
    assert "".join(kept.split()) == "".join(told.split())
    calls = {piece.index for some in pieces for piece in some if isinstance(piece, CallPiece)}
    assert len([i for i in body["output"] if i["type"] == "function_call"]) == len(calls)


def test_what_a_model_thinks_says_and_calls_are_items_in_their_order() -> None:
    events, body = run(
        [
            [ReasoningPiece("hm")],
            [TextPiece("\n\n")],
            [TextPiece("so")],
            [CallPiece(0, '{"a"', "f"), CallPiece(0, ":1}")],
            [TextPiece("\n")],
            [CallPiece(1, "{}", "g")],
        ]
    )
    assert [item["type"] for item in body["output"]] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert body["output"][1]["content"][0]["text"] == "\n\nso"
    assert body["output"][2]["arguments"] == '{"a":1}'
    assert body["output"][3]["name"] == "g"
    assert len({item["call_id"] for item in body["output"][2:]}) == 2
    assert [event["type"] for event in events[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert body["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 7,
    }


def test_an_empty_output_is_an_empty_message() -> None:
    _, body = run([])
    assert [part["text"] for part in body["output"][0]["content"]] == [""]
    _, body = run([[TextPiece("\n")]])
    assert [part["text"] for part in body["output"][0]["content"]] == ["\n"]


def test_a_response_that_is_cut_off_says_so() -> None:
    _, body = run([[CallPiece(0, '{"a', "f")]], "length")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["completed_at"] is None
    assert body["output"][0]["status"] == "incomplete"


def test_log_probabilities_come_with_their_text() -> None:
    builder = ResponseBuilder(new(), with_logprobs=True)

    def logprob(token: str) -> TokenLogprob:
        return TokenLogprob(token_id=1, logprob=-0.5, data=token.encode(), top=())

    events = builder.add([], [logprob("<think>")])
    events += builder.add([ReasoningPiece("hm")], [logprob("hm")])
    events += builder.add([], [logprob("a")])
    events += builder.add([TextPiece("ab")], [logprob("b")])
    events += builder.close("stop")
    (delta,) = [e for e in decoded(events) if e["type"] == "response.output_text.delta"]
    assert [item["token"] for item in delta["logprobs"]] == ["a", "b"]
    part = json.loads(msgspec.json.encode(builder.response.output[1]))["content"][0]
    assert [item["token"] for item in part["logprobs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "background", "status", "code"),
    [
        (EngineError("the device is gone"), False, "failed", "server_error"),
        (RateLimitError("slow down"), False, "failed", "rate_limit_exceeded"),
        (KeyError("secret"), False, "failed", "server_error"),
        (RequestCancelledError("cancelled"), False, "failed", "server_error"),
        (RequestCancelledError("cancelled"), True, "cancelled", None),
    ],
)
def test_what_goes_wrong_becomes_part_of_the_response(
    error: Exception, background: bool, status: str, code: str | None
) -> None:
    builder = ResponseBuilder(new(background=background))
    events = builder.create() + builder.add([TextPiece("half")])
    (event,) = decoded([builder.fail(error)])
    decoded(events)
    response = event["response"]
    check("Response", response)
    assert event["type"] == "response.failed"
    assert response["status"] == status
    assert (response["error"] or {}).get("code") == code
    assert "secret" not in json.dumps(response)
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "half"
