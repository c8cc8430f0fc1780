"""What a client has got of its answer, and what of a second answer is news to it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stoker import Delta
from stoker_plugins.response_cache.accounts import at_no_cost, merged

__all__ = ["Given"]

_MERGE_ABOVE = 64  # deltas: who has fallen behind, or joins late, gets fewer and larger ones


class Given:
    """The deltas that one client got.

    Args:
        n: Sequences of its request.

    Attributes:
        tokens: How many tokens of each sequence it got.
        first_s: When it got something of each for the first time.
        endings: The last deltas that it got, by index.
        differs: Whether a second answer did not begin like the first one.
    """

    def __init__(self, n: int) -> None:
        self.tokens = [0] * n
        self.first_s: list[float | None] = [None] * n
        self.endings: dict[int, Delta] = {}
        self.differs = False
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._expected: dict[int, str] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it got nothing yet."""
        return not any(self.first_s)

    def begin_again(self) -> None:
        """What comes next is a second answer from its beginning."""
        texts = ["".join(parts) for parts in self._texts]
        self._expected = {index: text for index, text in enumerate(texts) if text}

    def take(self, batch: Sequence[Delta], now_s: float, *, leads: bool) -> list[Delta]:
        """What of a batch to give the client.

        Args:
            batch: Deltas of the answer that follow those of the batch before.
            now_s: The time.
            leads: Whether the answer is computed for this client; it then needs no second one, ever.
        """
        news: list[Delta] = []
        for delta in merged(batch) if len(batch) > _MERGE_ABOVE else batch:
            index = delta.index
            if index in self.endings:
                continue
            expected = self._expected.pop(index, "")
            if not expected:
                self.tokens[index] += delta.num_tokens
            elif _agrees(delta, expected):
                length = len(delta.text)
                if length < len(expected):
                    self._expected[index] = expected[length:]
                delta = msgspec.structs.replace(delta, text=delta.text[len(expected) :])
            else:
                self.differs = True
                break
            if self.first_s[index] is None:
                self.first_s[index] = now_s
            if not leads:
                self._texts[index].append(delta.text)
                if delta.finish_reason is not None:
                    delta = at_no_cost(delta)
            if delta.finish_reason is not None:
                self.endings[index] = delta
            news.append(delta)
        return news


def _agrees(delta: Delta, expected: str) -> bool:
    """Whether a text that goes on with this delta may begin with ``expected``."""
    if len(delta.text) >= len(expected):
        return delta.text.startswith(expected)
    return delta.finish_reason is None and expected.startswith(delta.text)
