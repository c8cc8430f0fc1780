"""When a request runs: one queue, one set of running sequences, one plan per step.

A step is {sequence: number of tokens} (as vLLM's v1 scheduler puts it). Decodes go first, one token each;
what remains of the token budget goes to prefill chunks of several sequences (Sarathi-Serve, Agrawal et al.,
OSDI 2024), so that a long prompt never stalls the streams that run. The policy orders; nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.policy_guard import PolicyGuard
from stoker.engine.sequence import Sequence, SequenceStatus
from stoker.interfaces import PolicyContext
from stoker.types import StepInput

if TYPE_CHECKING:
    from stoker.config import SchedulerConfig
    from stoker.engine.lanes import LanePool
    from stoker.interfaces import SchedulingPolicy

__all__ = ["Plan", "Scheduler"]


@dataclass(slots=True)
class Plan:
    """What one step computes.

    Attributes:
        decodes: Sequences with one pending token.
        prefills: Sequences and how many of their pending tokens to compute.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens to compute."""
        return sum(count for _, count in self.prefills)

    @property
    def num_tokens(self) -> int:
        """All tokens to compute."""
        return len(self.decodes) + self.num_prefill_tokens

    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return self.decodes + [sequence for sequence, _ in self.prefills]

    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of the logits' rows."""
        return self.decodes + [s for s, count in self.prefills if count == s.num_pending]

    def step_input(self) -> StepInput:
        """The arrays for ``Runtime.step``."""
        decodes = self.decodes
        head = len(decodes)
        total = self.num_tokens
        token_ids = np.empty(total, np.int32)
        positions = np.empty(total, np.int32)
        lanes = np.empty(total, np.int32)
        wants_logits = np.zeros(total, np.bool_)
        if decodes:
            token_ids[:head] = [s.tokens[s.num_computed] for s in decodes]
            positions[:head] = [s.num_computed for s in decodes]
            lanes[:head] = [s.lane for s in decodes]
            wants_logits[:head] = True
        at = head
        for sequence, count in self.prefills:
            start, end = sequence.num_computed, sequence.num_computed + count
            token_ids[at : at + count] = sequence.tokens[start:end]
            positions[at : at + count] = np.arange(start, end, dtype=np.int32)
            lanes[at : at + count] = sequence.lane
            at += count
            wants_logits[at - 1] = end == sequence.num_tokens
        return StepInput(token_ids, positions, lanes, wants_logits)


