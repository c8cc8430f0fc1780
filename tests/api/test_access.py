"""Keys, CORS, request ids, logs, and routes of plugins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from litestar import Controller, get, post
from litestar.exceptions import PermissionDeniedException
from litestar.params import FromPath

from stoker.api.app import build_app
from stoker.api.auth import load_keys
from stoker.config import Config, LoggingConfig, ServerConfig
from stoker.errors import (
    ConfigError,
    OutOfMemoryError,
    PluginConflictError,
    RateLimitError,
)
from stoker.logs import setup_logging

if TYPE_CHECKING:
    from conftest import Running

KEY, FILE_KEY = "sk-first-key", "sk-from-file"
ORIGIN = "https://app.example"
PATHS = ["/v1/models", "/v1/chat/completions", "/schema/openapi.json", "/nonsense", "/", "//health"]


@pytest.fixture(scope="module")
def locked(
    start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Needs a key; browsers may call it from one origin."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who: the tests\n\n{FILE_KEY}  # the other one\n")
    settings = {"api_keys": [KEY], "api_keys_file": str(file), "cors_origins": [ORIGIN]}
    server = start_server(server=settings)
    server.auth = {"authorization": f"Bearer {KEY}"}
    return server


# --------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": "Bearer \u00ff\u00fe"},
        {"x-api-key": "wrong"},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_without_a_right_key_nothing_is_open(
    locked: Running, path: str, headers: dict[str, str]
) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = httpx.get(
        httpx.URL(locked.url + "/x").copy_with(raw_path=path.encode()), headers=raw
    )
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["type"] == "authentication_error"
    assert error["code"] == "invalid_api_key"
    assert KEY not in response.text
    locked.check_still_serves()


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {FILE_KEY}"},
        {"x-api-key": FILE_KEY},
        {"authorization": "Basic abc", "x-api-key": KEY},
    ],
)
def test_a_right_key_opens(locked: Running, headers: dict[str, str]) -> None:
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200
    assert httpx.get(locked.url + "/nonsense", headers=headers).status_code == 404
    assert httpx.put(locked.url + "/v1/models", headers=headers).status_code == 405
    assert httpx.get(locked.url + "/schema/openapi.json", headers=headers).status_code == 200


def test_health_and_readiness_need_no_key(locked: Running) -> None:
    assert httpx.get(locked.url + "/health").status_code == 200
    assert httpx.get(locked.url + "/ready").status_code == 200


def test_refused_before_the_body_is_read(locked: Running) -> None:
    response = httpx.post(locked.url + "/v1/completions", content=b"x" * 10_000_000)
    assert response.status_code == 401
    locked.check_still_serves()


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for content in ("", "# only a comment\n\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="holds no key"):
            load_keys(ServerConfig(api_keys_file=str(file)))
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(ServerConfig(api_keys_file=str(file)))
    with pytest.raises(ConfigError, match=r"api_keys_file.*cannot be read"):
        load_keys(ServerConfig(api_keys_file=str(tmp_path / "none")))
    file.write_text("with space\n")
    with pytest.raises(ConfigError, match="printable") as caught:
        load_keys(ServerConfig(api_keys_file=str(file)))
    assert "with space" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"server\.api_keys"):
        load_keys(ServerConfig(api_keys=["fine", ""]))


@pytest.mark.parametrize("key", ["wrong", KEY])
async def test_websockets_need_a_key_too(locked: Running, key: str) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer " + key.encode())]
    scope = {"type": "websocket", "path": "/socket", "headers": headers, "query_string": b""}
    app: Any = locked.server.app
    await app(scope, receive, send)
    (message,) = sent  # with a key it is only unknown
    assert (message["type"], message["code"] == 1008) == ("websocket.close", key == "wrong")


# --------------------------------------------------------------------------- CORS


def test_preflight_needs_no_key(locked: Running) -> None:
    headers = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = httpx.options(locked.url + "/v1/chat/completions", headers=headers)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    bad = httpx.options(
        locked.url + "/v1/models", headers={**headers, "origin": "https://evil.example"}
    )
    assert bad.status_code == 400
    assert "access-control-allow-origin" not in bad.headers


def test_options_that_is_no_preflight_needs_a_key(locked: Running) -> None:
    assert httpx.options(locked.url + "/v1/models").status_code == 401
    assert httpx.options(locked.url + "/v1/models", headers={"origin": ORIGIN}).status_code == 401


def test_answers_can_be_read_by_the_origin(locked: Running) -> None:
    own = {"origin": ORIGIN}
    for headers, status in ((own, 401), ({**own, **locked.auth}, 200)):
        response = httpx.get(locked.url + "/v1/models", headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
    other = {"origin": "https://evil.example"}
    for headers in (other, {**other, **locked.auth}):
        response = httpx.get(locked.url + "/v1/models", headers=headers)
        assert "access-control-allow-origin" not in response.headers


def test_without_origins_there_is_no_cors(server: Running) -> None:
    response = httpx.get(server.url + "/v1/models", headers={"origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers


# --------------------------------------------------------------------------- request ids


@pytest.mark.parametrize("given", ["abc", "A-z_0.9:/+=", "x" * 128])
def test_a_good_request_id_comes_back(server: Running, given: str) -> None:
    headers = {"x-request-id": given}
    assert httpx.get(server.url + "/nope", headers=headers).headers["x-request-id"] == given
    body = {"prompt": "hi", "max_tokens": 1}
    response = httpx.post(server.url + "/v1/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == given
    assert response.json()["id"] == f"cmpl-{given}"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", 'a"b', "a\\b", "ü"])
def test_a_bad_request_id_is_replaced(server: Running, given: str) -> None:
    headers = {"x-request-id": given.encode("latin-1")}
    answered = httpx.get(server.url + "/health", headers=headers).headers["x-request-id"]
    assert answered != given
    assert len(answered) == 32


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


def test_access_log_as_json(server: Running, log: Callable[[], str]) -> None:
    setup_logging(LoggingConfig(format="json"))
    body = {"prompt": "very secret prompt", "max_tokens": 3}
    headers = {"x-request-id": "the-id", "authorization": "Bearer very-secret-key"}
    for stream in (False, True):
        httpx.post(
            f"{server.url}/v1/completions?token=very-secret",
            json={**body, "stream": stream},
            headers=headers,
        )
    httpx.get(f"{server.url}/a%0Ab")
    server.wait_until_idle()
    written = ""

    def access() -> list[dict[str, Any]]:
        nonlocal written
        written += log()
        lines = [json.loads(line) for line in written.splitlines()]
        return [line for line in lines if line["logger"] == "stoker.access"]

    server.wait_until(lambda: len(access()) >= 3)  # each comes after its answer
    told = access()
    (strange,) = (line for line in told if line["method"] == "GET")
    plain, streamed = (line for line in told if line["method"] == "POST")
    for line in (plain, streamed):
        assert line["request_id"] == "the-id"
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert line["model"] == "org/scripted"
        assert (line["prompt_tokens"], line["completion_tokens"]) == (19, 3)
        assert isinstance(line["duration_ms"], float)
        assert "error" not in line
    assert (strange["path"], strange["status"]) == ("/a%0Ab", 404)
    assert "secret" not in written


def test_pretty_log_cannot_be_forged(log: Callable[[], str]) -> None:
    setup_logging(LoggingConfig(format="pretty", level="warning"))
    logging.getLogger("stoker.test").warning("one\nERROR \x1b[31mtwo %s", "\x9bthree")
    logging.getLogger("stoker.test").info("not written")
    # The line of another test's last request may come late.
    (line,) = [line for line in log().splitlines() if "stoker.access" not in line]
    assert line.endswith("stoker.test: one\\x0aERROR \\x1b[31mtwo \\x9bthree")


def test_setup_logging_twice_writes_once(log: Callable[[], str]) -> None:
    setup_logging(LoggingConfig(format="json"))
    setup_logging(LoggingConfig(format="json", level="debug"))
    try:
        raise ValueError("a reason")
    except ValueError:
        logging.getLogger("stoker.test").exception("failed", extra={"fields": {"path": Path("x")}})
    (line,) = log().splitlines()
    record = json.loads(line)
    assert record["message"] == "failed"
    assert record["level"] == "error"
    assert record["path"] == "x"
    assert "ValueError: a reason" in record["exception"]


# --------------------------------------------------------------------------- routes of plugins


@get("/plugin/{what:str}")
async def misbehave(what: FromPath[str]) -> dict[str, str]:
    errors: dict[str, Exception] = {
        "bug": RuntimeError("a secret of the machine"),
        "limit": RateLimitError("slow down", retry_after_s=1.2),
        "memory": OutOfMemoryError("the model does not fit"),
        "forbidden": PermissionDeniedException("not for you"),
    }
    if what in errors:
        raise errors[what]
    return {"what": what}


@pytest.mark.slow
def test_errors_of_plugin_routes(
    start_server: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(route_handlers=[misbehave])

    def ask(what: FromPath[str]) -> tuple[httpx.Response, dict[str, Any]]:
        response = httpx.get(f"{server.url}/plugin/{what}", headers={"x-request-id": "my-id"})
        return response, response.json()

    assert ask("fine")[1] == {"what": "fine"}
    response, body = ask("bug")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "my-id" in body["error"]["message"]
    assert "a secret of the machine" in caplog.text  # with its traceback, in the log
    response, body = ask("limit")
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    assert body["error"]["type"] == "rate_limit_error"
    response, body = ask("memory")
    assert response.status_code == 507
    response, body = ask("forbidden")
    assert response.status_code == 403
    assert body["error"]["message"] == "not for you"
    server.check_still_serves()


@get("/health")
async def another_health() -> None:
    return


@get("/v1/models/{other:path}")
async def another_model(other: FromPath[str]) -> None:
    return


@get("/schema")
async def another_schema() -> None:
    return


@get("/mine")
async def mine() -> None:
    return


class AlsoMine(Controller):
    path = "/mine"

    @post("/")
    async def create(self) -> None:
        return


@pytest.mark.parametrize(
    ("handlers", "path"),
    [
        ([another_health], "/health"),
        ([another_schema], "/schema"),
        ([mine, AlsoMine], "/mine"),
        ([another_model], "/v1/models"),
    ],
)
def test_taken_paths_are_refused(
    server: Running, config: Config, handlers: list[Any], path: str
) -> None:
    with pytest.raises(PluginConflictError, match=path):
        build_app(config, server.server.router, route_handlers=handlers)
