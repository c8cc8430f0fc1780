"""``POST /v1/responses``."""

import asyncio
from functools import partial

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.answering import answer, begin
from stoker.api.body import BodyDecoder
from stoker.api.incoming import AnyRequest, current_tenant, merged_headers
from stoker.api.responses.answer_schemas import ResponseObject
from stoker.api.responses.background import BackgroundJob, BackgroundJobs, JobStream
from stoker.api.responses.builder import ResponseBuilder
from stoker.api.responses.form import ResponseForm, new_response
from stoker.api.responses.parameters import check_fields, check_include
from stoker.api.responses.records import KeptResponse
from stoker.api.responses.request_schemas import ResponseRequest
from stoker.api.responses.requests import Prepared, Preparer
from stoker.api.responses.store import ResponseStore
from stoker.api.responses.translation import check_options, in_own_words, wants_logprobs
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.router import Router, add_warning

__all__ = ["Creator", "job_stream", "json_answer"]

_encode = msgspec.json.Encoder().encode
_decoder = BodyDecoder(ResponseRequest)


class Creator:
    """Answers requests for responses.

    Args:
        config: Limits and strictness.
        router: Where they go.
        store: Keeps them.
        jobs: Those that run in the background.
        preparer: Prepares requests.
    """

    def __init__(
        self,
        config: Config,
        router: Router,
        store: ResponseStore,
        jobs: BackgroundJobs,
        preparer: Preparer,
    ) -> None:
        self._config = config
        self._router = router
        self._store = store
        self._jobs = jobs
        self._preparer = preparer

    async def create(self, request: AnyRequest) -> ASGIApp:
        """Answer a request for a response."""
        strict = self._config.server.strict
        check = partial(check_fields, strict=strict)
        limit = self._config.server.max_body_bytes
        body, headers = await _decoder.read(request, limit, check)
        check_include(body.include, headers, strict=strict)
        check_options(body)
        prepared = await self._preparer.prepare(request, body)
        if prepared.warning:
            add_warning(headers, prepared.warning)
        store = self._stores(body, headers)
        response = new_response(body, prepared.call, prepared.call.model, store=store)
        builder = ResponseBuilder(response, with_logprobs=wants_logprobs(body))
        with in_own_words(prepared.turns, has_instructions=bool(body.instructions)):
            if body.background:
                return await self._start(request, body, prepared, builder, headers)
            tenant = current_tenant()

            def keep(whole: ResponseObject) -> asyncio.Future[str] | None:
                if not store:
                    return None
                return self._store.put(KeptResponse(response=whole, input=prepared.items), tenant)

            form = ResponseForm(builder, stream=bool(body.stream), keep=keep)
            return await answer(request, self._config, self._router, [prepared.call], headers, form)

    def _stores(self, body: ResponseRequest, headers: dict[str, str]) -> bool:
        """Whether the response is stored, and a warning if it is not although that was asked for."""
        if body.store is False:
            return False
        limits = self._config.responses
        if self._store.is_on and (limits.max_background or not body.background):
            return True
        if body.background:
            name = "max_background" if self._store.is_on else "max_responses"
            raise InvalidRequestError(
                f"'background' is not possible here: responses.{name} is 0",
                param="background",
                code="unsupported_parameter",
            )
        if body.store:
            add_warning(headers, "store ignored: this server stores no responses")
        return False

    async def _start(
        self,
        request: AnyRequest,
        body: ResponseRequest,
        prepared: Prepared,
        builder: ResponseBuilder,
        headers: dict[str, str],
    ) -> ASGIApp:
        tenant = current_tenant()
        self._jobs.check_room(tenant)
        run = await begin(request, self._router, [prepared.call])
        builder.response.model = run.model
        job = BackgroundJob(tenant, builder, prepared.items, with_events=bool(body.stream))
        try:
            queued = _encode(builder.response)
            await self._jobs.start(job, run)
        except BaseException as error:
            run.close(error)
            raise
        headers = merged_headers(run.headers, headers)
        if body.stream:
            return job_stream(job, 0, self._config, headers)
        return json_answer(queued, headers)


def job_stream(job: BackgroundJob, start: int, config: Config, headers: dict[str, str]) -> ASGIApp:
    """The events of a job from a sequence number on."""
    server = config.server
    return JobStream(job.follow(start), server.keep_alive_s, server.reader_timeout_s, headers)


def json_answer(body: bytes, headers: dict[str, str] | None = None) -> ASGIApp:
    """An answer of JSON."""
    return ASGIResponse(body=body, media_type="application/json", headers=headers)
