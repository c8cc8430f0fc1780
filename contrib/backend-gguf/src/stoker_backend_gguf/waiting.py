"""How OpenMP's threads wait for each other, and how that adapts to company on their cores.

A step has some hundred barriers. Threads that sleep at each are slow, above all on virtual machines, where
waking a core costs tens of microseconds; threads that spin wait a whole time slice whenever a neighbour has
taken the core of one of them, which can make a step a hundred times slower. So they spin while they are alone
and sleep while they are not.

gcc's libgomp reads ``GOMP_SPINCOUNT`` once, when it is loaded. But it spins for a hundred rounds only while
the process has more OpenMP threads than cores (see ``GOMP_SPINCOUNT`` in its manual), and that can be brought
about at any time: by a spare team of threads that sleep. And a core that somebody else keeps busy is no use
to a step whose threads wait for each other: as many threads fewer are quicker.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stoker_backend_gguf.native import library_folder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SpareTeam", "SpinControl", "prepare_openmp", "spin_control"]

logger = logging.getLogger("stoker.backend.gguf")

Policy = Literal["adaptive", "passive", "active", "default"]

_LONG_SPIN = 10_000  # some hundred microseconds: hardly any wait within a step is longer
_SHORT_SPIN = 300  # a few microseconds
_TASKS = Path("/proc/self/task")
_PERIOD_S = 0.5  # looking takes a millisecond or two
_LEAST_S = 0.02  # less computing than this in a period tells nothing
# Cores that the computing threads wanted and did not get. Alone that is below 0.03; beside one process that
# keeps a core busy it was 0.86 to 0.93 on two cores, whether they spin or not.
_LOST, _NOT_LOST = 0.35, 0.2
# Cores that other processes use.
_COMPANY, _ALONE = 0.5, 0.25
_CALM_PERIODS = 8

_chosen: list[Policy] = []


def prepare_openmp(policy: Policy, spin_count: int | None = None) -> tuple[str, str | None]:
    """Set how OpenMP's threads wait, before the library that reads it is loaded.

    Args:
        policy: As the option says. ``adaptive`` is ``passive`` where it does not work: without libgomp, or if
            the kernel does not say how long threads wait for a core.
        spin_count: Rounds to spin before sleeping, while alone; ``None`` for the policy's own.

    Returns:
        The policy in effect, and a warning if it came too late.
    """
    current = os.environ.get("OMP_WAIT_POLICY")
    if _chosen:
        return _chosen[0], None
    if current is not None:
        return current.lower(), None
    if policy == "default":
        return "default", None
    if _is_loaded():
        return "default", (
            "OpenMP was loaded before the gguf backend, so its wait policy could not be set and steps may "
            "become very slow beside other work: set OMP_WAIT_POLICY=PASSIVE in the environment."
        )
    if policy == "adaptive" and ("GOMP_SPINCOUNT" in os.environ or not _can_adapt()):
        policy = "passive"
    if policy != "adaptive":
        os.environ["OMP_WAIT_POLICY"] = policy
    if spin_count is None:
        spin_count = {"adaptive": _LONG_SPIN, "passive": _SHORT_SPIN}.get(policy)
    if spin_count is not None:
        os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))
    _chosen.append(policy)
    return policy, None


@functools.cache
def spin_control() -> SpinControl | None:
    """The process's control of how long threads spin; ``None`` if they do not adapt."""
    if _chosen != ["adaptive"]:
        return None
    path = _libgomp()
    return None if path is None else SpinControl(SpareTeam(path), _compute_times, _OtherProcesses())


class SpareTeam:
    """More OpenMP threads than cores, asleep: as long as they exist, libgomp's threads hardly spin.

    Args:
        path: libgomp, as it is loaded.
    """

    def __init__(self, path: str) -> None:
        self._openmp = ctypes.CDLL(path)
        self._done: threading.Event | None = None

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return self._done is not None

    def make(self) -> None:
        """Make one, for whatever number of threads computes."""
        if self._done is None:
            self._done = threading.Event()
            threading.Thread(
                target=self._hold, args=(self._done,), name="stoker-openmp-spare", daemon=True
            ).start()

    def dismiss(self) -> None:
        """End it: its threads go when the one that made them does."""
        if self._done is not None:
            self._done.set()
            self._done = None

    def _hold(self, done: threading.Event) -> None:
        # Any function will do: the threads are wanted, not what they compute.
        nothing = ctypes.cast(self._openmp.omp_get_thread_num, ctypes.c_void_p)
        size = self._openmp.omp_get_num_procs() + 1
        self._openmp.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
        done.wait()


