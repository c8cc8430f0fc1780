"""The same bits with a hit as without one: where prompts may be cut, and what of a prefix is as good as new.

A matrix product over 64 rows may round otherwise than one over 3. So the KV of a token depends on the piece
that it was computed in, and a prompt whose beginning is found in KV can get another text than one whose
beginning is not. A runtime may promise a block length B (``Capabilities.exact_block``) such that two
*kinds* of pieces are each self-consistent: whole blocks of B tokens at multiples of B, and pieces shorter
than B. Here every prompt is computed in the same way: its whole blocks as blocks; what remains, and all
that is generated, in shorter pieces. Then a prefix can be reused as far as the newcomer would compute the
same kinds. Where not even shorter pieces are alike (``Capabilities.exact_tail``), what remains after the
blocks is computed in one piece, and only blocks are ever reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.engine.sequence import Sequence

__all__ = ["ExactBlocks"]


class ExactBlocks:
    """The rule for one runtime.

    Args:
        block: Tokens of a block; 1 if any cut gives the same bits, or if nobody asks for that.
        start: Shorter prompts have no blocks.
        whole_tail: What follows a prompt's last block must be computed in one piece. It has two rows at least
            (one row is what a runtime computes like a decode), and so one more than a block at most.
    """

    def __init__(self, block: int = 1, start: int = 0, *, whole_tail: bool = False) -> None:
        self.block = block
        self.start = start
        self.whole_tail = whole_tail and block > 1

    def boundary(self, num_prompt: int) -> int:
        """How many of a prompt's tokens are computed as whole blocks."""
        if num_prompt < self.start:
            return 0
        return self._down(max(0, num_prompt - 2) if self.whole_tail else num_prompt)

    def reusable(self, sequence: Sequence) -> int:
        """How many of a sequence's first tokens may come from somebody else's KV at most.

        Never the last one: its KV may be there, but its logits are not. Nor the one before it where pieces
        matter and the last one would not be alone otherwise: a piece of one row is what a runtime computes
        like a decode. And nothing of a prompt that is to be scored, before it is.
        """
        num_tokens = sequence.num_tokens
        if self.whole_tail:
            most = self.boundary(sequence.num_prompt)
        elif self.block > 1 and num_tokens - self.boundary(sequence.num_prompt) > 1:
            most = num_tokens - 2
        else:
            most = num_tokens - 1
        scores = sequence.scores
        return most if scores is None or scores.is_complete else min(most, scores.num_scored)

    def usable(self, shared: int, theirs: int, own: int) -> int:
        """How many of ``shared`` tokens are of the kinds that a newcomer would compute itself.

        Args:
            shared: Tokens of the newcomer that a source holds.
            theirs: The source's boundary: how many of its first tokens are whole blocks.
            own: The newcomer's.
        """
        if self.block == 1 or (theirs == own and shared >= own and not self.whole_tail):
            return shared
        return self._down(min(shared, theirs, own))

    def kept(self, num_tokens: int, sequence: Sequence) -> int:
        """How many of so many first tokens, of the right kinds, a sequence can go on from."""
        own = self.boundary(sequence.num_prompt)
        if num_tokens < own:
            return self._down(num_tokens)
        return own if self.whole_tail and num_tokens < sequence.num_prompt else num_tokens

    def piece(self, sequence: Sequence, count: int) -> int:
        """The longest piece of at most ``count`` pending tokens, or the shortest one that is allowed."""
        if self.block == 1:
            return min(count, sequence.num_pending)
        left = self.boundary(sequence.num_prompt) - sequence.num_computed
        if left > 0:
            return max(self.block, self._down(min(count, left)))
        if self.whole_tail and (tail := sequence.num_prompt - sequence.num_computed) > 0:
            return tail
        return min(count, sequence.num_pending, self.block - 1)

    def fit(self, shares: dict[int, int], prefilling: Iterable[Sequence]) -> dict[int, int]:
        """Cut each sequence's share to a piece.

        What one cannot use goes to the next one, in order of arrival. The first of them that has a share
        gets a whole block even if that is more than the share: else it might never get one.

        Args:
            shares: Pending tokens for every sequence, by its id.
            prefilling: The sequences.

        Returns:
            The same keys; together no more tokens than before, or a single block or tail.
        """
        if self.block == 1:
            return shares
        left = sum(shares.values())
        carried, is_first = 0, True
        fitted = dict.fromkeys(shares, 0)
        for sequence in sorted(prefilling, key=lambda s: (s.request.arrival_s, s.sequence_id)):
            share = shares[sequence.sequence_id]
            if not share:
                continue
            piece = self.piece(sequence, max(1, share + carried))
            if (piece > share + carried or piece > left) and not is_first:
                piece = 0
            fitted[sequence.sequence_id] = piece
            carried += share - piece
            left -= piece
            is_first = False
        return fitted

    def _down(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self.block
