"""What of ggml's CPU kernels depends on how many rows they compute at once: where a text's bits come from.

A row has the same bits alone and among others only if the same kernel computes it. Flash attention takes
another one from 64 rows of a sequence on, and the matrix products of most types of weights from 2, 4 or 8
rows on. What is said of them here was read in ggml's sources and checked by computing the same prompt in
many cuts (``bench/cuts.py``).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker import machine

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from stoker_backend_gguf.native import NativeSettings

__all__ = ["TILES_FROM", "TILE_ROWS", "Exactness", "describe_exactness", "have_row_kernels"]

TILE_ROWS = 64
"""From so many rows of one sequence on, ggml's CPU flash attention computes them in tiles."""

TILES_FROM = 512
"""Tokens of a prompt that tiles are worth their price for: a tenth quicker at 256 tokens, a quarter at 1,000,
but what is written after them is not of their kind, and so a conversation's last answer is computed again."""

# Numbers of ggml's tensor types whose product with a row is the same however many rows there are, on x86:
# F32 (norms and the like, no matrices), Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
_BY_ROWS = frozenset({0, 2, 3, 6, 7, 8})
# And if neither repacked weights nor tiles are used: the K-quants and those IQ types that have tiles.
_BY_ROWS_IF_ASKED = frozenset({10, 11, 12, 13, 14, 16, 17, 18, 19, 21, 22, 23, 29})


@dataclass(frozen=True, slots=True)
class Exactness:
    """What ``Capabilities`` says of it.

    Attributes:
        block: ``exact_block``.
        start: ``exact_from``.
        any_tail: Whether what follows the blocks may be cut anywhere.
    """

    block: int = 1
    start: int = 0
    any_tail: bool = True


def describe_exactness(
    tensor_types: AbstractSet[int], native: NativeSettings, *, on_gpu: bool
) -> Exactness:
    """Which cuts of a prompt give the same bits.

    Rows that attention computes in tiles and other rows are rounded differently, so a prompt's token must
    always be one or always the other. Where nothing tiles, every row is computed by itself. (With
    ``n_ubatch`` no multiple of a tile, runs longer than it are cut in between, and the promise does not hold
    for them.)

    Args:
        tensor_types: Types of the model's weights, as ggml numbers them.
        native: The settings in effect.
        on_gpu: Whether a GPU computes, of which nothing is known.
    """
    # Rows of unified KV see the cells of all lanes, in an order that depends on who came when.
    if on_gpu or native.kv_unified or min(native.n_ubatch, native.n_batch) < TILE_ROWS:
        return Exactness()
    if not have_row_kernels(
        tensor_types, exact_kernels=native.exact_kernels, extra_buffers=native.use_extra_buffers
    ):
        return Exactness(TILE_ROWS, any_tail=False)
    types = {native.kv_type_k, native.kv_type_v}
    if native.flash_attention == "off" or types not in ({"f16"}, {"f32"}):
        return Exactness()
    return Exactness(TILE_ROWS, TILES_FROM)


def have_row_kernels(
    tensor_types: AbstractSet[int], *, exact_kernels: bool, extra_buffers: bool
) -> bool:
    """Whether a row of every matrix product has the same bits however many rows are computed with it.

    Args:
        tensor_types: Types of the model's weights, as ggml numbers them.
        exact_kernels: Whether kernels that tile K-quants are switched off.
        extra_buffers: Whether weights may be repacked.
    """
    if platform.machine() not in {"x86_64", "AMD64"}:
        return False  # not looked into
    if extra_buffers and "amx_tile" in machine.cpu_flags():
        return False  # AMX multiplies tiles; not looked into
    alike = _BY_ROWS
    if exact_kernels and not extra_buffers:
        alike |= _BY_ROWS_IF_ASKED
    return tensor_types <= alike
