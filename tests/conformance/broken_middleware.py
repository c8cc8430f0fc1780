"""Middleware with one mistake each, and which tests of the suite say so (run by test_catches.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

import msgspec
import pytest

from stoker import (
    Delta,
    DeltaStream,
    InvalidRequestError,
    Middleware,
    MiddlewareInfo,
    RateLimitError,
    Request,
    RequestError,
    RequestRecord,
    SequenceTrace,
)
from stoker.testing import MiddlewareConformance, MiddlewareUnderTest, Refusal

FORBIDDEN = {"prompt": "forbidden", "max_tokens": 5}


class Honest(Middleware):
    """Makes no mistake: refuses a word, and more than 20 requests at once."""

    def __init__(self, _context: Any = None) -> None:
        self.held: set[str] = set()

    async def on_request(self, request: Request) -> Request:
        self.refuse(request)
        if len(self.held) >= 20:
            raise RateLimitError("too many at once", retry_after_s=1.0)
        self.held.add(request.request_id)
        return request

    def refuse(self, request: Request) -> None:
        if list(request.prompt_token_ids[1:]) == list(b"forbidden"):
            raise InvalidRequestError("that word is forbidden", code="forbidden_word")

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        self.held.discard(request.request_id)


class Wrapped(DeltaStream):
    """Passes everything on."""

    def __init__(self, inner: DeltaStream) -> None:
        self.inner = inner

    @property
    def request(self) -> Request:
        return self.inner.request

    @property
    def records(self) -> Sequence[RequestRecord]:
        return self.inner.records

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self.inner.__aiter__()

    def abort(self) -> None:
        self.inner.abort()

    def cancel(self, error: RequestError) -> None:
        self.inner.cancel(error)

    async def wait_until_over(self) -> None:
        await self.inner.wait_until_over()

    def traces(self) -> list[SequenceTrace]:
        return self.inner.traces()


class Wraps(Honest):
    """Puts a stream of its own in place of the engine's."""

    stream: ClassVar[type[Wrapped]] = Wrapped

    def submit(self, request: Request, forward: Callable[[Request], DeltaStream]) -> DeltaStream:
        return self.stream(forward(request))


class Broken(MiddlewareConformance):
    """Base: ``Plugin`` is what is broken, ``fails`` the tests that must say so, and no others."""

    Plugin: ClassVar[type[Middleware]] = Honest
    status: ClassVar[int] = 400
    code: ClassVar[str] = "forbidden_word"
    fails: ClassVar[set[str]]

    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        info = MiddlewareInfo(api_version=1, name="broken", summary="Broken", factory=self.Plugin)
        refusal = Refusal(
            body=FORBIDDEN,
            status=self.status,
            code=self.code,
            during=[{"prompt": "while this runs", "max_tokens": 30}],
        )
        return MiddlewareUnderTest(info=info, entry_module="stoker_plugins", refusals=[refusal])


class TestNothingIsWrong(Broken):
    Plugin = Wraps
    fails: ClassVar = set()


class TestNeverGivesBack(Broken):
    class Plugin(Honest):
        async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
            if any(record.error is None for record in records):
                await super().on_finish(request, records)

        async def on_request(self, request: Request) -> Request:
            if len(self.held) >= 4:
                raise RateLimitError("too many at once", retry_after_s=1.0)
            return await super().on_request(request)

    fails: ClassVar = {
        "test_what_another_refuses_is_given_back[refuse-429-refused_by_the_suite]",
        "test_what_another_refuses_is_given_back[crash-500-internal_error]",
        "test_a_failing_model_costs_one_request",
        "test_every_client_gets_its_own_answer",
    }


class TestRefusesByABug(Broken):
    class Plugin(Honest):
        def refuse(self, request: Request) -> None:
            if list(request.prompt_token_ids[1:]) == list(b"forbidden"):
                raise ValueError("that word is forbidden")

    fails: ClassVar = {"test_refusals_reach_the_client"}


class TestSaysNotWhen(Broken):
    class Plugin(Honest):
        def refuse(self, request: Request) -> None:
            if list(request.prompt_token_ids[1:]) == list(b"forbidden"):
                raise RateLimitError("not now")

    status = 429
    code = "rate_limit_exceeded"
    fails: ClassVar = {"test_refusals_reach_the_client"}


class TestRenamesRequests(Broken):
    class Plugin(Honest):
        async def on_request(self, request: Request) -> Request:
            request = await super().on_request(request)
            return msgspec.structs.replace(request, request_id=f"mine-{request.request_id}")

    fails: ClassVar = {"test_ordinary_requests_pass"}


class TestRaisesAtTheEnd(Broken):
    class Plugin(Honest):
        async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
            await super().on_finish(request, records)
            records[0]  # there may be none

    fails: ClassVar = {
        "test_what_another_refuses_is_given_back[crash-500-internal_error]",
        "test_what_another_refuses_is_given_back[refuse-429-refused_by_the_suite]",
    }


class TestKeepsTheLastRequest(Broken):
    class Plugin(Honest):
        """Where requests overlap, they get each other's prompts."""

        async def on_request(self, request: Request) -> Request:
            import asyncio

            request = await super().on_request(request)
            self.prompt = request.prompt_token_ids
            await asyncio.sleep(0.005)
            return msgspec.structs.replace(request, prompt_token_ids=self.prompt)

    fails: ClassVar = {"test_every_client_gets_its_own_answer"}


class TestDropsAborts(Broken):
    class Plugin(Wraps):
        class stream(Wrapped):  # noqa: N801 - a class attribute
            def abort(self) -> None:
                """It should."""

    fails: ClassVar = {
        "test_a_client_that_hangs_up_is_given_up[True]",
        "test_a_client_that_hangs_up_is_given_up[False]",
    }


class TestDropsCancels(Broken):
    class Plugin(Wraps):
        class stream(Wrapped):  # noqa: N801 - a class attribute
            def cancel(self, error: RequestError) -> None:
                """It should."""

    fails: ClassVar = {"test_a_cancelled_request_tells_its_reader"}


class TestDropsText(Broken):
    class Plugin(Wraps):
        class stream(Wrapped):  # noqa: N801 - a class attribute
            async def __aiter__(self) -> AsyncIterator[list[Delta]]:  # type: ignore[override]
                async for batch in self.inner:
                    yield [msgspec.structs.replace(d, text="") if d.index else d for d in batch]

    fails: ClassVar = {"test_ordinary_requests_pass"}


class TestHidesErrors(Broken):
    class Plugin(Wraps):
        class stream(Wrapped):  # noqa: N801 - a class attribute
            async def __aiter__(self) -> AsyncIterator[list[Delta]]:  # type: ignore[override]
                async for batch in self.inner:
                    yield [
                        msgspec.structs.replace(d, error=None, finish_reason="stop")  # type: ignore[arg-type]
                        if d.error
                        else d
                        for d in batch
                    ]

    fails: ClassVar = {
        "test_a_failing_model_costs_one_request",
        "test_a_cancelled_request_tells_its_reader",
    }


class TestTripsOverEmbeddings(Broken):
    class Plugin(Honest):
        async def on_request(self, request: Request) -> Request:
            request = await super().on_request(request)
            if request.inputs:
                raise TypeError("what is this?")
            return request

    fails: ClassVar = {"test_embeddings_pass"}
