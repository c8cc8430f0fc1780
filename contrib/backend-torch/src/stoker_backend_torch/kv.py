"""KV memory with a contiguous part for each lane: what is quickest where one slice serves many lanes.

A layer's keys are one tensor ``[lanes, context, kv_heads, key_dim]``, and its values likewise. The decodes of
neighbouring lanes are one masked call of attention over a slice of it, without copying; each longer run is a
call over its lane. Queries that share a KV head are treated as rows of one query, so that no key is repeated.
Layers with a sliding window keep everything, too: any truncation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.attention import KvMemory, LayerCall, plain_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker_backend_torch.ragged import Decodes, RaggedBatch, Run

__all__ = ["ContiguousKv", "LayerShape"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token.

    Attributes:
        kv_heads: Heads of keys and values.
        key_dim: Numbers of a key.
        value_dim: Numbers of a value.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers of a token's key and value."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class ContiguousKv(KvMemory):
    """Keys and values of all lanes.

    Args:
        shapes: What each layer keeps, by its number.
        num_lanes: Lanes.
        context_length: Most tokens of a lane.
        dtype: Type of the numbers.
        device: Where they lie.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_lanes: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def empty(kv_heads: int, width: int) -> torch.Tensor:
            # Zeros, not just anything: idle lanes within a slice are computed with, and a NaN is slow.
            size = (num_lanes, context_length, kv_heads, width)
            return torch.zeros(size, dtype=dtype, device=device)

        self._shapes = tuple(shapes)
        self._keys = [empty(shape.kv_heads, shape.key_dim) for shape in shapes]
        self._values = [empty(shape.kv_heads, shape.value_dim) for shape in shapes]
        self._context_length = context_length
        self._dtype = dtype
        self._device = device
        self._batch: RaggedBatch | None = None
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(part.nbytes for part in (*self._keys, *self._values))

    def begin(self, batch: RaggedBatch) -> None:
        """Prepare for a step."""
        self._batch = batch
        slots = batch.lanes * self._context_length + batch.positions
        self._slots = torch.from_numpy(slots).to(self._device)
        self._masks = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """See ``KvMemory.attend``."""
        batch = self._batch
        if batch is None:
            raise RuntimeError("attention outside of a step")
        shape = self._shapes[layer]
        keys, values = self._keys[layer], self._values[layer]
        keys.view(-1, shape.kv_heads, shape.key_dim).index_copy_(0, self._slots, key)
        values.view(-1, shape.kv_heads, shape.value_dim).index_copy_(0, self._slots, value)
        if len(batch.decodes) + len(batch.runs) == 1:
            if batch.runs:
                return self._run(0, batch.runs[0], query, keys, values, call)
            return self._decode(0, batch.decodes[0], query, keys, values, call)
        out = query.new_empty(len(query), query.shape[1], shape.value_dim)
        for at, group in enumerate(batch.decodes):
            rows = slice(group.start, group.stop)
            out[rows] = self._decode(at, group, query[rows], keys, values, call)
        for at, run in enumerate(batch.runs):
            rows = slice(run.start, run.stop)
            out[rows] = self._run(at, run, query[rows], keys, values, call)
        return out

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a lane to another one's beginning."""
        for part in (*self._keys, *self._values):
            part[target, :num_tokens] = part[source, :num_tokens]

    def read(self, lane: int, num_tokens: int) -> bytes:
        """The first tokens of a lane: each layer's keys, then its values."""
        parts = [
            part[lane, :num_tokens].contiguous().view(torch.uint8).cpu().numpy().tobytes()
            for pair in zip(self._keys, self._values, strict=True)
            for part in pair
        ]
        return b"".join(parts)

    def write(self, lane: int, num_tokens: int, data: bytes) -> None:
        """Put back what ``read`` gave.

        Raises:
            ValueError: It has another size.
        """
        size = self._dtype.itemsize * num_tokens * sum(shape.width for shape in self._shapes)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes are not the {size} of {num_tokens} tokens")
        # Copied: torch wants memory that may be written to.
        whole = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(self._dtype)
        start = 0
        for pair in zip(self._keys, self._values, strict=True):
            for part in pair:
                lane_part = part[lane, :num_tokens]
                end = start + lane_part.numel()
                lane_part.copy_(whole[start:end].view(lane_part.shape))
                start = end

    # ------------------------------------------------------------------ attention

    def _decode(
        self,
        at: int,
        group: Decodes,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """Single tokens of several lanes: ``[n, heads, value_dim]``."""
        span = slice(group.first_lane, group.last_lane + 1)
        longest = int(group.lengths.max())
        first = max(0, int(group.lengths.min()) - call.window) if call.window else 0
        key = keys[span, first:longest].transpose(1, 2)
        value = values[span, first:longest].transpose(1, 2)
        mask = self._decode_mask(at, group, first, longest, call.window)
        kv_heads = key.shape[1]
        places: torch.Tensor | None = None
        if not group.is_dense:
            places = torch.from_numpy(group.lanes - group.first_lane).to(self._device)
            spread = query.new_zeros(key.shape[0], *query.shape[1:])
            query = spread.index_copy_(0, places, query)
        folded = query.reshape(len(query), kv_heads, -1, query.shape[-1])
        if call.is_plain:
            out = plain_attention(folded, key, value, mask, call)
        else:
            mask = None if mask is None else mask.unsqueeze(2)
            out = plain_attention(
                folded.unsqueeze(3), key.unsqueeze(2), value.unsqueeze(2), mask, call
            ).squeeze(3)
        out = out.reshape(len(query), query.shape[1], -1)
        return out if places is None else out[places]

    def _decode_mask(
        self, at: int, group: Decodes, first: int, longest: int, window: int
    ) -> torch.Tensor | None:
        """``[lanes, 1, 1, longest - first]``; made once for all layers with the same window."""
        if (at, window) in self._masks:
            return self._masks[at, window]
        width = group.last_lane - group.first_lane + 1
        lengths = np.full(
            width, longest, np.int64
        )  # idle lanes see something: no row is all masked
        lengths[group.lanes - group.first_lane] = group.lengths
        places = np.arange(first, longest)
        hidden = places >= lengths[:, None]
        if window:
            hidden |= places < lengths[:, None] - window
        mask = self._as_mask(hidden[:, None, None]) if hidden.any() else None
        self._masks[at, window] = mask
        return mask

    def _run(
        self,
        at: int,
        run: Run,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """Several tokens of one lane: ``[n, heads, value_dim]``."""
        first = max(0, run.position + 1 - call.window) if call.window else 0
        key = keys[run.lane, first : run.end].transpose(0, 1).unsqueeze(1)
        value = values[run.lane, first : run.end].transpose(0, 1).unsqueeze(1)
        kv_heads = key.shape[0]
        count, heads, width = query.shape
        folded = query.reshape(count, kv_heads, -1, width).permute(1, 2, 0, 3)
        group = folded.shape[1]
        # Views: nothing is repeated in memory.
        key = key.expand(-1, group, -1, -1)
        value = value.expand(-1, group, -1, -1)
        is_causal = run.position == 0 and not 0 < call.window < count
        mask = None if is_causal else self._run_mask(at, run, first, call.window)
        out = plain_attention(folded, key, value, mask, call, is_causal=is_causal)
        return out.permute(2, 0, 1, 3).reshape(count, heads, -1)

    def _run_mask(self, at: int, run: Run, first: int, window: int) -> torch.Tensor:
        """``[tokens, end - first]``; made once for all layers with the same window."""
        slot = (-1 - at, window)
        mask = self._masks.get(slot)
        if mask is None:
            own = np.arange(run.position, run.end)[:, None]
            places = np.arange(first, run.end)
            hidden = places > own
            if window:
                hidden |= places <= own - window
            mask = self._masks[slot] = self._as_mask(hidden)
        return mask

    def _as_mask(self, hidden: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> torch.Tensor:
        """Minus infinity where something is hidden, added to scores."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype)
        mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
        return mask.to(self._device)
