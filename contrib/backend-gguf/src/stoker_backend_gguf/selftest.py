"""A trial run in a child process: native code that crashes must not take the server with it.

Run as ``python -m stoker_backend_gguf.selftest PATH --json SETTINGS``: loads the model, computes a chunk
of 40 tokens and a step of one, and exits with 0; with 3 and the reason on standard error if llama.cpp
refuses the model; by a signal if it crashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from stoker import ModelError
from stoker.machine import cpu_flags
from stoker_backend_gguf.batch import Batch
from stoker_backend_gguf.native import NativeContext, NativeModel, NativeSettings, library_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMAND", "Outcome", "main", "run_selftest"]

COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "stoker_backend_gguf.selftest")
"""What is run, followed by the path, ``--json`` and the settings; tests put something else here."""

_REFUSED, _NOT_FINITE = 3, 4
_CHUNK = 40
_CELLS = 256
_BASE_LIMIT_S = 120.0
_LIMIT_S_PER_BYTE = 1 / 20e6  # a slow disk


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial run ended.

    Attributes:
        crash: How the computation failed: the signal that killed the child (``SIGSEGV``), or
            ``logits that are no numbers``; empty if it did not.
        refused: llama.cpp's reason not to load the model, empty if it had none.
        problem: Why the test says nothing (it could not be run, or took too long), empty if it does.
    """

    crash: str = ""
    refused: str = ""
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the model was loaded and computed."""
        return not (self.crash or self.refused or self.problem)


def run_selftest(path: Path, settings: NativeSettings) -> Outcome:
    """Try a model with these settings, but one lane and a small context, in a child process.

    A pass is remembered in the user's cache folder for this build of the library, this file, these
    settings and this CPU.
    """
    small = msgspec.structs.replace(
        settings, lanes=1, cells=_CELLS, n_batch=_CHUNK, use_mlock=False, kv_unified=False
    )
    stamp = _stamp_path(path, small)
    if stamp is not None and stamp.exists():
        return Outcome()
    command = [*COMMAND, os.fspath(path), "--json", msgspec.json.encode(small).decode()]
    limit_s = _BASE_LIMIT_S + path.stat().st_size * _LIMIT_S_PER_BYTE
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"it did not end within {limit_s:.0f} s")
    except OSError as error:
        return Outcome(problem=f"it could not be started ({error})")
    outcome = _judge(done.returncode, done.stderr)
    if outcome.passed and stamp is not None:
        with contextlib.suppress(OSError):  # no cache only costs time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return outcome


def _judge(code: int, stderr: bytes) -> Outcome:
    if code == 0:
        return Outcome()
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return Outcome(crash=known.get(-code, f"signal {-code}"))
    if code == _NOT_FINITE:
        return Outcome(crash="logits that are no numbers")
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    if code == _REFUSED:
        return Outcome(refused=last)
    return Outcome(problem=f"it ended with code {code}: {last}")


def _stamp_path(path: Path, settings: NativeSettings) -> Path | None:
    """Where a pass is remembered; its name is a digest of all that could change the result."""
    folder = library_folder()
    if folder is None:
        return None
    try:
        files = [*sorted(folder.iterdir()), path.resolve()]
        parts = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    except OSError:
        return None
    parts += [msgspec.json.encode(settings).decode(), platform.machine(), *sorted(cpu_flags())]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stoker" / "gguf-selftest" / digest


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
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    return 0 if finite else _NOT_FINITE


def _compute(path: Path, settings: NativeSettings) -> bool:
    """Load the model, compute a chunk and a single token; whether all logits are finite."""
    model = NativeModel(path, settings)
    context = NativeContext(path, model, settings)
    lib = model.lib
    vocab_size = lib.llama_vocab_n_tokens(model.vocab)
    batch = Batch(lib, _CHUNK, 1)
    finite = True
    start = 0
    for count in (_CHUNK, 1):
        positions = np.arange(start, start + count, dtype=np.int32)
        batch.fill(positions % vocab_size, positions, positions * 0, positions >= start + count - 1)
        code = lib.llama_decode(context.pointer, batch.struct)
        if code:
            raise ModelError(f"{path}: llama.cpp cannot compute a step (code {code})")
        row = np.ctypeslib.as_array(lib.llama_get_logits(context.pointer), (vocab_size,))
        finite = finite and bool(np.isfinite(row).all())
        start += count
    context.close()
    model.close()
    return finite


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
