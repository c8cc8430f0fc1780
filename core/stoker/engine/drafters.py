"""The seam of speculative decoding: who guesses the tokens that a step then verifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence

__all__ = ["Drafter"]


class Drafter(ABC):
    """Guesses the next tokens of sequences; on the loop's thread.

    A guess can cost time, never correctness: what it proposes is verified, cut and checked by the core. If
    it raises, the model goes on without it.

    Attributes:
        is_free: Guessing costs next to nothing (microseconds). It is then asked in every step, and what
            it says is compared with what the model says even when it is not worth computing.
        depth_s: Seconds that one more token for all its sequences takes, lately.
        predicted: Sequences, by id, whose last guess came from their request's prediction.
    """

    is_free = False
    depth_s = 0.0
    predicted: AbstractSet[int] = frozenset()

    @abstractmethod
    def propose(
        self, sequences: Rows[Sequence], limits: Mapping[int, int]
    ) -> Mapping[int, NDArray[np.int32]]:
        """Guess what follows the tokens of each sequence.

        Args:
            sequences: Sequences that decode; only to be read.
            limits: Most tokens wanted, by sequence id; at least 1.

        Returns:
            ``int32[k]`` by sequence id; sequences without a guess are left out.
        """

    @abstractmethod
    def forget(self, sequence_id: int) -> None:
        """A sequence has ended; it may be one that was never seen."""
