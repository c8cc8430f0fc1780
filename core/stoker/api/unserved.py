"""Endpoints of the OpenAI API that have nothing to do with what this server is for: 501, and why."""

from collections.abc import Sequence
from typing import Literal

from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from stoker.api.errors import asgi_error
from stoker.api.incoming import AnyRequest
from stoker.errors import UnservedEndpointError

__all__ = ["UNSERVED", "unserved_routes"]

UNSERVED = {
    "assistants": "the Assistants API; use /v1/responses or /v1/chat/completions",
    "audio": "speech and transcription",
    "chatkit": "ChatKit",
    "conversations": "conversations; follow responses with previous_response_id",
    "containers": "code interpreter containers",
    "evals": "evals",
    "fine_tuning": "fine-tuning",
    "images": "images",
    "moderations": "moderation",
    "organization": "the administration of an OpenAI organization; see `stoker keys`",
    "realtime": "realtime sessions",
    "skills": "skills",
    "threads": "the Assistants API; use /v1/responses or /v1/chat/completions",
    "uploads": "uploads in parts; send a file to /v1/files",
    "vector_stores": "vector stores; embed with /v1/embeddings and search in a database of your own",
    "videos": "videos",
}
"""What is not served below ``/v1/``, and in other words."""

_METHODS: Sequence[Literal["GET", "POST", "PUT", "PATCH", "DELETE"]] = (
    "GET",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
)


def unserved_routes() -> list[HTTPRouteHandler]:
    """Handlers that say so, for these paths and all below them; the OpenAPI document has none of them."""
    return [_refuse(name, what) for name, what in UNSERVED.items()]


def _refuse(name: str, what: str) -> HTTPRouteHandler:
    async def refuse(request: AnyRequest) -> ASGIApp:
        error = UnservedEndpointError(
            f"{request.method} {request.url.path[:200]}: this server generates and embeds text; it does "
            f"not serve {what}"
        )
        # OpenAI's clients would send it again, as after any other 5xx.
        return asgi_error(error, {"x-should-retry": "false"})

    path = f"/v1/{name}"
    handler = HTTPRouteHandler(
        [path, f"{path}/{{rest:path}}"], http_method=_METHODS, include_in_schema=False
    )
    return handler(refuse)
