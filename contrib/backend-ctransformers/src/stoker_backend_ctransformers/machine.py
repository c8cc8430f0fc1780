"""What this machine has to offer: cores and memory that may be used, and features of its CPU."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

__all__ = ["available_memory", "cpu_flags", "format_bytes", "usable_cores"]

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and its container's CPU quota, rounded up."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def available_memory() -> int:
    """Bytes that can be allocated without swapping, by the system and by the container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        # Cached files count as used by the container, but make way.
        statistics = (line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
        reclaimable = sum(int(value) for name, value in statistics if name == "inactive_file")
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return available


def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def format_bytes(count: int) -> str:
    """``1234567`` as ``1.2 MB``; decimal units."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
