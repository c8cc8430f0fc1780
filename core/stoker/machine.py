"""What this machine has to offer, as far as this process may use it: cores, memory, features of the CPU.

Plugins may use this, backends above all. Containers limit CPU and memory by control groups, version 1 and 2.
A limit may stand in any group between a process's own and the root; the least one counts. Inside a container
the path in ``/proc/self/cgroup`` is often the host's and leads nowhere: then only the mounted root is there.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Limits",
    "available_memory",
    "cpu_flags",
    "cpu_name",
    "format_bytes",
    "read_limits",
    "usable_cores",
]

_ROOT = Path("/")
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


def read_limits(root: Path = _ROOT) -> Limits:
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


def usable_cores(limits: Limits | None = None) -> int:
    """Cores this process may use: by its affinity, and by its container's quota, rounded up.

    Args:
        limits: Of the control groups; by default those in force.
    """
    limits = read_limits() if limits is None else limits
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return cores if limits.cores is None else max(1, min(cores, math.ceil(limits.cores)))


def available_memory(limits: Limits | None = None) -> int:
    """Bytes that can be taken without swapping, by the system and by the container.

    Args:
        limits: Of the control groups; by default those in force.
    """
    import psutil  # noqa: PLC0415 - slow to import, and only this needs it

    limits = read_limits() if limits is None else limits
    available = int(psutil.virtual_memory().available)
    return available if limits.memory_left is None else min(available, limits.memory_left)


def cpu_name(root: Path = _ROOT) -> str:
    """The CPU as its maker names it; where the system does not tell, its architecture.

    Args:
        root: Where ``proc`` is, as for ``read_limits``.
    """
    name = _cpu_facts(root).get("model name") or platform.processor() or platform.machine()
    return " ".join(name.split())


def cpu_flags(root: Path = _ROOT) -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere.

    Args:
        root: Where ``proc`` is, as for ``read_limits``.
    """
    facts = _cpu_facts(root)
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def format_bytes(count: int) -> str:
    """A size for people: 1234567 is ``1.2 MB``; decimal units."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:  # what is more would be shown as 1000.0
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def _cpu_facts(root: Path) -> dict[str, str]:
    """What Linux says of its CPU; of what differs between cores, the first one's."""
    lines = (line.partition(":") for line in _read(root / "proc" / "cpuinfo").splitlines())
    facts: dict[str, str] = {}
    for key, _, value in lines:
        facts.setdefault(key.strip(), value.strip())
    return facts


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
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
