"""What decides how long threads wait for each other: their number, how they wait, and who else computes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

import psutil

from stoker.interfaces import Finding

__all__ = ["check_company", "check_threads"]

_LOOK_S = 0.5
_COMPANY = 0.25  # cores; less than this no barrier notices
_MANY_ROUNDS = 1_000_000  # of spinning: several milliseconds


def check_threads(environ: Mapping[str, str], threads: int | None, cores: int) -> Iterator[Finding]:
    """What sets how many threads compute, and how they wait for each other.

    Args:
        environ: The environment.
        threads: ``[performance] threads``.
        cores: Cores that can be used.
    """
    if threads is not None and threads > cores:
        yield Finding(
            level="warning",
            topic="threads",
            message=f"[performance] threads = {threads}, but {cores} cores can be used: threads that wait "
            "for each other at every barrier wait for a core, too.",
            cure=f"Set it to {cores}, or leave it out.",
        )
    yield from _num_threads(environ.get("OMP_NUM_THREADS", ""), cores)
    policy = environ.get("OMP_WAIT_POLICY", "").lower()
    if policy == "active":
        yield Finding(
            level="warning",
            topic="threads",
            message="OMP_WAIT_POLICY=active: waiting threads spin. With any other busy process on their "
            "cores a step can take a hundred times as long.",
            cure="Unset it (the backends choose), or set OMP_WAIT_POLICY=passive.",
        )
    elif policy:
        yield Finding(
            level="note",
            topic="threads",
            message=f"OMP_WAIT_POLICY={policy} overrules what the backends would choose. Threads that sleep "
            "while they wait bear company; alone on their cores, threads that spin make single "
            "streams faster.",
        )
    else:
        yield Finding(
            level="ok",
            topic="threads",
            message="OMP_WAIT_POLICY is not set: each backend chooses how its threads wait.",
        )
    rounds = environ.get("GOMP_SPINCOUNT", "").lower()
    long = rounds in ("infinite", "infinity") or (rounds.isdigit() and int(rounds) > _MANY_ROUNDS)
    if rounds:
        yield Finding(
            level="warning" if long else "note",
            topic="threads",
            message=f"GOMP_SPINCOUNT={rounds}: threads of gcc's OpenMP spin so many rounds before they sleep"
            + (", which is far too long beside other work." if long else "."),
            cure="Unset it: the backends choose." if long else "",
        )


def _num_threads(value: str, cores: int) -> Iterator[Finding]:
    first = value.partition(",")[0].strip()
    if not value:
        return
    if not first.isdigit() or int(first) < 1:
        yield Finding(
            level="warning",
            topic="threads",
            message=f"OMP_NUM_THREADS={value!r} is no number of threads.",
            cure="Unset it.",
        )
    elif int(first) != cores:
        more = int(first) > cores
        yield Finding(
            level="warning" if more else "note",
            topic="threads",
            message=f"OMP_NUM_THREADS={first}, and {cores} cores can be used"
            + (
                ": more threads than cores wait for each other."
                if more
                else ": the others stay idle."
            ),
            cure="Unset it, and set [performance] threads if you must.",
        )


def check_company(cores: int, look_s: float = _LOOK_S) -> Iterator[Finding]:
    """What else keeps the cores busy.

    Args:
        cores: Cores that can be used.
        look_s: For how long to look.
    """
    before = _times()
    started = time.monotonic()
    time.sleep(look_s)
    after, wall_s = _times(), max(time.monotonic() - started, 1e-3)
    shares = {
        name: (after[name] - before[name]) / wall_s
        for name in after.keys() & before.keys()
        if name[0] != os.getpid()
    }
    busy = sorted(((share, name[2]) for name, share in shares.items()), reverse=True)
    taken = sum(share for share, _ in busy)
    if taken < _COMPANY:
        yield Finding(
            level="ok", topic="company", message="No other process keeps a core busy just now."
        )
        return
    names = ", ".join(f"{name} ({share:.1f})" for share, name in busy[:3] if share >= 0.05)
    if taken <= (psutil.cpu_count() or 1) - cores:
        text = f"Other processes keep {taken:.1f} cores busy ({names}); as many are none of ours."
        yield Finding(level="note", topic="company", message=text)
        return
    yield Finding(
        level="warning",
        topic="company",
        message=f"Other processes keep {taken:.1f} cores busy: {names}. Threads that wait for each other "
        "are slowed down by far more than that share.",
        cure="End them, or leave them cores: [performance] threads.",
    )


def _times() -> dict[tuple[int, float, str], float]:
    """Seconds of CPU that each process has used, by id, start and name."""
    times = {}
    for process in psutil.process_iter(["pid", "create_time", "name", "cpu_times"]):
        info = process.info
        used = info["cpu_times"]
        if used is not None:
            key = (info["pid"], info["create_time"] or 0.0, str(info["name"]))
            times[key] = float(used.user + used.system)
    return times
