"""The KV memory that a plan asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker_backend_torch.blocks import BlockTables
from stoker_backend_torch.choosing import AttentionShape, choose_attention
from stoker_backend_torch.kv import ContiguousKv
from stoker_backend_torch.paged import PagedKv

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from stoker_backend_torch.attention import KvMemory
    from stoker_backend_torch.options import TorchOptions
    from stoker_backend_torch.planning import Plan

__all__ = ["MadeMemory", "make_memory"]


@dataclass(frozen=True, slots=True)
class MadeMemory:
    """KV memory, and what to say about it.

    Attributes:
        memory: The memory, all of it free.
        settings: Lines for ``RuntimeInfo.settings``.
        warnings: What did not work.
    """

    memory: KvMemory
    settings: Mapping[str, str]
    warnings: Sequence[str] = field(default=())


def make_memory(
    options: TorchOptions,
    plan: Plan,
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
) -> MadeMemory:
    """Allocate a model's KV memory.

    Args:
        options: The backend's options.
        plan: How much, and of which kind.
        shape: What the model's attention is like.
        dtype: Type of keys and values.
        device: Where they will be.
    """
    if not plan.block_size:
        memory = ContiguousKv(shape.layers, plan.num_lanes, plan.context_length, dtype, device)
        return MadeMemory(memory, {"kv": "contiguous"})
    tables = BlockTables(
        plan.num_lanes, plan.context_length, plan.kv_capacity_tokens, plan.block_size
    )
    attention, warnings = choose_attention(
        options, shape, tables.num_blocks + 1, plan.block_size, dtype, device
    )
    paged = PagedKv(shape.layers, tables, attention, dtype, device)
    settings = {
        "kv": f"paged, {plan.block_size} tokens a block",
        "attention": attention.name,
    }
    return MadeMemory(paged, settings, warnings)
