"""When a request runs: one queue, one set of running sequences, one plan per step.

A step is {sequence: number of tokens} (as vLLM's v1 scheduler puts it). Decodes go first, one token each;
what remains of the token budget goes to prefill chunks of several sequences (Sarathi-Serve, Agrawal et al.,
OSDI 2024), so that a long prompt never stalls the streams that run. The policy orders; nothing here computes.
Who leaves the queue is decided in ``admission.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from stoker.engine.admission import Admission
from stoker.engine.costs import CostModel
from stoker.engine.in_flight import InFlightPrefixes
from stoker.engine.plan import Plan
from stoker.engine.policy_guard import PolicyGuard
from stoker.engine.reservations import Reservations
from stoker.engine.scoring import within_rows
from stoker.engine.sequence import Sequence, SequenceStatus
from stoker.errors import EngineError
from stoker.interfaces import MAX_DEFERRED, MAX_VIEWS, PolicyContext, StepCost, TenantShare
from stoker.tenants import Tenants

if TYPE_CHECKING:
    from stoker.config import SchedulerConfig
    from stoker.engine.lanes import LanePool
    from stoker.interfaces import SchedulingPolicy
    from stoker.types import SequenceView

__all__ = ["Scheduler"]

# What a step that lets prompts end may take, against what it should.
_MIN_PATIENCE, _MAX_PATIENCE = 1.5, 3.0
_MIN_CHUNK = 32  # prompt tokens of a step that prefills at all: below, a step is mostly overhead


class Scheduler:
    """Admits, plans and preempts the sequences of one model.

    Args:
        model: The served model's id.
        policy: Who goes first.
        lanes: Where KV goes.
        config: Token budgets.
        max_step_tokens: Most tokens the runtime takes in one step.
        clock: Monotonic seconds.
        tenants: Weights and reservations.
        share_in_flight: Whether sequences wait for a prefix that another one computes.

    Attributes:
        waiting: The queue, in order of arrival (a preempted sequence waits again, at the end).
        running: Who holds a lane.
        paused: Who had one, and waits for its reader.
        costs: What steps cost lately.
        in_flight: Prefixes that are being computed, and who waits for them.
        max_scored_rows: Prompt tokens of a step that may be scored.
    """

    def __init__(
        self,
        model: str,
        policy: SchedulingPolicy,
        lanes: LanePool,
        config: SchedulerConfig,
        max_step_tokens: int,
        clock: Callable[[], float],
        tenants: Tenants,
        *,
        share_in_flight: bool = True,
    ) -> None:
        self.model = model
        self.policy = PolicyGuard(policy, clock)
        self.lanes = lanes
        self.token_budget = min(config.max_num_batched_tokens, max_step_tokens)
        self.prefill_limit = config.max_prefill_tokens_while_decoding
        self.target_step_s = config.target_step_s
        self.clock = clock
        self.tenants = tenants
        self.reservations = Reservations(tenants, lanes.capacity_tokens)
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self.paused: dict[int, Sequence] = {}
        self.costs = lanes.costs.steps = CostModel()
        self.num_preemptions = 0
        self.max_scored_rows = self.token_budget
        self.in_flight = InFlightPrefixes(self, is_on=share_in_flight)
        self._admission = Admission(self, config)
        self._admitted: list[Sequence] = []
        self._next_deadline_s = float("inf")

    # ------------------------------------------------------------------ in and out

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        self.waiting[sequence.sequence_id] = sequence
        self.lanes.prefetch(sequence)
        request = sequence.request
        for deadline in (request.queue_deadline_s, request.deadline_s):
            if deadline is not None:
                self._next_deadline_s = min(self._next_deadline_s, deadline)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence and free its lane."""
        self.waiting.pop(sequence.sequence_id, None)
        self.paused.pop(sequence.sequence_id, None)
        if self.running.pop(sequence.sequence_id, None) is not None:
            self.lanes.release(sequence)

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose queue deadline or total deadline has passed."""
        if now_s < self._next_deadline_s:
            return []
        late: list[Sequence] = []
        upcoming = float("inf")
        everybody = (*self.waiting.values(), *self.running.values(), *self.paused.values())
        for sequence in everybody:
            deadline = _deadline(sequence)
            if deadline <= now_s:
                late.append(sequence)
            else:
                upcoming = min(upcoming, deadline)
        self._next_deadline_s = upcoming
        return late

    def start(self, sequence: Sequence, rule: str) -> None:
        """Give a waiting sequence a free lane; it waits on if the runtime cannot free it."""
        try:
            self.lanes.acquire(sequence)
        except EngineError:
            return
        del self.waiting[sequence.sequence_id]
        self.in_flight.started(sequence)
        sequence.move_to(SequenceStatus.PREFILL)
        sequence.output_at_admission = sequence.num_output
        if sequence.admitted_s is None:
            sequence.admitted_s = self.clock()
            sequence.facts.admitted_by = rule
            if sequence.facts.shared_wait_s:
                waited_s = sequence.facts.shared_wait_s
                sequence.facts.admitted_by += f"; waited {waited_s:.3f} s for a shared prefix"
            self._admitted.append(sequence)
        self.running[sequence.sequence_id] = sequence

    def take_admitted(self) -> list[Sequence]:
        """Sequences that left the queue for the first time since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def hopeless(self) -> list[Sequence]:
        """The queue, if nobody runs and the runtime cannot free a single lane; else nobody."""
        return [] if self.running or self.lanes.num_free else list(self.waiting.values())

    def preempt(self, sequence: Sequence, reason: str) -> None:
        """Take a running sequence's lane; it waits again, with its text, under its arrival time.

        Args:
            sequence: The one that yields.
            reason: See ``Preemption.reason``; with ``reader`` it waits for its reader, outside the queue.
        """
        del self.running[sequence.sequence_id]
        now_s = self.clock()
        sequence.lost_lane(now_s, reason, sequence.num_computed)
        self.lanes.release(sequence)
        sequence.move_to(SequenceStatus.PREEMPTED)
        self.num_preemptions += 1
        if reason == "reader":
            sequence.paused_at_s = now_s
            self.paused[sequence.sequence_id] = sequence
        else:
            self.waiting[sequence.sequence_id] = sequence
        sequence.view = sequence.snapshot()

    def resume(self, sequence: Sequence) -> None:
        """Put a paused sequence back into the queue."""
        del self.paused[sequence.sequence_id]
        now_s = self.clock()
        if sequence.paused_at_s is not None:
            sequence.facts.paused_s += now_s - sequence.paused_at_s
        sequence.paused_at_s = None
        sequence.waiting_since_s = now_s
        sequence.view = sequence.snapshot()
        self.waiting[sequence.sequence_id] = sequence

    # ------------------------------------------------------------------ what a policy sees

    def waiting_views(self) -> tuple[SequenceView, ...]:
        """The queue, bounded: if it is too long, the oldest of each tenant in turn."""
        if len(self.waiting) <= MAX_VIEWS:
            return tuple(sequence.view for sequence in self.waiting.values())
        by_tenant: dict[str, list[SequenceView]] = {}
        for sequence in self.waiting.values():
            by_tenant.setdefault(sequence.request.tenant, []).append(sequence.view)
        in_turn = itertools.zip_longest(*by_tenant.values())
        shown = (view for round_ in in_turn for view in round_ if view is not None)
        return tuple(itertools.islice(shown, MAX_VIEWS))

    def context(self, waiting: tuple[SequenceView, ...] | None = None) -> PolicyContext:
        """What a policy may know now.

        Args:
            waiting: The views of the queue, if they are known already.
        """
        return PolicyContext(
            now_s=self.clock(),
            model=self.model,
            num_lanes=self.lanes.num_lanes,
            num_free_lanes=self.lanes.num_free,
            token_budget=self.token_budget,
            kv_tokens_capacity=self.lanes.capacity_tokens,
            kv_tokens_used=self.lanes.used_tokens,
            waiting=self.waiting_views() if waiting is None else waiting,
            running=tuple(sequence.snapshot() for sequence in self.running.values()),
            tenants=self._shares(),
            cost=self.costs.cost,
            target_step_s=self.target_step_s,
        )

    def _shares(self) -> dict[str, TenantShare]:
        counts: dict[str, list[int]] = {}
        for column, group in enumerate((self.running, self.waiting)):
            for sequence in group.values():
                counts.setdefault(sequence.request.tenant, [0, 0])[column] += 1
        shares: dict[str, TenantShare] = {}
        for name, (num_running, num_waiting) in counts.items():
            tenant = self.tenants.get(name)
            shares[name] = TenantShare(
                name=name,
                weight=tenant.weight,
                num_running=num_running,
                num_waiting=num_waiting,
                reserved_lanes=tenant.reserved_lanes,
                reserved_kv_tokens=self.reservations.kv_tokens(tenant),
            )
        return shares

    # ------------------------------------------------------------------ a step

    def schedule(self) -> Plan:
        """Admit what fits, then plan one step."""
        if self.waiting:
            self.lanes.recover()
            self.in_flight.look_around()
            self._admission.admit()
        plan = Plan()
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            if sequence.status is SequenceStatus.DECODE:
                plan.decodes.append(sequence)
            else:
                prefilling.append(sequence)
        num_decoding = len(plan.decodes)
        if prefilling and plan.decodes and self.policy.selects_decodes:
            plan.decodes = self._select_decodes(plan.decodes, prefilling)
        if len(plan.decodes) > self.token_budget:
            # More lanes than budget: those whose last token is oldest go first.
            plan.decodes.sort(key=lambda s: s.last_token_s or 0.0)
            del plan.decodes[self.token_budget :]
        # Runtimes that keep a KV stream for each lane batch neighbours best.
        plan.decodes.sort(key=lambda s: s.lane)
        prefilling.sort(key=lambda s: s.lane)
        if prefilling:
            self._share_prefill(plan, prefilling, num_decoding)
        return plan

    def _select_decodes(
        self, decoding: list[Sequence], prefilling: list[Sequence]
    ) -> list[Sequence]:
        """The decodes that the policy wants in this step, and those it has left out for too long."""
        chosen = self.policy.decodes(decoding, prefilling, self.context)
        if chosen is None:
            chosen = {sequence.sequence_id for sequence in decoding}
        selected: list[Sequence] = []
        for sequence in decoding:
            if sequence.sequence_id in chosen or sequence.num_deferred >= MAX_DEFERRED:
                sequence.num_deferred = 0
                selected.append(sequence)
            else:
                sequence.num_deferred += 1
                sequence.facts.num_deferred_steps += 1
        return selected

    def _share_prefill(self, plan: Plan, prefilling: list[Sequence], num_decoding: int) -> None:
        budget = self.prefill_budget(len(plan.decodes), is_mixed=num_decoding > 0)
        if budget <= 0:
            return
        chosen = self.policy.prefill_shares(prefilling, budget, self.context)
        shares = _default_shares(prefilling, budget) if chosen is None else dict(chosen)
        if self.target_step_s:
            self._finish_short(shares, prefilling, plan, is_mixed=num_decoding > 0)
        shares = self.lanes.blocks.fit(shares, prefilling)
        shares = within_rows(shares, prefilling, self.lanes.blocks, self.max_scored_rows)
        plan.prefills = [(s, shares[s.sequence_id]) for s in prefilling if shares[s.sequence_id]]

    def _finish_short(
        self, shares: dict[int, int], prefilling: list[Sequence], plan: Plan, *, is_mixed: bool
    ) -> None:
        """Let a prompt end in this step of which only a little would be left for another one.

        A step may take half as long again for that: the rest would cost a whole step, and its first token. It
        may take up to three times as long if so many more wait for their first token than for their next.
        """
        used = sum(shares.values())
        limit = self.token_budget - len(plan.decodes)
        if is_mixed:
            limit = min(limit, self.prefill_limit)
        patience = min(
            _MAX_PATIENCE, max(_MIN_PATIENCE, len(prefilling) / max(1, len(plan.decodes)))
        )
        room = min(limit - used, int(used * (patience - 1)))
        for sequence in sorted(prefilling, key=lambda s: s.num_pending - shares[s.sequence_id]):
            rest = sequence.num_pending - shares[sequence.sequence_id]
            if rest and shares[sequence.sequence_id] and rest <= room:
                shares[sequence.sequence_id] += rest
                room -= rest

    def prefill_budget(self, num_decodes: int, *, is_mixed: bool) -> int:
        """Most prompt tokens of a step with so many decodes.

        Args:
            num_decodes: Decodes of the step.
            is_mixed: Whether anything decodes that a long step would hold up, in this step or not.
        """
        budget = self.token_budget - num_decodes
        if is_mixed:
            budget = min(budget, self.prefill_limit)
        return min(budget, self._affordable(num_decodes)) if self.target_step_s else budget

    def _affordable(self, num_decodes: int) -> int:
        """Prompt tokens that make a step with so many decodes take about as long as it should."""
        cost: StepCost = self.costs.cost
        if cost.prefill_s <= 0:
            return self.prefill_limit  # nothing is known yet: a careful guess
        left_s = self.target_step_s - cost.step_s(0, num_decodes)
        return max(_MIN_CHUNK, int(left_s / cost.prefill_s))

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
        planned = plan.sequences()
        # One that has yielded before stays, if it is the only one that wants room: when all others have
        # yielded and there still is none, it is known to be at fault. Else it would yield for ever.
        stays = planned[0] if len(planned) == 1 and planned[0].yielded_in_vain else None
        return plan if self._preempt_one(plan, stays) else None

    def _preempt_one(self, plan: Plan, stays: Sequence | None = None) -> bool:
        """Preempt the running sequence that the policy gives up first, and drop it from the plan.

        Args:
            plan: What is to be computed.
            stays: Who is not preempted, whatever the policy says.
        """
        if len(self.running) <= 1:
            return False
        running = list(self.running.values())
        order = self.policy.preemption_order([s.snapshot() for s in running], self.context())
        victims = [self.running[view.sequence_id] for view in order]
        victims = [victim for victim in victims if victim is not stays]
        if self.reservations.holders():
            # Those within their reservation last; the sort is stable.
            victims.sort(key=lambda s: self.reservations.is_protected(running, s))
        victim = victims[0]
        self.preempt(victim, "no_room")
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


def _default_shares(prefilling: Iterable[Sequence], budget: int) -> dict[int, int]:
    """Half for the oldest prompt, the rest for those that are done the soonest, one after the other.

    So a short prompt does not wait behind a long one, none starves, and a step has few pieces: many small
    ones would cost a runtime that computes lanes in groups several passes.
    """
    todo = sorted(prefilling, key=lambda s: (s.num_pending, s.request.arrival_s, s.sequence_id))
    oldest = min(todo, key=lambda s: (s.request.arrival_s, s.sequence_id))
    shares = dict.fromkeys((s.sequence_id for s in todo), 0)
    shares[oldest.sequence_id] = min(oldest.num_pending, budget - budget // 2)
    budget -= shares[oldest.sequence_id]
    for sequence in todo:
        part = min(sequence.num_pending - shares[sequence.sequence_id], budget)
        shares[sequence.sequence_id] += part
        budget -= part
    return shares
