"""What a model says into Anthropic's content blocks, and into the events by which they come."""

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stoker.api.choices import ChoiceReader
from stoker.api.messages_answers import (
    ContentBlock,
    Message,
    MessageUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ThinkingTokens,
    ToolUseBlock,
)
from stoker.api.run import Run
from stoker.interfaces import CallPiece, Piece, ReasoningPiece
from stoker.types import Delta

__all__ = ["MessageShape", "MessageWriter", "collect_message"]

Event = dict[str, Any]

_ENDINGS: dict[str, StopReason] = {"stop": "end_turn", "tool_calls": "tool_use"}
_arguments = msgspec.json.Decoder(dict[str, msgspec.Raw])


class MessageShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an answer before it comes.

    Attributes:
        message_id: Its id.
        max_tokens: Most tokens, as the request has it.
        stop_sequences: What may end it.
        shows_thinking: Whether to tell what the model thought, or only that it did.
    """

    message_id: str
    max_tokens: int
    stop_sequences: Sequence[str] = ()
    shows_thinking: bool = True


@dataclass(slots=True)
class _Block:
    """A content block.

    Attributes:
        start: How its start is told: the block, with nothing in it yet.
        delta_type: What its events are called.
        delta_field: The field in which they bring more of it.
        call: Of a tool call: which of the answer's calls.
        parts: What is in it.
    """

    start: Event
    delta_type: str
    delta_field: str
    call: int | None = None
    parts: list[str] = field(default_factory=list)

    def built(self) -> ContentBlock:
        """The whole block."""
        text, kind = "".join(self.parts), self.start["type"]
        if kind == "text":
            return TextBlock(text=text)
        if kind == "thinking":
            return ThinkingBlock(thinking=text)
        return ToolUseBlock(
            id=self.start["id"], name=self.start["name"], input=_read_arguments(text)
        )


class MessageWriter:
    """Writes one message.

    Args:
        run: Where it comes from.
        shape: What is known of it.
    """

    def __init__(self, run: Run, shape: MessageShape) -> None:
        self._run = run
        self._shape = shape
        self._reader = ChoiceReader(run.new_parser(0))
        self._blocks: list[_Block] = []
        self._is_open = False
        self._stop_reason: StopReason | None = None
        self._stop_sequence: str | None = None

    def read(self, delta: Delta) -> list[Event]:
        """Take in a delta; returns the events of what it adds."""
        events: list[Event] = []
        for piece in self._reader.read(delta):
            events += self._add(piece)
        return events

    def finish(self, delta: Delta, reason: str) -> list[Event]:
        """Take note of the end; returns the event of the last block's end, if there is one.

        Args:
            delta: The last delta, which was read.
            reason: Why it ended: ``stop`` or ``length``.
        """
        self._run.reasoning_tokens += self._reader.reasoning_tokens
        if isinstance(delta.stop, str) and delta.stop in self._shape.stop_sequences:
            self._stop_reason, self._stop_sequence = "stop_sequence", delta.stop
        elif reason == "length":
            told = self._run.usage().completion_tokens
            is_full = told < self._shape.max_tokens
            self._stop_reason = "model_context_window_exceeded" if is_full else "max_tokens"
        else:
            self._stop_reason = _ENDINGS[self._reader.reason(reason)]
        return self._close()

    def message(self) -> Message:
        """The message so far."""
        return Message(
            id=self._shape.message_id,
            model=self._run.model,
            content=[block.built() for block in self._blocks],
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        usage = self._run.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        if self._stop_reason is None:  # not told yet, but known
            traces = self._run.tracked.traces()
            cached = min((trace.cached_tokens for trace in traces), default=0)
        return MessageUsage(
            input_tokens=max(0, usage.prompt_tokens - cached),
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=ThinkingTokens(thinking_tokens=self._run.reasoning_tokens),
        )

    def _add(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        if not self._continues(piece):
            events += self._close()
            self._blocks.append(_new_block(piece))
            self._is_open = True
            start = {"type": "content_block_start", "content_block": self._blocks[-1].start}
            events.append(start | {"index": len(self._blocks) - 1})
        more = piece.arguments if isinstance(piece, CallPiece) else piece.text
        if isinstance(piece, ReasoningPiece) and not self._shape.shows_thinking:
            more = ""
        if more:
            block = self._blocks[-1]
            block.parts.append(more)
            delta = {"type": block.delta_type, block.delta_field: more}
            index = len(self._blocks) - 1
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        return events

    def _continues(self, piece: Piece) -> bool:
        """Whether a piece belongs to the open block."""
        if not self._is_open:
            return False
        block = self._blocks[-1]
        if isinstance(piece, CallPiece):
            return block.call == piece.index
        kind = "thinking" if isinstance(piece, ReasoningPiece) else "text"
        return bool(block.start["type"] == kind)

    def _close(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _new_block(piece: Piece) -> _Block:
    if isinstance(piece, CallPiece):
        call = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": piece.name}
        return _Block(call | {"input": {}}, "input_json_delta", "partial_json", piece.index)
    if isinstance(piece, ReasoningPiece):
        start = {"type": "thinking", "thinking": "", "signature": ""}
        return _Block(start, "thinking_delta", "thinking")
    return _Block({"type": "text", "text": ""}, "text_delta", "text")


def _read_arguments(text: str) -> dict[str, msgspec.Raw]:
    """The arguments of a call; empty if it was cut off, which the message's stop reason tells."""
    try:
        return _arguments.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}


async def collect_message(run: Run, shape: MessageShape) -> Message:
    """A run's message, once it is whole.

    Raises:
        Exception: It did not end well: the error to tell the client.
    """
    writer = MessageWriter(run, shape)
    async with contextlib.aclosing(run.batches()) as batches:
        async for offset, batch in batches:
            for delta in batch:
                writer.read(delta)
                if delta.finish_reason is not None:
                    writer.finish(delta, run.finish(offset, delta))
    return writer.message()
