"""The OpenAPI document: bodies that this API decodes itself, described from their structs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Response, Router
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    Components,
    Link,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
)

from stoker import __version__
from stoker.api.answer_schemas import ChatCompletion, Completion
from stoker.api.cache_schemas import CacheList, ClearedCache
from stoker.api.embedding_schemas import EmbeddingList, EmbeddingRequest, Rerank, RerankRequest
from stoker.api.messages_answers import (
    CountedTokens,
    Message,
    MessagesErrorBody,
    MessagesModel,
    MessagesModelList,
)
from stoker.api.messages_schemas import MessagesPrompt, MessagesRequest
from stoker.api.request_schemas import ChatRequest, CompletionRequest
from stoker.api.responses.answer_schemas import (
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponseObject,
)
from stoker.api.responses.request_schemas import InputTokensRequest, ResponseRequest
from stoker.api.schemas import (
    CancelledRequest,
    EngineList,
    ErrorBody,
    ModelList,
    Readiness,
    RequestDetails,
    RequestList,
)
from stoker.api.token_schemas import (
    AppliedTemplate,
    Detokenization,
    DetokenizeRequest,
    Tokenization,
    TokenizeRequest,
    TokenizerInfo,
)
from stoker.router import Health

__all__ = [
    "EVENT",
    "OF_THE_REQUEST",
    "Links",
    "body_operation",
    "generation_operation",
    "json_operation",
    "links_to",
    "openapi_config",
]

Links = dict[str, Link | Reference]
"""Where one can go from an answer, by name."""

_BODIES = (
    ChatRequest, ChatCompletion, CompletionRequest, Completion, ModelList, EngineList, Health, Readiness,
    ErrorBody, RequestList, RequestDetails, CancelledRequest, CacheList,
    ClearedCache, EmbeddingRequest, EmbeddingList, RerankRequest, Rerank, TokenizeRequest, Tokenization,
    DetokenizeRequest, Detokenization, AppliedTemplate, TokenizerInfo,
    ResponseRequest, ResponseObject, DeletedResponse, ItemList, InputTokensRequest, InputTokens,
    MessagesRequest, MessagesPrompt, Message, CountedTokens, MessagesModelList, MessagesModel,
    MessagesErrorBody,
)  # fmt: skip


class _BodyComponents(Components):
    """Components with the schemas that msgspec makes; Litestar collects its own over any given ones.

    Args:
        brought: Types that plugins' routes read and write, beside the core's own.
    """

    def __init__(self, brought: Sequence[type] = ()) -> None:
        super().__init__()
        self._brought = tuple(brought)  # no field of a dataclass: those are written out

    def to_schema(self) -> dict[str, Any]:
        components = super().to_schema()
        _, schemas = msgspec.json.schema_components(
            (*_BODIES, *self._brought), ref_template="#/components/schemas/{name}"
        )
        components["schemas"] = {**components.get("schemas", {}), **schemas}
        return components


def _json(name: str, description: str) -> OpenAPIResponse:
    reference = Reference(ref=f"#/components/schemas/{name}")
    return OpenAPIResponse(
        description=description, content={"application/json": OpenAPIMediaType(schema=reference)}
    )


def links_to(parameter: str, *operation_ids: str, value: str = "$response.body#/id") -> Links:
    """Links to operations that can be called with a part of an answer.

    Args:
        parameter: The parameter that it becomes, by its place: ``path.file_id``.
        operation_ids: The operations.
        value: The part, as a runtime expression of OpenAPI.
    """
    return {name: Link(operation_id=name, parameters={parameter: value}) for name in operation_ids}


def json_operation(response: str, *, links: Links | None = None, **others: str) -> type[Operation]:
    """An operation that answers with the struct named ``response``.

    Args:
        response: Name of a schema.
        links: Where one can go from its answer.
        others: More answers: ``s503="Readiness"``.
    """

    @dataclass
    class JsonOperation(Operation):
        def __post_init__(self) -> None:
            success = _json(response, "Success")
            success.links = dict(links) if links else None
            self.responses = {
                "200": success,
                **{status[1:]: _json(name, "No success") for status, name in others.items()},
                "default": _json("ErrorBody", "An error"),
            }

    return JsonOperation


def body_operation(request: str, response: str) -> type[Operation]:
    """An operation that takes the struct named ``request`` and answers with the one named ``response``."""

    @dataclass
    class BodyOperation(Operation):
        def __post_init__(self) -> None:
            reference = Reference(ref=f"#/components/schemas/{request}")
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=reference)}, required=True
            )
            self.responses = {
                "200": _json(response, "Success"),
                "default": _json("ErrorBody", "An error"),
            }

    return BodyOperation


OF_THE_REQUEST = links_to(
    "path.request_id",
    "get_request",
    "cancel_request",
    value="$response.header.x-request-id",
)
"""From the answer of a generating endpoint to what is known of it."""

_STRING = Schema(type=OpenAPIType.STRING)
_ASK_TO_EXPLAIN = Parameter(
    name="x-stoker-explain",
    param_in="header",
    description="`1` asks why the answer took as long as it did: see `RequestDetails`.",
    schema=_STRING,
)
_REQUEST_ID = Parameter(
    name="x-request-id",
    param_in="header",
    description="The request's id, by which it can be explained and cancelled; else one is made up.",
    schema=_STRING,
)
EVENT = Schema(
    type=OpenAPIType.OBJECT,
    description="A server-sent event; `data` is JSON, or `[DONE]` at the end.",
    properties={"event": _STRING, "data": _STRING},
    required=["data"],
)
"""One event of a stream."""
_EXPLANATION = OpenAPIHeader(
    description=(
        "If asked for: `RequestDetails` as JSON. In a stream it is a comment before the end: "
        "`: stoker-explain {...}`."
    ),
    schema=_STRING,
)


def generation_operation(
    request: str, response: str, links: Links | None = None
) -> type[Operation]:
    """An operation that takes the struct named ``request`` and answers in one piece or streams.

    Args:
        request: Name of a schema.
        response: Name of a schema.
        links: Where one can go from its answer, beside its request's history.
    """

    @dataclass
    class GenerationOperation(Operation):
        def __post_init__(self) -> None:
            reference = Reference(ref=f"#/components/schemas/{request}")
            self.parameters = [_REQUEST_ID, _ASK_TO_EXPLAIN]
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=reference)}, required=True
            )
            success = _json(response, "The answer; with `stream`, server-sent events of its chunks")
            success.headers = {"x-stoker-explain": _EXPLANATION}
            success.links = {**OF_THE_REQUEST, **(links or {})}
            if success.content is not None:
                success.content["text/event-stream"] = OpenAPIMediaType(schema=EVENT)
            self.responses = {"200": success, "default": _json("ErrorBody", "An error")}

    return GenerationOperation


def openapi_config(*, secured: bool, schemas: Sequence[type] = ()) -> OpenAPIConfig:
    """What describes the API; served at ``/schema`` and ``/schema/openapi.json``.

    Args:
        secured: Whether API keys are required.
        schemas: Types that plugins' routes read and write: components by their names.
    """
    components = _BodyComponents(schemas)
    if secured:
        components.security_schemes = {
            "api_key": SecurityScheme(type="http", scheme="bearer"),
            "x_api_key": SecurityScheme(
                type="apiKey", name="x-api-key", security_scheme_in="header"
            ),
        }
    return OpenAPIConfig(
        title="stoker",
        version=__version__,
        description="An OpenAI-compatible API in front of local models.",
        components=components,
        security=[{"api_key": []}, {"x_api_key": []}] if secured else None,
        # The pages that show it would load scripts from elsewhere; the document needs nothing.
        render_plugins=[JsonRenderPlugin()],
        openapi_router=Router(
            "/schema", route_handlers=[], include_in_schema=False, after_request=_no_html
        ),
    )


async def _no_html(response: Response[Any]) -> Response[Any]:
    """Litestar answers unknown paths below /schema with a page; everything here is an error object."""
    if response.status_code == 404:
        raise NotFoundException
    return response
