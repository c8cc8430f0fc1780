"""Pieces into content blocks: the same as Anthropic's client puts together from the events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import given
from hypothesis import strategies as st

from stoker.api.answer_schemas import (
    CompletionTokensDetails,
    PromptTokensDetails,
    UsageBody,
)
from stoker.api.messages_writer import MessageShape, MessageWriter
from stoker.api.run import Run
from stoker.interfaces import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece
from stoker.types import Delta, FinishReason

SHAPE = MessageShape(message_id="msg_1", max_tokens=100, stop_sequences=("END",))


class GivenPieces(OutputParser):
    """Reads from each character which of the given pieces comes."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = list(pieces)

    def push(self, text: str) -> Sequence[Piece]:
        return [self._pieces.pop(0) for _ in text]

    def finish(self) -> Sequence[Piece]:
        rest, self._pieces = self._pieces, []
        return rest


class GivenRun:
    """What a writer asks of a run."""

    model = "m"

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self.reasoning_tokens = 0
        self.completion_tokens = 0
        self.tracked = self

    def traces(self) -> list[Any]:
        return []

    def new_parser(self, index: int) -> OutputParser:
        return GivenPieces(self._pieces)

    def usage(self) -> UsageBody:
        return UsageBody(
            prompt_tokens=7,
            completion_tokens=self.completion_tokens,
            total_tokens=7 + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=3),
            completion_tokens_details=CompletionTokensDetails(),
        )


def write(
    pieces: Sequence[Piece],
    shape: MessageShape = SHAPE,
    *,
    at_the_end: int = 0,
    stop: str | int | None = None,
    length: bool = False,
    num_tokens: int | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events and the message of some pieces.

    Args:
        pieces: The pieces; all but the last ``at_the_end`` come one by one, those with the last delta.
        shape: What is known of the message.
        at_the_end: See ``pieces``.
        stop: What stopped it.
        length: Whether it ran out of tokens.
        num_tokens: How many it had.
    """
    run = GivenRun(pieces)
    writer = MessageWriter(cast(Run, run), shape)
    start = writer.message()
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": msgspec.to_builtins(start)}
    ]
    for _ in range(len(pieces) - at_the_end):
        events += writer.read(Delta(text="x", num_tokens=1))
    reason = FinishReason.LENGTH if length else FinishReason.STOP
    last = Delta(finish_reason=reason, stop=stop)
    events += writer.read(last)
    run.completion_tokens = len(pieces) if num_tokens is None else num_tokens
    events += writer.finish(last, reason.value)
    message = json.loads(msgspec.json.encode(writer.message()))
    return events, message


def put_together(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that Anthropic's client makes of events."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        snapshot = accumulate_event(
            event=cast(Any, event), current_snapshot=snapshot, json_bufs=buffers
        )
    return [block.to_dict() for block in snapshot.content]


def call(index: int, *parts: str, name: str = "f") -> list[Piece]:
    first, *rest = parts or ("",)
    return [CallPiece(index, first, name), *(CallPiece(index, part) for part in rest)]


@st.composite
def answers(draw: st.DrawFn) -> list[Piece]:
    """Text, reasoning and calls in any order, cut anywhere."""
    pieces: list[Piece] = []
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thinking", "call"]), max_size=6)):
        parts = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4))
        if kind == "text":
            pieces += map(TextPiece, parts)
        elif kind == "thinking":
            pieces += map(ReasoningPiece, parts)
        else:
            arguments = json.dumps({"".join(parts): draw(st.integers() | st.text(max_size=5))})
            cut = draw(st.integers(0, len(arguments)))
            pieces += call(num_calls, arguments[:cut], arguments[cut:])
            num_calls += 1
    return pieces


@pytest.mark.slow
@given(answers(), st.data())
def test_events_and_plain_answer_are_the_same(pieces: list[Piece], data: st.DataObject) -> None:
    at_the_end = data.draw(st.integers(0, len(pieces)))
    events, message = write(pieces, at_the_end=at_the_end)
    assert put_together(events) == message["content"]
    open_block = None
    num_blocks = 0
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert open_block is None
            assert event["index"] == num_blocks
            open_block, num_blocks = num_blocks, num_blocks + 1
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
        else:
            assert event["index"] == open_block
    assert open_block is None
    told = "".join(p.text for p in pieces if isinstance(p, TextPiece))
    assert told == "".join(b["text"] for b in message["content"] if b["type"] == "text")
    has_calls = any(isinstance(piece, CallPiece) for piece in pieces)
    assert message["stop_reason"] == ("tool_use" if has_calls else "end_turn")


def test_blocks_in_their_order() -> None:
    pieces = [ReasoningPiece("hm"), TextPiece("so "), TextPiece("be it"), *call(0), *call(1, "{}")]
    events, message = write(pieces)
    assert [block["type"] for block in message["content"]] == [
        *("thinking", "text", "tool_use", "tool_use"),
    ]
    first, second = message["content"][2:]
    assert first["id"].startswith("toolu_")
    assert first["id"] != second["id"]
    assert (first["name"], first["input"]) == ("f", {})
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "text_delta", "text": "so "},
        {"type": "text_delta", "text": "be it"},
        {"type": "input_json_delta", "partial_json": "{}"},
    ]
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 1}
    assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (4, 3)


def test_thinking_that_is_not_to_be_told() -> None:
    shape = msgspec.structs.replace(SHAPE, shows_thinking=False)
    events, message = write([ReasoningPiece("a"), ReasoningPiece("b"), TextPiece("c")], shape)
    assert message["content"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "c"},
    ]
    assert put_together(events) == message["content"]


def test_reasons_to_stop() -> None:
    text = [TextPiece("a")]
    cases: list[tuple[tuple[str, str | None], dict[str, Any]]] = [
        (("end_turn", None), {}),
        (("end_turn", None), {"stop": 2}),
        (("end_turn", None), {"stop": "not asked for"}),
        (("stop_sequence", "END"), {"stop": "END"}),
        (("max_tokens", None), {"length": True, "num_tokens": 100}),
        (("model_context_window_exceeded", None), {"length": True, "num_tokens": 99}),
    ]
    for expected, how in cases:
        message = write(text, **how)[1]
        assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert write(call(0, "{}"), stop="END")[1]["stop_reason"] == "stop_sequence"


def test_a_call_that_was_cut_off() -> None:
    _, message = write(call(0, '{"a": "b'), length=True, num_tokens=100)
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {}


def test_arguments_are_given_back_as_they_are() -> None:
    _, message = write(call(0, '{"big": 12345678901234567890123, "nested": {"a": [1, 2.50]}}'))
    assert message["content"][0]["input"] == {
        "big": 12345678901234567890123,
        "nested": {"a": [1, 2.5]},
    }
