"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

import contextlib
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import msgspec
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker import __version__
from stoker.api.body import BodyDecoder, read_json_body
from stoker.api.errors import asgi_error
from stoker.api.incoming import (
    AnyRequest,
    current_request_id,
    default_model,
    unless_gone,
    visible_headers,
)
from stoker.api.openapi import generation_operation
from stoker.api.parameters import CHAT_FIELDS, COMPLETION_FIELDS, check_parameters
from stoker.api.requests import EXPLAIN_HEADER, Explain, explain_request, wants_explanation
from stoker.api.run import Run, start
from stoker.api.schemas import (
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    GenerationRequest,
    ResponseMessage,
)
from stoker.api.streaming import EventEncoder, EventStream, stream_events
from stoker.api.validation import chat_calls, completion_calls, includes_usage
from stoker.config import Config
from stoker.logs import CURRENT_REQUEST
from stoker.router import WARNING_HEADER, Call, Router, add_warning

__all__ = ["completion_routes"]

_FINGERPRINT = f"stoker-{__version__}"

_encoder = msgspec.json.Encoder()
_chat_decoder = BodyDecoder(ChatRequest)
_completion_decoder = BodyDecoder(CompletionRequest)


def completion_routes(config: Config, router: Router) -> list[HTTPRouteHandler]:
    """The handlers of both endpoints.

    Args:
        config: Limits and strictness.
        router: Where requests go.
    """
    limit = config.server.max_body_bytes

    @post(
        "/v1/chat/completions",
        status_code=200,
        summary="Answer a conversation",
        tags=["completions"],
        operation_id="create_chat_completion",
        operation_class=generation_operation("ChatRequest", "ChatCompletion"),
    )
    async def chat_completions(request: AnyRequest) -> ASGIApp:
        body, raw = _chat_decoder.decode(await read_json_body(request, limit))
        headers = check_parameters(raw, CHAT_FIELDS, strict=config.server.strict)
        calls = chat_calls(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        return await _answer(request, config, router, body, calls, headers, chat=True)

    @post(
        "/v1/completions",
        status_code=200,
        summary="Continue a text",
        tags=["completions"],
        operation_id="create_completion",
        operation_class=generation_operation("CompletionRequest", "Completion"),
    )
    async def completions(request: AnyRequest) -> ASGIApp:
        body, raw = _completion_decoder.decode(await read_json_body(request, limit))
        headers = check_parameters(raw, COMPLETION_FIELDS, strict=config.server.strict)
        calls = completion_calls(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        return await _answer(request, config, router, body, calls, headers, chat=False)

    return [chat_completions, completions]


async def _answer(
    request: AnyRequest,
    config: Config,
    router: Router,
    body: GenerationRequest,
    calls: list[Call],
    headers: dict[str, str],
    *,
    chat: bool,
) -> ASGIApp:
    """Start the calls; their answer, streamed or in one piece."""
    include_usage = includes_usage(body)
    context = CURRENT_REQUEST.get()
    if context is not None:
        for call in calls:
            call.tenant = context.tenant
    # Middleware may take its time; who does not wait for it must not be computed for.
    run = await unless_gone(start(router, calls), request.receive)
    headers = _merged(run.headers, headers)
    explain: Explain | None = None
    if wants_explanation(calls[0].headers):
        explain = partial(explain_request, run.tracked, config.scheduler.policy)
    response_id = f"{'chatcmpl' if chat else 'cmpl'}-{current_request_id()}"
    created = int(time.time())  # noqa: TID251 - a timestamp in a body
    try:
        if not body.stream:
            texts, reasons = await unless_gone(_collect(run), request.receive)
            run.close()
            content = _content(run, response_id, created, texts, reasons, chat=chat)
            return ASGIResponse(
                body=content, media_type="application/json", headers=headers | _explained(explain)
            )
        encoder = EventEncoder(
            chat=chat,
            response_id=response_id,
            created=created,
            model=run.model,
            fingerprint=_FINGERPRINT,
            include_usage=include_usage,
        )
        events = stream_events(run, encoder, include_usage=include_usage, explain=explain)
        # The status waits for the first token: what goes wrong before it is an error, not an event.
        first = await unless_gone(_first(events), request.receive)
        return EventStream(first, events, run, headers, config.server.reader_timeout_s)
    except BaseException as error:
        run.close(error)
        if isinstance(error, Exception):
            return asgi_error(error, headers | _explained(explain))
        raise


def _merged(headers: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """Headers that middleware wants, and ours; of warnings all are kept."""
    merged = dict(headers)
    for name, value in own.items():
        if name == WARNING_HEADER:
            add_warning(merged, value)
        else:
            merged[name] = value
    return merged


def _explained(explain: Explain | None) -> dict[str, str]:
    return {} if explain is None else {EXPLAIN_HEADER: explain()}


def _content(
    run: Run, response_id: str, created: int, texts: list[str], reasons: list[str], *, chat: bool
) -> bytes:
    """The body of an answer in one piece."""
    kind: Any = ChatCompletion if chat else Completion
    make_choice = _chat_choice if chat else _completion_choice
    choices = zip(range(run.num_choices), texts, reasons, strict=True)
    answer = kind(
        id=response_id,
        created=created,
        model=run.model,
        system_fingerprint=_FINGERPRINT,
        choices=[make_choice(*choice) for choice in choices],
        usage=run.usage(),
    )
    return _encoder.encode(answer)


def _chat_choice(index: int, text: str, reason: Any) -> ChatChoice:
    message = ResponseMessage(content=text)
    return ChatChoice(index=index, message=message, finish_reason=reason)


def _completion_choice(index: int, text: str, reason: Any) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, finish_reason=reason)


async def _collect(run: Run) -> tuple[list[str], list[str]]:
    """The texts and finish reasons of all choices."""
    parts: list[list[str]] = [[] for _ in range(run.num_choices)]
    reasons = [""] * run.num_choices
    async with contextlib.aclosing(run.batches()) as batches:
        async for offset, batch in batches:
            for delta in batch:
                index = offset + delta.index
                parts[index].append(delta.text)
                if delta.finish_reason is not None:
                    reasons[index] = run.finish(offset, delta)
    return ["".join(part) for part in parts], reasons


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    """The first bytes of a stream."""
    return await anext(events)
