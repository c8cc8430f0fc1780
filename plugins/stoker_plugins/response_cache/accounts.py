"""What is told of requests that the engine did not compute: deltas, traces, records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stoker import (
    Delta,
    FinishReason,
    Request,
    RequestRecord,
    SequenceTrace,
    StokerError,
)

__all__ = ["Account", "at_no_cost", "merged", "record_of"]

_STORED = "its answer was stored in the response cache"
_SHARED = "an identical request was under way"


@dataclass(slots=True, frozen=True)
class Account:
    """Tells of one request that reads an answer.

    Attributes:
        request: The request.
        now_s: The time.
        leader_arrival_s: When the request arrived that the engine computed; ``None`` for a stored answer.
        outcome: How sequences ended that the answer did not end; ``None`` if they have not.
        error: What went wrong.
    """

    request: Request
    now_s: float
    leader_arrival_s: float | None
    outcome: FinishReason | None
    error: Exception | None

    def trace(
        self,
        engine: SequenceTrace | None,
        ending: Delta | None,
        num_tokens: int,
        first_s: float | None,
    ) -> SequenceTrace:
        """What happened to one of its sequences.

        Args:
            engine: What happened to the one that was computed; ``None`` for a stored answer.
            ending: The answer's last delta of it.
            num_tokens: Tokens that the client got, if there is no such delta.
            first_s: When it got the first of them.
        """
        arrival_s = self.request.arrival_s
        total_s = self.now_s - arrival_s
        num_prompt = len(self.request.prompt_token_ids)
        if ending is not None and ending.usage is not None:
            num_tokens = ending.usage.completion_tokens
        reason = self.outcome if ending is None else ending.finish_reason
        status, queue_s = "finished" if engine is None else engine.status, 0.0
        is_waiting = status == "waiting" and not num_tokens
        if engine is not None and self.leader_arrival_s is not None:
            queue_s = min(total_s, max(0.0, self.leader_arrival_s + engine.queue_s - arrival_s))
        is_wrong = reason is FinishReason.ERROR
        return SequenceTrace(
            status=status if reason is None else "finished",
            queue_s=queue_s,
            total_s=total_s,
            prompt_tokens=num_prompt,
            admitted_by="" if is_waiting else _STORED if engine is None else _SHARED,
            cached_tokens=0 if is_waiting else num_prompt,
            completion_tokens=num_tokens,
            time_to_first_token_s=None if first_s is None else first_s - arrival_s,
            finish_reason=reason,
            error=_message(self.error) if is_wrong else None,
        )


def record_of(request: Request, trace: SequenceTrace, code: str | None) -> RequestRecord:
    """The record of a sequence that has ended.

    Args:
        request: Its request.
        trace: What happened to it.
        code: The ``code`` of its error.
    """
    reason = trace.finish_reason or FinishReason.ABORT
    return RequestRecord(
        request_id=request.request_id,
        model=request.model,
        tenant=request.tenant,
        finish_reason=reason,
        prompt_tokens=trace.prompt_tokens,
        cached_tokens=trace.cached_tokens,
        completion_tokens=trace.completion_tokens,
        queue_s=trace.queue_s,
        time_to_first_token_s=trace.time_to_first_token_s,
        total_s=trace.total_s,
        num_preemptions=0,
        error=trace.error,
        error_code=code if reason is FinishReason.ERROR else None,
        trace=trace,
    )


def at_no_cost(delta: Delta) -> Delta:
    """A sequence's last delta, for who did not have to wait for its prompt to be computed."""
    usage = delta.usage
    if usage is None:
        return delta
    usage = msgspec.structs.replace(
        usage,
        cached_tokens=usage.prompt_tokens,
        accepted_prediction_tokens=0,
        rejected_prediction_tokens=0,
    )
    return msgspec.structs.replace(delta, usage=usage)


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """The same text, finish reasons and counts in at most one delta for each sequence."""
    of_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        of_index.setdefault(delta.index, []).append(delta)
    return [
        msgspec.structs.replace(
            parts[-1],
            text="".join(part.text for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
        )
        for parts in of_index.values()
    ]


def _message(error: Exception | None) -> str:
    # What was not raised on purpose may tell what no client should know.
    return str(error) if isinstance(error, StokerError) else "internal error"
