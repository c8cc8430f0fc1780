"""What an answer's headers say: of middleware, of errors, of tenants' limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from stoker import Middleware, RateLimitError, Request, UnavailableError

if TYPE_CHECKING:
    from conftest import Running

TEXT = "/v1/completions"
SHORT = {"prompt": "hi", "max_tokens": 3, "temperature": 0}


class Limits(Middleware):
    """Counts down, and says so; refuses with whatever it is given."""

    def __init__(self) -> None:
        self.remaining = 10
        self.refusal: Exception | None = None
        self.seen: list[Request] = []

    async def on_request(self, request: Request) -> Request:
        self.seen.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.remaining -= 1
        request.response_headers["x-ratelimit-remaining-requests"] = str(self.remaining)
        request.response_headers["x-stoker-warning"] = "be quick"
        return request


@contextmanager
def limited(server: Running) -> Iterator[Limits]:
    limits = Limits()
    server.server.router.middleware = [limits]
    try:
        yield limits
    finally:
        server.server.router.middleware = []


@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_middleware_reach_the_answer(server: Running, stream: bool) -> None:
    with limited(server):
        for remaining in ("9", "8"):
            body = {**SHORT, "stream": stream, "nonsense": 1}
            response = httpx.post(server.url + TEXT, json=body)
            assert response.status_code == 200
            assert response.headers["x-ratelimit-remaining-requests"] == remaining
            assert response.headers["x-stoker-warning"] == (
                "be quick, unknown parameter 'nonsense' ignored"
            )
        # Of several prompts the last one counts.
        response = httpx.post(server.url + TEXT, json={**SHORT, "prompt": ["a", "b", "c"]})
        assert response.headers["x-ratelimit-remaining-requests"] == "5"
        assert response.headers["x-stoker-warning"] == "be quick"
    assert "x-stoker-warning" not in httpx.post(server.url + TEXT, json=SHORT).headers
    server.wait_until_idle()


def test_they_reach_an_answer_that_fails_later(slow_server: Running) -> None:
    with limited(slow_server):
        body = {"prompt": "hi", "max_tokens": 1000, "timeout": 0.05}
        response = httpx.post(slow_server.url + TEXT, json=body)
    assert response.status_code == 408
    assert response.headers["x-ratelimit-remaining-requests"] == "9"
    slow_server.wait_until_idle()


@pytest.mark.parametrize(
    ("error", "seconds", "milliseconds"),
    [
        (RateLimitError("no", retry_after_s=1.2), "2", "1200"),
        (RateLimitError("no", retry_after_s=0.0001), "1", "1"),
        (RateLimitError("no", retry_after_s=30.00001), "31", "30001"),
        (RateLimitError("no", headers={"x-ratelimit-reset-requests": "1s"}), None, None),
        (UnavailableError("gone"), "5", "5000"),
        (UnavailableError("gone", retry_after_s=2), "2", "2000"),
    ],
)
def test_when_to_come_back(
    server: Running, error: Exception, seconds: str | None, milliseconds: str | None
) -> None:
    with limited(server) as limits:
        limits.refusal = error
        for stream in (False, True):
            response = httpx.post(server.url + TEXT, json={**SHORT, "stream": stream})
            assert response.status_code in {429, 503}
            assert response.headers.get("retry-after") == seconds
            assert response.headers.get("retry-after-ms") == milliseconds
            expected = "1s" if seconds is None else None
            assert response.headers.get("x-ratelimit-reset-requests") == expected
    server.check_still_serves()


@pytest.mark.slow
def test_browsers_may_read_them(start_server: Callable[..., Running]) -> None:
    server = start_server(server={"cors_origins": ["*"]})
    response = httpx.get(server.url + "/health", headers={"origin": "https://app.example"})
    exposed = {
        name.strip() for name in response.headers["access-control-expose-headers"].split(",")
    }
    assert {
        "retry-after", "retry-after-ms", "x-request-id", "x-stoker-explain", "x-stoker-warning",
        "x-ratelimit-limit-requests", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
    } <= exposed  # fmt: skip


UNHEEDED = "priority and service_tier have no effect under this scheduling policy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tenant", "asked", "priority", "warning"),
    [
        ("low", -3, 5, "priority -3 lowered to 5, the most urgent of this tenant"),
        ("low", None, 5, None),
        ("low", 7, 7, UNHEEDED),
        ("other", -3, 1, "priority -3 lowered to 1, the most urgent of this tenant"),
        ("free", -3, -3, UNHEEDED),
    ],
)
def test_a_tenant_is_no_more_urgent_than_its_ceiling(
    start_server: Callable[..., Running],
    tenant: str,
    asked: int | None,
    priority: int,
    warning: str | None,
) -> None:
    tenants: list[dict[str, Any]] = [
        {"name": "low", "priority_ceiling": 5},
        {"name": "free"},
        {"name": "*", "priority_ceiling": 1},
    ]
    server = start_server(server={"trusted_proxies": ["127.0.0.1"]}, tenants=tenants)
    with limited(server) as limits:
        body = {**SHORT, "priority": asked}
        headers = {"x-stoker-tenant": tenant}
        response = httpx.post(server.url + TEXT, json=body, headers=headers)
    (request,) = limits.seen
    assert (request.tenant, request.priority) == (tenant, priority)
    warnings = response.headers["x-stoker-warning"]
    assert warnings == (f"be quick, {warning}" if warning else "be quick")
    server.wait_until_idle()
