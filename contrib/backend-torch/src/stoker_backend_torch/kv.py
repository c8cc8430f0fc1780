"""KV memory with a contiguous part for each lane: what is quickest where one slice serves many lanes.

A layer's keys are one tensor ``[lanes, context, kv_heads, key_dim]``, and its values likewise. The decodes of
neighbouring lanes are one masked call of attention over a slice of it, without copying; each longer run is a
call over its lane. Layers with a sliding window keep everything, too: any truncation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.attention import KvMemory, LayerCall
from stoker_backend_torch.dense import (
    additive_mask,
    decode_attention,
    hidden_of_decodes,
    hidden_of_run,
    run_attention,
)
from stoker_backend_torch.snapshots import pack_tokens, unpack_tokens

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
        self._written = np.zeros(
            num_lanes, np.int64
        )  # tokens of each lane that are more than zeros

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(part.nbytes for part in (*self._keys, *self._values))

    def begin(self, batch: RaggedBatch) -> None:
        """Prepare for a step."""
        self._batch = batch
        for group in batch.decodes:
            self._forget(group)
        self._written[batch.touched] = np.maximum(self._written[batch.touched], batch.ends)
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
        """See ``LayerAttention.attend``."""
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

    def reserve(self, batch: RaggedBatch) -> bool:
        """Whether there is room: always, as each lane has its own."""
        return True

    def truncate(self, lane: int, num_tokens: int) -> None:
        """Nothing to do: what is behind a lane's length is nobody's."""

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a lane to another one's beginning."""
        if source == target:
            return
        for part in (*self._keys, *self._values):
            part[target, :num_tokens] = part[source, :num_tokens]
        self._written[target] = max(self._written[target], num_tokens)

    def read(self, lane: int, num_tokens: int) -> bytes:
        """See ``KvMemory.read``."""
        return pack_tokens(
            part[lane, :num_tokens]
            for pair in zip(self._keys, self._values, strict=True)
            for part in pair
        )

    def write(self, lane: int, num_tokens: int, data: bytes) -> bool:
        """See ``KvMemory.write``; there is always room."""
        parts = unpack_tokens(data, self._shapes, num_tokens, self._dtype)
        pairs = zip(self._keys, self._values, strict=True)
        for part, tokens in zip((part for pair in pairs for part in pair), parts, strict=True):
            part[lane, :num_tokens] = tokens.to(self._device)
        self._written[lane] = max(self._written[lane], num_tokens)
        return True

    @torch.inference_mode()
    def _forget(self, group: Decodes) -> None:
        """Zero what is behind the ends of a group's lanes, as far as its call looks.

        It is hidden by masks, but for numbers that are none: a sequence with such must not spoil the lane's
        next one.
        """
        stale = group.lengths < self._written[group.lanes]
        for lane, length in zip(group.lanes[stale], group.lengths[stale], strict=True):
            for part in (*self._keys, *self._values):
                part[lane, length : self._written[lane]] = 0
            self._written[lane] = length

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
        mask = self._decode_mask(at, group, first, longest, call.window)
        places: torch.Tensor | None = None
        if not group.is_dense:
            places = torch.from_numpy(group.lanes - group.first_lane).to(self._device)
            spread = query.new_zeros(span.stop - span.start, *query.shape[1:])
            query = spread.index_copy_(0, places, query)
        out = decode_attention(
            query, keys[span, first:longest], values[span, first:longest], mask, call
        )
        return out if places is None else out[places]

    def _decode_mask(
        self, at: int, group: Decodes, first: int, longest: int, window: int
    ) -> torch.Tensor | None:
        """``[lanes, 1, 1, longest - first]``; made once for all layers with the same window."""
        if (at, window) in self._masks:
            return self._masks[at, window]
        width = group.last_lane - group.first_lane + 1
        # Idle lanes see something: no row is all masked.
        lengths = np.full(width, longest, np.int64)
        lengths[group.lanes - group.first_lane] = group.lengths
        hidden = hidden_of_decodes(lengths, np.arange(first, longest), window)
        mask = None
        if hidden.any():
            mask = additive_mask(hidden[:, None, None], self._dtype, self._device)
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
        is_causal = run.position == 0 and not 0 < call.window < len(query)
        mask = None if is_causal else self._run_mask(at, run, first, call.window)
        return run_attention(
            query, keys[run.lane, first : run.end], values[run.lane, first : run.end], mask, call
        )

    def _run_mask(self, at: int, run: Run, first: int, window: int) -> torch.Tensor:
        """``[tokens, end - first]``; made once for all layers with the same window."""
        slot = (-1 - at, window)
        mask = self._masks.get(slot)
        if mask is None:
            own, places = np.arange(run.position, run.end), np.arange(first, run.end)
            hidden = hidden_of_run(own, places, window)
            mask = self._masks[slot] = additive_mask(hidden, self._dtype, self._device)
        return mask
