"""``POST /v1/embeddings`` and ``POST /v1/rerank``."""

import asyncio
import base64
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp
from numpy.typing import NDArray

from stoker.api.body import BodyDecoder
from stoker.api.embedding_schemas import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    Rerank,
    RerankDocument,
    RerankRequest,
    RerankResult,
)
from stoker.api.errors import asgi_error
from stoker.api.incoming import (
    AnyRequest,
    current_request_id,
    current_tenant,
    default_model,
    merged_headers,
    unless_gone,
    visible_headers,
)
from stoker.api.openapi import body_operation
from stoker.api.parameters import LABELS, KnownFields, check_parameters
from stoker.api.requests import EXPLAIN_HEADER, explain_request, wants_explanation
from stoker.config import Config
from stoker.embeddings import EmbedCall, Inputs, unit_vectors
from stoker.errors import EngineError, InvalidRequestError, UnavailableError
from stoker.logs import CURRENT_REQUEST
from stoker.router import Generation, Router
from stoker.types import Delta, FinishReason, SamplingParams

__all__ = ["embedding_routes"]

Vectors = NDArray[np.float32]

_EMBEDDING_FIELDS = KnownFields.of(
    EmbeddingRequest, also=LABELS, unsupported=("input_type", "truncate_prompt_tokens")
)
_RERANK_FIELDS = KnownFields.of(
    RerankRequest,
    also=LABELS,
    within={"documents": KnownFields.of(RerankDocument)},
    unsupported=(
        "max_chunks_per_doc",
        "max_tokens_per_doc",
        "rank_fields",
        "truncate_prompt_tokens",
    ),
)
_RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
_MAX_INPUTS = 2048  # as in the OpenAI API
_OFF_THREAD_NUMBERS = 100_000  # to write more than these would hold up the event loop
_DECIMALS = 10  # a float32 of such a vector is known to about nine

_embedding_decoder = BodyDecoder(EmbeddingRequest)
_rerank_decoder = BodyDecoder(RerankRequest)
_encoder = msgspec.json.Encoder()
_NOTHING_GENERATED = SamplingParams(max_tokens=0)


def embedding_routes(config: Config, router: Router) -> list[HTTPRouteHandler]:
    """The handlers of both endpoints.

    Args:
        config: Limits and strictness.
        router: Where requests go.
    """
    limit, strict = config.server.max_body_bytes, config.server.strict

    @post(
        "/v1/embeddings",
        status_code=200,
        summary="Turn texts into vectors",
        tags=["embeddings"],
        operation_id="create_embedding",
        operation_class=body_operation("EmbeddingRequest", "EmbeddingList"),
    )
    async def embeddings(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=_EMBEDDING_FIELDS, strict=strict)
        body, headers = await _embedding_decoder.read(request, limit, check)
        inputs, names = _inputs(body.input)
        call = _call(router, request, body, "embedding", inputs, names)
        call.dimensions = body.dimensions
        call.user = body.user or ""

        def answer(model: str, vectors: Vectors, usage: EmbeddingUsage) -> EmbeddingList:
            as_text = body.encoding_format == "base64"
            data = [
                Embedding(index=index, embedding=_base64(row) if as_text else _floats(row))
                for index, row in enumerate(vectors)
            ]
            return EmbeddingList(data=data, model=model, usage=usage)

        return await _answer(config, router, request, call, headers, answer)

    async def rerank(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=_RERANK_FIELDS, strict=strict)
        body, headers = await _rerank_decoder.read(request, limit, check)
        texts = [item if isinstance(item, str) else item.text for item in body.documents]
        names = ["query", *(_document_name(i, item) for i, item in enumerate(body.documents))]
        _check_count(len(names), "documents", _MAX_INPUTS)
        inputs = [_text(text, name) for text, name in zip([body.query, *texts], names, strict=True)]
        call = _call(router, request, body, "rerank", inputs, names)
        answer_id = f"rerank-{current_request_id()}"

        def answer(model: str, vectors: Vectors, usage: EmbeddingUsage) -> Rerank:
            scores = np.clip(vectors[1:] @ vectors[0], -1.0, 1.0)
            best = np.argsort(-scores, kind="stable")[: body.top_n]
            results = [
                RerankResult(
                    index=index,
                    relevance_score=round(float(scores[index]), _DECIMALS),
                    document=RerankDocument(text=texts[index])
                    if body.return_documents is not False
                    else None,
                )
                for index in best.tolist()
            ]
            return Rerank(id=answer_id, model=model, results=results, usage=usage)

        return await _answer(config, router, request, call, headers, answer)

    def rerank_at(path: str) -> HTTPRouteHandler:
        return post(
            path,
            status_code=200,
            summary="Sort documents by what they have to do with a query",
            tags=["embeddings"],
            operation_id="rerank" + path.removesuffix("/rerank").replace("/", "_"),
            operation_class=body_operation("RerankRequest", "Rerank"),
        )(rerank)

    return [embeddings, *(rerank_at(path) for path in _RERANK_PATHS)]


