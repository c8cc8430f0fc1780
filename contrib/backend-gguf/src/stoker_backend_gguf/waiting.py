"""How OpenMP's threads wait for each other, and how that adapts to company on their cores.

A step has some hundred barriers. Threads that sleep at each are slow, above all on virtual machines, where
waking a core costs tens of microseconds; threads that spin wait a whole time slice whenever a neighbour has
taken the core of one of them, which can make a step a hundred times slower. So they spin while they are alone
and sleep while they are not.

gcc's libgomp reads ``GOMP_SPINCOUNT`` once, when it is loaded. But it spins for a hundred rounds only while
the process has more OpenMP threads than cores (see ``GOMP_SPINCOUNT`` in its manual), and that can be brought
about at any time: by a spare team of threads that sleep.
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
_PERIOD_S = 0.25
_LEAST_S = 0.02  # less computing than this in a period tells nothing
# Share of their time that the threads wanted a core and had none. Alone it is below 0.02; beside one process
# that keeps a core busy it was 0.43 to 0.46 on two cores, whether they spin or not.
_COMPANY, _ALONE = 0.15, 0.08
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
    return None if path is None else SpinControl(SpareTeam(path), _compute_times)


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
    """Lets threads spin long while they are alone on their cores, and shortly while they are not.

    Args:
        team: What shortens the spinning.
        times: Seconds that each computing thread has run, and has waited for a core, by thread.
        clock: Seconds.
    """

    def __init__(
        self,
        team: SpareTeam,
        times: Callable[[], dict[str, tuple[float, float]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._team = team
        self._times = times
        self._clock = clock
        self._due_s = 0.0
        self._seen: dict[str, tuple[float, float]] = {}
        self._calm = 0

    def look(self) -> None:
        """Adapt if it is time to; to be called after a step, on the thread that computed it."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _PERIOD_S
        times = self._times()
        before, self._seen = self._seen, times
        both = times.keys() & before.keys()
        ran_s = sum(times[thread][0] - before[thread][0] for thread in both)
        waited_s = sum(times[thread][1] - before[thread][1] for thread in both)
        if ran_s + waited_s < _LEAST_S:
            return
        share = waited_s / (ran_s + waited_s)
        self._calm = self._calm + 1 if share < _ALONE else 0
        if share > _COMPANY and not self._team.exists:
            logger.debug("company on the cores (%.0f %% of the time): threads sleep", share * 100)
            self._team.make()
        elif self._calm >= _CALM_PERIODS and self._team.exists:
            logger.debug("alone on the cores: threads spin")
            self._team.dismiss()


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
    except OSError:
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
