"""How OpenMP's threads wait for each other; it is read once, when torch brings OpenMP in.

A step of a model is hundreds of parallel regions. Threads that spin at their ends wait a whole time slice
whenever another process has taken the core of one of them: one busy neighbour makes a step a hundred times
slower. Threads that sleep lose some microseconds each time, and survive neighbours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

__all__ = ["keep_threads", "prepare_openmp", "set_threads"]

Policy = Literal["passive", "active", "default"]

_SHORT_SPIN = (
    "300"  # rounds, a few microseconds: what torch's short regions need, and no neighbour feels
)
_MAPS = Path("/proc/self/maps")

_chosen: list[Policy] = []


def prepare_openmp(policy: Policy) -> tuple[str, str | None]:
    """Set how OpenMP's threads wait, before torch loads the library that reads it.

    Args:
        policy: As the option says. ``OMP_WAIT_POLICY`` in the environment wins.

    Returns:
        The policy in effect, and a warning if it came too late.
    """
    if _chosen:
        return _chosen[0], None
    current = os.environ.get("OMP_WAIT_POLICY")
    if current is not None:
        return current.lower(), None
    if policy == "default":
        return "default", None
    if "torch" in sys.modules or _has_openmp():
        return "default", (
            "OpenMP was loaded before the torch backend, so its wait policy could not be set and steps may "
            "become very slow beside other work: set OMP_WAIT_POLICY=PASSIVE in the environment."
        )
    os.environ["OMP_WAIT_POLICY"] = policy
    if policy == "passive":
        os.environ.setdefault("GOMP_SPINCOUNT", _SHORT_SPIN)
    _chosen.append(policy)
    return policy, None


def set_threads(count: int) -> None:
    """Let operators use ``count`` threads, and one operator run at a time.

    The number holds for the thread that calls this and for those that have not computed yet; see
    ``keep_threads``.
    """
    import torch  # noqa: PLC0415 - not before prepare_openmp

    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except (
            RuntimeError
        ):  # parallel work has begun; a setting that only saves a few idle threads
            return


def keep_threads(count: int) -> None:
    """Let the calling thread's operators use ``count`` threads, whatever was set for another model."""
    import torch  # noqa: PLC0415 - not before prepare_openmp

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _has_openmp() -> bool:
    """Whether gcc's OpenMP is loaded already."""
    try:
        return "/libgomp" in _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
