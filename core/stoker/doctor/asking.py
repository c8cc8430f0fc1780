"""Backends are asked in processes of their own: what their libraries do to a process is a finding, too.

Run as ``python -P -m stoker.doctor.asking BACKEND``: reads models as JSON from standard input, writes
findings as JSON to standard output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from stoker.interfaces import Backend, Finding
from stoker.types import LocalModel

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.discovery import Plugins
    from stoker.interfaces import BackendInfo

__all__ = ["COMMAND", "ask_backend", "ask_backends", "main"]

COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "stoker.doctor.asking")
"""What is run, followed by the backend's name; tests put something else here."""

_LIMIT_S = 300.0


def ask_backends(
    plugins: Plugins, config: Config, models: Sequence[tuple[str, LocalModel]]
) -> Iterator[Finding]:
    """What the installed backends say of this machine and of their models.

    Args:
        plugins: The backends.
        config: Which of them are switched off.
        models: Backend -> a model that it loads.
    """
    for info in cast("list[BackendInfo]", plugins.active("backend", config)):
        name = info.name
        try:
            kind = type(info.factory())
        except Exception as error:  # noqa: BLE001  # somebody else's code
            yield Finding(
                level="warning",
                topic=name,
                message=f"The backend cannot be made: {type(error).__name__}: {error}.",
            )
            continue
        if kind.diagnose is not Backend.diagnose:  # who has nothing to say costs no process
            yield from ask_backend(name, [model for backend, model in models if backend == name])


def ask_backend(name: str, models: Sequence[LocalModel]) -> list[Finding]:
    """What one backend says; how its process ended if it says nothing.

    Args:
        name: The backend.
        models: The models that it loads.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [*COMMAND, name],
            input=msgspec.json.encode(models, enc_hook=str),  # paths
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        why = f"it did not end within {_LIMIT_S:.0f} s"
    except OSError as error:
        why = f"it could not be started ({error})"
    else:
        if done.returncode == 0:
            try:
                return msgspec.json.decode(done.stdout, type=list[Finding])
            except msgspec.DecodeError as error:
                why = f"its answer is none ({error})"
        else:
            why = _ending(done.returncode, done.stderr)
    message = f"The backend's look at itself failed: {why}."
    return [
        Finding(
            level="problem" if models else "warning",  # nothing asks for a backend without models
            topic=name,
            message=message,
            cure="Its library does not work on this machine: reinstall it, built from source.",
        )
    ]


def _ending(code: int, stderr: bytes) -> str:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"its process was killed by {names.get(-code, f'signal {-code}')}"
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"{lines[-1] if lines else 'it said nothing'} (code {code})"


def main(name: str) -> int:
    """What the child does; returns its exit code."""
    from stoker.discovery import load_plugins  # noqa: PLC0415 - the parent has done it already

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native libraries print is no answer
    models = msgspec.json.decode(
        sys.stdin.buffer.read(), type=list[LocalModel], dec_hook=lambda kind, value: kind(value)
    )
    backend = load_plugins().backends()[name].factory()
    with answers:
        answers.write(msgspec.json.encode(list(backend.diagnose(models))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
