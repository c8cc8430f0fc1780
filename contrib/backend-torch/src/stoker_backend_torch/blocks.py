"""Which blocks of KV memory hold which lane's tokens: block tables with reference counts.

The idea is PagedAttention's (Kwon et al. 2023): a lane's tokens lie in blocks of a fixed size anywhere in one
pool, and lanes that begin alike share blocks. Here are numbers only; ``paged.py`` has the memory.

A copy shares all blocks, the last one included, however full it is; whoever first writes to a block that
others hold gets its own copy of it. So a copy never needs room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["BlockTables", "Growth", "blocks_for"]


def blocks_for(num_lanes: int, context_length: int, capacity_tokens: int, block_size: int) -> int:
    """Blocks with which lanes can hold so many tokens in any distribution.

    A lane's last block may be all but empty, so these are more than the tokens alone would fill: otherwise
    memory that counts as free would not be, and a cache that is always full would be told so all the time.
    """
    lanes = min(num_lanes, capacity_tokens)
    most = num_lanes * -(-context_length // block_size)
    return min(most, (capacity_tokens - lanes) // block_size + lanes)


@dataclass(frozen=True, slots=True)
class Growth:
    """What is to be done before tokens are written.

    Attributes:
        fresh: Blocks that were free.
        copies: Pairs of blocks: the first one's contents belong into the second one, which was free, too.
    """

    fresh: Sequence[int] = ()
    copies: Sequence[tuple[int, int]] = ()


class BlockTables:
    """The blocks of all lanes.

    Args:
        num_lanes: Lanes.
        context_length: Most tokens of a lane.
        capacity_tokens: Most tokens of all lanes; those in shared blocks count once.
        block_size: Tokens of a block.

    Attributes:
        block_size: Tokens of a block.
        num_blocks: Blocks that lanes can have.
        scratch: A further block, which nobody has: where a table has no block, and where writes go that
            are nobody's.
        tables: ``int32[num_lanes, blocks]``, each lane's blocks in order, then ``scratch``.
        lengths: ``int64[num_lanes]``, tokens of each lane.
        references: ``int32[num_blocks + 1]``, how many lanes have a block.
    """

    def __init__(
        self, num_lanes: int, context_length: int, capacity_tokens: int, block_size: int
    ) -> None:
        self.block_size = block_size
        self.num_blocks = blocks_for(num_lanes, context_length, capacity_tokens, block_size)
        self.scratch = self.num_blocks
        self._capacity = capacity_tokens
        per_lane = -(-context_length // block_size)
        self.tables = np.full((num_lanes, per_lane), self.scratch, np.int32)
        self.lengths = np.zeros(num_lanes, np.int64)
        self.references = np.zeros(self.num_blocks + 1, np.int32)
        self._free = list(range(self.num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that are held; those of a shared block once."""
        places = np.arange(self.tables.shape[1]) * self.block_size
        held = np.clip(self.lengths[:, None] - places, 0, self.block_size)
        filled = np.zeros(self.num_blocks + 1, np.int64)
        np.maximum.at(filled, self.tables, held)
        return int(filled.sum())

    def slots(self, lanes: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where tokens lie in the pool, counted in tokens: ``int64[T]``."""
        blocks = self.tables[lanes, positions // self.block_size].astype(np.int64)
        slots: NDArray[np.int64] = blocks * self.block_size + positions % self.block_size
        return slots

    def extend(self, lanes: NDArray[np.int64], ends: NDArray[np.int64]) -> Growth | None:
        """Give lanes room to write.

        Args:
            lanes: ``int64[n]``, different ones.
            ends: ``int64[n]``, how many tokens each has afterwards: more than now, within the context.

        Returns:
            What is to be done in the pool; ``None``, and nothing has changed, if there is no room.
        """
        starts = self.lengths[lanes]
        firsts = starts // self.block_size
        is_partial = starts % self.block_size > 0
        is_shared = is_partial & (self.references[self.tables[lanes, firsts]] > 1)
        if self.lengths.sum() + (ends - starts).sum() > self._capacity:
            # As many as that only if no block is shared.
            copied = int((starts % self.block_size)[is_shared].sum())
            if self.num_tokens + int((ends - starts).sum()) + copied > self._capacity:
                return None
        self.lengths[lanes] = ends
        held, wanted = firsts + is_partial, -(-ends // self.block_size)
        grows = np.flatnonzero(is_shared | (wanted > held))
        if not len(grows):
            return Growth()
        fresh: list[int] = []
        copies: list[tuple[int, int]] = []
        for i in grows.tolist():
            lane, first = int(lanes[i]), int(firsts[i])
            block = int(self.tables[lane, first])
            # The last of those that share it keeps it.
            if is_shared[i] and self.references[block] > 1:
                self.references[block] -= 1
                copies.append((block, self._take(lane, first)))
            fresh += [self._take(lane, place) for place in range(int(held[i]), int(wanted[i]))]
        return Growth(fresh, copies)

    def truncate(self, lane: int, num_tokens: int) -> None:
        """Keep a lane's first tokens; more than it has are none."""
        length = int(self.lengths[lane])
        if num_tokens >= length:
            return
        keep, held = -(-num_tokens // self.block_size), -(-length // self.block_size)
        row = self.tables[lane]
        for block in row[keep:held].tolist():
            self.references[block] -= 1
            if not self.references[block]:
                self._free.append(block)
        row[keep:held] = self.scratch
        self.lengths[lane] = num_tokens

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first tokens of one lane all that another one has; the source has as many."""
        if source == target:
            self.truncate(target, num_tokens)
            return
        self.truncate(target, 0)
        count = -(-num_tokens // self.block_size)
        shared = self.tables[source, :count]
        self.tables[target, :count] = shared
        self.references[shared] += 1
        self.lengths[target] = num_tokens

    def _take(self, lane: int, place: int) -> int:
        block = self._free.pop()
        self.references[block] = 1
        self.tables[lane, place] = block
        return block
