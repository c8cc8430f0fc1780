"""What sampled tokens make of a sequence: text, and perhaps its end."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker.engine.sampler import NOT_FINITE
from stoker.errors import EngineError
from stoker.types import FinishReason, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from stoker.engine.masks import Constraint
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
        stop: The stop string or stop token that ended it.
    """

    # No arguments: one is made for every sequence of every step.
    num_tokens: int = field(default=0, init=False)
    text: str = field(default="", init=False)
    reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    stop: str | int | None = field(default=None, init=False)


def advance(
    sequence: Sequence,
    tokens: list[int],
    end_token_ids: Collection[int],
    entries: Rows[TokenLogprob] | None = None,
) -> Advance:
    """Add sampled tokens to a sequence, up to the one that ends it.

    Args:
        sequence: A sequence that decodes.
        tokens: What was sampled for it, at least one; what follows the end is dropped.
        end_token_ids: Tokens that end a generation.
        entries: What is to be told of each of them, if anything.
    """
    done = Advance()
    detokenizer, ledger = sequence.detokenizer, sequence.ledger
    stop_ids, constraint = sequence.sampling.stop_token_ids, sequence.constraint
    for token in tokens:
        is_odd = constraint is not None or token == NOT_FINITE
        if is_odd and _stops_before(done, token, constraint):
            break
        sequence.append(token)
        done.num_tokens += 1
        is_end = token in end_token_ids or token in stop_ids
        if is_end and _ends(done, token, end_token_ids, sequence.sampling):
            break
        if constraint is not None:
            constraint.accept(token)
        try:
            if ledger is None:
                done.text += detokenizer.push(token)
            else:
                entry = entries[done.num_tokens - 1] if entries else None
                done.text += ledger.push(token, entry, detokenizer)
        except Exception as error:  # noqa: BLE001 - a tokenizer may raise anything, too
            done.error = error
            break
        if is_odd or detokenizer.stopped or sequence.num_output >= sequence.max_tokens:
            _note_end(done, sequence, constraint)
        if done.reason is not None:
            break
    if ledger is not None:
        ledger.note(tokens[: done.num_tokens], entries or ())
    return done


def _stops_before(done: Advance, token: int, constraint: Constraint | None) -> bool:
    """Note why a token is not to be added, if there is a reason."""
    if constraint is not None and (constraint.is_over or constraint.error is not None):
        done.error = constraint.error
        done.reason = FinishReason.STOP if done.error is None else None
        return True
    if token == NOT_FINITE:
        done.error = EngineError("the model produced logits that are not finite")
        return True
    return False


def _note_end(done: Advance, sequence: Sequence, constraint: Constraint | None) -> None:
    """Note why the output ends after a token that is part of it, if it does."""
    if sequence.detokenizer.stopped:
        done.reason, done.stop = FinishReason.STOP, sequence.detokenizer.stop_string
    elif constraint is not None and constraint.is_over:
        done.reason = FinishReason.STOP
    elif done.reason is None and sequence.num_output >= sequence.max_tokens:
        done.reason = FinishReason.LENGTH


def _ends(
    done: Advance, token: int, end_token_ids: Collection[int], sampling: SamplingParams
) -> bool:
    """Note that a token ends the output, if it does; returns whether it is no part of the text."""
    if token in end_token_ids and not sampling.ignore_eos:
        done.reason = FinishReason.STOP
        return True
    if token not in sampling.stop_token_ids:
        return False
    done.reason, done.stop = FinishReason.STOP, token
    return not sampling.include_stop
