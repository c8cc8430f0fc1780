"""How a response is told: in one piece, or as its events."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from stoker.api.answering import AnswerForm
from stoker.api.choices import ChoiceReader
from stoker.api.events import StreamEncoder
from stoker.api.responses.answer_schemas import ResponseObject
from stoker.api.responses.builder import ResponseBuilder, now
from stoker.api.responses.items import new_id
from stoker.api.responses.request_schemas import ResponseRequest
from stoker.api.responses.translation import echoed
from stoker.api.run import Run
from stoker.api.validation import tier_of
from stoker.router import WARNING_HEADER, Call
from stoker.types import Delta

__all__ = ["ResponseForm", "drive", "new_response"]

_encode = msgspec.json.Encoder().encode
_STORE_PATIENCE_S = 2.0
_MAX_PROBLEM = 100

Keep = Callable[[ResponseObject], asyncio.Future[str] | None]
"""Stores a response and returns at once; what it returns becomes why that failed, or empty."""


def new_response(body: ResponseRequest, call: Call, model: str, *, store: bool) -> ResponseObject:
    """A response as it begins: with what was asked for, and nothing that has come of it.

    Args:
        body: The request.
        call: What it asks for.
        model: The model's id.
        store: Whether it will be stored.
    """
    text: Any = body.text.format if body.text is not None else None
    reasoning = body.reasoning
    return ResponseObject(
        id=new_id("resp"),
        created_at=now(),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": None if reasoning is None else reasoning.effort, "summary": None},
        safety_identifier=body.safety_identifier,
        service_tier=_tier(body),
        store=store,
        temperature=call.sampling.temperature,
        text={"format": {"type": "text"} if text is None else echoed(text), "verbosity": "medium"},
        tool_choice="auto" if body.tool_choice is None else echoed(body.tool_choice),
        tools=list(body.tools or ()),
        top_logprobs=body.top_logprobs or 0,
        top_p=call.sampling.top_p,
        truncation=body.truncation or "disabled",
        user=UNSET if body.user is None else body.user,
        metadata=dict(body.metadata or {}),
    )


def _tier(body: ResponseRequest) -> str:
    tier: Any = body  # what it looks at has the same name in both kinds of requests
    return tier_of(tier) or "default"


async def drive(run: Run, builder: ResponseBuilder) -> AsyncGenerator[list[bytes], None]:
    """Read a run to its end into a builder; yield the events as they come, but for the last one.

    Raises:
        Exception: It did not end well: the error to tell the client.
    """
    reader = ChoiceReader(run.new_parser(0))
    async with contextlib.aclosing(run.batches()) as batches:
        async for offset, batch in batches:
            for delta in batch:
                events = builder.begin()
                events += builder.add(reader.read(delta), delta.logprobs)
                if delta.finish_reason is not None:
                    reason = run.finish(offset, delta)
                    run.reasoning_tokens += reader.reasoning_tokens
                    events += builder.close(reason)
                yield events


class ResponseForm(AnswerForm):
    """Tells a response that a client waits for.

    Args:
        builder: Builds it.
        stream: Whether as events.
        keep: Stores it, once it is over.
    """

    def __init__(self, builder: ResponseBuilder, *, stream: bool, keep: Keep) -> None:
        self.stream = stream
        self._builder = builder
        self._keep = keep
        self._problem = ""

    def encoder(self, run: Run) -> StreamEncoder:
        """Makes its events."""
        return _Encoder(run, self._builder, self._keep)

    async def body(self, run: Run) -> bytes:
        """The whole response."""
        builder = self._builder
        builder.response.model = run.model
        async with contextlib.aclosing(drive(run, builder)) as events:
            async for _ in events:
                pass
        builder.end(run.usage())
        kept = self._keep(builder.response)
        if kept is not None:
            # Shielded, for it is written all the same if the disk takes long or the client leaves.
            done, _ = await asyncio.wait((asyncio.shield(kept),), timeout=_STORE_PATIENCE_S)
            self._problem = next(iter(done)).result() if done else "the disk takes too long"
        return _encode(builder.response)

    def more_headers(self) -> Mapping[str, str]:
        """A warning, if the response could not be stored."""
        if not self._problem:
            return {}
        problem = ascii(self._problem[:_MAX_PROBLEM]).strip("'\"")
        return {WARNING_HEADER: f"the response is not stored: {problem}"}


class _Encoder(StreamEncoder):
    """Makes the events of a response.

    Args:
        run: What is streamed.
        builder: Builds the response.
        keep: Stores it.
    """

    def __init__(self, run: Run, builder: ResponseBuilder, keep: Keep) -> None:
        self._run = run
        self._builder = builder
        self._keep = keep
        self._reader = ChoiceReader(run.new_parser(0))
        self._created = b""
        self._has_told = False
        builder.response.model = run.model

    def begin(self) -> bytes:
        """It exists."""
        self._created = b"".join(self._builder.create())
        return self._created

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of some more output."""
        events = b"".join(self._builder.add(self._reader.read(delta), delta.logprobs))
        self._has_told = self._has_told or bool(events)
        return events

    def finish(self, index: int, delta: Delta, reason: str) -> bytes:
        """The last events of the output."""
        self._run.reasoning_tokens += self._reader.reasoning_tokens
        self._has_told = True
        return b"".join(self._builder.close(reason))

    def end(self, comment: bytes) -> bytes:
        """The last event, and a comment before it."""
        event = self._builder.end(self._run.usage())
        self._keep(self._builder.response)
        return comment + event

    def error(self, error: Exception) -> bytes:
        """The last event of a response that failed; what comes first does so here if nothing was told."""
        created = b"" if self._has_told else self._created or self.begin()
        event = self._builder.fail(error)
        self._keep(self._builder.response)
        return created + event
