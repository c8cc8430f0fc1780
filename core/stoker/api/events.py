"""Server-sent events of chat and text completions.

``TextEncoder`` is the hot path of the API: only the text of an event is encoded; what surrounds it is made
once for each choice. ``ChunkEncoder`` makes the same events with all that can be in them.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from stoker.api.answer_schemas import UsageBody
from stoker.api.choices import ChoiceReader, new_call_id
from stoker.api.errors import describe
from stoker.api.logprobs import CompletionLogprobsBuilder, chat_logprobs, prompt_logprobs_body
from stoker.api.run import Run
from stoker.interfaces import CallPiece, Piece, ReasoningPiece
from stoker.types import Delta, TokenLogprob

__all__ = ["KEEP_ALIVE", "ChunkEncoder", "StreamEncoder", "StreamShape", "TextEncoder"]

_encode = msgspec.json.Encoder().encode
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which is sent in pauses."""

_DONE = b"data: [DONE]\n\n"


class StreamEncoder(ABC):
    """Makes the events of one stream. For each delta ``delta`` is called, and after a last one ``finish``."""

    def begin(self) -> bytes:
        """What comes before everything else."""
        return b""

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of what a delta adds to a choice; may be empty."""

    @abstractmethod
    def finish(self, index: int, delta: Delta, reason: str) -> bytes:
        """The last events of a choice.

        Args:
            index: Which choice.
            delta: Its last delta.
            reason: Why it ended: ``stop`` or ``length``.
        """

    @abstractmethod
    def end(self, comment: bytes) -> bytes:
        """The end of the stream, after all choices.

        Args:
            comment: What to say before the very last event; may be empty.
        """

    def keep_alive(self) -> bytes:
        """What is sent in a pause; means nothing."""
        return KEEP_ALIVE

    def error(self, error: Exception) -> bytes:
        """The end of a stream that failed."""
        return b"data: " + describe(error).body() + b"\n\n"


class StreamShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be in the chunks.

    Attributes:
        chat: Chat chunks, or text completion chunks.
        response_id: The ``id`` of all chunks.
        created: Seconds since 1970.
        model: The model's id.
        fingerprint: The ``system_fingerprint`` of all chunks.
        service_tier: That of all chunks; empty if there is none to tell.
        include_usage: Whether chunks have a ``usage``, which is ``null`` in all but the last.
        continuous_usage: Whether it is not ``null``.
        logprobs: How many alternatives to tell for each token; ``None`` for no log-probabilities.
        prompt_logprobs: Whether to tell the prompt's.
        token_ids: Whether to tell token ids.
        timings: Whether to tell timings at the end.
        progress: Whether to tell how far the prompt is.
        echo: The texts of the prompts, by choice, that come first.
    """

    chat: bool
    response_id: str
    created: int
    model: str
    fingerprint: str
    service_tier: str = ""
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    token_ids: bool = False
    timings: bool = False
    progress: bool = False
    echo: Sequence[str] = ()

    @property
    def is_plain(self) -> bool:
        """Whether events have nothing but text in them."""
        return self.logprobs is None and not (
            self.continuous_usage
            or self.prompt_logprobs
            or self.token_ids
            or self.timings
            or self.progress
            or self.echo
        )

    def head(self) -> dict[str, Any]:
        """The fields that all chunks share."""
        head = {
            "id": self.response_id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return head | ({"service_tier": self.service_tier} if self.service_tier else {})


class TextEncoder(StreamEncoder):
    """Makes the events of a stream of nothing but text.

    Args:
        run: What is streamed.
        shape: What is in the chunks.
    """

    def __init__(self, run: Run, shape: StreamShape) -> None:
        self._run = run
        self._chat = shape.chat
        self._include_usage = shape.include_usage
        self._head = b"data: " + _encode(shape.head())[:-1] + b',"choices":['
        self._end = b"]" + (b',"usage":null' if shape.include_usage else b"") + b"}\n\n"
        close = b"}" if shape.chat else b""
        self._after = close + b',"logprobs":null,"finish_reason":null}' + self._end
        self._before: dict[int, bytes] = {}

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of some new text; the first of a chat choice comes with its role event."""
        text = delta.text
        if not text:
            return b""
        before = self._before.get(index)
        if before is None:
            start = self.start(index)
            return start + self._before[index] + _encode(text) + self._after
        return before + _encode(text) + self._after

    def start(self, index: int) -> bytes:
        """What comes before a choice's first event; nothing if it has begun."""
        if index in self._before:
            return b""
        choice = b'%s{"index":%d,' % (self._head, index)
        if not self._chat:
            self._before[index] = choice + b'"text":'
            return b""
        self._before[index] = choice + b'"delta":{"content":'
        return choice + b'"delta":{"role":"assistant","content":""' + self._after

    def finish(self, index: int, delta: Delta, reason: str) -> bytes:
        """The last event of a choice."""
        content = b'"delta":{}' if self._chat else b'"text":""'
        return (
            self.start(index)
            + b'%s{"index":%d,' % (self._head, index)
            + content
            + b',"logprobs":null,"finish_reason":"%s"' % reason.encode()
            + (b"" if delta.stop is None else b',"stop_reason":' + _encode(delta.stop))
            + b"}"
            + self._end
        )

    def end(self, comment: bytes) -> bytes:
        """The event with the token counts, if it is wanted, and the end."""
        usage = self.usage(self._run.usage()) if self._include_usage else b""
        return usage + comment + _DONE

    def usage(self, usage: UsageBody) -> bytes:
        """The event with the token counts."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"


class _ChoiceState:
    """What is known of a choice between its events."""

    def __init__(self, reader: ChoiceReader, echoed: int) -> None:
        self.reader = reader
        self.has_begun = False
        self.num_tokens = 0
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob | None] = []
        self.builder = CompletionLogprobsBuilder(echoed)
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.call_ids: set[int] = set()


class ChunkEncoder(StreamEncoder):
    """Makes the events of a stream with tool calls, reasoning, log-probabilities or anything else in it.

    Args:
        run: What is streamed.
        shape: What is in the chunks.
    """

    def __init__(self, run: Run, shape: StreamShape) -> None:
        self._run = run
        self._shape = shape
        self._head = shape.head()
        self._states = [
            _ChoiceState(ChoiceReader(run.new_parser(index)), 0) for index in range(run.num_choices)
        ]
        self._num_open_tokens = 0
        self._started_s = time.monotonic()

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of what a delta adds to a choice."""
        state = self._states[index]
        state.num_tokens += delta.num_tokens
        self._num_open_tokens += delta.num_tokens
        state.token_ids += delta.token_ids
        before = self._start(index, state, delta)
        state.logprobs += delta.logprobs
        if delta.num_prefilled:
            return before + self._progress(index, delta.num_prefilled)
        pieces = state.reader.read(delta)
        if not pieces:
            return before
        return before + b"".join(
            self._choice(index, state, content) for content in self._contents(state, pieces)
        )

    def finish(self, index: int, delta: Delta, reason: str) -> bytes:
        """The last event of a choice."""
        state = self._states[index]
        self._run.reasoning_tokens += state.reader.reasoning_tokens
        self._num_open_tokens -= state.num_tokens
        content: dict[str, Any] = {"delta": {}} if self._shape.chat else {"text": ""}
        more = {} if delta.stop is None else {"stop_reason": delta.stop}
        return self._choice(index, state, content, state.reader.reason(reason), more)

    def end(self, comment: bytes) -> bytes:
        """The event with the token counts, if it is wanted, and the end."""
        if not (self._shape.include_usage or self._shape.timings):
            return comment + _DONE
        last: dict[str, Any] = {"choices": []}
        if self._shape.include_usage:
            last["usage"] = self._run.usage()
        if self._shape.timings:
            last["timings"] = self._run.timings()
        return self._event(last) + comment + _DONE

    def _start(self, index: int, state: _ChoiceState, delta: Delta) -> bytes:
        """What comes before a choice's first event: its role, or the prompt that is to be echoed."""
        if state.has_begun or delta.num_prefilled:
            return b""
        state.has_begun = True
        more: dict[str, Any] = {}
        if self._shape.token_ids:
            more["prompt_token_ids"] = self._run.prompt_token_ids(index)
        if delta.prompt_logprobs is not None and self._shape.prompt_logprobs:
            more["prompt_logprobs"] = prompt_logprobs_body(delta.prompt_logprobs)
        if self._shape.chat:
            return self._choice(
                index, state, {"delta": {"role": "assistant", "content": ""}}, None, more
            )
        if not self._shape.echo:
            return self._choice(index, state, {"text": ""}, None, more) if more else b""
        echo = self._shape.echo[index]
        if delta.prompt_logprobs is not None and self._shape.logprobs is not None:
            state.logprobs += delta.prompt_logprobs
        return self._choice(index, state, {"text": echo}, None, more)

    def _contents(self, state: _ChoiceState, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        if not self._shape.chat:
            return [{"text": "".join(getattr(piece, "text", "") for piece in pieces)}]
        return [{"delta": self._piece(state, piece)} for piece in pieces]

    @staticmethod
    def _piece(state: _ChoiceState, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, ReasoningPiece):
            return {"reasoning_content": piece.text}
        if not isinstance(piece, CallPiece):
            return {"content": piece.text}
        call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
        if piece.index not in state.call_ids:
            state.call_ids.add(piece.index)
            call |= {"id": new_call_id(), "type": "function"}
            call["function"]["name"] = piece.name
        return {"tool_calls": [call]}

    def _choice(
        self,
        index: int,
        state: _ChoiceState,
        content: dict[str, Any],
        reason: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        """An event of a choice; it brings the tokens that have come since the last one."""
        choice: dict[str, Any] = {"index": index, **content, "logprobs": self._logprobs(state)}
        choice["finish_reason"] = reason
        if self._shape.token_ids:
            choice["token_ids"], state.token_ids = state.token_ids, []
        return self._event({"choices": [choice | (more or {})]} | self._usage())

    def _logprobs(self, state: _ChoiceState) -> Any:
        if self._shape.logprobs is None or not state.logprobs:
            return None
        logprobs, state.logprobs = state.logprobs, []
        if self._shape.chat:
            return chat_logprobs(item for item in logprobs if item is not None)
        return state.builder.build(logprobs)

    def _usage(self) -> dict[str, Any]:
        if self._shape.continuous_usage:
            return {"usage": self._run.usage(self._num_open_tokens)}
        return {"usage": None} if self._shape.include_usage else {}

    def _progress(self, index: int, num_prefilled: int) -> bytes:
        """How far the prompt is, in llama-server's words."""
        progress = {
            "total": len(self._run.prompt_token_ids(index)),
            "processed": num_prefilled,
            "time_ms": (time.monotonic() - self._started_s) * 1e3,
        }
        return self._event({"choices": [], "prompt_progress": progress} | self._usage())

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + _encode(self._head | fields) + b"\n\n"
