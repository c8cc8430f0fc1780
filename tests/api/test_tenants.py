"""Whose request it is: keys, trusted proxies, refusals, and what the log says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from litestar import get

from stoker.api.auth import KeyRing
from stoker.config import (
    Config,
    LoggingConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    TenantConfig,
)
from stoker.discovery import load_plugins
from stoker.errors import ConfigError
from stoker.keys import digest_of
from stoker.logs import CURRENT_REQUEST, setup_logging
from stoker.server import build_server

if TYPE_CHECKING:
    from conftest import Running

KEYS = {"sk-of-default": "default", "sk-of-a": "a", "sk-of-b": "b"}
TENANTS = [{"name": "a", "keys": [digest_of("sk-of-a")], "weight": 2.0}]


@get("/whoami", sync_to_thread=False)
def whoami() -> str:
    """The tenant of the request, as everything behind the gate sees it."""
    context = CURRENT_REQUEST.get()
    return "" if context is None else context.tenant


@pytest.fixture(scope="module")
def locked(
    start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Has keys of three tenants, and trusts this machine."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[[keys]]\ntenant = "b"\ndigest = "{digest_of("sk-of-b")}"\n')
    settings = {
        "api_keys": ["sk-of-default"],
        "tenant_keys_file": str(file),
        "trusted_proxies": ["127.0.0.0/8"],
    }
    server = start_server(server=settings, tenants=TENANTS, route_handlers=[whoami])
    server.auth = {"authorization": "Bearer sk-of-a"}
    return server


@pytest.fixture(scope="module")
def wary(start_server: Callable[..., Running]) -> Running:
    """Has no keys, and trusts another machine only."""
    return start_server(server={"trusted_proxies": ["10.0.0.1"]}, route_handlers=[whoami])


@pytest.fixture(scope="module")
def trusting(start_server: Callable[..., Running]) -> Running:
    """Has no keys, and trusts this machine."""
    return start_server(server={"trusted_proxies": ["127.0.0.1"]}, route_handlers=[whoami])


def ask(server: Running, *names: str, key: str | None = None, path: str = "/whoami") -> Any:
    headers = [("x-stoker-tenant", name.encode("latin-1")) for name in names]
    if key is not None:
        headers.append(("authorization", f"Bearer {key}".encode()))
    return httpx.get(server.url + path, headers=headers)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(("key", "tenant"), KEYS.items())
def test_a_key_says_whose_request_it_is(locked: Running, key: str, tenant: str) -> None:
    assert ask(locked, key=key).text == tenant
    body = {"prompt": "hi", "max_tokens": 2}
    headers = {"x-api-key": key}
    response = httpx.post(f"{locked.url}/v1/completions", json=body, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", digest_of("sk-of-a"), "sha256:"])
def test_no_or_a_wrong_key_is_refused_even_for_a_trusted_proxy(
    locked: Running, key: str | None
) -> None:
    for names in ((), ("a",)):
        response = ask(locked, *names, key=key)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    locked.check_still_serves()


def test_a_trusted_proxy_with_a_key_names_the_tenant(locked: Running) -> None:
    assert ask(locked, "somebody", key="sk-of-a").text == "somebody"
    assert ask(locked, "anonymous", key="sk-of-a").text == "anonymous"
    assert ask(locked, key="sk-of-a").text == "a"


def test_without_keys_a_trusted_proxy_needs_none(trusting: Running) -> None:
    assert ask(trusting).text == "anonymous"
    assert ask(trusting, "team.a").text == "team.a"


@pytest.mark.parametrize("names", [("",), ("a b",), ("*",), ("x" * 65,), ("\xfc",), ("a", "b")])
def test_what_is_no_tenant_is_named_as_such(trusting: Running, names: tuple[str, ...]) -> None:
    response = ask(trusting, *names, path="/v1/models")
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", "x-stoker-tenant")
    assert "x-stoker-tenant" in error["message"]
    trusting.check_still_serves()


def test_from_anybody_else_the_header_is_refused(wary: Running, server: Running) -> None:
    for other in (wary, server):
        response = ask(other, "a", path="/v1/models")
        assert response.status_code == 403
        error = error_of(response)
        assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
        assert "127.0.0.1" in error["message"]
        assert "[server] trusted_proxies" in error["message"]
        assert response.headers["x-request-id"]
        body = {"prompt": "hi", "max_tokens": 1}
        headers = {"x-stoker-tenant": "a"}
        generation = httpx.post(f"{other.url}/v1/completions", json=body, headers=headers)
        assert generation.status_code == 403
        other.check_still_serves()


def test_health_and_readiness_are_open_whatever_they_are_sent(
    locked: Running, wary: Running
) -> None:
    for server in (locked, wary):
        for path in ("/health", "/ready"):
            assert ask(server, "a b", path=path).status_code == 200


async def test_websockets_are_refused_as_well(wary: Running) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/socket",
        "headers": [(b"x-stoker-tenant", b"a")],
        "query_string": b"",
        "client": ("10.0.0.2", 1),
    }
    app: Any = wary.server.app
    await app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.slow
def test_new_keys_and_tenants_are_taken_while_it_serves(
    start_server: Callable[..., Running],
) -> None:
    running = start_server(server={"api_keys": ["old"]}, tenants=[{"name": "a", "weight": 2.0}])
    assert running.server.tenant("a").weight == 2.0
    assert ask(running, key="old", path="/v1/models").status_code == 200
    config = Config(
        server=ServerConfig(api_keys=["new"], port=1),
        tenants=[TenantConfig(name="a", weight=5.0), TenantConfig(name="*", weight=7.0)],
    )
    running.server.apply(config, KeyRing.load(config))
    assert ask(running, key="old", path="/v1/models").status_code == 401
    assert ask(running, key="new", path="/v1/models").status_code == 200
    assert running.server.tenant("a").weight == 5.0
    assert running.server.tenant("b").weight == 7.0
    assert running.server.config.tenants == config.tenants
    assert running.server.config.server.port != 1


def test_a_missing_file_of_keys_stops_the_start(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"tenant_keys_file.*no such file"):
        start_server(server={"tenant_keys_file": str(tmp_path / "none.toml")})


# --------------------------------------------------------------------------- logs


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Reads what was written to standard error; the logging set-up is undone afterwards."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield lambda: capsys.readouterr().err
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(False)


def test_the_access_log_names_the_tenant_unless_it_is_nobody(
    locked: Running, server: Running, log: Callable[[], str]
) -> None:
    setup_logging(LoggingConfig(format="json"))
    ask(locked, key="sk-of-b", path="/v1/models")
    ask(locked, key="wrong", path="/v1/models")
    ask(server, path="/v1/models")
    written = ""

    def access() -> list[dict[str, Any]]:
        nonlocal written
        written += log()
        lines = [json.loads(line) for line in written.splitlines()]
        return [line for line in lines if line["logger"] == "stoker.access"]

    server.wait_until(lambda: len(access()) >= 3)  # each comes after its answer
    told = access()
    seen = [(line["status"], line.get("tenant")) for line in told]
    assert sorted(seen, key=str) == [(200, "b"), (200, None), (401, None)]
    assert " tenant=b" in next(line["message"] for line in told if line.get("tenant"))
    assert "sk-of-b" not in written


def test_reservations_that_leave_nobody_else_a_lane_are_refused_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def build(*, lends: bool) -> None:
        config = Config(
            models=[ModelConfig(model="scripted:x", lanes=2)],
            tenants=[
                TenantConfig(name="a", reserved_lanes=1),
                TenantConfig(name="b", reserved_lanes=1),
            ],
            scheduler=SchedulerConfig(lend_reserved=lends),
        )
        build_server(config, load_plugins(only=[])).stop()

    with pytest.raises(ConfigError, match="2 lanes are reserved of a model that has 2"):
        build(lends=False)
    with caplog.at_level(logging.WARNING, logger="stoker.server"):
        build(lends=True)
    assert "2 lanes are reserved" in caplog.text
