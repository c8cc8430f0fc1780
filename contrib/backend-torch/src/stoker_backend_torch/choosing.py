"""Which attention reads the blocks of paged memory: tried before it is used, and left when it fails."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.attention import LayerCall
from stoker_backend_torch.block_attention import BlockAttention, BlockStep, GatheredAttention
from stoker_backend_torch.block_kernels import FlashAttention, FlexAttention
from stoker_backend_torch.ragged import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stoker_backend_torch.kv import LayerShape
    from stoker_backend_torch.options import TorchOptions

__all__ = ["GuardedAttention", "choose_attention", "choose_block_size", "is_same"]

logger = logging.getLogger("stoker.torch")

_FLASH_BLOCK, _FLEX_BLOCK, _BLOCK = 256, 128, 16
_TRIAL_BLOCKS = 4
# Of the greatest number: sums in another order, rounded to 8 or 11 bits in between.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def choose_block_size(options: TorchOptions, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a block of paged memory: 0 if the memory is not to be paged."""
    if options.kv == "contiguous" or (options.kv == "auto" and device.type != "cuda"):
        return 0
    if options.block_size is not None:
        return options.block_size
    kinds = _kinds(options, device, dtype, _FLASH_BLOCK)
    return {"flash": _FLASH_BLOCK, "flex": _FLEX_BLOCK}.get(kinds[0], _BLOCK)


def choose_attention(
    options: TorchOptions,
    shapes: Sequence[LayerShape],
    num_heads: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[BlockAttention, list[str]]:
    """The first way to attend that says the same as the one that works everywhere.

    Args:
        options: The backend's options.
        shapes: What each layer keeps.
        num_heads: Heads of queries.
        num_blocks: Blocks of the pool, with the scratch block.
        block_size: Tokens of a block.
        dtype: Type of keys and values.
        device: Where they are.

    Returns:
        How to attend, and warnings about what did not work.
    """
    gathered = GatheredAttention(device, dtype)
    warnings: list[str] = []
    for kind in _kinds(options, device, dtype, block_size):
        if kind == "gathered":
            break
        try:
            trial = _make(kind, device, _TRIAL_BLOCKS, block_size)
            for shape in dict.fromkeys(shapes):
                _try(trial, gathered, shape, num_heads, block_size, dtype, device)
            found = _make(kind, device, num_blocks, block_size)
        except Exception as error:  # noqa: BLE001 - a kernel that does not work may raise anything
            first = str(error).strip().splitlines()
            reason = first[0] if first else type(error).__name__
            warnings.append(f"Attention by {kind} does not work here ({reason}).")
            continue
        return GuardedAttention(found, gathered), warnings
    return gathered, warnings


class GuardedAttention(BlockAttention):
    """A kernel, and what to do when it fails after all: with one warning, the other one from then on.

    Args:
        first: What to attend with.
        other: What always works.
    """

    def __init__(self, first: BlockAttention, other: BlockAttention) -> None:
        self._current, self._other = first, other
        self._step: BlockStep | None = None

    @property
    def name(self) -> str:  # type: ignore[override] # nobody sets it
        """The name of the current one."""
        return self._current.name

    @property
    def is_static(self) -> bool:  # type: ignore[override] # nobody sets it
        """Whether the current one is."""
        return self._current.is_static

    def begin(self, step: BlockStep) -> None:
        """See ``BlockAttention.begin``."""
        self._step = step
        self._guard(lambda: self._current.begin(step))

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """See ``BlockAttention.attend``."""
        out: torch.Tensor | None = None

        def compute() -> None:
            nonlocal out
            out = self._current.attend(query, keys, values, call)

        self._guard(compute)
        if out is None:  # the other one has begun the step by now
            out = self._current.attend(query, keys, values, call)
        return out

    def _guard(self, action: Callable[[], None]) -> None:
        if self._current is self._other:
            action()
            return
        try:
            action()
        except torch.OutOfMemoryError:
            raise  # which the other one would need more of
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning(
                "attention by %s failed (%s); from now on it is %s",
                self._current.name,
                error,
                self._other.name,
            )
            self._current = self._other
            if self._step is not None:
                self._current.begin(self._step)


def is_same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two results differ by rounding only; false if one has numbers that are none."""
    difference = float((got.float() - want.float()).abs().max())
    return difference <= _TOLERANCE.get(want.dtype, 5e-2) * max(float(want.abs().max()), 1e-3)


def _kinds(
    options: TorchOptions, device: torch.device, dtype: torch.dtype, block_size: int
) -> list[str]:
    """The ways to attend, the best first."""
    if options.attention != "auto":
        return [options.attention, "gathered"]
    if device.type != "cuda":
        return ["gathered"]
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if has_flash and dtype != torch.float32 and block_size % _FLASH_BLOCK == 0:
        return ["flash", "flex", "gathered"]
    return ["flex", "gathered"]


def _make(kind: str, device: torch.device, num_blocks: int, block_size: int) -> BlockAttention:
    if kind == "flash":
        return FlashAttention(device)
    return FlexAttention.compiled(num_blocks, block_size)


def _try(
    found: BlockAttention,
    other: BlockAttention,
    shape: LayerShape,
    num_heads: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Attend to random numbers in a few blocks with both, in a step of decodes and in a mixed one.

    Raises:
        ValueError: They say different things.
    """
    generator = torch.Generator().manual_seed(1)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    with torch.inference_mode():
        keys = numbers(_TRIAL_BLOCKS, block_size, shape.kv_heads, shape.key_dim)
        values = numbers(_TRIAL_BLOCKS, block_size, shape.kv_heads, shape.value_dim)
        query = numbers(7, num_heads, shape.key_dim)
        tables = np.array([[3, 0], [1, 3]], np.int32)
        most = 2 * block_size
        mixed = [Run(1, 7, 1, most - 7)]
        for lengths, runs in (([most - 3, 2], []), ([most, most - 1], mixed)):
            step = BlockStep(
                num_decodes=2 - len(runs),
                runs=runs,
                tables=tables,
                lengths=np.array(lengths, np.int64),
                device_tables=torch.from_numpy(tables).to(device),
                device_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            )
            rows = query if runs else query[:2]
            for window in (0, 5):
                call = LayerCall(scaling=shape.key_dim**-0.5, window=window)
                found.begin(step)
                other.begin(step)
                got = found.attend(rows, keys, values, call)
                if not is_same(got, other.attend(rows, keys, values, call)):
                    raise ValueError("it gives other numbers than plain attention")
