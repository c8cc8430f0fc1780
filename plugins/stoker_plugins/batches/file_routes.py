"""``/v1/files``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import BinaryIO

from litestar import delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import ASGIApp

from stoker import ServerContext
from stoker_plugins.batches.archive import Archive, Store, no_such_file, now
from stoker_plugins.batches.database import StoredFile
from stoker_plugins.batches.documents import (
    AFTER,
    BINARY,
    FROM_FILE,
    ORDER,
    PURPOSE,
    UPLOAD,
    limit_parameter,
    operation,
)
from stoker_plugins.batches.forms import (
    AnyRequest,
    choice,
    current_tenant,
    ignore,
    limit,
    reply,
    unknown_query,
)
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.schemas import DeletedFile, FileExpiration, FileList, FileObject
from stoker_plugins.batches.upload import receive_upload

__all__ = ["file_routes"]

_MAX_LISTED = 10_000
_CHUNK = 256 * 1024
_LIST_QUERY = {"limit", "after", "order", "purpose"}
_SCHEMAS = {"schemas": (FileObject, FileList, DeletedFile, FileExpiration)}


def file_routes(
    context: ServerContext, archive: Archive, options: BatchesOptions
) -> list[HTTPRouteHandler]:
    """The handlers: everybody sees their own files only.

    Args:
        context: The server.
        archive: Where the files are.
        options: Bounds.
    """

    @post(
        "/v1/files",
        status_code=200,
        request_max_body_size=None,  # it is read, and bounded, piece by piece
        summary="Upload a file of requests, one JSON object a line",
        tags=["files"],
        operation_id="create_file",
        operation_class=operation("FileObject", body=UPLOAD, links=FROM_FILE),
        opt=_SCHEMAS,
    )
    async def create_file(request: AnyRequest) -> ASGIApp:
        tenant = current_tenant()
        file_id = f"file-{uuid.uuid4().hex}"
        try:
            upload = await receive_upload(request, archive, file_id, options.max_file_bytes)
            upload.check_purpose()
            headers = ignore(context, [*upload.ignored, *unknown_query(request, ())])
            ttl_s = min(upload.expires_after_s() or options.ttl_s, options.ttl_s)
            created = now()
            file = FileObject(
                id=file_id,
                bytes=upload.size or 0,
                created_at=created,
                filename=upload.filename,
                purpose="batch",
                expires_at=created + ttl_s,
            )
            await archive.run(Store.add, StoredFile(tenant=tenant, file=file))
        except BaseException:
            await asyncio.shield(archive.run(Store.discard, file_id))
            raise
        return reply(file, headers)

    @get(
        "/v1/files",
        summary="List your files",
        tags=["files"],
        operation_id="list_files",
        operation_class=operation(
            "FileList",
            parameters=[limit_parameter(_MAX_LISTED, _MAX_LISTED), AFTER, ORDER, PURPOSE],
        ),
        opt=_SCHEMAS,
    )
    async def list_files(request: AnyRequest) -> ASGIApp:
        headers = ignore(context, unknown_query(request, _LIST_QUERY))
        number = limit(request, _MAX_LISTED, _MAX_LISTED)
        order = choice(request, "order", ("asc", "desc"), "desc")
        purpose = choice(request, "purpose", ("batch", "batch_output"), None)
        after = request.query_params.get("after")
        if not archive.is_used():
            return reply(FileList(data=[], first_id="", last_id="", has_more=False), headers)
        page = await archive.run(
            _page, current_tenant(), number, after, purpose, newest_first=order == "desc"
        )
        return reply(page, headers)

    @get(
        "/v1/files/{file_id:str}",
        summary="Describe a file",
        tags=["files"],
        operation_id="get_file",
        operation_class=operation("FileObject"),
        opt=_SCHEMAS,
    )
    async def get_file(request: AnyRequest, file_id: FromPath[str]) -> ASGIApp:
        headers = ignore(context, unknown_query(request, ()))
        return reply(await _find(archive, file_id), headers)

    @get(
        "/v1/files/{file_id:str}/content",
        summary="Download a file",
        tags=["files"],
        operation_id="get_file_content",
        operation_class=operation(BINARY),
    )
    async def get_content(request: AnyRequest, file_id: FromPath[str]) -> ASGIApp:
        headers = ignore(context, unknown_query(request, ()))
        await _find(archive, file_id)
        # Opened now: what is deleted while it is sent can still be read.
        opened, size = await archive.run(_open, file_id)
        return _content(opened, size, headers)

    @delete(
        "/v1/files/{file_id:str}",
        status_code=200,
        summary="Delete a file",
        tags=["files"],
        operation_id="delete_file",
        operation_class=operation("DeletedFile"),
        opt=_SCHEMAS,
    )
    async def delete_file(request: AnyRequest, file_id: FromPath[str]) -> ASGIApp:
        headers = ignore(context, unknown_query(request, ()))
        if not archive.is_used():
            raise no_such_file(file_id)
        await archive.run(Store.delete, current_tenant(), file_id)
        return reply(DeletedFile(id=file_id), headers)

    return [create_file, list_files, get_file, get_content, delete_file]


async def _find(archive: Archive, file_id: str) -> FileObject:
    if not archive.is_used():
        raise no_such_file(file_id)
    return await archive.run(Store.find, current_tenant(), file_id)


def _page(
    store: Store,
    tenant: str,
    number: int,
    after: str | None,
    purpose: str | None,
    *,
    newest_first: bool,
) -> FileList:
    place = None
    if after is not None:
        place = store.database.place_of_file(tenant, after)
        if place is None:
            raise no_such_file(after, "after")
    found = store.database.list_files(
        tenant, now(), limit=number + 1, after=place, purpose=purpose, newest_first=newest_first
    )
    data = found[:number]
    return FileList(
        data=data,
        first_id=data[0].id if data else "",
        last_id=data[-1].id if data else "",
        has_more=len(found) > number,
    )


def _open(store: Store, file_id: str) -> tuple[BinaryIO, int]:
    path = store.path(file_id)
    try:
        return path.open("rb"), path.stat().st_size
    except FileNotFoundError:
        raise no_such_file(file_id) from None


def _content(opened: BinaryIO, size: int, headers: dict[str, str]) -> ASGIApp:
    async def chunks() -> AsyncIterator[bytes]:
        try:
            while data := await asyncio.to_thread(opened.read, _CHUNK):
                yield data
        finally:
            opened.close()

    if not size:
        opened.close()
        return ASGIResponse(media_type="application/octet-stream", headers=headers)
    return ASGIStreamingResponse(
        iterator=chunks(),
        media_type="application/octet-stream",
        headers={
            "content-length": str(size),
            "x-content-type-options": "nosniff",  # a page that somebody uploaded is not ours
            **headers,
        },
    )
