"""Where a model computes, in which type, and what room there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch

import stoker

__all__ = [
    "choose_device",
    "choose_dtype",
    "format_bytes",
    "free_memory",
    "kv_bytes_per_token",
    "usable_cores",
]

_CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
# Instructions that compute with bfloat16 itself; Linux' names on x86 and Arm.
_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The device an option names; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: There is no such device; names those there are.
    """
    present = _present()
    if name == "auto":
        return torch.device(present[0])
    wanted = {"cuda": "cuda:0", "mps:0": "mps", "cpu:0": "cpu"}.get(name, name)
    if wanted not in present:
        raise stoker.ConfigError(
            f"device = {name!r}: there is no such device here; choose one of auto, {', '.join(present)}"
        )
    return torch.device(wanted)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type an option names; ``auto`` is the smallest that the device computes with natively."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if _BF16_FLAGS & _cpu_flags() else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device; on the CPU without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and not given out is free for us, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(unused)
    if device.type == "mps":
        most = int(torch.mps.recommended_max_memory())
        return max(0, most - int(torch.mps.driver_allocated_memory()))
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


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers, by the text model's configuration.

    Exact for plain, grouped-query and multi-head latent attention as transformers computes it (keys and
    values expanded to all heads); too much where layers share keys and values.

    Args:
        config: A transformers configuration; of several parts, the text model's.
        dtype: The type that keys and values are kept in.
    """
    layers = int(config.num_hidden_layers)
    if getattr(
        config, "is_heterogeneous", False
    ):  # each layer has a configuration of its own (Gemma 4)
        numbers = sum(_kv_numbers(part) for part in config.per_layer_config)
    elif isinstance(kv_heads := getattr(config, "num_key_value_heads", None), (list, tuple)):
        numbers = sum(_kv_numbers(config, int(heads)) for heads in kv_heads)
    else:
        numbers = layers * _kv_numbers(config)
    return numbers * int(dtype.itemsize)


def _kv_numbers(config: Any, kv_heads: int | None = None) -> int:
    """Numbers of one token's key and value in one layer."""
    heads = int(config.num_attention_heads)
    if kv_heads is None:
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "kv_lora_rank", None):
        key_width = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return heads * (key_width + int(config.v_head_dim))
    width = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return kv_heads * 2 * int(width)


def format_bytes(count: int) -> str:
    """``1234567`` as ``1.2 MB``; decimal units."""
    if count < 1000:
        return f"{count} bytes"
    for power, unit in ((1, "kB"), (2, "MB"), (3, "GB")):
        if count < 1000 ** (power + 1):
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count / 1000**4:.1f} TB"


def _present() -> list[str]:
    """The devices of this machine, the best first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def _cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    for line in _read(_CPU_INFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
