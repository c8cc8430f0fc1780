"""Fair shares for tenants: the Virtual Token Counter, for chunked prefill, lanes and preemption.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each tenant has a counter of the
service it had: ``prefill_price`` for each prompt token computed, ``decode_price`` for each token generated,
divided by its weight. What is computed again after a preemption costs nothing, nor does a prefix that was
found in KV. The tenant with the least counter is admitted next; within a tenant, arrival order.

The bound. Let p and q be the prices, L and N the most prompt and output tokens of a sequence,
S = p L + q N, K the lanes, w the least weight. While two tenants f and g both have sequences waiting, the
service that they get differs by

    |W_f / w_f  -  W_g / w_g|  <=  2 K S / w

over *any* such interval, however long (VTC's 2 max(p L, q M), with M tokens in K lanes). Why: let R_f be
what f's running sequences may still be charged. For all f and g that wait, c_f + R_f - c_g <= K S / w:

* serving f moves charge from R_f to c_f; serving g raises c_g; an end or a preemption lowers R_f;
* f is admitted only if c_f plus its uncomputed prompts that run is at most the same of g. Then R_f grows
  by at most S, and the left side is at most S, plus what R_f had beside prompts, plus g's uncomputed
  prompts: at most one S for each lane that f and g hold then, of which there are K;
* g that begins to wait is lifted to the least counter of those that wait, for which it held already.

So c_f - c_g stays between -K S / w and K S / w, and changes by at most twice that. This is without what
stands above policies (reservations) and below them (a request that does not fit in KV is passed by up to
``MAX_PASSED`` others). The order of prompts within a step and the decodes left out do not enter: they move
work, they admit nobody.

Shares are of tenants, so whoever can make up tenants at will gets as many; keys are what prevents that.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from stoker import PolicyContext, SchedulingPolicy, SequenceView, StepRecord, TenantShare
from stoker_plugins.policies.counters import Counters
from stoker_plugins.policies.options import FairOptions
from stoker_plugins.policies.views import by_arrival, pending

__all__ = ["FairShare"]

_SOON = 4  # steps within which a prompt that was begun is finished before others get their turn


class FairShare(SchedulingPolicy):
    """Least service for its weight first; see the module.

    Args:
        options: See ``FairOptions``.
    """

    heeds_priority = False

    def __init__(self, options: FairOptions | None = None) -> None:
        self.options = options or FairOptions()
        self.counters = Counters()
        # With what was computed again: free of charge, but a step's time like anything else. Orders the
        # prompts of a step, or one tenant's second prefills could keep all others' first tokens back.
        self._work = Counters()

    # ------------------------------------------------------------------ accounting

    def on_step(self, record: StepRecord) -> None:
        """Charge what was computed for the first time."""
        options = self.options
        for item in record.scheduled:
            price = item.prefill * options.prefill_price + item.decode * options.decode_price
            if price:
                self.counters.charge(item.tenant, price)
            price += item.recomputed * options.prefill_price
            self._work.charge(item.tenant, price)
        if not record.num_waiting:
            self.counters.nobody_waits()
            self._work.nobody_waits()

    def _observe(self, context: PolicyContext) -> None:
        self.counters.observe(context.tenants)
        self._work.observe(context.tenants)

    def _prompt_charge(self, view: SequenceView) -> float:
        """What the rest of its prompt will add to its tenant's counter, at most."""
        if view.num_output_tokens:
            return 0.0
        price = self.options.prefill_price * pending(view)
        return price / self.counters.weight(view.tenant)

    def _committed(self, context: PolicyContext) -> dict[str, float]:
        """The counters with the prompts that run as if they were computed: what admission goes by."""
        committed = {name: self.counters[name] for name in context.tenants}
        for view in context.running:
            committed[view.tenant] += self._prompt_charge(view)
        return committed

    # ------------------------------------------------------------------ lanes

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The tenant with the least counter next, charged for each prompt as it is put into the order."""
        self._observe(context)
        committed = self._committed(context)
        queues: dict[str, list[SequenceView]] = {}
        for view in sorted(waiting, key=by_arrival, reverse=True):
            queues.setdefault(view.tenant, []).append(view)
        # Of tenants with equal counters the one with the fewest lanes for its weight is next.
        lanes = {n: t.num_running / t.weight for n, t in context.tenants.items()}
        heap = [(committed[n], lanes[n], by_arrival(q[-1]), n) for n, q in queues.items()]
        heapq.heapify(heap)
        order: list[SequenceView] = []
        while heap:
            counter, _, _, name = heap[0]
            queue = queues[name]
            view = queue.pop()
            order.append(view)
            if queue:
                counter += self._prompt_charge(view)
                heapq.heapreplace(heap, (counter, lanes[name], by_arrival(queue[-1]), name))
            else:
                heapq.heappop(heap)
        return order

    def victims(
        self, candidate: SequenceView, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Of tenants above their share of lanes, for one below it: who loses the least work first.

        Only for the tenant that is next by its counter, and only from one that has the greater counter
        without that lane and still holds its share, or as much of it as the other then: so it may not take
        the lane back.
        """
        if not self.options.preempt:
            return ()
        self._observe(context)
        own = candidate.tenant
        shares = _lane_shares(context)
        if context.tenants[own].num_running >= shares[own]:
            return ()
        committed = self._committed(context)
        rivals = (n for n, t in context.tenants.items() if t.num_waiting and n != own)
        if any(committed[name] < committed[own] for name in rivals):
            return ()
        chosen = [
            view
            for view in running
            if view.tenant != own
            and _keeps_enough(context.tenants[view.tenant], context.tenants[own], shares)
            and committed[view.tenant] - self._prompt_charge(view) >= committed[own]
        ]
        return sorted(chosen, key=_least_lost)

    def preemption_order(
        self, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Those of tenants above their share of lanes first, then who loses the least work."""
        shares = _lane_shares(context)
        return sorted(
            running, key=lambda v: (not _is_above(v.tenant, shares, context), _least_lost(v))
        )

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """How its tenant stands, without the others' names."""
        rivals = [n for n, t in context.tenants.items() if t.num_waiting and n != admitted.tenant]
        if not rivals:
            return "only its tenant waits, arrival order"
        return f"its tenant had the least service of {len(rivals) + 1} that wait"

    # ------------------------------------------------------------------ steps

    def prefill_shares(
        self, prefilling: Sequence[SequenceView], budget: int, context: PolicyContext
    ) -> Mapping[int, int]:
        """The tenant with the least counter first; within a tenant, one prompt after the other.

        Prompts are not computed side by side: the first of them is done sooner, the last no later, and
        those not begun yet lose nothing if they must yield their lane.
        """
        self._observe(context)
        shares = _lane_shares(context)
        levels = {view.tenant: self._work[view.tenant] for view in prefilling}
        soon = _SOON * budget
        queues: dict[str, list[SequenceView]] = {}
        for view in sorted(prefilling, key=by_arrival, reverse=True):
            queues.setdefault(view.tenant, []).append(view)

        def turn(name: str) -> tuple[float, bool, int, str]:
            head, level = queues[name][-1], levels[name]
            is_above = _is_above(name, shares, context)
            if not is_above and pending(head) <= soon and not head.num_output_tokens:
                # What it was charged for the prompt that it has begun does not cost it its turn.
                level -= self._charge_so_far(head)
            return level, is_above, pending(head), name

        tokens: dict[int, int] = {}
        gives_first_token = False
        while budget and queues:
            name = min(queues, key=turn)
            if self.options.defer and gives_first_token and _is_above(name, shares, context):
                break
            view = queues[name].pop()
            if not queues[name]:
                del queues[name]
            count = min(pending(view), budget)
            tokens[view.sequence_id] = count
            budget -= count
            levels[name] += self.options.prefill_price * count / self.counters.weight(name)
            if count == pending(view) and not view.num_output_tokens:
                gives_first_token |= not _is_above(name, shares, context)
        return tokens

    def decodes(
        self,
        decoding: Sequence[SequenceView],
        prefilling: Sequence[SequenceView],
        context: PolicyContext,
    ) -> Sequence[SequenceView] | None:
        """Without those of tenants above their share, if that brings one below it its first token sooner."""
        if not self.options.defer:
            return None
        self._observe(context)
        shares = _lane_shares(context)
        firsts = [
            view
            for view in prefilling
            if not view.num_output_tokens
            and pending(view) <= context.token_budget
            and not _is_above(view.tenant, shares, context)
        ]
        if not firsts:
            return None
        least = min(self._work[view.tenant] - self._charge_so_far(view) for view in firsts)
        kept = [
            view
            for view in decoding
            if not _is_above(view.tenant, shares, context) or self._work[view.tenant] < least
        ]
        return kept if len(kept) < len(decoding) else None

    def _charge_so_far(self, view: SequenceView) -> float:
        """What the computed part of its prompt has added to its tenant's counter, at most."""
        computed = min(view.num_computed_tokens, view.num_prompt_tokens)
        return self.options.prefill_price * computed / self.counters.weight(view.tenant)


def _lane_shares(context: PolicyContext) -> dict[str, float]:
    """Lanes that each tenant with work is entitled to, by weight."""
    total = sum(tenant.weight for tenant in context.tenants.values())
    return {n: context.num_lanes * tenant.weight / total for n, tenant in context.tenants.items()}


def _is_above(tenant: str, shares: Mapping[str, float], context: PolicyContext) -> bool:
    """Whether a tenant holds more lanes than its share."""
    return context.tenants[tenant].num_running > shares[tenant]


def _keeps_enough(victim: TenantShare, candidate: TenantShare, shares: Mapping[str, float]) -> bool:
    """Whether a tenant that gives a lane to another is not worse off than that one then."""
    left = victim.num_running - 1
    return left >= shares[victim.name] or (
        left / victim.weight >= (candidate.num_running + 1) / candidate.weight
    )


def _least_lost(view: SequenceView) -> tuple[int, float, int]:
    """Sort key: fewest computed tokens first, then the latest arrival."""
    return view.num_computed_tokens, -view.arrival_s, -view.sequence_id
