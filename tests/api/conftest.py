"""A real server on a free loopback port, with the scripted model behind it."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
import uvloop

from stoker.api.app import build_app
from stoker.api.connection import bounded_protocol
from stoker.config import Config, ModelConfig
from stoker.discovery import load_plugins
from stoker.server import Server, build_server
from stoker.testing import ScriptedRuntime

BEGIN = 256
MODEL = "org/scripted"
DEADLINE_S = 30.0


def _wait_until(condition: Callable[[], bool]) -> None:
    """Poll; fail loudly when it never comes true."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the condition never became true")
        time.sleep(0.005)


class Running:
    """A server that runs in a thread of this process."""

    wait_until = staticmethod(_wait_until)

    def __init__(self, config: Config, route_handlers: Sequence[Any] = ()) -> None:
        self.server: Server = build_server(config, load_plugins(only=[]))
        app = self.server.app
        if route_handlers:
            app = build_app(config, self.server.router, route_handlers=route_handlers)
        self.server.start()
        self.auth: dict[str, str] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                http=bounded_protocol(config.server.body_timeout_s, config.server.max_connections),
                lifespan="on",
                log_config=None,
                access_log=False,
            )
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        _wait_until(lambda: self._uvicorn.started)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.loop = runner.get_loop()
            runner.run(self._uvicorn.serve(sockets=[self._socket]))

    def start_stopping(self) -> None:
        """Tell it to stop; several that are told at once stop side by side."""
        self._uvicorn.should_exit = True

    def stop(self) -> None:
        self.start_stopping()
        self._thread.join()
        self._socket.close()
        self.server.stop()

    @property
    def num_running(self) -> int:
        """Sequences that hold a lane."""
        return self.server.load(MODEL).num_running

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return self.server.load(MODEL).num_waiting

    @property
    def runtime(self) -> ScriptedRuntime:
        runtime = self.server._loader.runtimes[0]
        if not isinstance(runtime, ScriptedRuntime):
            raise TypeError(runtime)
        return runtime

    def wait_until_idle(self) -> None:
        """Until no sequence runs or waits, and the router knows of no request."""

        def idle() -> bool:
            return not (self.num_running or self.num_waiting or self.server.router.num_active)

        _wait_until(idle)

    def expected(self, prompt: str, num_tokens: int) -> str:
        """What the model writes after a text prompt."""
        return self.runtime.expected_text([BEGIN, *prompt.encode()], num_tokens)

    def check_still_serves(self) -> None:
        """A greedy completion still gives the right text, and nothing is left behind."""
        body = {"prompt": "still", "max_tokens": 5, "temperature": 0}
        response = httpx.post(f"{self.url}/v1/completions", json=body, headers=self.auth)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == self.expected("still", 5)
        self.wait_until_idle()


def make_config(options: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A configuration with one scripted model."""
    model = ModelConfig(model=f"scripted:{MODEL}", lanes=8, context=1024, options=options or {})
    plugins = sections.pop("plugins", {})
    # Several servers of a process are servers of one user: no two may keep batches in one folder.
    folder = tempfile.mkdtemp(dir=os.environ["XDG_DATA_HOME"])
    raw = {
        "models": [msgspec.to_builtins(model)],
        "logging": {"access": True},
        "responses": {"path": ":memory:"},
        "plugins": {**plugins, "batches": {"directory": folder, **plugins.get("batches", {})}},
        **sections,
    }
    return msgspec.convert(raw, Config)


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Running]]:
    """Start servers that live until the end of the session."""
    running: list[Running] = []

    def start(
        options: dict[str, Any] | None = None,
        *,
        route_handlers: Sequence[Any] = (),
        **sections: Any,
    ) -> Running:
        running.append(Running(make_config(options, **sections), route_handlers))
        return running[-1]

    yield start
    for server in running:
        server.start_stopping()
    for server in running:
        server.stop()


@pytest.fixture
def config() -> Config:
    """A configuration as the servers' own."""
    return make_config()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Running]) -> Running:
    """Open, lenient, fast."""
    return start_server()


@pytest.fixture(scope="session")
def slow_server(start_server: Callable[..., Running]) -> Running:
    """Takes its time for every step, so that there is a middle to break off in."""
    return start_server({"step_s": 0.004})


@pytest.fixture(scope="session")
def strict_server(start_server: Callable[..., Running]) -> Running:
    return start_server(server={"strict": True, "max_body_bytes": 10_000})


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
