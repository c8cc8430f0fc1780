"""Which of a step's runs llama.cpp computes together: one ``llama_decode`` for each number of rows.

With partitioned KV llama.cpp cuts a batch into passes in which every sequence has as many rows. Given
four decodes and a chunk of 64 prompt tokens, it computes one token of the chunk with the decodes and then
the other 63: no longer a chunk of 64, and so not the attention kernel for chunks, which is faster on long
prompts and rounds differently. Handed over apart, a chunk is computed in the shape in which it was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["plan_passes"]


def plan_passes(
    lengths: Sequence[int], n_ubatch: int, alone: Collection[int] = ()
) -> list[list[int]]:
    """The runs of each pass, by their index.

    Args:
        lengths: Rows of each run.
        n_ubatch: Most rows that llama.cpp computes at once: more runs than fit are another pass.
        alone: Runs that are to have a pass of their own.

    Returns:
        Passes; the longest runs come first, since those mostly want no logits, which the next pass would
        overwrite.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault((length, index if index in alone else -1), []).append(index)
    passes: list[list[int]] = []
    for length, which in sorted(groups, reverse=True):
        runs = groups[length, which]
        fitting = max(1, n_ubatch // length)
        passes += [runs[at : at + fitting] for at in range(0, len(runs), fitting)]
    return passes
