"""Where a model computes, in which type, and what room there is."""

from __future__ import annotations

from typing import Any

import torch

import stoker
from stoker.machine import available_memory, cpu_flags

__all__ = ["choose_device", "choose_dtype", "free_memory", "kv_bytes_per_token"]

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
    return torch.bfloat16 if _BF16_FLAGS & cpu_flags() else torch.float32


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
    return available_memory()


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


def _present() -> list[str]:
    """The devices of this machine, the best first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]