class Scheduler:
    """Admits, plans and preempts the sequences of one model.

    Args:
        model: The served model's id.
        policy: Who goes first.
        lanes: Where KV goes.
        config: Token budgets.
        max_step_tokens: Most tokens the runtime takes in one step.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        model: str,
        policy: SchedulingPolicy,
        lanes: LanePool,
        config: SchedulerConfig,
        max_step_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.policy = PolicyGuard(policy)
        self.lanes = lanes
        self.token_budget = min(config.max_num_batched_tokens, max_step_tokens)
        self.prefill_limit = config.max_prefill_tokens_while_decoding
        self.clock = clock
        # Insertion order is arrival order; a preempted sequence keeps its arrival time.
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self.num_preemptions = 0
        self._admitted: list[Sequence] = []
        self._next_deadline_s = float("inf")

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        self.waiting[sequence.sequence_id] = sequence
        request = sequence.request
        for deadline in (request.queue_deadline_s, request.deadline_s):
            if deadline is not None:
                self._next_deadline_s = min(self._next_deadline_s, deadline)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence and free its lane."""
        self.waiting.pop(sequence.sequence_id, None)
        if self.running.pop(sequence.sequence_id, None) is not None:
            self.lanes.release(sequence)

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose queue deadline or total deadline has passed."""
        if now_s < self._next_deadline_s:
            return []
        late: list[Sequence] = []
        upcoming = float("inf")
        for sequence in (*self.waiting.values(), *self.running.values()):
            deadline = _deadline(sequence)
            if deadline <= now_s:
                late.append(sequence)
            else:
                upcoming = min(upcoming, deadline)
        self._next_deadline_s = upcoming
        return late

    def schedule(self) -> Plan:
        """Admit what fits, then plan one step."""
        if self.waiting and (self.lanes.num_free or self.policy.may_preempt):
            self._admit()
        plan = Plan()
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            if sequence.status is SequenceStatus.DECODE:
                plan.decodes.append(sequence)
            else:
                prefilling.append(sequence)
        if len(plan.decodes) > self.token_budget:
            # More lanes than budget: those whose last token is oldest go first.
            plan.decodes.sort(key=lambda s: s.last_token_s or 0.0)
            del plan.decodes[self.token_budget :]
        # Runtimes that keep a KV stream for each lane batch neighbours best.
        plan.decodes.sort(key=lambda s: s.lane)
        prefilling.sort(key=lambda s: s.lane)
        if prefilling:
            self._share_prefill(plan, prefilling)
        return plan

    def take_admitted(self) -> list[Sequence]:
        """Sequences that left the queue for the first time since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def _context(self) -> PolicyContext:
        return PolicyContext(
            now_s=self.clock(),
            model=self.model,
            num_lanes=self.lanes.num_lanes,
            num_free_lanes=self.lanes.num_free,
            token_budget=self.token_budget,
        )

    def _admit(self) -> None:
        views = [sequence.view for sequence in self.waiting.values()]
        order = self.policy.admission_order(views, self._context())
        for view in order:
            sequence = self.waiting[view.sequence_id]
            if not self.lanes.num_free and not self._preempt_for(sequence):
                break
            if not self._fits(sequence):
                break
            self._start(sequence)

    def _fits(self, candidate: Sequence) -> bool:
        """Whether KV has room for all tokens that the running sequences and the candidate have so far.

        Without this, sequences that do not fit together would take each other's lane for ever before
        any of them got a token; with it, every preemption is paid for by at least one new token.
        """
        if not self.running:
            return True
        reserved = sum(sequence.num_tokens for sequence in self.running.values())
        return reserved + candidate.num_tokens < self.lanes.capacity_tokens

    def _start(self, sequence: Sequence) -> None:
        del self.waiting[sequence.sequence_id]
        self.lanes.acquire(sequence)
        sequence.move_to(SequenceStatus.PREFILL)
        if sequence.admitted_s is None:
            sequence.admitted_s = self.clock()
            self._admitted.append(sequence)
        self.running[sequence.sequence_id] = sequence

    def _preempt_for(self, candidate: Sequence) -> bool:
        """Let the policy name a running sequence that yields its lane to the candidate."""
        if not self.policy.may_preempt:
            return False
        running = [s.snapshot() for s in self.running.values()]
        victims = self.policy.victims(candidate.snapshot(), running, self._context())
        if not victims:
            return False
        self.preempt(self.running[victims[0].sequence_id])
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's lane; it waits again, with its text, under its arrival time."""
        del self.running[sequence.sequence_id]
        self.lanes.release(sequence)
        sequence.move_to(SequenceStatus.PREEMPTED)
        sequence.num_preemptions += 1
        sequence.view = sequence.snapshot()
        self.num_preemptions += 1
        self.waiting[sequence.sequence_id] = sequence

    def _share_prefill(self, plan: Plan, prefilling: list[Sequence]) -> None:
        budget = self.token_budget - len(plan.decodes)
        if plan.decodes:
            budget = min(budget, self.prefill_limit)
        if budget <= 0:
            return
        shares = self.policy.prefill_shares(prefilling, budget, self._context)
        if shares is None:
            shares = _even_shares(prefilling, budget)
        plan.prefills = [(s, shares[s.sequence_id]) for s in prefilling if shares[s.sequence_id]]

    def make_room(self, plan: Plan) -> Plan:
        """Free KV for a plan: first what idle lanes retain, then preempted sequences' lanes.

        Returns:
            The plan without the sequences that had to yield; empty if nothing could be done.
        """
        while not self.lanes.make_room(plan.num_tokens):
            if not self._preempt_one(plan):
                break
        return plan

    def no_room(self, plan: Plan) -> Plan | None:
        """Answer to a runtime that found no room although the count said there was.

        Returns:
            A smaller plan or the same one to try again; ``None`` if a single sequence does not fit.
        """
        if self.lanes.evict_all():
            return plan
        return plan if self._preempt_one(plan) else None

    def _preempt_one(self, plan: Plan) -> bool:
        """Preempt the running sequence that the policy gives up first, and drop it from the plan."""
        if len(self.running) <= 1:
            return False
        running = [s.snapshot() for s in self.running.values()]
        order = self.policy.preemption_order(running, self._context())
        victim = self.running[order[0].sequence_id]
        self.preempt(victim)
        self.lanes.evict_all()
        if victim in plan.decodes:
            plan.decodes.remove(victim)
        plan.prefills = [(s, count) for s, count in plan.prefills if s is not victim]
        return True


def _deadline(sequence: Sequence) -> float:
    """The next moment at which the sequence would be given up."""
    request = sequence.request
    deadline = float("inf") if request.deadline_s is None else request.deadline_s
    if sequence.admitted_s is None and request.queue_deadline_s is not None:
        deadline = min(deadline, request.queue_deadline_s)
    return deadline


def _even_shares(prefilling: Iterable[Sequence], budget: int) -> dict[int, int]:
    """Equal parts of the budget; what a short prompt leaves goes to the longer ones."""
    shares: dict[int, int] = {}
    todo = sorted(prefilling, key=lambda s: s.num_pending)
    for position, sequence in enumerate(todo):
        part = min(sequence.num_pending, -(-budget // (len(todo) - position)))
        shares[sequence.sequence_id] = part
        budget -= part
    return shares
