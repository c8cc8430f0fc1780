"""KV memory in blocks that lanes share: as much as there are tokens, wherever they are.

All keys of a layer are one tensor ``[blocks, block_size, kv_heads, key_dim]``, and its values likewise;
``blocks.py`` says which blocks are whose. Copies of a prefix share its blocks. Layers with a sliding window
keep everything, too: any truncation is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.attention import KvMemory, LayerCall
from stoker_backend_torch.block_attention import BlockAttention, BlockStep
from stoker_backend_torch.blocks import BlockTables, Growth
from stoker_backend_torch.snapshots import pack_tokens, unpack_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stoker_backend_torch.kv import LayerShape
    from stoker_backend_torch.ragged import RaggedBatch

__all__ = ["PagedKv"]


class PagedKv(KvMemory):
    """Keys and values of all lanes in blocks.

    Args:
        shapes: What each layer keeps, by its number.
        tables: Whose blocks are whose; all are free.
        attention: How it attends.
        dtype: Type of the numbers.
        device: Where they lie.

    Attributes:
        tables: Whose blocks are whose.
        attention: How it attends.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        tables: BlockTables,
        attention: BlockAttention,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tables = tables
        self.attention = attention
        self._shapes = tuple(shapes)
        self._dtype = dtype
        self._device = device
        # Layers of one shape in one tensor: what concerns blocks is one operation for all of them.
        self._pools: list[torch.Tensor] = []
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.empty(0), torch.empty(0)) for _ in shapes
        ]
        for shape in dict.fromkeys(shapes):
            layers = [layer for layer, other in enumerate(shapes) if other == shape]
            size = (len(layers), tables.num_blocks + 1, tables.block_size, shape.kv_heads)
            keys = torch.zeros((*size, shape.key_dim), dtype=dtype, device=device)
            values = torch.zeros((*size, shape.value_dim), dtype=dtype, device=device)
            self._pools += [keys, values]
            for at, layer in enumerate(layers):
                self._layers[layer] = keys[at], values[at]
        self._slots = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(pool.nbytes for pool in self._pools)

    def reserve(self, batch: RaggedBatch) -> bool:
        """See ``KvMemory.reserve``."""
        return self._extend(batch.touched, batch.ends)

    def begin(self, batch: RaggedBatch) -> None:
        """See ``KvMemory.begin``."""
        num_decodes = len(batch.lanes) - sum(run.stop - run.start for run in batch.runs)
        runs = np.array([run.lane for run in batch.runs], np.int64)
        lanes = np.concatenate((batch.lanes[:num_decodes], runs))
        lengths = self.tables.lengths[lanes]
        width = -(-int(lengths.max()) // self.tables.block_size)
        tables = self.tables.tables[lanes, :width]
        step = BlockStep(
            num_decodes=num_decodes,
            runs=batch.runs,
            tables=tables,
            lengths=lengths,
            device_tables=torch.from_numpy(tables).to(self._device),
            device_lengths=torch.from_numpy(lengths.astype(np.int32)).to(self._device),
        )
        slots = self.tables.slots(batch.lanes, batch.positions)
        self.begin_at(step, torch.from_numpy(slots).to(self._device))

    def begin_at(self, step: BlockStep, slots: torch.Tensor) -> None:
        """Prepare for a step with given blocks.

        Args:
            step: Its sequences.
            slots: ``int64[T]``, where its rows' keys and values are put, see ``BlockTables.slots``.
        """
        self._slots = slots
        self.attention.begin(step)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """See ``LayerAttention.attend``."""
        keys, values = self._layers[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, key)
        values.flatten(0, 1).index_copy_(0, self._slots, value)
        return self.attention.attend(query, keys, values, call)

    def truncate(self, lane: int, num_tokens: int) -> None:
        """See ``KvMemory.truncate``."""
        self.tables.truncate(lane, num_tokens)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Share the blocks; a lane that writes into the last one, if it is not full, gets its own then."""
        self.tables.share(source, target, num_tokens)

    def read(self, lane: int, num_tokens: int) -> bytes:
        """See ``KvMemory.read``."""
        count = -(-num_tokens // self.tables.block_size)
        blocks = self._indices(self.tables.tables[lane, :count])
        return pack_tokens(
            part.index_select(0, blocks).flatten(0, 1)[:num_tokens]
            for pair in self._layers
            for part in pair
        )

    def write(self, lane: int, num_tokens: int, data: bytes) -> bool:
        """See ``KvMemory.write``."""
        self.tables.truncate(lane, 0)
        parts = unpack_tokens(data, self._shapes, num_tokens, self._dtype)
        lanes, ends = np.array([lane], np.int64), np.array([num_tokens], np.int64)
        if num_tokens and not self._extend(lanes, ends):
            return False
        positions = np.arange(num_tokens)
        slots = torch.from_numpy(self.tables.slots(np.full_like(positions, lane), positions))
        slots = slots.to(self._device)
        own = (part for pair in self._layers for part in pair)
        for part, tokens in zip(own, parts, strict=True):
            part.flatten(0, 1).index_copy_(0, slots, tokens.to(self._device))
        return True

    def _extend(self, lanes: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
        growth = self.tables.extend(lanes, ends)
        if growth is None:
            return False
        self._prepare(growth)
        return True

    def _prepare(self, growth: Growth) -> None:
        """Bring contents into blocks that were free.

        Zeros into those without any: what a block's last owner left there is hidden by masks, but for
        numbers that are none. A sequence with such must not spoil the next one.
        """
        if growth.fresh:
            fresh = self._indices(np.array(growth.fresh))
            for pool in self._pools:
                pool.index_fill_(1, fresh, 0)
        if growth.copies:
            pairs = np.array(growth.copies)
            sources, targets = self._indices(pairs[:, 0]), self._indices(pairs[:, 1])
            for pool in self._pools:
                pool.index_copy_(1, targets, pool.index_select(1, sources))

    def _indices(self, blocks: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(blocks.astype(np.int64)).to(self._device)
