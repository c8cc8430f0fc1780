"""``/v1/requests``: what became of a request and why, and how to cancel it."""

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec
from litestar import Request, delete, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.openapi import json_operation, links_to
from stoker.api.schemas import CancelledRequest, RequestDetails, RequestList, RequestSummary
from stoker.history import TrackedRequest
from stoker.logs import CURRENT_REQUEST
from stoker.router import Router
from stoker.tenants import ANONYMOUS

__all__ = ["EXPLAIN_HEADER", "Explain", "explain_request", "request_routes", "wants_explanation"]

EXPLAIN_HEADER = "x-stoker-explain"
"""Asks for an explanation of the answer; on the answer, the explanation."""

Explain = Callable[[], str]
"""The explanation of a request, as it stands: a line of ASCII."""

_MAX_EXPLAINED = 4096  # bytes of a header that clients and proxies take without further settings
_MAX_LISTED = 100
_PREFIX = b"/v1/requests/"

AnyRequest = Request[Any, Any, Any]


def request_routes(policy: str, router: Router) -> list[HTTPRouteHandler]:
    """The handlers that explain and cancel requests: the caller's own; others' are not found.

    Args:
        policy: Name of the scheduling policy.
        router: What knows the requests.
    """

    @get(
        "/v1/requests",
        summary="List your requests: those that run, and the last ones that ended",
        tags=["requests"],
        operation_id="list_requests",
        operation_class=json_operation(
            "RequestList",
            links=links_to(
                "path.request_id",
                "get_request",
                "cancel_request",
                value="$response.body#/data/0/id",
            ),
        ),
    )
    async def list_requests() -> ASGIApp:
        found = router.history.recent(_tenant(), _MAX_LISTED)
        return _json(RequestList(data=[_summary(tracked) for tracked in found]))

    @get(
        "/v1/requests/{request_id:path}",
        summary="Explain a request: what it waited for, what was computed, how it ended",
        tags=["requests"],
        operation_id="get_request",
        operation_class=json_operation("RequestDetails"),
    )
    async def get_request(request: AnyRequest, request_id: FromPath[str]) -> ASGIApp:
        tracked = router.tracked(_id(request, request_id), _tenant())
        return _json(_details(tracked, policy))

    @delete(
        "/v1/requests/{request_id:path}",
        status_code=200,
        summary="Cancel a request, wherever it is: its reader gets the error `request_cancelled`",
        tags=["requests"],
        operation_id="cancel_request",
        operation_class=json_operation("CancelledRequest"),
    )
    async def cancel_request(request: AnyRequest, request_id: FromPath[str]) -> ASGIApp:
        name = _id(request, request_id)
        return _json(CancelledRequest(id=name, cancelled=router.cancel(name, _tenant())))

    return [list_requests, get_request, cancel_request]


def wants_explanation(headers: Mapping[str, str]) -> bool:
    """Whether a request asks for an explanation of its answer."""
    return headers.get(EXPLAIN_HEADER, "").strip().lower() in {"1", "true"}


def explain_request(tracked: TrackedRequest, policy: str) -> str:
    """A request's explanation as one line of ASCII, short enough for a header.

    Of a request with many sequences it holds the first ones; ``num_sequences`` tells how many there are.
    """
    details = msgspec.to_builtins(_details(tracked, policy))
    while True:
        line = json.dumps(details, separators=(",", ":"))  # msgspec's is not ASCII
        sequences = details["sequences"]
        if len(line) <= _MAX_EXPLAINED or not sequences:
            return line
        if len(sequences) == 1 and sequences[0]["preemptions"]:
            sequences[0]["preemptions"] = []
        else:
            details["sequences"] = sequences[: len(sequences) // 2]


def _details(tracked: TrackedRequest, policy: str) -> RequestDetails:
    return RequestDetails(
        id=tracked.request_id,
        created=tracked.created,
        model=tracked.model,
        status=tracked.status(),
        tenant=tracked.tenant,
        policy=policy,
        num_sequences=tracked.num_sequences,
        sequences=tracked.traces(),
    )


def _summary(tracked: TrackedRequest) -> RequestSummary:
    return RequestSummary(
        id=tracked.request_id,
        created=tracked.created,
        model=tracked.model,
        status=tracked.status(),
    )


def _tenant() -> str:
    context = CURRENT_REQUEST.get()
    return ANONYMOUS if context is None else context.tenant


def _id(request: AnyRequest, matched: str) -> str:
    """The id in the path as it was sent: routing drops slashes that follow a slash or come last."""
    raw: bytes = request.scope.get("raw_path") or b""
    sent = raw.partition(b"?")[0].partition(_PREFIX)[2]
    return unquote(sent.decode("latin-1")) if sent else matched.removeprefix("/")


def _json(body: Any) -> ASGIApp:
    return ASGIResponse(body=msgspec.json.encode(body), media_type="application/json")
