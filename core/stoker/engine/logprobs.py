"""How likely the model found the tokens: for those who ask, by the logits as the model gave them.

A log-probability is ``logit - log(sum(exp(logits)))`` over the whole vocabulary, before bias, penalties,
masks and temperature: what the model says, not what the request made of it (OpenAI's and vLLM's meaning).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.filters import head
from stoker.errors import EngineError
from stoker.types import TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.plan import Plan
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import Tokenizer

__all__ = ["LEAST_LOGPROB", "NOTHING", "LogprobTeller", "TokenNames"]

LEAST_LOGPROB = -9999.0
"""What stands for less: JSON knows no infinity, and OpenAI's API has the same one."""

_PIECE_VALUES = 1 << 20  # logits to work on at once: as many as fit into a cache


class TokenNames:
    """What tokens are called: their bytes, and of control tokens their text.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._special = {token: text.encode() for text, token in tokenizer.special_tokens.items()}
        self._names: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """The token's name."""
        name = self._names.get(token)
        if name is None:
            name = self._token_bytes(token) or self._special.get(token, b"")
            self._names[token] = name
        return name


class LogprobTeller:
    """Log-probabilities of one model's tokens.

    Args:
        names: What its tokens are called.

    Attributes:
        num_asking: Sequences under way that want them: while there are none, nobody looks for them.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self.num_asking = 0

    def of_step(
        self,
        logits: NDArray[np.float32],
        sampled: Rows[Sequence],
        tokens: Rows[Rows[int]],
        plan: Plan,
    ) -> Mapping[int, list[TokenLogprob]]:
        """What is to be told of a step's tokens.

        Args:
            logits: ``float32[R, vocab]``, the rows that were sampled from: one for each sequence, and one
                more for each of its draft tokens.
            sampled: The sequences, in the order of the rows.
            tokens: What was chosen for each, one token for each of its first rows.
            plan: The step.

        Returns:
            For each sequence that asks, by its id, an entry for each of its tokens; fewer if the last one
            is not a token.
        """
        if not self.num_asking:
            return NOTHING
        told: dict[int, list[TokenLogprob]] = {}
        row = 0
        for sequence, chosen in zip(sampled, tokens, strict=True):
            wanted = sequence.sampling.logprobs
            if wanted is not None:
                good = [token for token in chosen if token >= 0]
                told[sequence.sequence_id] = self.of_rows(
                    logits[row : row + len(good)], good, wanted
                )
            row += 1 + len(plan.drafts.get(sequence.sequence_id, ()))
        return told

    def of_rows(
        self, logits: NDArray[np.float32], tokens: Rows[int], num_top: int
    ) -> list[TokenLogprob]:
        """The entry of each token.

        Args:
            logits: ``float32[R, vocab]``.
            tokens: R tokens, one for each row.
            num_top: How many of the likeliest to tell for each.

        Raises:
            EngineError: A row has no finite maximum.
        """
        entries: list[TokenLogprob] = []
        size = max(1, _PIECE_VALUES // logits.shape[1])
        for start in range(0, len(tokens), size):
            rows = logits[start : start + size]
            peaks = rows.max(axis=1)
            if not np.isfinite(peaks).all():
                raise EngineError("the model produced logits that are not finite")
            sums = np.exp(rows - peaks[:, None]).sum(axis=1, dtype=np.float64)
            totals = (peaks + np.log(sums)).tolist()
            for row, token, total in zip(rows, tokens[start : start + size], totals, strict=True):
                entries.append(self._entry(row, token, total, num_top))
        return entries

    def _entry(
        self, row: NDArray[np.float32], token: int, total: float, num_top: int
    ) -> TokenLogprob:
        top: tuple[TokenLogprob, ...] = ()
        if num_top:
            likeliest = head(row, min(num_top, len(row)))
            top = tuple(
                TokenLogprob(token_id=other, data=self._names(other), logprob=_told(logit - total))
                for other, logit in zip(likeliest.tolist(), row[likeliest].tolist(), strict=True)
            )
        return TokenLogprob(
            token_id=token,
            data=self._names(token),
            logprob=_told(float(row[token]) - total),
            top=top,
        )


def _told(logprob: float) -> float:
    """What is told of a log-probability: not what rounding or infinite logits make of it."""
    return min(0.0, max(LEAST_LOGPROB, logprob))


NOTHING: Mapping[int, list[TokenLogprob]] = {}
"""What is told of a step of which nobody asks."""
