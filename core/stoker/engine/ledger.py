"""What deltas tell beyond their text, for those who want it: token ids, and log-probabilities in their time.

Text may be held back: as part of a character, or because it may turn out to be the beginning of a stop
string. What is told of a token waits as long as its text does, and if that is cut off nothing is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.engine.detokenizer import Detokenizer
    from stoker.types import TokenLogprob

__all__ = ["OutputLedger"]

_NEVER = 1 << 62


@dataclass(slots=True)
class _Waiting:
    """An entry whose text is not all out.

    Attributes:
        entry: What is told.
        start: Where the token's text begins, in characters of the output.
        end: Where it ends; with the character that it is a part of.
    """

    entry: TokenLogprob
    start: int
    end: int


class OutputLedger:
    """Follows one sequence's tokens into its text.

    Args:
        wants_token_ids: Whether deltas carry them.

    Attributes:
        wants_token_ids: See above.
        cumulative_logprob: Sum over all tokens, also those that only end the output.
    """

    __slots__ = ("_num_out", "_token_ids", "_waiting", "cumulative_logprob", "wants_token_ids")

    def __init__(self, *, wants_token_ids: bool) -> None:
        self.wants_token_ids = wants_token_ids
        self.cumulative_logprob = 0.0
        self._token_ids: tuple[int, ...] = ()
        self._num_out = 0  # characters
        self._waiting: deque[_Waiting] = deque()

    def push(self, token: int, entry: TokenLogprob | None, detokenizer: Detokenizer) -> str:
        """Add a token to a text; returns the text that is certain now.

        Args:
            token: The token.
            entry: What is to be told of it, if anything.
            detokenizer: Makes the text; nobody else pushes into it.
        """
        start = self._num_out + detokenizer.num_held
        if detokenizer.is_partial and not detokenizer.continues(token):
            start += 1  # after the character that will never be whole
        text = detokenizer.push(token)
        self._num_out += len(text)
        if entry is not None:
            end = self._num_out + detokenizer.num_held + detokenizer.is_partial
            self._waiting.append(
                _Waiting(entry, start, _NEVER if detokenizer.stopped else max(start, end))
            )
        return text

    def note(self, tokens: Rows[int], entries: Rows[TokenLogprob]) -> None:
        """Count the tokens of a step, pushed or not.

        Args:
            tokens: All of them, those that only ended the output, too.
            entries: What was to be told of each of them, or of more; or nothing.
        """
        if self.wants_token_ids:
            self._token_ids += tuple(tokens)
        if entries:
            self.cumulative_logprob += sum(e.logprob for e in entries[: len(tokens)])

    def take_token_ids(self) -> tuple[int, ...]:
        """The tokens since the last call, if they are wanted."""
        tokens, self._token_ids = self._token_ids, ()
        return tokens

    def release(self, detokenizer: Detokenizer) -> tuple[TokenLogprob, ...]:
        """What may be told now."""
        if detokenizer.stopped:
            return self._rest(detokenizer)
        released = []
        waiting = self._waiting
        while waiting and waiting[0].end <= self._num_out:
            released.append(waiting.popleft().entry)
        return tuple(released)

    def finish(self, tail: str, detokenizer: Detokenizer) -> tuple[TokenLogprob, ...]:
        """What is to be told last.

        Args:
            tail: What ``detokenizer.finish()`` returned.
            detokenizer: Made the text.
        """
        self._num_out += len(tail)
        return self._rest(detokenizer)

    def _rest(self, detokenizer: Detokenizer) -> tuple[TokenLogprob, ...]:
        """What waits; of tokens whose text was cut off nothing."""
        rest = tuple(
            item.entry
            for item in self._waiting
            if not detokenizer.stopped or item.start < self._num_out or item.end <= self._num_out
        )
        self._waiting.clear()
        return rest
