"""``/v1/responses``: create, retrieve, follow, cancel, delete, list what went in, count its tokens."""

from functools import partial

import msgspec
from litestar import delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.body import BodyDecoder
from stoker.api.incoming import AnyRequest, current_tenant
from stoker.api.openapi import generation_operation, json_operation
from stoker.api.responses.answer_schemas import (
    DeletedResponse,
    InputTokens,
    ItemList,
)
from stoker.api.responses.background import BackgroundJobs
from stoker.api.responses.creation import Creator, job_stream, json_answer
from stoker.api.responses.operations import (
    FOLLOWING,
    INPUT_ITEMS,
    RETRIEVAL,
    TOKEN_COUNT,
    query_bool,
    query_int,
    query_text,
)
from stoker.api.responses.parameters import check_token_fields
from stoker.api.responses.request_schemas import InputTokensRequest, ResponseRequest
from stoker.api.responses.requests import Preparer, all_items
from stoker.api.responses.store import ResponseStore
from stoker.api.responses.translation import check_truncation, in_own_words
from stoker.config import Config
from stoker.errors import InvalidRequestError, RequestNotFoundError
from stoker.router import Router, add_warning

__all__ = ["Responses"]

_PATH = "/v1/responses"
_ONE = f"{_PATH}/{{response_id:str}}"
_TAGS = ["responses"]
_MAX_SEQUENCE = 2**31 - 1
_MAX_LIMIT = 100
_DEFAULT_LIMIT = 20

_encode = msgspec.json.Encoder().encode
_decoder = BodyDecoder(ResponseRequest)
_token_decoder = BodyDecoder(InputTokensRequest)


