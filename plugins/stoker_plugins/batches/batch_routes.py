"""``/v1/batches``."""

from __future__ import annotations

import uuid

from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.types import ASGIApp

from stoker import InvalidRequestError, RateLimitError, RequestNotFoundError, ServerContext
from stoker_plugins.batches.archive import Archive, Store, no_such_file, now
from stoker_plugins.batches.database import BatchRecord
from stoker_plugins.batches.documents import (
    AFTER,
    FROM_BATCH,
    json_body,
    limit_parameter,
    operation,
)
from stoker_plugins.batches.forms import (
    AnyRequest,
    current_tenant,
    ignore,
    limit,
    read_body,
    reply,
    unknown_query,
)
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.runner import BatchRunner
from stoker_plugins.batches.schemas import Batch, BatchList, BatchRequestCounts, CreateBatch

__all__ = ["batch_routes"]

_WINDOW_S = 24 * 3600
_MAX_LISTED = 100
_DEFAULT_LISTED = 20
_MAX_BODY = 256 * 1024
_BUSY_RETRY_S = 60.0
_SCHEMAS = {"schemas": (Batch, BatchList, CreateBatch)}


def batch_routes(
    context: ServerContext, archive: Archive, runner: BatchRunner, options: BatchesOptions
) -> list[HTTPRouteHandler]:
    """The handlers: everybody sees their own batches only.

    Args:
        context: The server.
        archive: Where batches and their files are.
        runner: What runs them.
        options: Bounds.
    """
    endpoints = _Endpoints(context)

    @post(
        "/v1/batches",
        status_code=200,
        summary="Run the requests of a file in idle capacity",
        tags=["batches"],
        operation_id="create_batch",
        operation_class=operation("Batch", body=json_body("CreateBatch"), links=FROM_BATCH),
        opt=_SCHEMAS,
    )
    async def create_batch(request: AnyRequest) -> ASGIApp:
        wanted, unknown = await read_body(request, CreateBatch, _MAX_BODY)
        headers = ignore(context, [*unknown, *unknown_query(request, ())])
        await endpoints.check(wanted.endpoint)
        if not archive.is_used():
            raise no_such_file(wanted.input_file_id, "input_file_id")
        created = now()
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            completion_window=wanted.completion_window,
            status="validating",
            created_at=created,
            expires_at=created + _WINDOW_S,
            request_counts=BatchRequestCounts(),
            metadata=wanted.metadata,
        )
        expires = wanted.output_expires_after
        record = BatchRecord(
            tenant=current_tenant(),
            batch=batch,
            output_id=f"file-{uuid.uuid4().hex}",
            error_id=f"file-{uuid.uuid4().hex}",
            output_ttl_s=min(options.ttl_s, expires.seconds if expires else options.ttl_s),
        )
        await archive.run(_add, record, options.max_open_batches)
        answer = reply(batch, headers)  # before anything of it changes
        runner.submit(record)
        return answer

    @get(
        "/v1/batches",
        summary="List your batches, the newest first",
        tags=["batches"],
        operation_id="list_batches",
        operation_class=operation(
            "BatchList", parameters=[limit_parameter(_DEFAULT_LISTED, _MAX_LISTED), AFTER]
        ),
        opt=_SCHEMAS,
    )
    async def list_batches(request: AnyRequest) -> ASGIApp:
        headers = ignore(context, unknown_query(request, {"limit", "after"}))
        number = limit(request, _DEFAULT_LISTED, _MAX_LISTED)
        after = request.query_params.get("after")
        if not archive.is_used():
            return reply(BatchList(data=[], has_more=False), headers)
        found = await archive.run(_page, current_tenant(), number + 1, after)
        data = [runner.current(batch) for batch in found[:number]]
        page = BatchList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(found) > number,
        )
        return reply(page, headers)

    @get(
        "/v1/batches/{batch_id:str}",
        summary="Describe a batch",
        tags=["batches"],
        operation_id="get_batch",
        operation_class=operation("Batch", links=FROM_BATCH),
        opt=_SCHEMAS,
    )
    async def get_batch(request: AnyRequest, batch_id: FromPath[str]) -> ASGIApp:
        headers = ignore(context, unknown_query(request, ()))
        return reply(runner.current(await _find(archive, batch_id)), headers)

    @post(
        "/v1/batches/{batch_id:str}/cancel",
        status_code=200,
        summary="Cancel a batch; what is done of it is kept",
        tags=["batches"],
        operation_id="cancel_batch",
        operation_class=operation("Batch", links=FROM_BATCH),
        opt=_SCHEMAS,
    )
    async def cancel_batch(request: AnyRequest, batch_id: FromPath[str]) -> ASGIApp:
        headers = ignore(context, unknown_query(request, ()))
        await _find(archive, batch_id)
        await runner.cancel(batch_id)
        batch = runner.current(await _find(archive, batch_id))
        if batch.status not in {"cancelling", "cancelled"}:
            raise InvalidRequestError(
                f"the batch {batch_id!r} cannot be cancelled: it is {batch.status}",
                code="batch_not_cancellable",
            )
        return reply(batch, headers)

    return [create_batch, list_batches, get_batch, cancel_batch]


class _Endpoints:
    """Which endpoints this server has."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._served: dict[str, bool] = {}

    async def check(self, endpoint: str) -> None:
        """Refuse an endpoint that this server does not have."""
        if endpoint not in self._served:
            answer = await self._context.ask("OPTIONS", endpoint, tenant=current_tenant())
            self._served[endpoint] = answer.status_code != 404
        if not self._served[endpoint]:
            raise InvalidRequestError(
                f"the endpoint {endpoint!r} is not served here",
                param="endpoint",
                code="unsupported_value",
            )


def _add(store: Store, record: BatchRecord, most: int) -> None:
    """Add a batch, if its file is there and its tenant has not too many."""
    file_id = record.batch.input_file_id
    file = store.database.find_file(record.tenant, file_id, now())
    if file is None:
        raise no_such_file(file_id, "input_file_id")
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"the file {file_id!r} was not uploaded with the purpose 'batch'",
            param="input_file_id",
            code="invalid_value",
        )
    others = [open_ for open_ in store.database.open_batches() if open_.tenant == record.tenant]
    if len(others) >= most:
        raise RateLimitError(
            f"{len(others)} batches are not over, of at most {most}; wait for one to end, or cancel one",
            code="too_many_batches",
            retry_after_s=_BUSY_RETRY_S,
        )
    store.database.add_batch(record)


def _page(store: Store, tenant: str, number: int, after: str | None) -> list[Batch]:
    place = None
    if after is not None:
        place = store.database.place_of_batch(tenant, after)
        if place is None:
            raise _no_such_batch(after, "after")
    return store.database.list_batches(tenant, limit=number, after=place)


async def _find(archive: Archive, batch_id: str) -> Batch:
    found = None
    if archive.is_used():
        found = await archive.run(_lookup, current_tenant(), batch_id)
    if found is None:
        raise _no_such_batch(batch_id)
    return found


def _no_such_batch(batch_id: str, param: str | None = None) -> RequestNotFoundError:
    return RequestNotFoundError(
        f"there is no batch {batch_id[:100]!r}; GET /v1/batches lists yours",
        param=param,
        code="batch_not_found",
    )


def _lookup(store: Store, tenant: str, batch_id: str) -> Batch | None:
    return store.database.find_batch(tenant, batch_id)
