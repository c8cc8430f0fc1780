"""Builds the HTTP application: the core's routes, what plugins brought, and the layers around them."""

from collections.abc import Sequence
from typing import Any

from litestar import Response
from litestar import Router as LitestarRouter
from litestar.config.cors import CORSConfig
from litestar.exceptions import ImproperlyConfiguredException
from litestar.handlers import HTTPRouteHandler
from litestar.routes import BaseRoute, HTTPRoute

from stoker.api.access import Application
from stoker.api.auth import KeyRing
from stoker.api.cache import cache_routes
from stoker.api.completions import completion_routes
from stoker.api.embeddings import embedding_routes
from stoker.api.errors import handle_exception
from stoker.api.info import info_routes
from stoker.api.messages import messages_routes
from stoker.api.openapi import openapi_config
from stoker.api.requests import request_routes
from stoker.api.responses.routes import Responses
from stoker.api.tokens import token_routes
from stoker.api.unserved import unserved_routes
from stoker.config import Config
from stoker.errors import PluginConflictError
from stoker.router import Router

__all__ = ["build_app"]

_EXPOSED = [
    *(
        "retry-after",
        "retry-after-ms",
        "request-id",
        "x-request-id",
        "x-stoker-explain",
        "x-stoker-warning",
    ),
    *("age", "x-stoker-cache"),
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]
_ANY = "*"  # of a route that takes whatever comes
_DOCUMENT_PATHS = {("/schema", _ANY), ("/schema/openapi.json", _ANY)}


def build_app(
    config: Config,
    router: Router,
    *,
    route_handlers: Sequence[Any] = (),
    on_startup: Sequence[Any] = (),
    on_shutdown: Sequence[Any] = (),
) -> Application:
    """The ASGI application.

    Args:
        config: The configuration.
        router: Where requests go.
        route_handlers: Litestar route handlers that plugins brought.
        on_startup: Called, or awaited, before the first request.
        on_shutdown: Called, or awaited, after the last.

    Raises:
        ConfigError: A file of API keys cannot be used.
        PluginConflictError: A plugin's route has a path that is taken; the message names it.
    """
    keys = KeyRing.load(config)
    responses = Responses(config, router)
    own = [
        *completion_routes(config, router),
        *responses.handlers(),
        *messages_routes(config, router),
        *request_routes(config.scheduler.policy, router),
        *cache_routes(config, router),
        *info_routes(router),
        *embedding_routes(config, router),
        *token_routes(config, router),
        *unserved_routes(),
    ]
    _check_paths(own, route_handlers)
    served = [*own, *route_handlers]
    origins = config.server.cors_origins
    try:
        app = Application(
            route_handlers=[*_options_handlers(served), *served],
            on_startup=list(on_startup),
            on_shutdown=[*on_shutdown, responses.close],
            exception_handlers={Exception: handle_exception},
            cors_config=CORSConfig(allow_origins=list(origins), expose_headers=list(_EXPOSED))
            if origins
            else None,
            openapi_config=openapi_config(
                secured=keys.is_required, schemas=_schemas(route_handlers)
            ),
            logging_config=None,
            request_max_body_size=config.server.max_body_bytes,
        )
    except ImproperlyConfiguredException as error:
        if not route_handlers:
            raise
        raise PluginConflictError(f"a plugin's routes cannot be served: {error}") from error
    app.keys = keys
    app.log_access = config.logging.access
    app.body_timeout_s = config.server.body_timeout_s
    return app


def _options_handlers(handlers: Sequence[Any]) -> list[HTTPRouteHandler]:
    """What answers OPTIONS with all methods of a path.

    Registered first, for then Litestar adds none: its own names only the methods of the first handler.
    """
    methods: dict[str, set[str]] = {}
    answered: set[str] = set()
    for handler in handlers:
        for route in LitestarRouter("/", route_handlers=[handler]).routes:
            if not isinstance(route, HTTPRoute):
                continue
            methods.setdefault(route.path, set()).update(route.methods)
            if "OPTIONS" in getattr(handler, "http_methods", ()):
                answered.add(route.path)
    return [_options_handler(path, methods[path]) for path in methods if path not in answered]


def _options_handler(path: str, methods: set[str]) -> HTTPRouteHandler:
    headers = {"allow": ", ".join(sorted(methods))}

    async def options() -> Response[None]:
        return Response(None, status_code=204, headers=headers, media_type="text/plain")

    return HTTPRouteHandler(path, http_method="OPTIONS", include_in_schema=False)(options)


def _schemas(handlers: Sequence[Any]) -> list[type]:
    """The types that plugins' handlers name in ``opt["schemas"]``, for the OpenAPI document."""
    routes = [
        route
        for handler in handlers
        for route in LitestarRouter("/", route_handlers=[handler]).routes
        if isinstance(route, HTTPRoute)
    ]
    found = {
        schema: None
        for route in routes
        for handler in route.route_handlers
        for schema in handler.opt.get("schemas", ())
    }
    return list(found)


def _check_paths(own: Sequence[Any], brought: Sequence[Any]) -> None:
    taken = _DOCUMENT_PATHS | {place for handler in own for place in _places(handler)}
    for handler in brought:
        places = _places(handler)
        for path, method in sorted(places):
            if {(path, method), (path, _ANY)} & taken or (
                method == _ANY and any(path == other for other, _ in taken)
            ):
                raise PluginConflictError(
                    f"a plugin brings a route for {path}, which is taken; deactivate one of the two plugins"
                )
        taken |= places


def _places(handler: Any) -> set[tuple[str, str]]:
    """The full paths of a route handler, controller or router, each with its methods.

    Parameters stand there by type, not by name: two that differ in the name only are the same.
    """
    return {
        (_path(route), method)
        for route in LitestarRouter("/", route_handlers=[handler]).routes
        for method in (set(route.methods) - {"OPTIONS"} if isinstance(route, HTTPRoute) else {_ANY})
    }


def _path(route: BaseRoute) -> str:
    return "/" + "/".join(
        part if isinstance(part, str) else f"{{{part.type.__name__}}}"
        for part in route.path_components
    )
