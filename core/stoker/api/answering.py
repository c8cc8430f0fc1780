"""From an endpoint's calls to its HTTP answer, streamed or in one piece: the same for all that generate."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Receive

from stoker.api.errors import asgi_error
from stoker.api.events import StreamEncoder
from stoker.api.incoming import AnyRequest, merged_headers, unless_gone
from stoker.api.requests import EXPLAIN_HEADER, Explain, explain_request, wants_explanation
from stoker.api.run import Run, start
from stoker.api.streaming import EventStream, stream_events
from stoker.config import Config
from stoker.logs import CURRENT_REQUEST
from stoker.router import Call, Router

__all__ = ["AnswerForm", "answer", "begin"]


class AnswerForm(ABC):
    """How an endpoint tells what was generated.

    Attributes:
        stream: Whether as server-sent events.
    """

    stream: bool

    @abstractmethod
    def encoder(self, run: Run) -> StreamEncoder:
        """Makes the events of a stream."""

    @abstractmethod
    async def body(self, run: Run) -> bytes:
        """The answer in one piece, as JSON.

        Raises:
            Exception: The generation did not end well: the error to tell the client.
        """

    def more_headers(self) -> Mapping[str, str]:
        """Headers that are known once the body is."""
        return {}

    def error(self, error: Exception, headers: Mapping[str, str]) -> ASGIApp:
        """The answer of an error before the first byte."""
        return asgi_error(error, headers)


async def begin(request: AnyRequest, router: Router, calls: Sequence[Call]) -> Run:
    """Start calls in the name of whoever makes a request.

    Raises:
        RequestError: They were refused.
        ClientDisconnectedError: The client has gone.
    """
    context = CURRENT_REQUEST.get()
    if context is not None:
        context.user = calls[0].user
        for call in calls:
            call.tenant = context.tenant
    # Middleware may take its time; who does not wait for it must not be computed for.
    return await unless_gone(start(router, calls), request.receive)


async def answer(
    request: AnyRequest,
    config: Config,
    router: Router,
    calls: Sequence[Call],
    headers: Mapping[str, str],
    form: AnswerForm,
) -> ASGIApp:
    """Start calls and answer with what comes of them.

    Args:
        request: The HTTP request; its tenant pays.
        config: Timeouts.
        router: Where the calls go.
        calls: What to generate.
        headers: Headers of the answer, besides those that middleware wants.
        form: How to tell it.

    Raises:
        RequestError: They were refused.
        ClientDisconnectedError: The client has gone.
    """
    run = await begin(request, router, calls)
    headers = merged_headers(run.headers, headers)
    explain: Explain | None = None
    if wants_explanation(calls[0].headers):
        explain = partial(explain_request, run.tracked, config.scheduler.policy)
    try:
        if not form.stream:
            body = await unless_gone(form.body(run), request.receive)
            run.close()
            headers = merged_headers(headers, form.more_headers()) | _explained(explain)
            return ASGIResponse(body=body, media_type="application/json", headers=headers)
        encoder = form.encoder(run)
        events = stream_events(run, encoder, explain)
        server = config.server
        first = await _first(events, request.receive, server.keep_alive_s)
        return EventStream(
            first, events, run, encoder, headers, server.reader_timeout_s, server.keep_alive_s
        )
    except BaseException as error:
        run.close(error)
        if isinstance(error, Exception):
            return form.error(error, headers | _explained(explain))
        raise


async def _first(
    events: AsyncGenerator[bytes, None], receive: Receive, patience_s: float
) -> asyncio.Future[bytes]:
    """The first bytes of a stream, waited for as long as nobody grows impatient.

    The status waits for them: what goes wrong before the first token is an error, not an event.
    """
    first = asyncio.ensure_future(_next(events))
    try:
        await unless_gone(_settled(first, patience_s), receive)
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise
    return first


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _settled(first: asyncio.Future[bytes], patience_s: float) -> None:
    """Wait until it is there, or until patience has ended.

    Raises:
        Exception: It failed.
    """
    await asyncio.wait((first,), timeout=patience_s or None)
    if first.done():
        first.result()


def _explained(explain: Explain | None) -> dict[str, str]:
    return {} if explain is None else {EXPLAIN_HEADER: explain()}