class Responses:
    """The endpoints, what they keep, and what they run.

    Args:
        config: Limits and strictness.
        router: Where requests go.
    """

    def __init__(self, config: Config, router: Router) -> None:
        self._config = config
        self._router = router
        self._store = ResponseStore(config.responses)
        self._jobs = BackgroundJobs(self._store, config.responses.max_background)
        self._preparer = Preparer(config, router, self._store)
        self._creator = Creator(config, router, self._store, self._jobs, self._preparer)

    async def close(self) -> None:
        """End what runs in the background, and write what has to be kept."""
        await self._jobs.close()
        await self._store.close()

    # ------------------------------------------------------------------ what there is

    async def retrieve(self, request: AnyRequest, response_id: str) -> ASGIApp:
        """A response, or its events."""
        stream = query_bool(request, "stream")
        start = query_int(request, "starting_after", 0, _MAX_SEQUENCE, -1) + 1
        if start and not stream:
            raise InvalidRequestError(
                "'starting_after' is only allowed when 'stream' is true",
                param="starting_after",
                code="invalid_value",
            )
        tenant = current_tenant()
        job = self._jobs.find(response_id, tenant)
        if job is None:
            kept = await self._store.get(response_id, tenant)
            if not stream:
                return json_answer(_encode(kept.response))
            if kept.events is None:
                raise _cannot_follow()
            return _events(kept.events, start)
        if stream:
            if not job.with_events:
                raise _cannot_follow()
            return job_stream(job, start, self._config, {})
        job.builder.settle()
        return json_answer(_encode(job.builder.response))

    async def cancel(self, response_id: str) -> ASGIApp:
        """End a response that runs in the background; one that is over stays what it is."""
        tenant = current_tenant()
        job = self._jobs.find(response_id, tenant)
        if job is not None:
            await self._jobs.cancel(job)
            return json_answer(_encode(job.builder.response))
        kept = await self._store.get(response_id, tenant)
        if not kept.response.background:
            raise InvalidRequestError(
                "only responses made with 'background' can be cancelled; to end another one, hang up",
                param="response_id",
                code="invalid_value",
            )
        return json_answer(_encode(kept.response))

    async def remove(self, response_id: str) -> ASGIApp:
        """Forget a response; one that runs is ended."""
        tenant = current_tenant()
        job = self._jobs.find(response_id, tenant)
        if job is not None:
            await self._jobs.cancel(job)
            self._jobs.forget(response_id)
        if not await self._store.delete(response_id, tenant) and job is None:
            raise RequestNotFoundError(
                f"no response {response_id[:64]!r} is stored: it was not, was deleted, or has expired",
                param="response_id",
                code="response_not_found",
            )
        return json_answer(_encode(DeletedResponse(id=response_id)))

    async def input_items(self, request: AnyRequest, response_id: str) -> ASGIApp:
        """What a response was made from."""
        limit = query_int(request, "limit", 1, _MAX_LIMIT, _DEFAULT_LIMIT)
        order = query_text(request, "order") or "desc"
        if order not in {"asc", "desc"}:
            raise InvalidRequestError(
                f"'order' is {order[:50]!r}; use asc or desc", param="order", code="invalid_value"
            )
        tenant = current_tenant()
        kept = await self._store.get(response_id, tenant)
        items = list(kept.input)
        previous = kept.response.previous_response_id
        if previous is not None:
            items = all_items(await self._store.history(previous, tenant)) + items
        items = list({item.id: item for item in items}.values())  # some clients send all again
        if order == "desc":
            items.reverse()
        after = query_text(request, "after")
        if after is not None:
            ids = [item.id for item in items]
            if after not in ids:
                raise InvalidRequestError(
                    f"'after' is {after[:64]!r}, which is none of this response's items",
                    param="after",
                    code="invalid_value",
                )
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        listed = ItemList(
            data=page,
            first_id=page[0].id if page else "",
            last_id=page[-1].id if page else "",
            has_more=len(items) > limit,
        )
        return json_answer(_encode(listed))

    async def count_tokens(self, request: AnyRequest) -> ASGIApp:
        """How many tokens a response's prompt would have."""
        check = partial(check_token_fields, strict=self._config.server.strict)
        body, headers = await _token_decoder.read(
            request, self._config.server.max_body_bytes, check
        )
        check_truncation(body)
        prepared = await self._preparer.prepare(request, body)
        with in_own_words(prepared.turns, has_instructions=bool(body.instructions)):
            counted = InputTokens(input_tokens=await self._preparer.count(prepared.call))
        if prepared.warning:
            add_warning(headers, prepared.warning)
        return json_answer(_encode(counted), headers)

    # ------------------------------------------------------------------ handlers

    def handlers(self) -> list[HTTPRouteHandler]:
        """The route handlers."""

        @post(
            _PATH,
            status_code=200,
            summary="Answer text or items, and keep the response",
            tags=_TAGS,
            operation_id="create_response",
            operation_class=generation_operation("ResponseRequest", "ResponseObject", FOLLOWING),
        )
        async def create_response(request: AnyRequest) -> ASGIApp:
            return await self._creator.create(request)

        @get(
            _ONE,
            summary="Get a stored response, or follow one that runs in the background",
            tags=_TAGS,
            operation_id="get_response",
            operation_class=RETRIEVAL,
        )
        async def get_response(request: AnyRequest, response_id: FromPath[str]) -> ASGIApp:
            return await self.retrieve(request, response_id)

        @delete(
            _ONE,
            status_code=200,
            summary="Delete a stored response",
            tags=_TAGS,
            operation_id="delete_response",
            operation_class=json_operation("DeletedResponse"),
        )
        async def delete_response(response_id: FromPath[str]) -> ASGIApp:
            return await self.remove(response_id)

        @post(
            f"{_ONE}/cancel",
            status_code=200,
            summary="Cancel a response that runs in the background",
            tags=_TAGS,
            operation_id="cancel_response",
            operation_class=json_operation("ResponseObject", links=FOLLOWING),
        )
        async def cancel_response(response_id: FromPath[str]) -> ASGIApp:
            return await self.cancel(response_id)

        @get(
            f"{_ONE}/input_items",
            summary="List the items that a stored response was made from",
            tags=_TAGS,
            operation_id="list_input_items",
            operation_class=INPUT_ITEMS,
        )
        async def list_input_items(request: AnyRequest, response_id: FromPath[str]) -> ASGIApp:
            return await self.input_items(request, response_id)

        @post(
            f"{_PATH}/input_tokens",
            status_code=200,
            summary="Count the tokens of a response's prompt",
            tags=_TAGS,
            operation_id="count_input_tokens",
            operation_class=TOKEN_COUNT,
        )
        async def count_input_tokens(request: AnyRequest) -> ASGIApp:
            return await self.count_tokens(request)

        return [
            create_response,
            get_response,
            delete_response,
            cancel_response,
            list_input_items,
            count_input_tokens,
        ]


def _cannot_follow() -> InvalidRequestError:
    return InvalidRequestError(
        "this response cannot be streamed: it was not made with both 'background' and 'stream'",
        param="stream",
        code="invalid_value",
    )


def _events(events: bytes, start: int) -> ASGIApp:
    """Stored events from a sequence number on."""
    wanted = events.split(b"\n\n")[start:]
    return ASGIResponse(
        body=b"\n\n".join(wanted),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache"},
    )
