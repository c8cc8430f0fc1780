"""One token stream: its tokens, where it stands, and the legal ways to move on."""

from __future__ import annotations

import enum
import itertools
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stoker.errors import RequestError, StokerError
from stoker.types import (
    FinishReason,
    Preemption,
    Request,
    RequestRecord,
    ScheduledTokens,
    SequenceTrace,
    SequenceView,
    Usage,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.client import RequestStream
    from stoker.engine.detokenizer import Detokenizer
    from stoker.engine.filters import TokenRules
    from stoker.engine.ledger import OutputLedger
    from stoker.engine.masks import Constraint
    from stoker.engine.sampler import TokenCounts
    from stoker.engine.scoring import PromptScores

__all__ = ["NO_LANE", "Facts", "Sequence", "SequenceStatus"]

_ids = itertools.count(1)
_MASK64 = (1 << 64) - 1

_MAX_PREEMPTIONS_TOLD = 16

NO_LANE = -1
"""The ``lane`` of a sequence that holds none."""


class SequenceStatus(enum.Enum):
    """Where a sequence stands; see ``_LEGAL`` for the ways between."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_LEGAL = {
    SequenceStatus.WAITING: {SequenceStatus.PREFILL, SequenceStatus.FINISHED},
    SequenceStatus.PREFILL: {
        SequenceStatus.DECODE,
        SequenceStatus.PREEMPTED,
        SequenceStatus.FINISHED,
    },
    SequenceStatus.DECODE: {SequenceStatus.PREEMPTED, SequenceStatus.FINISHED},
    SequenceStatus.PREEMPTED: {SequenceStatus.PREFILL, SequenceStatus.FINISHED},
    SequenceStatus.FINISHED: set(),
}


@dataclass(slots=True)
class Facts:
    """What happened to a sequence so far, beyond what it needs to run: see ``SequenceTrace``."""

    waiting_ahead: int = 0
    waiting_ahead_own: int = 0
    waiting_ahead_tokens: int = 0
    running_at_arrival: int = 0
    admitted_by: str = ""
    cached_by: str = ""
    shared_wait_s: float = 0.0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_deferred_steps: int = 0
    recomputed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_prediction: int = 0
    rejected_prediction: int = 0
    paused_s: float = 0.0
    preemptions: list[Preemption] = field(default_factory=list)


class Sequence:
    """A prompt and what was generated from it so far.

    The first ``num_computed`` of its ``num_tokens`` tokens have their KV in ``lane``; the rest is pending.
    A decode step has exactly one pending token: the one that was sampled last. (A step may compute guessed
    tokens behind it; those are no tokens of the sequence until they are accepted.)

    Args:
        request: The request it belongs to.
        index: Which of the request's ``n`` sequences.
        stream: Where its deltas go.
        detokenizer: Turns its tokens into text.
        max_total_tokens: Most tokens of prompt and output together: the context length.

    Attributes:
        num_known: Tokens that were computed once, if perhaps not any more.
        num_passed: Sequences admitted past this one because it did not fit.
        num_deferred: Steps in a row whose decode the policy left out.
        output_at_admission: Tokens generated when it last got its lane.
        failed_at: Tokens generated when a failed step last cost it its lane; -1 if none ever did.
        paused_at_s: Since when it waits for its reader.
        rules: What its logits need beyond bias and penalties.
        ledger: What its deltas tell beyond text.
        constraint: Where it stands in its request's grammar; ``None`` before its first token, or without one.
        scores: How likely its prompt's tokens are, until that is told.
        facts: What is told about it.
    """

    __slots__ = (
        "admitted_s",
        "constraint",
        "counts",
        "detokenizer",
        "ended_s",
        "error",
        "expected_output",
        "facts",
        "failed_at",
        "finish_reason",
        "first_token_s",
        "index",
        "lane",
        "last_token_s",
        "ledger",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_deferred",
        "num_known",
        "num_passed",
        "num_preemptions",
        "num_prompt",
        "num_tokens",
        "output_at_admission",
        "paused_at_s",
        "request",
        "rules",
        "sampling",
        "scores",
        "seed",
        "sequence_id",
        "status",
        "stream",
        "tokens",
        "view",
        "waiting_since_s",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        stream: RequestStream,
        detokenizer: Detokenizer,
        max_total_tokens: int,
    ) -> None:
        self.sequence_id = next(_ids)
        self.request = request
        self.index = index
        self.stream = stream
        self.detokenizer = detokenizer
        self.sampling = request.sampling
        self.num_prompt = len(request.prompt_token_ids)
        room = max_total_tokens - self.num_prompt
        self.max_tokens = room if self.sampling.max_tokens is None else self.sampling.max_tokens
        self.max_tokens = min(self.max_tokens, room)
        self.tokens: NDArray[np.int32] = np.empty(self.num_prompt + self.max_tokens, np.int32)
        self.tokens[: self.num_prompt] = request.prompt_token_ids
        self.num_tokens = self.num_prompt
        self.num_computed = 0
        self.num_cached = 0
        self.lane = NO_LANE
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_preemptions = 0
        base = self.sampling.seed if self.sampling.seed is not None else secrets.randbits(64)
        # Sequences of one request must differ from each other, reproducibly.
        self.seed = (base + index * 0x9E3779B97F4A7C15) & _MASK64
        self.counts: TokenCounts | None = None
        self.rules: TokenRules | None = None
        self.ledger: OutputLedger | None = None
        self.constraint: Constraint | None = None
        self.scores: PromptScores | None = None
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.ended_s: float | None = None
        self.error: Exception | None = None
        self.waiting_since_s = request.arrival_s
        self.paused_at_s: float | None = None
        self.num_known = 0
        self.num_passed = 0
        self.num_deferred = 0
        self.output_at_admission = 0
        self.failed_at = -1
        self.expected_output = self.max_tokens
        self.facts = Facts()
        self.view = self.snapshot()

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not computed yet."""
        return self.num_tokens - self.num_computed

    @property
    def yielded_in_vain(self) -> bool:
        """Whether it lost a lane before and got no token in this one yet: to take it again leads nowhere."""
        return self.num_preemptions > 0 and self.num_output <= self.output_at_admission

    def move_to(self, status: SequenceStatus) -> None:
        """Change the status.

        Raises:
            RuntimeError: The transition is not legal; a bug in the engine.
        """
        if status not in _LEGAL[self.status]:
            raise RuntimeError(
                f"sequence {self.sequence_id}: illegal transition {self.status} -> {status}"
            )
        self.status = status

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def snapshot(self) -> SequenceView:
        """What a policy may see of it, now."""
        request = self.request
        return SequenceView(
            sequence_id=self.sequence_id,
            request_id=request.request_id,
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            num_prompt_tokens=self.num_prompt,
            num_computed_tokens=self.num_computed,
            num_output_tokens=self.num_output,
            max_tokens=self.max_tokens,
            num_preemptions=self.num_preemptions,
            deadline_s=request.deadline_s,
            admitted_s=self.admitted_s,
            waiting_since_s=self.waiting_since_s,
            num_passed=self.num_passed,
            num_deferred=self.num_deferred,
            expected_output_tokens=self.expected_output,
        )

    def scheduled(self, count: int) -> ScheduledTokens:
        """What computing its next ``count`` pending tokens is: new, or done before."""
        end = self.num_computed + count
        again = max(0, min(self.num_known, end) - self.num_computed)
        decoded = max(0, end - max(self.num_known, self.num_computed, self.num_prompt))
        return ScheduledTokens(
            self.request.tenant, count - again - decoded, decoded, again, self.sequence_id
        )

    def lost_lane(self, now_s: float, reason: str, lost_tokens: int) -> None:
        """Note a preemption."""
        self.num_preemptions += 1
        self.waiting_since_s = now_s
        self.num_passed = self.num_deferred = 0
        if len(self.facts.preemptions) < _MAX_PREEMPTIONS_TOLD:
            after_s = now_s - self.request.arrival_s
            self.facts.preemptions.append(
                Preemption(after_s=after_s, reason=reason, lost_tokens=lost_tokens)
            )

    def usage(self) -> Usage:
        """Its own token counts."""
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output,
            cached_tokens=self.num_cached,
            accepted_prediction_tokens=self.facts.accepted_prediction,
            rejected_prediction_tokens=self.facts.rejected_prediction,
        )

    def trace(self, now_s: float) -> SequenceTrace:
        """What happened to it so far; from any thread, as of about now."""
        facts, arrival = self.facts, self.request.arrival_s
        end_s = now_s if self.ended_s is None else self.ended_s
        first_s, last_s = self.first_token_s, self.last_token_s
        rate = None
        if first_s is not None and last_s is not None and last_s > first_s:
            rate = (self.num_output - 1) / (last_s - first_s)
        paused_s = facts.paused_s
        if self.paused_at_s is not None:
            paused_s += end_s - self.paused_at_s
        is_paused = self.paused_at_s is not None and self.ended_s is None
        return SequenceTrace(
            status="paused" if is_paused else self.status.value,
            queue_s=(end_s if self.admitted_s is None else self.admitted_s) - arrival,
            waiting_ahead=facts.waiting_ahead,
            waiting_ahead_own=facts.waiting_ahead_own,
            waiting_ahead_tokens=facts.waiting_ahead_tokens,
            running_at_arrival=facts.running_at_arrival,
            passed_by=self.num_passed,
            admitted_by=facts.admitted_by,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            cached_by=facts.cached_by,
            shared_wait_s=facts.shared_wait_s,
            computed_tokens=max(0, min(self.num_known, self.num_prompt) - self.num_cached),
            recomputed_tokens=facts.recomputed_tokens,
            completion_tokens=self.num_output,
            num_prefill_steps=facts.num_prefill_steps,
            num_decode_steps=facts.num_decode_steps,
            num_deferred_steps=facts.num_deferred_steps,
            draft_tokens=facts.draft_tokens,
            accepted_tokens=facts.accepted_tokens,
            num_preemptions=self.num_preemptions,
            preemptions=tuple(facts.preemptions),
            paused_s=paused_s,
            time_to_first_token_s=None if first_s is None else first_s - arrival,
            tokens_per_s=rate,
            total_s=end_s - arrival,
            finish_reason=self.finish_reason,
            error=self._error_for_its_owner(),
        )

    def _error_for_its_owner(self) -> str | None:
        # What was not raised on purpose may tell what no client should know.
        if self.error is None or isinstance(self.error, StokerError):
            return None if self.error is None else str(self.error)
        return "internal error"

    def record(self) -> RequestRecord:
        """What observers are told at its end."""
        now_s = self.request.arrival_s if self.ended_s is None else self.ended_s
        trace = self.trace(now_s)
        return RequestRecord(
            request_id=self.request.request_id,
            model=self.request.model,
            tenant=self.request.tenant,
            finish_reason=self.finish_reason or FinishReason.ABORT,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=self.num_output,
            queue_s=trace.queue_s,
            time_to_first_token_s=trace.time_to_first_token_s,
            total_s=trace.total_s,
            num_preemptions=self.num_preemptions,
            error=None if self.error is None else str(self.error),
            error_code=self.error.code if isinstance(self.error, RequestError) else None,
            trace=trace,
            user=self.request.user,
        )
