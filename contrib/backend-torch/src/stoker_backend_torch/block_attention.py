"""Attention over keys and values that lie in blocks: the interface, and what works everywhere.

``GatheredAttention`` copies the blocks of a step's lanes side by side and is done with masked scaled
dot-product attention. Kernels that read blocks where they are: ``block_kernels.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.dense import (
    additive_mask,
    decode_attention,
    hidden_of_decodes,
    hidden_of_run,
    run_attention,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stoker_backend_torch.attention import LayerCall
    from stoker_backend_torch.ragged import Run

__all__ = ["BlockAttention", "BlockStep", "GatheredAttention", "group_by_length"]

# What one more call of attention costs, in KV tokens that are looked at; see ragged.py. Gathering them makes
# each token dearer, and a call is two more operations.
_CALL_COST = 150


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A step as attention over blocks sees it: its sequences are the decodes, then the runs.

    Attributes:
        num_decodes: Sequences of a single token; their rows are the first ones.
        runs: The longer ones.
        tables: ``int32[N, W]``, each sequence's blocks, then any block; empty in a recorded step.
        lengths: ``int64[N]``, each one's tokens with the new ones; likewise.
        device_tables: ``int32[N, W]``, the tables on the device.
        device_lengths: ``int32[N]``, the lengths on the device.
    """

    num_decodes: int
    runs: Sequence[Run]
    tables: NDArray[np.int32]
    lengths: NDArray[np.int64]
    device_tables: torch.Tensor
    device_lengths: torch.Tensor


class BlockAttention(ABC):
    """A way to attend to blocks.

    Attributes:
        name: What people call it.
        is_static: Whether a step of decodes is always the same operations on the device, which read
            ``device_tables`` and ``device_lengths`` only: what a CUDA graph needs.
    """

    name: str
    is_static = False
    _current_step: BlockStep | None = None

    @property
    def step(self) -> BlockStep:
        """The step that has begun.

        Raises:
            RuntimeError: None has.
        """
        if self._current_step is None:
            raise RuntimeError("attention outside of a step")
        return self._current_step

    def begin(self, step: BlockStep) -> None:
        """Prepare for a step; what overrides this calls it."""
        self._current_step = step

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Attend in one layer; the step's own keys and values are in the blocks already.

        Args:
            query: ``[T, heads, key_dim]``.
            keys: ``[blocks, block_size, kv_heads, key_dim]``.
            values: ``[blocks, block_size, kv_heads, value_dim]``.
            call: How.

        Returns:
            ``[T, heads, value_dim]``.
        """


class GatheredAttention(BlockAttention):
    """Copies the blocks a step looks at, on any device; one call for decodes of similar length.

    Args:
        device: Where the blocks are.
        dtype: Type of keys and values.
    """

    name = "gathered"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._groups: list[NDArray[np.int64]] = []
        self._parts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def begin(self, step: BlockStep) -> None:
        """See ``BlockAttention.begin``.

        Raises:
            RuntimeError: The step's tables are on the device only.
        """
        if len(step.lengths) != step.num_decodes + len(step.runs):
            raise RuntimeError("blocks cannot be gathered without their tables on the host")
        super().begin(step)
        self._groups = group_by_length(step.lengths[: step.num_decodes])
        self._parts = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """See ``BlockAttention.attend``."""
        step = self.step
        if len(self._groups) + len(step.runs) == 1:
            if step.runs:
                return self._run(step, 0, query, keys, values, call)
            return self._decodes(step, 0, query, keys, values, call)
        out = query.new_empty(len(query), query.shape[1], values.shape[-1])
        for at, chosen in enumerate(self._groups):
            rows = torch.from_numpy(chosen).to(self._device)
            out[rows] = self._decodes(step, at, query[rows], keys, values, call)
        for at, run in enumerate(step.runs):
            part = slice(run.start, run.stop)
            out[part] = self._run(step, at, query[part], keys, values, call)
        return out

    def _decodes(
        self,
        step: BlockStep,
        at: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        part = self._parts.get((at, call.window))
        if part is None:
            rows, size = self._groups[at], keys.shape[1]
            lengths = step.lengths[rows]
            first = max(0, int(lengths.min()) - call.window) // size if call.window else 0
            last = -(-int(lengths.max()) // size)
            hidden = hidden_of_decodes(lengths, np.arange(first * size, last * size), call.window)
            mask = None
            if hidden.any():
                mask = additive_mask(hidden[:, None, None], self._dtype, self._device)
            part = self._indices(step.tables[rows, first:last]), mask
            self._parts[at, call.window] = part
        blocks, mask = part
        key = keys.index_select(0, blocks).view(len(query), -1, *keys.shape[2:])
        value = values.index_select(0, blocks).view(len(query), -1, *values.shape[2:])
        return decode_attention(query, key, value, mask, call)

    def _run(
        self,
        step: BlockStep,
        at: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        run, size = step.runs[at], keys.shape[1]
        first = max(0, run.position + 1 - call.window) // size if call.window else 0
        is_causal = run.position == 0 and not 0 < call.window < len(query)
        part = self._parts.get((-1 - at, call.window))
        if part is None:
            mask = None
            if not is_causal:
                own, places = np.arange(run.position, run.end), np.arange(first * size, run.end)
                hidden = hidden_of_run(own, places, call.window)
                mask = additive_mask(hidden, self._dtype, self._device)
            table = step.tables[step.num_decodes + at, first : -(-run.end // size)]
            part = self._indices(table), mask
            self._parts[-1 - at, call.window] = part
        blocks, mask = part
        count = run.end - first * size
        key = keys.index_select(0, blocks).flatten(0, 1)[:count]
        value = values.index_select(0, blocks).flatten(0, 1)[:count]
        return run_attention(query, key, value, mask, call)

    def _indices(self, blocks: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(self._device)


def group_by_length(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut single tokens into groups for one call each, such that little is looked at in vain.

    A call looks at as many tokens of each lane as the longest has. Lanes join the next longer ones where that
    is cheaper than a call of their own.

    Args:
        lengths: ``int64[n]``, tokens of each lane.

    Returns:
        For each group ``int64[m]``, which of them; together all.
    """
    if not len(lengths):
        return []
    by_length = np.argsort(-lengths, kind="stable")
    cuts, start = [], 0
    ordered = lengths[by_length].tolist()
    wasted = 0
    for at, length in enumerate(ordered):
        wasted += ordered[start] - length
        if wasted > _CALL_COST:
            cuts.append(at)
            start, wasted = at, 0
    return [np.sort(part) for part in np.split(by_length, cuts)]
