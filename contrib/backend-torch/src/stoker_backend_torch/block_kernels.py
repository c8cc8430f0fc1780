"""Kernels that attend to blocks where they are: flash-attn, and flex attention compiled by torch.

Neither has been run on a GPU by this project so far. flex attention's masks are tested on the CPU, where
torch can compute it step by step; flash-attn is written after its documentation. ``choosing.py`` therefore
tries each against ``GatheredAttention`` when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from stoker_backend_torch.block_attention import BlockAttention, BlockStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker_backend_torch.attention import LayerCall

__all__ = ["FlashAttention", "FlexAttention", "compile_flex"]

_QUERY_BLOCK = 128
_NO_WINDOW = 1 << 30
_MAX_PROGRAMS = 64


class FlashAttention(BlockAttention):
    """FlashAttention-2 of the package flash-attn (Dao 2023), which reads paged KV by block tables.

    Its pages must be multiples of 256 tokens, and numbers have 16 bits. It knows no sinks.

    Args:
        device: A CUDA device.

    Raises:
        ImportError: The package is not there, or was built for another torch.
    """

    name = "flash"
    is_static = True

    def __init__(self, device: torch.device) -> None:
        from flash_attn import (  # type: ignore[import-not-found] # noqa: PLC0415 - optional
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
        )

        self._varlen: Any = flash_attn_varlen_func
        self._with_cache: Any = flash_attn_with_kvcache
        self._device = device
        self._query_starts = self._key_starts = torch.empty(0)
        self._longest_query = self._longest_key = 0

    def begin(self, step: BlockStep) -> None:
        """See ``BlockAttention.begin``."""
        super().begin(step)
        if not step.runs:
            return
        counts = [1] * step.num_decodes + [run.stop - run.start for run in step.runs]
        self._query_starts = self._starts(np.array(counts))
        self._key_starts = self._starts(step.lengths)
        self._longest_query, self._longest_key = max(counts), int(step.lengths.max())

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """See ``BlockAttention.attend``.

        Raises:
            ValueError: The layer has sinks.
        """
        step = self.step
        if call.sinks is not None:
            raise ValueError("flash-attn knows no sinks")
        how = {
            "softmax_scale": call.scaling,
            "causal": True,
            "window_size": (call.window - 1, 0) if call.window else (-1, -1),
            "softcap": call.softcap,
            "block_table": step.device_tables,
        }
        out: torch.Tensor
        if step.runs:
            out = self._varlen(
                query,
                keys,
                values,
                cu_seqlens_q=self._query_starts,
                cu_seqlens_k=self._key_starts,
                max_seqlen_q=self._longest_query,
                max_seqlen_k=self._longest_key,
                **how,
            )
            return out
        out = self._with_cache(
            query.unsqueeze(1), keys, values, cache_seqlens=step.device_lengths, **how
        )
        return out.squeeze(1)

    def _starts(self, counts: np.ndarray[Any, Any]) -> torch.Tensor:
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        return torch.from_numpy(starts).to(self._device)


class FlexAttention(BlockAttention):
    """torch's flex attention (Dong et al. 2024) over the pool, of which it reads a sequence's blocks only.

    A sequence's block table is its list of non-empty blocks; the mask translates back from the place in the
    pool to the position in the sequence. All decodes are one call, each run is another.

    Args:
        compute: ``flex_attention``, compiled if it is to be fast.
        num_blocks: Blocks of the pool, the scratch block included.
        block_size: Tokens of a block.
    """

    name = "flex"
    is_static = True

    def __init__(self, compute: Callable[..., Any], num_blocks: int, block_size: int) -> None:
        self._compute = compute
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._positions = torch.empty(0)
        self._masks: dict[tuple[int, int], BlockMask] = {}

    def begin(self, step: BlockStep) -> None:
        """See ``BlockAttention.begin``."""
        super().begin(step)
        self._masks = {}
        # For each sequence and block of the pool, which of the sequence's blocks that is; -1 for none.
        tables = step.device_tables.long()
        order = torch.arange(tables.shape[1], dtype=torch.int32, device=tables.device)
        positions = order.new_full((len(tables), self._num_blocks), -1)
        self._positions = positions.scatter_reduce_(
            1, tables, order.expand_as(tables), "amin", include_self=False
        )

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """See ``BlockAttention.attend``."""
        step = self.step
        # One sequence of keys, for all sequences of queries.
        key = keys.flatten(0, 1).transpose(0, 1).unsqueeze(0)
        value = values.flatten(0, 1).transpose(0, 1).unsqueeze(0)
        out = query.new_empty(len(query), query.shape[1], values.shape[-1])
        if step.num_decodes:
            rows = query[: step.num_decodes].unsqueeze(2)
            out[: step.num_decodes] = self._call(rows, key, value, -1, call).squeeze(2)
        for at, run in enumerate(step.runs):
            part = slice(run.start, run.stop)
            rows = query[part].transpose(0, 1).unsqueeze(0).contiguous()
            out[part] = self._call(rows, key, value, at, call)[0].transpose(0, 1)
        return out

    def _call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int, call: LayerCall
    ) -> torch.Tensor:
        """Attend with ``[B, heads, L, key_dim]``: the decodes if ``at`` is -1, else that run."""
        mask = self._masks.get((at, call.window))
        if mask is None:
            mask = self._decode_mask(call.window) if at < 0 else self._run_mask(at, call.window)
            self._masks[at, call.window] = mask
        settings = {
            "score_mod": _softcap(call.softcap) if call.softcap else None,
            "block_mask": mask,
            "scale": call.scaling,
            "enable_gqa": query.shape[1] != key.shape[1],
        }
        out: torch.Tensor
        if call.sinks is None:
            out = self._compute(query, key, value, **settings)
            return out
        out, aux = self._compute(query, key, value, **settings, return_aux=AuxRequest(lse=True))
        # A sink is one more score in the softmax, whose value is zero.
        share = torch.sigmoid(aux.lse - call.sinks.view(1, -1, 1))
        return out * share.unsqueeze(-1).to(out.dtype)

    def _decode_mask(self, window: int) -> BlockMask:
        step = self.step
        count, size = step.num_decodes, self._block_size
        lengths, positions = step.device_lengths[:count], self._positions
        reach = self._number(window or _NO_WINDOW)

        def is_seen(
            batch: torch.Tensor, _head: torch.Tensor, _row: torch.Tensor, slot: torch.Tensor
        ) -> torch.Tensor:
            place = positions[batch, slot // size]
            position = place * size + slot % size
            length = lengths[batch]
            return (place >= 0) & (position < length) & (position >= length - reach)

        num_blocks = (lengths + (size - 1)) // size
        return self._mask(
            num_blocks.view(count, 1, 1), step.device_tables[:count, None, None], 1, is_seen
        )

    def _run_mask(self, at: int, window: int) -> BlockMask:
        step, size = self.step, self._block_size
        run, row = step.runs[at], step.num_decodes + at
        positions, count = self._positions[row], run.stop - run.start
        start, reach = self._number(run.position), self._number(window or _NO_WINDOW)

        def is_seen(
            _batch: torch.Tensor, _head: torch.Tensor, own: torch.Tensor, slot: torch.Tensor
        ) -> torch.Tensor:
            place = positions[slot // size]
            position = place * size + slot % size
            end = own + start
            return (place >= 0) & (position <= end) & (position > end - reach)

        # Each block of queries looks at the keys up to its own end.
        ends = np.minimum(np.arange(0, count, _QUERY_BLOCK) + _QUERY_BLOCK, count) + run.position
        num_blocks = torch.from_numpy((-(-ends // size)).astype(np.int32)).to(positions.device)
        tables = step.device_tables[row].expand(1, 1, len(ends), -1)
        return self._mask(num_blocks.view(1, 1, -1), tables, count, is_seen)

    def _mask(
        self,
        num_blocks: torch.Tensor,
        tables: torch.Tensor,
        num_rows: int,
        is_seen: Callable[..., torch.Tensor],
    ) -> BlockMask:
        """A mask whose lists of blocks are as long as there are blocks, as torch wants them."""
        indices = tables.new_zeros(*tables.shape[:-1], self._num_blocks)
        width = min(tables.shape[-1], self._num_blocks)
        indices[..., :width] = tables[..., :width]
        return BlockMask.from_kv_blocks(
            num_blocks,
            indices,
            BLOCK_SIZE=(_QUERY_BLOCK, self._block_size),
            mask_mod=is_seen,
            seq_lengths=(num_rows, self._num_blocks * self._block_size),
            compute_q_blocks=False,  # only gradients need those
        )

    def _number(self, value: int) -> torch.Tensor:
        """A number as a tensor: as such it would be a constant for the compiler, and another program."""
        return torch.tensor(value, dtype=torch.int32, device=self._positions.device)


def compile_flex() -> Callable[..., Any]:
    """``flex_attention`` with kernels that torch makes when they are first needed.

    They are few: for one row or several, one sequence or several, one block of queries or several. More
    than the limit would mean that something is compiled again and again, which is an error: left alone,
    torch would quietly compute all scores with the whole pool instead.
    """
    compute: Callable[..., Any] = torch.compile(
        flex_attention,
        dynamic=True,
        fullgraph=True,
        isolate_recompiles=True,
        recompile_limit=_MAX_PROGRAMS,
    )
    return compute


def _softcap(limit: float) -> Callable[..., torch.Tensor]:
    def bend(
        score: torch.Tensor,
        _batch: torch.Tensor,
        _head: torch.Tensor,
        _row: torch.Tensor,
        _slot: torch.Tensor,
    ) -> torch.Tensor:
        return limit * torch.tanh(score / limit)

    return bend
