"""What the server says about itself: models, engines, health, readiness."""

from typing import Any

import msgspec
from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.incoming import AnyRequest
from stoker.api.messages_errors import speaks_anthropic
from stoker.api.messages_models import list_for_anthropic, model_for_anthropic
from stoker.api.messages_operations import models_operation
from stoker.api.openapi import json_operation, links_to
from stoker.api.schemas import Engine, EngineList, Model, ModelList, Readiness
from stoker.interfaces import ServedModel
from stoker.router import Router

__all__ = ["info_routes"]

_DEPRECATED = {"deprecation": "true"}


def info_routes(router: Router) -> list[HTTPRouteHandler]:
    """The handlers that tell what is served and how it is.

    Args:
        router: What is asked.
    """

    def engine(served: ServedModel) -> Engine:
        return Engine(id=served.model_id, created=served.created, ready=router.ready())

    @get(
        "/v1/models",
        summary="List the models",
        tags=["models"],
        operation_id="list_models",
        operation_class=models_operation("ModelList", "MessagesModelList"),
    )
    async def list_models(request: AnyRequest) -> ASGIApp:
        if _asks_anthropic(request):
            return _json(list_for_anthropic(router.models(), request.query_params))
        return _json(ModelList(data=[_model(served) for served in router.models()]))

    @get(
        "/v1/models/{model_id:path}",
        summary="Describe a model",
        tags=["models"],
        operation_id="get_model",
        operation_class=models_operation("Model", "MessagesModel"),
    )
    async def get_model(request: AnyRequest, model_id: FromPath[str]) -> ASGIApp:
        served = router.find(model_id.removeprefix("/"))
        return _json(model_for_anthropic(served) if _asks_anthropic(request) else _model(served))

    @get(
        "/v1/engines",
        summary="List the models",
        tags=["models"],
        deprecated=True,
        operation_id="list_engines",
        operation_class=json_operation(
            "EngineList",
            links=links_to("path.engine_id", "get_engine", value="$response.body#/data/0/id"),
        ),
    )
    async def list_engines() -> ASGIApp:
        body = EngineList(data=[engine(served) for served in router.models()])
        return _json(body, headers=_DEPRECATED)

    @get(
        "/v1/engines/{engine_id:path}",
        summary="Describe a model",
        tags=["models"],
        deprecated=True,
        operation_id="get_engine",
        operation_class=json_operation("Engine"),
    )
    async def get_engine(engine_id: FromPath[str]) -> ASGIApp:
        body = engine(router.find(engine_id.removeprefix("/")))
        return _json(body, headers=_DEPRECATED)

    @get(
        "/health",
        summary="Whether the server is alive",
        tags=["health"],
        operation_id="health",
        operation_class=json_operation("Health", s503="Health"),
    )
    async def health() -> ASGIApp:
        body = router.health()
        return _json(body, status_code=503 if body.status == "stalled" else 200)

    @get(
        "/ready",
        summary="Whether the server takes new requests",
        tags=["health"],
        operation_id="ready",
        operation_class=json_operation("Readiness", s503="Readiness"),
    )
    async def ready() -> ASGIApp:
        status = router.readiness()
        body = Readiness(ready=status == "ok", status=status)
        return _json(body, status_code=200 if body.ready else 503)

    return [list_models, get_model, list_engines, get_engine, health, ready]


def _asks_anthropic(request: AnyRequest) -> bool:
    return speaks_anthropic(request.scope["path"], request.scope["headers"])


def _model(served: ServedModel) -> Model:
    return Model(
        id=served.model_id, created=served.created, max_model_len=served.info.context_length
    )


def _json(body: Any, *, status_code: int = 200, headers: dict[str, str] | None = None) -> ASGIApp:
    return ASGIResponse(
        body=msgspec.json.encode(body),
        status_code=status_code,
        media_type="application/json",
        headers=headers,
    )
