"""What sampled tokens make of a sequence: text, and perhaps its end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.engine.sampler import NOT_FINITE
from stoker.errors import EngineError
from stoker.types import FinishReason

if TYPE_CHECKING:
    from stoker.engine.sequence import Sequence

__all__ = ["Advance", "advance"]


@dataclass(slots=True)
class Advance:
    """What became of a sequence in a step.

    Attributes:
        num_tokens: Tokens that were added to it.
        text: Their text, as far as it is certain.
        reason: Why it ends; ``None`` if it goes on or failed.
        error: Why it failed: an ``EngineError``, its grammar's ``RequestError``, or whatever the tokenizer
            raised.
    """

    num_tokens: int = 0
    text: str = ""
    reason: FinishReason | None = None
    error: Exception | None = None


def advance(sequence: Sequence, tokens: list[int], end_token_ids: Collection[int]) -> Advance:
    """Add sampled tokens to a sequence, up to the one that ends it.

    Args:
        sequence: A sequence that decodes.
        tokens: What was sampled for it, at least one; what follows the end is dropped.
        end_token_ids: Tokens that end a generation.
    """
    done = Advance()
    constraint = sequence.constraint
    for token in tokens:
        if constraint is not None and (constraint.is_over or constraint.error is not None):
            done.error = constraint.error
            done.reason = FinishReason.STOP if done.error is None else None
            break
        if token == NOT_FINITE:
            done.error = EngineError("the model produced logits that are not finite")
            break
        sequence.append(token)
        done.num_tokens += 1
        if token in end_token_ids and not sequence.sampling.ignore_eos:
            done.reason = FinishReason.STOP
            break
        if constraint is not None:
            constraint.accept(token)
        try:
            done.text += sequence.detokenizer.push(token)
        except Exception as error:  # noqa: BLE001 - a tokenizer may raise anything, too
            done.error = error
            break
        if sequence.detokenizer.stopped or (constraint is not None and constraint.is_over):
            done.reason = FinishReason.STOP
        elif sequence.num_output >= sequence.max_tokens:
            done.reason = FinishReason.LENGTH
        if done.reason is not None:
            break
    return done
