"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's API."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.answering import AnswerForm, answer
from stoker.api.body import BodyDecoder
from stoker.api.errors import describe
from stoker.api.events import StreamEncoder
from stoker.api.incoming import AnyRequest, current_request_id, default_model, visible_headers
from stoker.api.messages_answers import CountedTokens
from stoker.api.messages_calls import COUNT_FIELDS, MESSAGES_FIELDS, messages_call
from stoker.api.messages_errors import messages_error
from stoker.api.messages_operations import messages_operation
from stoker.api.messages_schemas import MessagesPrompt, MessagesRequest
from stoker.api.messages_writer import MessageShape, MessageWriter, collect_message
from stoker.api.parameters import check_parameters
from stoker.api.run import Run
from stoker.config import Config
from stoker.router import Router
from stoker.types import Delta

__all__ = ["messages_routes"]

_encode = msgspec.json.Encoder().encode
_request_decoder = BodyDecoder(MessagesRequest)
_prompt_decoder = BodyDecoder(MessagesPrompt)


def messages_routes(config: Config, router: Router) -> list[HTTPRouteHandler]:
    """The handlers of both endpoints.

    Args:
        config: Limits and strictness.
        router: Where requests go.
    """
    limit, strict = config.server.max_body_bytes, config.server.strict

    @post(
        "/v1/messages",
        status_code=200,
        summary="Answer a conversation, as Anthropic's API does",
        tags=["messages"],
        operation_id="create_message",
        operation_class=messages_operation("MessagesRequest", "Message", streams=True),
    )
    async def create_message(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=MESSAGES_FIELDS, strict=strict)
        body, headers = await _request_decoder.read(request, limit, check)
        call = messages_call(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        return await answer(request, config, router, [call], headers, _MessageForm(body))

    @post(
        "/v1/messages/count_tokens",
        status_code=200,
        summary="How many tokens a message's prompt has",
        tags=["messages"],
        operation_id="count_message_tokens",
        operation_class=messages_operation("MessagesPrompt", "CountedTokens"),
    )
    async def count_tokens(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=COUNT_FIELDS, strict=strict)
        body, headers = await _prompt_decoder.read(request, limit, check)
        call = messages_call(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        counted = CountedTokens(input_tokens=len(await router.encode(call)))
        return ASGIResponse(body=_encode(counted), media_type="application/json", headers=headers)

    return [create_message, count_tokens]


class _MessageForm(AnswerForm):
    """Tells it as a message.

    Args:
        body: The request.
    """

    def __init__(self, body: MessagesRequest) -> None:
        self.stream = bool(body.stream)
        self._shape = MessageShape(
            message_id=f"msg_{current_request_id()}",
            max_tokens=body.max_tokens,
            stop_sequences=body.stop_sequences or (),
            shows_thinking=body.thinking is None or body.thinking.display != "omitted",
        )

    def encoder(self, run: Run) -> StreamEncoder:
        """Makes its events."""
        return _MessageEncoder(run, self._shape)

    async def body(self, run: Run) -> bytes:
        """The whole message."""
        return _encode(await collect_message(run, self._shape))

    def error(self, error: Exception, headers: Mapping[str, str]) -> ASGIApp:
        """The answer of an error before the first byte."""
        reply = describe(error)
        return ASGIResponse(
            body=messages_error(reply.status_code, reply.detail),
            status_code=reply.status_code,
            media_type="application/json",
            headers={**headers, **reply.headers},
        )


class _MessageEncoder(StreamEncoder):
    """Makes a message's events: its start, those of its content blocks, and why it ended.

    Args:
        run: What is streamed.
        shape: What is known of it.
    """

    def __init__(self, run: Run, shape: MessageShape) -> None:
        self._writer = MessageWriter(run, shape)
        self._has_begun = False

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of what a delta adds; with the first one, the message's start."""
        events = b"".join(map(_event, self._writer.read(delta)))
        if self._has_begun:
            return events
        self._has_begun = True
        start = self._writer.message()
        start.content = []
        return _event({"type": "message_start", "message": start}) + self.keep_alive() + events

    def finish(self, index: int, delta: Delta, reason: str) -> bytes:
        """The end of the last block, why the message ended, and its token counts."""
        closed = b"".join(map(_event, self._writer.finish(delta, reason)))
        message = self._writer.message()
        usage = msgspec.to_builtins(message.usage)
        del usage["service_tier"]  # told at the start
        ending = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        return closed + _event({"type": "message_delta", "delta": ending, "usage": usage})

    def end(self, comment: bytes) -> bytes:
        """The end of the stream."""
        return comment + _event({"type": "message_stop"})

    def error(self, error: Exception) -> bytes:
        """The end of a stream that failed."""
        reply = describe(error)
        return b"event: error\ndata: %s\n\n" % messages_error(reply.status_code, reply.detail)

    def keep_alive(self) -> bytes:
        """A ping; before the message's start, which comes before all events, a comment."""
        return _event({"type": "ping"}) if self._has_begun else super().keep_alive()


def _event(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), _encode(event))
