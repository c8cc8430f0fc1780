"""What became of a sequence in a step, as its reader is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.types import Delta, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from stoker.engine.advance import Advance
    from stoker.engine.ledger import OutputLedger
    from stoker.engine.sequence import Sequence

__all__ = ["delta_of", "last_delta", "progress"]


def delta_of(sequence: Sequence, ledger: OutputLedger, done: Advance) -> Delta:
    """The delta of a sequence that goes on and tells more than its text."""
    return Delta(
        index=sequence.index,
        text=done.text,
        num_tokens=done.num_tokens,
        token_ids=ledger.take_token_ids(),
        logprobs=ledger.release(sequence.detokenizer),
        prompt_logprobs=_scores(sequence),
    )


def progress(sequence: Sequence) -> Delta:
    """The delta that tells how far a sequence's prompt is."""
    return Delta(index=sequence.index, num_prefilled=sequence.num_computed)


def _scores(sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """How likely the prompt's tokens are, if that is known and was not told yet."""
    scores = sequence.scores
    if scores is None or not scores.is_complete:
        return None
    sequence.scores = None
    return tuple(scores.entries)


def last_delta(
    sequence: Sequence, reason: FinishReason, error: Exception | None, done: Advance
) -> Delta:
    """The last delta of a sequence: with the text that was held back, and its counts.

    Args:
        sequence: The sequence; nothing is added to it any more.
        reason: Why it ends. If what was held back completes a stop string, that is why.
        error: What went wrong.
        done: What its last step added.
    """
    detokenizer, ledger = sequence.detokenizer, sequence.ledger
    had_stopped = detokenizer.stopped
    tail = detokenizer.finish()
    stop = done.stop
    if detokenizer.stopped and not had_stopped and reason is FinishReason.LENGTH:
        reason, stop = FinishReason.STOP, detokenizer.stop_string
    cumulative = None
    if ledger is not None and sequence.sampling.logprobs is not None:
        cumulative = ledger.cumulative_logprob
    return Delta(
        index=sequence.index,
        text=done.text + tail,
        num_tokens=done.num_tokens,
        finish_reason=reason,
        error=error,
        usage=sequence.usage(),
        token_ids=() if ledger is None else ledger.take_token_ids(),
        logprobs=() if ledger is None else ledger.finish(tail, detokenizer),
        prompt_logprobs=_scores(sequence),
        stop=stop if reason is FinishReason.STOP else None,
        cumulative_logprob=cumulative,
    )
