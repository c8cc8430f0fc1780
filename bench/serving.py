"""Start a stoker server for a measurement, and stop it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(*arguments: str, cores: set[int] | None = None) -> Iterator[str]:
    """``stoker serve`` with ``arguments`` on a free port; yields its address without a slash."""
    port = free_port()
    command = [sys.executable, "-m", "stoker", "serve", *arguments, "--port", str(port)]
    environment = dict(os.environ, STOKER_LOGGING_ACCESS="false", STOKER_LOGGING_LEVEL="warning")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {process.returncode}: {command}")
            try:
                urllib.request.urlopen(f"{address}/ready", timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
