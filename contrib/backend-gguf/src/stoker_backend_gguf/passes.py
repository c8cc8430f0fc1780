"""Which of a step's runs llama.cpp computes together: one ``llama_decode`` for each number of rows.

With partitioned KV llama.cpp cuts a batch into passes in which every sequence has as many rows. Given
four decodes and a chunk of 64 prompt tokens, it computes one token of the chunk with the decodes and then
the other 63: no longer a chunk of 64, and so not the attention kernel for chunks, which is faster on long
prompts and rounds differently. Handed over apart, a chunk is computed in the shape in which it was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TILES_FROM", "TILE_ROWS", "exact_block", "plan_passes"]

TILE_ROWS = 64
"""From so many rows of one sequence on, ggml's CPU flash attention computes them in tiles."""

TILES_FROM = 512
"""Tokens of a prompt that tiles are worth their price for: a tenth quicker at 256 tokens, a quarter at 1,000,
but what is written after them is not of their kind, and so a conversation's last answer is computed again."""


def plan_passes(lengths: Sequence[int], n_ubatch: int) -> list[list[int]]:
    """The runs of each pass, by their index.

    Args:
        lengths: Rows of each run.
        n_ubatch: Most rows that llama.cpp computes at once: more runs than fit are another pass.

    Returns:
        Passes; the longest runs come first, since those mostly want no logits, which the next pass would
        overwrite.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    passes: list[list[int]] = []
    for length in sorted(by_length, reverse=True):
        runs = by_length[length]
        fitting = max(1, n_ubatch // length)
        passes += [runs[at : at + fitting] for at in range(0, len(runs), fitting)]
    return passes


def exact_block(kv_types: tuple[str, str], *, flash_attention: str, n_ubatch: int) -> int:
    """``Capabilities.exact_block`` of partitioned KV on the CPU.

    Rows of tiles and other rows differ in how they are rounded, so a prompt's token must always be one or
    always the other. Where there are no tiles every row is computed by itself. (With ``n_ubatch`` no multiple
    of a tile, runs longer than it are cut in between, and the promise does not hold for them.)
    """
    has_tiles = flash_attention != "off" and kv_types in {("f16", "f16"), ("f32", "f32")}
    return TILE_ROWS if has_tiles and n_ubatch >= TILE_ROWS else 1
