"""The parent's side of a measurement: starts the child, bounds its time, and reads how it ended.

A crash is an answer like any other: "crashes here (SIGSEGV)".
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from stoker_plugins.tune.messages import Answer, Job

__all__ = ["COMMAND", "run_job"]

COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "stoker", "tune", "--worker")
"""What is run; tests put something else here."""

_GRACE_S = 5.0  # to start and to end, beyond the job's own limit


def run_job(job: Job, command: Sequence[str] | None = None) -> Answer:
    """Do a job in a fresh process.

    Args:
        job: What to do.
        command: What to run instead of ``COMMAND``.
    """
    started_s = time.monotonic()
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            list(command or COMMAND),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's; its group can be ended as a whole
        )
    except OSError as error:
        return Answer(failure=f"the process could not be started: {error}")
    try:
        output, errors = process.communicate(
            msgspec.json.encode(job), timeout=job.limit_s + _GRACE_S
        )
    except subprocess.TimeoutExpired:
        end(process)
        return Answer(
            failure=f"takes longer than {job.limit_s:.0f} s", seconds=time.monotonic() - started_s
        )
    except BaseException:
        end(process)
        raise
    answer = _judge(process.returncode, output, errors)
    return msgspec.structs.replace(answer, seconds=time.monotonic() - started_s)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()


def _judge(code: int, output: bytes, errors: bytes) -> Answer:
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        if name == "SIGKILL":
            return Answer(failure="was killed, most likely because memory ran out")
        if name == "SIGALRM":
            return Answer(failure="takes too long")
        return Answer(failure=f"crashes here ({name})")
    if code == 0:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(output, type=Answer)
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    return Answer(failure=f"the process ended with code {code}: {last}")
