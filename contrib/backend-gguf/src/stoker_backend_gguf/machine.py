"""What this machine has to offer: cores and memory that may be used, within a container's limits too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from stoker_backend_gguf.gguf_header import GgufHeader
    from stoker_backend_gguf.options import KvType

__all__ = ["available_memory", "cpu_flags", "format_bytes", "kv_bytes_per_token", "usable_cores"]

_CGROUP = Path("/sys/fs/cgroup")
_KV_ELEMENT_BYTES: dict[KvType, float] = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "f32": 4.0}


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
        reclaimable = sum(
            int(line.split()[1])
            for line in _read(_CGROUP / "memory.stat").splitlines()
            if line.startswith("inactive_file ")
        )
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return available


def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def kv_bytes_per_token(header: GgufHeader, type_k: KvType, type_v: KvType) -> int:
    """Bytes of KV that one token takes in all attention layers, from the model's metadata.

    Exact for plain attention and for sliding windows kept whole; too much for compressed (MLA) KV and
    windows that are not kept whole; without the states of recurrent layers.
    """
    layers = int(header.get("block_count", 0))
    heads = _per_layer(header.get("attention.head_count", 0), layers)
    kv_heads = _per_layer(header.get("attention.head_count_kv", heads), layers)
    width = int(header.get("embedding_length", 0))
    most = max((0, *heads))
    default = width // most if most else 0
    keys = int(header.get("attention.key_length", default)) * _KV_ELEMENT_BYTES[type_k]
    values = int(header.get("attention.value_length", default)) * _KV_ELEMENT_BYTES[type_v]
    return int(sum(kv_heads) * (keys + values))


def format_bytes(count: int) -> str:
    """``1234567`` as ``1.2 MB``; decimal units."""
    if count < 1000:
        return f"{count} bytes"
    for power, unit in ((1, "kB"), (2, "MB"), (3, "GB")):
        if count < 1000 ** (power + 1):
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count / 1000**4:.1f} TB"


def _per_layer(value: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),) * layers


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
