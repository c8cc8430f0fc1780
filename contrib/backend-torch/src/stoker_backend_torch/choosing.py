"""Which attention reads the blocks of paged memory: tried before it is used, and left when it fails."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoker_backend_torch.attention import LayerCall
from stoker_backend_torch.block_attention import BlockAttention, BlockStep, GatheredAttention
from stoker_backend_torch.block_kernels import (
    FlashAttention,
    FlexAttention,
    compile_flex,
)
from stoker_backend_torch.ragged import Run

if TYPE_CHECKING:
    from stoker_backend_torch.kv import LayerShape
    from stoker_backend_torch.options import TorchOptions

__all__ = ["AttentionShape", "GuardedAttention", "choose_attention", "choose_block_size", "is_same"]

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


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model's attention is like.

    Attributes:
        layers: What each layer keeps.
        num_heads: Heads of queries.
        has_sinks: Whether it has attention sinks.
    """

    layers: Sequence[LayerShape]
    num_heads: int
    has_sinks: bool = False


def choose_attention(
    options: TorchOptions,
    shape: AttentionShape,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[BlockAttention, list[str]]:
    """The first way to attend that says the same as the one that works everywhere.

    Args:
        options: The backend's options.
        shape: What the model's attention is like.
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
        if kind == "gathered" or (
            kind == "flash" and shape.has_sinks and options.attention == "auto"
        ):
            continue
        try:
            make = _maker(kind, device, block_size)
            trial = make(_TRIAL_BLOCKS)
            for layer in dict.fromkeys(shape.layers):
                _try(trial, gathered, shape, layer, block_size, dtype, device)
        except Exception as error:  # noqa: BLE001 - a kernel that does not work may raise anything
            first = str(error).strip().splitlines()
            reason = first[0] if first else type(error).__name__
            warnings.append(f"Attention by {kind} does not work here ({reason}).")
            continue
        return GuardedAttention(make(num_blocks), gathered), warnings
    return gathered, warnings


class GuardedAttention(BlockAttention):
    """A kernel, and what to do when it fails after all: with one warning, the other one from then on.

    Args:
        first: What to attend with.
        other: What always works.
    """

    def __init__(self, first: BlockAttention, other: BlockAttention) -> None:
        self._current, self._other = first, other

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
        super().begin(step)
        self._guard(lambda: self._current.begin(step))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
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
            self._current.begin(self.step)


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


def _maker(kind: str, device: torch.device, block_size: int) -> Callable[[int], BlockAttention]:
    """Makes attention for a pool of so many blocks; what is compiled serves all of them."""
    if kind == "flash":
        flash = FlashAttention(device)
        return lambda _: flash
    compute = compile_flex()
    return lambda num_blocks: FlexAttention(compute, num_blocks, block_size)


def _try(
    found: BlockAttention,
    other: BlockAttention,
    shape: AttentionShape,
    layer: LayerShape,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Attend to random numbers in a few blocks with both, in all kinds of steps.

    So a kernel that is compiled for each kind of step is there before a request needs it.

    Raises:
        ValueError: They say different things.
    """
    generator = torch.Generator().manual_seed(1)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    most = 2 * block_size
    with torch.inference_mode():
        keys = numbers(_TRIAL_BLOCKS, block_size, layer.kv_heads, layer.key_dim)
        values = numbers(_TRIAL_BLOCKS, block_size, layer.kv_heads, layer.value_dim)
        queries = numbers(most + 2, shape.num_heads, layer.key_dim)
        sinks = numbers(shape.num_heads) if shape.has_sinks else None
        for decodes, num_rows in (
            ([most - 3], 0),
            ([most - 3, 2], 0),
            ([most, 7, 1, block_size, 9], 0),
            ([most], 7),
            ([most, 5], most),
        ):
            count = len(decodes)
            runs = [Run(count, count + num_rows, count, most - num_rows)] if num_rows else []
            lengths = np.array([*decodes, *(most for _ in runs)], np.int64)
            tables = np.array([[3, 0], [1, 3], [2, 1], [0, 2], [3, 2]], np.int32)[: len(lengths)]
            step = BlockStep(
                num_decodes=count,
                runs=runs,
                tables=tables,
                lengths=lengths,
                device_tables=torch.from_numpy(tables).to(device),
                device_lengths=torch.from_numpy(lengths.astype(np.int32)).to(device),
            )
            found.begin(step)
            other.begin(step)
            for window in (0, 5):
                call = LayerCall(layer.key_dim**-0.5, window, sinks=sinks)
                rows = queries[: count + num_rows]
                got = found.attend(rows, keys, values, call)
                if not is_same(got, other.attend(rows, keys, values, call)):
                    raise ValueError("it gives other numbers than plain attention")
