"""What a container leaves of a machine: CPU quota and memory limit of control groups, version 1 and 2.

A limit may stand in any group between a process's own and the root; the least one counts. Inside a container
the path in ``/proc/self/cgroup`` is often the host's and leads nowhere: then only the mounted root is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Limits", "read_limits"]

_ENDLESS = 1 << 60  # version 1 says "no limit" with a number beyond any memory


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups of this process allow.

    Attributes:
        cores: Cores' worth of time; ``None`` for no limit.
        memory: Bytes; ``None`` for no limit.
        memory_left: Of those, bytes that can still be taken: cached files make way.
    """

    cores: float | None = None
    memory: int | None = None
    memory_left: int | None = None


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits of this process; none where the system has no control groups.

    Args:
        root: Where ``proc`` and ``sys`` are; tests put a folder of their own here.
    """
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    memory = [found for folder in _folders(root, "memory") if (found := _memory(folder))]
    return Limits(
        cores=min(quotas, default=None),
        memory=min((limit for limit, _ in memory), default=None),
        memory_left=min((left for _, left in memory), default=None),
    )


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of a controller's groups, this process's own first."""
    base = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controllers, base / controller]
        else:
            continue
        for mount in mounts:
            place = mount / path.strip("/")
            while place.is_relative_to(mount):
                yield place
                place = place.parent


def _quota(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None  # "max", "-1", or nothing at all


def _memory(folder: Path) -> tuple[int, int] | None:
    for limit_name, used_name, cached_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(folder / limit_name), _read(folder / used_name)
        if limit.isdigit() and used.isdigit() and int(limit) < _ENDLESS:
            stat = dict(
                line.split(maxsplit=1)
                for line in _read(folder / "memory.stat").splitlines()
                if " " in line
            )
            left = int(limit) - int(used) + int(stat.get(cached_name, 0))
            return int(limit), max(0, min(left, int(limit)))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