class SpinControl:
    """Lets threads spin long while they are alone on their cores; in company they sleep, and are fewer.

    Args:
        team: What shortens the spinning.
        times: Seconds that each computing thread has run, and has waited for a core, by thread.
        others: Cores that other processes have used since the last call.
        clock: Seconds.

    Attributes:
        num_given_up: By how many threads fewer steps are to be computed.
    """

    def __init__(
        self,
        team: SpareTeam,
        times: Callable[[], dict[str, tuple[float, float]]],
        others: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._team = team
        self._times = times
        self._others = others
        self._clock = clock
        self._due_s = 0.0
        self._seen: dict[str, tuple[float, float]] = {}
        self._calm = 0
        self.num_given_up = 0

    def look(self, num_threads: int) -> None:
        """Adapt if it is time to; to be called after a step, on the thread that computed it.

        Args:
            num_threads: How many threads compute a step of its runtime, if none are given up.
        """
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _PERIOD_S
        try:
            times, others = self._times(), self._others()
        except (OSError, ValueError):
            return  # no reason to fail a step
        before, self._seen = self._seen, times
        both = times.keys() & before.keys()
        ran_s = sum(times[thread][0] - before[thread][0] for thread in both)
        waited_s = sum(times[thread][1] - before[thread][1] for thread in both)
        if ran_s + waited_s < _LEAST_S:
            return
        computing = max(1, num_threads - self.num_given_up)
        lost = computing * waited_s / (ran_s + waited_s)
        if lost > _LOST:
            self._share_cores(min(lost, others), others, computing)
        # Threads that were given up lose nothing: then only the others' leaving tells.
        is_calm = others < _ALONE and lost < _NOT_LOST
        self._calm = self._calm + 1 if is_calm else 0
        if self._calm >= _CALM_PERIODS and self._team.exists:
            logger.debug("alone on the cores: threads spin")
            self._team.dismiss()
            self.num_given_up = 0

    def _share_cores(self, lost: float, others: float, computing: int) -> None:
        if not self._team.exists:
            logger.debug("company on the cores (%.1f of them): threads sleep", others)
            self._team.make()
        if lost > _COMPANY:
            self.num_given_up += min(round(lost), computing - 1)


class _OtherProcesses:
    """Cores of ours that other processes use, by the kernel's count of what each core did."""

    def __init__(self) -> None:
        self._seen = self._read()

    def __call__(self) -> float:
        before, self._seen = self._seen, self._read()
        wall_s, busy_s, own_s = (now - then for now, then in zip(self._seen, before, strict=True))
        return max(0.0, busy_s - own_s) / wall_s if wall_s > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: the clock's, of our cores together, of this process."""
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = 0
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *counts = line.split()
            if name in ours:
                user, nice, system, _idle, _io, irq, soft = map(int, counts[:7])
                ticks += user + nice + system + irq + soft
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def _compute_times() -> dict[str, tuple[float, float]]:
    """Of this thread and of all that are not Python's, which are OpenMP's and some that sleep."""
    others = {str(t.native_id) for t in threading.enumerate()} - {str(threading.get_native_id())}
    times = {}
    for task in os.listdir(_TASKS):  # noqa: PTH208 - names are what is wanted
        if task not in others:
            try:
                ran, waited, _ = (_TASKS / task / "schedstat").read_text().split()
            except (OSError, ValueError):  # it has ended
                continue
            times[task] = int(ran) * 1e-9, int(waited) * 1e-9
    return times


def _can_adapt() -> bool:
    """Whether the kernel tells how long threads wait, and llama.cpp's libraries use libgomp."""
    try:
        told = (_TASKS / str(threading.get_native_id()) / "schedstat").read_text().split()
        _OtherProcesses()
    except (OSError, ValueError):
        return False
    folder = library_folder()
    if len(told) != 3 or told[0] == "0" or folder is None:
        return False
    return any(b"libgomp" in path.read_bytes() for path in folder.glob("libggml*.so*"))


def _is_loaded() -> bool:
    return "llama_cpp" in sys.modules or _libgomp() is not None


def _libgomp() -> str | None:
    """The path of the libgomp that is loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libgomp" in line)
    return next(paths, None)
