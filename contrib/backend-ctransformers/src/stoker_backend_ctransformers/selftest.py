"""A trial run in a child process: ctransformers ends the process where it should answer with an error.

Run as ``python -m stoker_backend_ctransformers.selftest PATH --json SETTINGS``: loads one instance, computes
a chunk at the start of the context and one at its end, and exits with 0; with 3 if ctransformers refuses the
file; by a signal if it crashes. Memory for intermediate results is of a fixed size, grown by what the first
token took; a chunk at the end of a long context may exceed it, which is a crash. Smaller chunks then do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from stoker import EngineError, ModelError
from stoker_backend_ctransformers.native import Instance, NativeSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMAND", "Outcome", "find_batch_size", "main", "run_selftest"]

COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "stoker_backend_ctransformers.selftest")
"""What is run, followed by the path, ``--json`` and the settings; tests put something else here."""

_REFUSED, _NOT_FINITE = 3, 4
_LOADED = "the model is loaded"
_BASE_LIMIT_S = 120.0
_LIMIT_S_PER_BYTE = 1 / 10e6  # a slow disk, and a slow CPU


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial run ended; all are empty if it passed.

    Attributes:
        crash: The signal that killed the child (``SIGSEGV``), or ``logits that are no numbers``.
        refused: ctransformers' reason not to load the model.
        problem: Why the test says nothing: it could not be run, or took too long.
        said: The last line that the child wrote.
        loaded: Whether the crash came after loading, in a computation.
    """

    crash: str = ""
    refused: str = ""
    problem: str = ""
    said: str = ""
    loaded: bool = False


def find_batch_size(path: Path, settings: NativeSettings) -> tuple[int, str]:
    """The largest batch size up to ``settings.batch_size`` that works, and a warning, or none.

    It is remembered in the user's cache folder for this library, this file and these settings.

    Raises:
        ModelError: ctransformers refuses the model, or crashes on it whatever the batch size.
    """
    stamp = _stamp_path(path, settings)
    with contextlib.suppress(OSError, ValueError):
        remembered = int(stamp.read_text(encoding="ascii"))
        if 1 <= remembered <= settings.batch_size:
            return remembered, ""
    batch_size = settings.batch_size
    while True:
        outcome = run_selftest(path, msgspec.structs.replace(settings, batch_size=batch_size))
        if outcome.problem:
            return batch_size, f"The self-test of the model says nothing: {outcome.problem}."
        if not outcome.crash and not outcome.refused:
            break
        if not outcome.loaded or batch_size == 1:
            raise _failure(path, settings, outcome)
        batch_size = max(1, batch_size // 4)
    with contextlib.suppress(OSError):  # no cache only costs time
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(str(batch_size), encoding="ascii")
    return batch_size, ""


def run_selftest(path: Path, settings: NativeSettings) -> Outcome:
    """Try a model with these settings in a child process."""
    command = [*COMMAND, os.fspath(path), "--json", msgspec.json.encode(settings).decode()]
    limit_s = _BASE_LIMIT_S + path.stat().st_size * _LIMIT_S_PER_BYTE
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"it did not end within {limit_s:.0f} s")
    except OSError as error:
        return Outcome(problem=f"it could not be started ({error})")
    loaded = _LOADED.encode() in done.stdout
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    said = " ".join(lines[-1].split())[:300] if lines else ""
    code = done.returncode
    if code == 0:
        return Outcome()
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return Outcome(crash=known.get(-code, f"signal {-code}"), said=said, loaded=loaded)
    if code == _NOT_FINITE:
        return Outcome(crash="logits that are no numbers", said=said)
    if code == _REFUSED:
        return Outcome(refused="; ".join(lines[:3])[:500] or "it does not say why")
    # Parts of ctransformers call exit() where they give up; a traceback of Python's is ours.
    if "Error" in said.partition(":")[0]:
        return Outcome(problem=f"it ended with code {code}: {said}")
    return Outcome(crash=f"exit({code})", said=said)


def _failure(path: Path, settings: NativeSettings, outcome: Outcome) -> ModelError:
    if outcome.refused:
        return ModelError(f"{path}: ctransformers refuses it: {outcome.refused}")
    said = f"; it said: {outcome.said}" if outcome.said else ""
    return ModelError(
        f"{path}: ctransformers fails on this model as {settings.model_type} "
        f"({outcome.crash} in the self-test{said}); use another file, a shorter context where the "
        "architecture lets you choose, or a GGUF file of the model with stoker-backend-gguf"
    )


def _stamp_path(path: Path, settings: NativeSettings) -> Path:
    """Where a pass is remembered; its name is a digest of all that could change the result."""
    parts = [msgspec.json.encode(settings).decode()]
    for file in (Path(settings.library), path.resolve()):
        found = file.stat()
        parts.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stoker" / "ctransformers-selftest" / digest


def main(arguments: Sequence[str]) -> int:
    """What the child does; returns its exit code."""
    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # a crash need not leave a core file
        import resource  # noqa: PLC0415 - not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path, _, settings_json = arguments
    settings = msgspec.json.decode(settings_json, type=NativeSettings)
    try:
        finite = _compute(Path(path), settings)
    except (ModelError, EngineError) as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    return 0 if finite else _NOT_FINITE


def _compute(path: Path, settings: NativeSettings) -> bool:
    """Compute the first and the last chunk of the context; whether the first one's logits are finite."""
    instance = Instance(path, settings)
    sys.stdout.write(_LOADED)
    sys.stdout.flush()
    length = min(settings.batch_size, instance.context_length)
    tokens = np.arange(length, dtype=np.int32) % instance.vocab_size
    instance.evaluate(tokens, 0)
    finite = bool(np.isfinite(instance.logits()).all())
    # What lies in the KV memory before it does not matter: only the sizes do.
    instance.evaluate(tokens, instance.context_length - length)
    instance.close()
    return finite


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
