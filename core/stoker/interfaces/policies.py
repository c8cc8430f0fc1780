"""What a scheduling policy sees and implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from stoker.types import SequenceView, StepRecord

__all__ = [
    "MAX_DEFERRED",
    "MAX_PASSED",
    "MAX_VIEWS",
    "PolicyContext",
    "SchedulingPolicy",
    "StepCost",
    "TenantShare",
]

MAX_VIEWS = 1024
"""Most waiting sequences that a policy is shown at once."""
MAX_DEFERRED = 4
"""Most steps in a row that a policy may leave a sequence's decode out."""
MAX_PASSED = 16
"""How many sequences may pass one that does not fit, unless the policy says otherwise."""


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a step costs, fitted to the steps of late: ``base_s + prefill_s * p + decode_s * d``.

    All are 0 until there was a step.

    Attributes:
        base_s: Seconds of a step, whatever is in it.
        prefill_s: Seconds for each prompt token.
        decode_s: Seconds for each sequence that decodes.
    """

    base_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def step_s(self, num_prefill_tokens: int, num_decodes: int) -> float:
        """Seconds that a step of so many tokens would take."""
        return self.base_s + self.prefill_s * num_prefill_tokens + self.decode_s * num_decodes


class TenantShare(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant that has something waiting or running, as a policy sees it.

    Attributes:
        name: Its name.
        weight: Its share, relative to the others' weights.
        num_running: Its sequences that hold a lane.
        num_waiting: Its sequences in the queue.
        reserved_lanes: Lanes that are its own whenever it needs them.
        reserved_kv_tokens: KV tokens that are its own whenever it needs them.
    """

    name: str
    weight: float
    num_running: int
    num_waiting: int
    reserved_lanes: int = 0
    reserved_kv_tokens: int = 0


class PolicyContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy may know beyond the sequences it is asked about: an immutable snapshot.

    Attributes:
        now_s: The clock the sequences' ``arrival_s`` was taken from.
        model: The served model's id.
        num_lanes: Lanes of the runtime.
        num_free_lanes: Lanes that no running sequence holds.
        token_budget: Most tokens of the step that is being planned.
        kv_tokens_capacity: KV tokens the runtime can hold.
        kv_tokens_used: Of those, of running sequences.
        waiting: The sequences in the queue, at most ``MAX_VIEWS``: if there are more, the oldest of each
            tenant in turn.
        running: The sequences that hold a lane.
        tenants: The tenants of those, by name.
        cost: What steps cost lately.
        target_step_s: How long a step should take at most; 0 if nothing is configured.
    """

    now_s: float
    model: str
    num_lanes: int
    num_free_lanes: int
    token_budget: int
    kv_tokens_capacity: int = 0
    kv_tokens_used: int = 0
    waiting: Sequence[SequenceView] = ()
    running: Sequence[SequenceView] = ()
    tenants: Mapping[str, TenantShare] = {}
    cost: StepCost = StepCost()
    target_step_s: float = 0.0


class SchedulingPolicy(ABC):
    """Decides order. It never allocates: the core validates every ordering and does the rest.

    A method that raises or returns nonsense costs a counter and falls back to arrival order.

    Attributes:
        heeds_priority: Whether it looks at the requests' ``priority``; if not, who sends one is warned.
    """

    heeds_priority: ClassVar[bool] = True

    @abstractmethod
    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The waiting sequences, next to be admitted first. A permutation of ``waiting``."""

    def preemption_order(
        self, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The running sequences, first to lose its lane first, when KV memory runs out.

        A permutation of ``running``. By default the latest arrival goes first.
        """
        return sorted(running, key=lambda view: (view.arrival_s, view.sequence_id), reverse=True)

    def victims(
        self, candidate: SequenceView, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Running sequences that may lose their lane so that ``candidate`` gets one, best victim first.

        Asked when no lane is free. By default nobody is preempted for a newcomer.
        """
        return ()

    def prefill_shares(
        self, prefilling: Sequence[SequenceView], budget: int, context: PolicyContext
    ) -> Mapping[int, int] | None:
        """Tokens of this step's prefill budget for each ``sequence_id``.

        ``None`` gives half of it to the oldest prompt and the rest to those that are done the soonest.
        """
        return None

    def admits(self, candidate: SequenceView, context: PolicyContext) -> bool:
        """Whether ``candidate``, whose turn it is, may start now; if not, those behind it are asked.

        For policies that keep the running work within a bound. Not asked while nothing runs, and not for
        sequences within their tenant's reservation.
        """
        return True

    def decodes(
        self,
        decoding: Sequence[SequenceView],
        prefilling: Sequence[SequenceView],
        context: PolicyContext,
    ) -> Sequence[SequenceView] | None:
        """Which of the decoding sequences get their token in this step; ``None`` for all of them.

        Leaving some out makes the step shorter for the others. Asked only if something prefills. The core
        puts back whoever was left out ``MAX_DEFERRED`` steps in a row, and lets all decode if nothing
        would be computed.
        """
        return None

    def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
        """Whether those that come after ``blocked``, which does not fit now, may be admitted before it.

        KV that the others free would else lie idle; but what passes may keep ``blocked`` from ever fitting,
        so this must become false. By default ``MAX_PASSED`` sequences may pass it.
        """
        return blocked.num_passed < MAX_PASSED

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """Why ``admitted`` was next, in a few words for its owner; never name another tenant."""
        return ""

    def on_step(self, record: StepRecord) -> None:
        """Account for a step, after it ran."""
