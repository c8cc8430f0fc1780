"""Requests into sequences, with what each needs to become text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.filters import make_rules
from stoker.engine.ledger import OutputLedger
from stoker.engine.logprobs import TokenNames
from stoker.engine.scoring import PromptScores
from stoker.engine.sequence import Sequence

if TYPE_CHECKING:
    from stoker.engine.client import RequestStream
    from stoker.interfaces import Runtime

__all__ = ["Intake"]


class Intake:
    """Makes the sequences of one model.

    Args:
        runtime: The model.
        max_total_tokens: Most tokens of prompt and output together.

    Attributes:
        token_text: The text of each of the model's tokens.
        names: What they are called.
    """

    def __init__(self, runtime: Runtime, max_total_tokens: int) -> None:
        self._end_token_ids = runtime.info.end_token_ids
        self._max_total_tokens = max_total_tokens
        self.token_text = TokenText(runtime.tokenizer.token_bytes)
        self.names = TokenNames(runtime.tokenizer)

    def sequences(self, stream: RequestStream) -> list[Sequence]:
        """The ``n`` sequences of a request."""
        return [self._sequence(stream, index) for index in range(stream.request.n)]

    def _sequence(self, stream: RequestStream, index: int) -> Sequence:
        request = stream.request
        params = request.sampling
        detokenizer = Detokenizer(
            self.token_text.showing(request.shown_tokens),
            params.stop,
            include_stop=params.include_stop,
            min_tokens=params.min_tokens,
        )
        sequence = Sequence(request, index, stream, detokenizer, self._max_total_tokens)
        sequence.rules = make_rules(params, self._end_token_ids, self.names)
        if params.prompt_logprobs is not None and index == 0:
            sequence.scores = PromptScores(sequence.num_prompt, params.prompt_logprobs)
        if params.logprobs is not None or request.wants_token_ids or sequence.scores is not None:
            sequence.ledger = OutputLedger(wants_token_ids=request.wants_token_ids)
        return sequence