# --------------------------------------------------------------------------- requests


def _call(
    router: Router,
    request: AnyRequest,
    body: EmbeddingRequest | RerankRequest,
    endpoint: str,
    inputs: Inputs,
    names: Sequence[str],
) -> EmbedCall:
    return EmbedCall(
        request_id=current_request_id(),
        model=default_model(router) if body.model is None else body.model,
        sampling=_NOTHING_GENERATED,
        priority=body.priority,
        timeout_s=body.timeout,
        endpoint=endpoint,
        headers=visible_headers(request),
        tenant=current_tenant(),
        inputs=inputs,
        names=names,
    )


def _inputs(given: str | list[str | int | list[int]]) -> tuple[Inputs, list[str]]:
    """The inputs, and how the client calls each: ``input``, or ``input.3`` in a list."""
    if isinstance(given, str):
        return [_text(given, "input")], ["input"]
    if not given:
        raise InvalidRequestError("'input' is empty", param="input", code="invalid_value")
    ids = [item for item in given if isinstance(item, int)]
    if len(ids) == len(given):
        return [ids], ["input"]
    _check_count(len(given), "input", _MAX_INPUTS)
    inputs: list[str | list[int]] = []
    names = [f"input.{i}" for i in range(len(given))]
    for item, name in zip(given, names, strict=True):
        if isinstance(item, int):
            raise InvalidRequestError(
                "'input' mixes token ids with other inputs; send one list of token ids, or a list of "
                "strings or of lists of token ids",
                param=name,
                code="invalid_type",
            )
        if not item:
            raise InvalidRequestError(f"{name!r} is empty", param=name, code="invalid_value")
        inputs.append(_text(item, name) if isinstance(item, str) else item)
    return inputs, names


def _document_name(index: int, document: str | RerankDocument) -> str:
    return f"documents.{index}" if isinstance(document, str) else f"documents.{index}.text"


def _check_count(count: int, name: str, most: int) -> None:
    if count > most:
        raise InvalidRequestError(
            f"{name!r} makes {count} inputs; at most {most} are possible in one request",
            param=name,
            code="invalid_value",
        )


def _text(text: str, name: str) -> str:
    if not text:
        raise InvalidRequestError(f"{name!r} is empty", param=name, code="invalid_value")
    if "\0" in text:
        raise InvalidRequestError(
            f"{name!r} holds a NUL character; remove it", param=name, code="invalid_value"
        )
    return text


# --------------------------------------------------------------------------- answers


async def _answer(
    config: Config,
    router: Router,
    request: AnyRequest,
    call: EmbedCall,
    headers: dict[str, str],
    write: Callable[[str, Vectors, EmbeddingUsage], EmbeddingList | Rerank],
) -> ASGIApp:
    """Embed, and answer with what ``write`` makes of the vectors; nothing if the client goes away."""
    # Middleware may take its time; who does not wait for it must not be computed for.
    (generation,) = await unless_gone(router.start([call]), request.receive)
    headers = merged_headers(generation.request.response_headers, headers)
    model = generation.model.model_id
    context = CURRENT_REQUEST.get()
    num_tokens = len(generation.request.prompt_token_ids)
    if context is not None:
        context.model, context.prompt_tokens, context.user = model, num_tokens, call.user

    def finish(vectors: Vectors) -> bytes:
        usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
        return _encoder.encode(write(model, unit_vectors(vectors, call.dimensions), usage))

    try:
        vectors = await unless_gone(_vectors(generation), request.receive)
        if vectors.size < _OFF_THREAD_NUMBERS:
            content = finish(vectors)
        else:
            content = await asyncio.to_thread(finish, vectors)
        failure = None
    except Exception as error:  # noqa: BLE001 - told to the client below
        if context is not None:
            context.error = type(error).__name__
        failure = error
    finally:
        generation.abort()
    if wants_explanation(call.headers):
        headers[EXPLAIN_HEADER] = explain_request(generation.tracked, config.scheduler.policy)
    if failure is not None:
        return asgi_error(failure, headers)
    return ASGIResponse(body=content, media_type="application/json", headers=headers)


async def _vectors(generation: Generation) -> Vectors:
    """The vectors of a request's inputs, as they were pooled.

    Raises:
        Exception: It did not end well: the error to tell the client.
    """
    last: Delta | None = None
    async for batch in generation:
        last = batch[-1]
    if last is None or last.finish_reason is FinishReason.ABORT:
        raise UnavailableError(
            "the server is shutting down and cancelled this request; send it again later",
            code="server_shutdown",
        )
    if last.finish_reason is FinishReason.ERROR:
        raise last.error or EngineError("the inputs could not be embedded")
    return generation.vectors()


def _floats(row: Vectors) -> list[float]:
    numbers: list[float] = row.astype(np.float64).round(_DECIMALS).tolist()
    return numbers


def _base64(row: Vectors) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
