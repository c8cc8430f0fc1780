"""What endpoints ask of the request they answer: its id, its tenant, whether its client is still there."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from litestar import Request
from litestar.types import Receive

from stoker.api.errors import ClientDisconnectedError
from stoker.api.streaming import wait_until_gone
from stoker.logs import CURRENT_REQUEST
from stoker.router import WARNING_HEADER, Router, add_warning
from stoker.tenants import ANONYMOUS

__all__ = [
    "AnyRequest",
    "current_request_id",
    "current_tenant",
    "default_model",
    "merged_headers",
    "unless_gone",
    "visible_headers",
]

T = TypeVar("T")

AnyRequest = Request[Any, Any, Any]

_SECRET_HEADERS = {"authorization", "cookie", "proxy-authorization", "x-api-key"}


def default_model(router: Router) -> str:
    """The model of requests that name none."""
    return router.models()[0].model_id


def current_request_id() -> str:
    """The id of the request that is being answered."""
    context = CURRENT_REQUEST.get()
    return "" if context is None else context.request_id


def current_tenant() -> str:
    """Whose request is being answered."""
    context = CURRENT_REQUEST.get()
    return ANONYMOUS if context is None else context.tenant


def visible_headers(request: AnyRequest) -> dict[str, str]:
    """What middleware may see: lower-case names, no secrets."""
    return {
        name.lower(): value
        for name, value in request.headers.items()
        if name.lower() not in _SECRET_HEADERS
    }


def merged_headers(headers: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Headers that middleware wants, and ours; of warnings all are kept."""
    merged = dict(headers)
    for name, value in own.items():
        if name == WARNING_HEADER:
            add_warning(merged, value)
        else:
            merged[name] = value
    return merged


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled if the client goes away first.

    Args:
        work: What to do; the body must have been read.
        receive: Tells that the client goes away.

    Raises:
        ClientDisconnectedError: It went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(wait_until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
