"""The middleware suite: on a real server in the test's process, in front of the scripted model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec
import pytest

from stoker.errors import RateLimitError
from stoker.interfaces import HttpAnswer, Middleware
from stoker.server import Server
from stoker.testing.app import AppHarness
from stoker.testing.conformance.base import check, fail
from stoker.testing.conformance.descriptors import DescriptorConformance
from stoker.testing.conformance.middleware_server import MODEL, ORDER, Stage
from stoker.testing.conformance.subjects import MiddlewareUnderTest, Refusal
from stoker.types import FinishReason

__all__ = ["MiddlewareConformance"]

_PATH = "/v1/completions"
_SHORT: Mapping[str, Any] = {"prompt": "one short request", "max_tokens": 6, "temperature": 0}
# Long enough that a client can hang up in its midst: the model takes a few milliseconds for a token.
_LONG: Mapping[str, Any] = {"prompt": "a long request", "max_tokens": 150, "temperature": 0}
_MANY = 6

Scenario = Callable[[AppHarness], Awaitable[None]]


class MiddlewareConformance(DescriptorConformance):
    """Proves a middleware right::

    class TestMine(MiddlewareConformance):
        @pytest.fixture
        def middleware(self):
            (info,) = my_package.stoker_register_middleware()
            too_many = Refusal(body={"prompt": "x"}, status=429, code="...", before=[...])
            return MiddlewareUnderTest(info=info, refusals=[too_many])
    """

    kind = "middleware"

    @pytest.fixture
    def middleware(self) -> MiddlewareUnderTest:
        """What is under test: fill this in."""
        fail(
            f"{type(self).__name__} says nothing of the middleware to test",
            "Override the fixture `middleware`; it returns a MiddlewareUnderTest.",
        )

    @pytest.fixture
    def subject(self, middleware: MiddlewareUnderTest) -> MiddlewareUnderTest:
        """The same, under the name that all suites know."""
        return middleware

    @pytest.fixture
    def stage(self, middleware: MiddlewareUnderTest) -> Stage:
        """The plugins and the configuration of the server that it is tried in."""
        return Stage(middleware)

    @pytest.fixture
    def build(
        self, middleware: MiddlewareUnderTest, stage: Stage
    ) -> Iterator[Callable[[], Middleware]]:
        """Builds the middleware, as a server does."""
        server = Server(stage.config(), stage.plugins)
        server.build()
        options = stage.plugins.options(middleware.info, server.config)
        arguments = (server,) if options is None else (server, options)
        yield lambda: middleware.info.factory(*arguments)
        server.stop()

    @pytest.fixture(autouse=True)
    def _quiet(self, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
        """Whatever stoker logs as an error, such as an ``on_finish`` that raised, is one."""
        yield
        errors = [
            record.getMessage()
            for record in caplog.get_records("call")
            if record.levelno >= logging.ERROR and record.name == "stoker.router"
        ]
        check(not errors, f"the router logged: {'; '.join(errors)}", "on_finish must not raise.")

    # ------------------------------------------------------------------ what passes

    def test_ordinary_requests_pass(self, stage: Stage) -> None:
        """A plain request is refused, changes its id, or is answered otherwise when it is streamed.

        To fix: return the request from ``on_request``, edited or not, with its ``request_id``; a stream that
        ``submit`` puts in place of the engine's must pass on every delta, and each sequence's last one.
        """

        async def scenario(app: AppHarness) -> None:
            for body in (_SHORT, {**_SHORT, "n": 2}, {**_SHORT, "prompt": "another"}):
                whole = await _ok(app, body)
                texts = _texts(whole)
                check(
                    len(texts) == body.get("n", 1) and all(texts),
                    f"{body} was answered with {texts!r}",
                )
                streamed = await _ok(app, {**body, "stream": True})
                check(
                    _streamed_texts(streamed) == texts,
                    f"{body} was answered {texts!r}, and {_streamed_texts(streamed)!r} as a stream",
                    "Pass on every batch of deltas that the inner stream yields.",
                )
                for answer in (whole, streamed):
                    request_id = answer.headers["x-request-id"]
                    check(
                        stage.probe.seen.count(request_id) == 1,
                        f"the next middleware saw {stage.probe.seen}, and not {request_id} once",
                        "on_request must not change request_id.",
                    )
            await app.wait_until_idle()
            check(
                sorted(stage.probe.ended) == sorted(stage.probe.seen),
                "requests began that never ended, or ended twice",
                "wait_until_over() of a stream must return once its records are there.",
            )

        _play(stage, scenario)

    def test_every_client_gets_its_own_answer(self, stage: Stage) -> None:
        """Clients that ask at the same time get other answers than one after another.

        To fix: keep what belongs to a request by its ``request_id``, not in the middleware.
        """
        bodies = [{**_SHORT, "prompt": f"client number {i}"} for i in range(_MANY)]
        alone: list[list[str]] = []

        async def one_by_one(app: AppHarness) -> None:
            alone.extend([_texts(await _ok(app, body)) for body in bodies])

        async def at_once(app: AppHarness) -> None:
            answers = await asyncio.gather(*(_ok(app, body) for body in bodies))
            check(
                [_texts(answer) for answer in answers] == alone,
                "clients that asked at the same time got other answers",
                "Share nothing between requests but what is the same for all of them.",
            )

        _play(stage, one_by_one)
        _play(stage, at_once)

    # ------------------------------------------------------------------ what is refused

    def test_refusals_reach_the_client(self, middleware: MiddlewareUnderTest, stage: Stage) -> None:
        """What must be refused passes, or the client gets another error than it should.

        To fix: raise the ``RequestError`` that says it (``RateLimitError``: 429, with ``retry_after_s``;
        ``InvalidRequestError``: 400; ...) in ``on_request`` or ``submit``: an exception of another kind is
        answered with 500.
        """
        if not middleware.refusals:
            pytest.skip("the middleware refuses nothing (MiddlewareUnderTest.refusals is empty)")
        for refusal in middleware.refusals:
            for stream in (False, True):
                self._refuse(stage, refusal, {**refusal.body, "stream": stream})

    def _refuse(self, stage: Stage, refusal: Refusal, body: Mapping[str, Any]) -> None:
        async def scenario(app: AppHarness) -> None:
            for before in refusal.before:
                await _ok(app, before)
            during = []
            for other in refusal.during:
                seen = len(stage.probe.seen)
                during.append(app.open(_PATH, {**other, "stream": True}))
                await app.wait_until(partial(stage.has_seen_more_than, seen))
            _check_refused(await app.ask(_PATH, body), refusal)
            check(
                stage.observer.refused.count(refusal.code) == 1,
                f"observers were told {stage.observer.refused} of one refusal",
                "Raise it once, from on_request or submit.",
            )
            for one in during:
                answer = await one.finish()
                check(
                    answer.status_code == 200 and b"[DONE]" in answer.body,
                    f"a request that ran was disturbed by the refusal of another: {answer.body!r}",
                )

        _play(stage, scenario, refusal.config)

    # ------------------------------------------------------------------ how requests end

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_hangs_up_is_given_up(self, stage: Stage, *, stream: bool) -> None:
        """A client goes away, and its request goes on, or what it held is never given back.

        To fix: ``abort`` of a stream that ``submit`` put in place must abort the inner one; what
        ``on_request`` took must be given back in ``on_finish``, whatever the records say.
        """

        async def scenario(app: AppHarness) -> None:
            for number in range(_MANY):
                body = {**_LONG, "prompt": f"nobody reads this {number}", "stream": stream}
                request = app.open(_PATH, body)
                await app.wait_until(partial(stage.has_seen_more_than, number))
                await request.hang_up()
            await app.wait_until_idle()
            ends = [record.finish_reason for record in stage.probe.records]
            check(
                set(ends) == {FinishReason.ABORT},
                f"clients hung up, and their requests ended with {sorted(set(ends))}",
                "abort() of your DeltaStream must call abort() of the one that it wraps.",
            )
            await _ok(app, _SHORT)

        _play(stage, scenario)

    def test_a_cancelled_request_tells_its_reader(self, stage: Stage) -> None:
        """A request is cancelled (``DELETE /v1/requests/{id}``), and its reader is not told so.

        To fix: ``cancel`` of a stream that ``submit`` put in place must cancel the inner one.
        """

        async def scenario(app: AppHarness) -> None:
            request = app.open(_PATH, {**_LONG, "stream": True}, headers={"x-request-id": "kit-1"})
            await request.first_byte()
            deleted = await app.ask("/v1/requests/kit-1", method="DELETE")
            check(deleted.status_code == 200, f"the request cannot be cancelled: {deleted.body!r}")
            answer = await request.finish()
            check(
                b"request_cancelled" in answer.body or b"cancelled" in answer.body,
                f"the reader of a cancelled request got {answer.body[-300:]!r}",
                "cancel(error) must end the stream with a delta that carries the error.",
            )
            await app.wait_until_idle()
            await _ok(app, _SHORT)

        _play(stage, scenario)

    @pytest.mark.parametrize(
        ("order", "status", "code"),
        [(ORDER.REFUSE, 429, "refused_by_the_suite"), (ORDER.CRASH, 500, "internal_error")],
    )
    def test_what_another_refuses_is_given_back(
        self, stage: Stage, order: str, status: int, code: str
    ) -> None:
        """A later middleware refuses requests, or fails, and what this one held for them is lost.

        To fix: give back in ``on_finish``, which is called with no records then.
        """

        async def scenario(app: AppHarness) -> None:
            for _ in range(_MANY):
                answer = await app.ask(_PATH, _SHORT, headers={ORDER.HEADER: order})
                check(
                    answer.status_code == status and _error(answer)["code"] == code,
                    f"another middleware's error came as {answer.status_code} {answer.body!r}",
                    "Let errors of others pass.",
                )
            await _ok(app, _SHORT)

        _play(stage, scenario)

    def test_a_failing_model_costs_one_request(self, stage: Stage) -> None:
        """The runtime fails, and requests after it fail, too, or its client is told nothing.

        To fix: give back in ``on_finish``, whatever the records say; a delta with an error must be passed on.
        """

        async def scenario(app: AppHarness) -> None:
            stage.fails = True
            for number in range(_MANY):
                answer = await app.ask(_PATH, {**_SHORT, "prompt": f"in vain {number}"})
                check(
                    answer.status_code == 500 and _error(answer)["message"],
                    f"the model failed, and the client got {answer.status_code} {answer.body!r}",
                    "Pass deltas with an error on.",
                )
            stage.fails = False
            await app.wait_until_idle()
            await _ok(app, {**_SHORT, "prompt": "well again"})

        _play(stage, scenario)

    def test_embeddings_pass(self, stage: Stage) -> None:
        """A request to embed fails: it has ``inputs``, and nobody generates anything for it.

        To fix: look at ``request.inputs`` before anything that is about generated tokens.
        """

        async def scenario(app: AppHarness) -> None:
            answer = await app.ask("/v1/embeddings", {"input": ["one", "two"], "model": MODEL})
            check(
                answer.status_code == 200,
                f"an embedding was answered with {answer.status_code} {answer.body!r}",
            )

        _play(stage, scenario)


def _play(stage: Stage, scenario: Scenario, config: Mapping[str, Any] | None = None) -> None:
    """Run a scenario on a server of its own."""
    stage.reset()

    async def run() -> None:
        async with AppHarness(stage.config(config), stage.plugins) as app:
            await scenario(app)

    asyncio.run(run())


async def _ok(app: AppHarness, body: Mapping[str, Any]) -> HttpAnswer:
    answer = await app.ask(_PATH, body)
    check(
        answer.status_code == 200,
        f"{dict(body)} was answered with {answer.status_code} {answer.body[:300]!r}",
        "With the configuration of the fixture, the suite's ordinary requests must pass.",
    )
    return answer


def _texts(answer: HttpAnswer) -> list[str]:
    choices = msgspec.json.decode(answer.body)["choices"]
    return [choice["text"] for choice in sorted(choices, key=lambda c: int(c["index"]))]


def _streamed_texts(answer: HttpAnswer) -> list[str]:
    texts: dict[int, str] = {}
    for line in answer.body.decode().splitlines():
        if line.startswith("data: {"):
            for choice in msgspec.json.decode(line[6:]).get("choices", ()):
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[index] for index in sorted(texts)]


def _error(answer: HttpAnswer) -> dict[str, Any]:
    """The error object of an answer; fails if it is none."""
    try:
        error = msgspec.json.decode(answer.body)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        fail(
            f"{answer.status_code} came with {answer.body[:300]!r}, which is no OpenAI error object",
            "Raise a stoker.RequestError and leave the answer to stoker.",
        )
    check(
        isinstance(error, dict) and error.keys() >= {"message", "type", "param", "code"},
        f"the error object has {error!r}, not message, type, param and code",
    )
    return dict(error)


def _check_refused(answer: HttpAnswer, refusal: Refusal) -> None:
    advice = f"Raise the RequestError of status {refusal.status} and code {refusal.code!r}."
    check(
        answer.status_code == refusal.status,
        f"{dict(refusal.body)} was answered with {answer.status_code} {answer.body[:300]!r}, not "
        f"{refusal.status}",
        advice,
    )
    error = _error(answer)
    check(
        error["code"] == refusal.code,
        f"the error's code is {error['code']!r}, not {refusal.code!r}",
        advice,
    )
    check(str(error["message"]).strip(), "the error has no message", "Say what to do about it.")
    if refusal.status == RateLimitError.status_code:
        check(
            float(answer.headers.get("retry-after", "-1")) >= 0,
            "a 429 came without Retry-After",
            "Give RateLimitError a retry_after_s: clients wait that long.",
        )
