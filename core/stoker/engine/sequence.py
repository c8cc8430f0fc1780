"""One token stream: its tokens, where it stands, and the legal ways to move on."""

from __future__ import annotations

import enum
import itertools
import secrets
from typing import TYPE_CHECKING

import numpy as np

from stoker.types import FinishReason, Request, RequestRecord, SequenceView, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.client import RequestStream
    from stoker.engine.detokenizer import Detokenizer
    from stoker.engine.sampler import TokenCounts

__all__ = ["NO_LANE", "Sequence", "SequenceStatus"]

_ids = itertools.count(1)
_MASK64 = (1 << 64) - 1

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


class Sequence:
    """A prompt and what was generated from it so far.

    The first ``num_computed`` of its ``num_tokens`` tokens have their KV in ``lane``; the rest is pending.
    A decode step has exactly one pending token: the one that was sampled last.

    Args:
        request: The request it belongs to.
        index: Which of the request's ``n`` sequences.
        stream: Where its deltas go.
        detokenizer: Turns its tokens into text.
        max_total_tokens: Most tokens of prompt and output together: the context length.
    """

    __slots__ = (
        "admitted_s",
        "counts",
        "detokenizer",
        "finish_reason",
        "first_token_s",
        "index",
        "lane",
        "last_token_s",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_tokens",
        "request",
        "sampling",
        "seed",
        "sequence_id",
        "status",
        "stream",
        "tokens",
        "view",
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
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.view = self.snapshot()

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not computed yet."""
        return self.num_tokens - self.num_computed

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
        )

    def usage(self) -> Usage:
        """Its own token counts."""
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output,
            cached_tokens=self.num_cached,
        )

    def record(self, now_s: float, error: str | None) -> RequestRecord:
        """What observers are told at its end."""
        arrival = self.request.arrival_s
        return RequestRecord(
            request_id=self.request.request_id,
            model=self.request.model,
            tenant=self.request.tenant,
            finish_reason=self.finish_reason or FinishReason.ABORT,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=self.num_output,
            queue_s=(now_s if self.admitted_s is None else self.admitted_s) - arrival,
            time_to_first_token_s=(
                None if self.first_token_s is None else self.first_token_s - arrival
            ),
            total_s=now_s - arrival,
            num_preemptions=self.num_preemptions,
            error=error,
        )
