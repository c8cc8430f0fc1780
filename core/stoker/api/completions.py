"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

import time
from functools import partial

from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from stoker import __version__
from stoker.api.answering import AnswerForm, answer
from stoker.api.bodies import chat_body, completion_body
from stoker.api.body import BodyDecoder
from stoker.api.choices import collect
from stoker.api.events import ChunkEncoder, StreamEncoder, StreamShape, TextEncoder
from stoker.api.incoming import AnyRequest, current_request_id, default_model, visible_headers
from stoker.api.openapi import generation_operation
from stoker.api.parameters import CHAT_FIELDS, COMPLETION_FIELDS, check_parameters
from stoker.api.request_schemas import ChatRequest, CompletionRequest, GenerationRequest
from stoker.api.run import Run
from stoker.api.validation import chat_calls, completion_calls, includes_usage, tier_of
from stoker.config import Config
from stoker.router import Router

__all__ = ["completion_routes"]

_FINGERPRINT = f"stoker-{__version__}"

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
        check = partial(check_parameters, known=CHAT_FIELDS, strict=config.server.strict)
        body, headers = await _chat_decoder.read(request, limit, check)
        calls = chat_calls(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        form = _CompletionForm(body, router)
        return await answer(request, config, router, calls, headers, form)

    @post(
        "/v1/completions",
        status_code=200,
        summary="Continue a text",
        tags=["completions"],
        operation_id="create_completion",
        operation_class=generation_operation("CompletionRequest", "Completion"),
    )
    async def completions(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=COMPLETION_FIELDS, strict=config.server.strict)
        body, headers = await _completion_decoder.read(request, limit, check)
        calls = completion_calls(
            body, config, default_model(router), current_request_id(), visible_headers(request)
        )
        form = _CompletionForm(body, router)
        return await answer(request, config, router, calls, headers, form)

    return [chat_completions, completions]


class _CompletionForm(AnswerForm):
    """Tells it in the words of chat or text completions.

    Args:
        body: The request.
        router: For the texts of prompts that came as tokens.

    Raises:
        InvalidRequestError: There are stream options but no stream.
    """

    def __init__(self, body: ChatRequest | CompletionRequest, router: Router) -> None:
        self.stream = bool(body.stream)
        self._body = body
        self._router = router
        self._include_usage = includes_usage(body)
        self._created = int(time.time())  # noqa: TID251 - a timestamp in a body

    def encoder(self, run: Run) -> StreamEncoder:
        """Makes chunks."""
        shape = self._shape(run)
        if shape.is_plain and not run.has_parsers:
            return TextEncoder(run, shape)
        return ChunkEncoder(run, shape)

    async def body(self, run: Run) -> bytes:
        """The whole completion."""
        choices = await collect(run)
        shape, body = self._shape(run), self._body
        if isinstance(body, ChatRequest):
            return chat_body(run, shape, choices, body.metadata)
        return completion_body(run, shape, choices, body.metadata, body.n or 1)

    def _shape(self, run: Run) -> StreamShape:
        body = self._body
        chat = isinstance(body, ChatRequest)
        options = body.stream_options
        return StreamShape(
            chat=chat,
            response_id=f"{'chatcmpl' if chat else 'cmpl'}-{current_request_id()}",
            created=self._created,
            model=run.model,
            fingerprint=_FINGERPRINT,
            service_tier=tier_of(body),
            include_usage=self._include_usage,
            continuous_usage=bool(options and options.continuous_usage_stats),
            logprobs=_num_logprobs(body),
            prompt_logprobs=body.prompt_logprobs is not None,
            token_ids=bool(body.return_token_ids),
            timings=bool(body.timings or body.timings_per_token),
            progress=bool(body.return_progress),
            echo=self._echo(run),
        )

    def _echo(self, run: Run) -> tuple[str, ...]:
        """The prompt's text for each choice, if it is to be echoed."""
        body = self._body
        if isinstance(body, ChatRequest) or not body.echo:
            return ()
        given = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        texts = []
        for index in range(run.num_choices):
            at = run.prompt_index(index)
            text = given[at] if at < len(given) else None
            if not isinstance(text, str):
                tokenizer = self._router.tokenizer(run.model)
                text = tokenizer.decode(run.prompt_token_ids(index))
            texts.append(text)
        return tuple(texts)


def _num_logprobs(body: GenerationRequest) -> int | None:
    """How many alternatives to tell; ``None`` for no log-probabilities."""
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None
