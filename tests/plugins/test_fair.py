"""The rules of ``fair``, one by one; its bound is checked for random loads in ``test_policy_properties``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stoker import (
    PolicyContext,
    ScheduledTokens,
    SchedulingPolicy,
    SequenceView,
    StepCost,
    StepInput,
    StepRecord,
    TenantShare,
)
from stoker.config import SchedulerConfig
from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker_plugins.policies import counters as counters_module
from stoker_plugins.policies.counters import Counters
from stoker_plugins.policies.fair import FairShare
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.policies.options import FairOptions

COST = StepCost(base_s=0.01, prefill_s=0.001, decode_s=0.01)
ids = itertools.count(1)


def view(tenant: str, *, prompt: int = 10, computed: int = 0, **more: Any) -> SequenceView:
    """A sequence; each arrives after the one before."""
    sequence_id = next(ids)
    fields = {
        "sequence_id": sequence_id,
        "request_id": f"request-{sequence_id}",
        "tenant": tenant,
        "priority": 0,
        "arrival_s": float(sequence_id),
        "num_prompt_tokens": prompt,
        "num_computed_tokens": computed,
        "num_output_tokens": 0,
        "max_tokens": 10,
        "num_preemptions": 0,
        "deadline_s": None,
    }
    return SequenceView(**(fields | more))


def decoding(tenant: str) -> SequenceView:
    return view(tenant, prompt=10, computed=10, num_output_tokens=1)


def context(
    waiting: Sequence[SequenceView] = (),
    running: Sequence[SequenceView] = (),
    *,
    lanes: int = 4,
    weights: dict[str, float] | None = None,
    cost: StepCost = COST,
) -> PolicyContext:
    in_queue = Counter(v.tenant for v in waiting)
    in_lanes = Counter(v.tenant for v in running)
    tenants = {
        name: TenantShare(
            name=name,
            weight=(weights or {}).get(name, 1.0),
            num_running=in_lanes[name],
            num_waiting=in_queue[name],
        )
        for name in (*in_lanes, *in_queue)
    }
    return PolicyContext(
        now_s=1e6,
        model="model",
        num_lanes=lanes,
        num_free_lanes=lanes - len(running),
        token_budget=100,
        waiting=tuple(waiting),
        running=tuple(running),
        tenants=tenants,
        cost=cost,
    )


def record(*scheduled: ScheduledTokens, num_waiting: int = 1) -> StepRecord:
    return StepRecord(
        model="model",
        started_s=0.0,
        duration_s=0.0,
        runtime_s=0.0,
        num_prefill_tokens=0,
        num_decode_tokens=0,
        num_generated_tokens=0,
        num_running=0,
        num_waiting=num_waiting,
        num_preemptions=0,
        scheduled=scheduled,
    )


def served(policy: FairShare, **tokens: int) -> None:
    """Let tenants have had so many prompt tokens computed."""
    policy.on_step(record(*(ScheduledTokens(name, n, 0, 0, 1) for name, n in tokens.items())))


def tenants_of(order: Sequence[SequenceView]) -> str:
    return "".join(v.tenant for v in order)


# --------------------------------------------------------------------------- counters


def share(name: str, num_waiting: int = 1, weight: float = 1.0) -> dict[str, TenantShare]:
    return {
        name: TenantShare(name=name, weight=weight, num_running=0, num_waiting=num_waiting),
    }


def test_service_is_charged_by_price_and_weight_and_never_twice() -> None:
    policy = FairShare(FairOptions(prefill_price=1.0, decode_price=3.0))
    policy.counters.observe(share("a") | share("b", weight=2.0))
    policy.on_step(
        record(
            ScheduledTokens("a", 10, 0, 0, 1),
            ScheduledTokens("a", 0, 1, 0, 2),
            ScheduledTokens("b", 8, 0, 100, 3),  # what was computed before costs nothing
        )
    )
    assert (policy.counters["a"], policy.counters["b"]) == (13.0, 4.0)


def test_who_begins_to_wait_is_lifted_to_the_least_of_those_that_wait() -> None:
    counters = Counters()
    counters.observe(share("a") | share("b"))
    counters.charge("a", 100.0)
    counters.charge("b", 60.0)
    counters.observe(share("a") | share("b") | share("c"))
    assert counters["c"] == 60.0
    # Nobody is lifted while it waits, and nobody is ever lowered.
    counters.charge("b", 500.0)
    counters.observe(share("a") | share("c"))
    counters.observe(share("a") | share("b") | share("c"))
    assert (counters["a"], counters["b"], counters["c"]) == (100.0, 560.0, 60.0)


def test_after_an_empty_queue_one_starts_where_the_last_one_stands_that_left() -> None:
    counters = Counters()
    counters.observe(share("a") | share("b"))
    counters.charge("b", 10.0)
    counters.observe(share("a"))  # b has left
    counters.charge("a", 70.0)
    counters.nobody_waits()  # a has left, and is still served
    counters.charge("a", 5.0)
    counters.observe(share("c"))
    assert counters["c"] == 75.0
    counters.observe(share("c") | share("b"))
    assert counters["b"] == 75.0


def test_a_tenant_that_only_runs_is_not_lifted() -> None:
    counters = Counters()
    counters.observe(share("a"))
    counters.charge("a", 50.0)
    counters.observe(share("a") | share("b", num_waiting=0))
    assert counters["b"] == 0.0


def test_counters_stay_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters_module, "_MAX_IDLE", 10)
    monkeypatch.setattr(counters_module, "_REBASE_AT", 1000.0)
    counters = Counters()
    for i in range(500):
        name = f"t{i}"
        counters.observe(share("steady") | share(name))
        counters.charge("steady", 10.0)
        counters.charge(name, 10.0 + i % 7)
        assert len(counters) <= 10 + 2 + 1
        assert counters["steady"] <= 1010.0
        assert 10.0 <= counters[name] - min(counters[name], counters["steady"]) + 10.0 <= 17.0


# --------------------------------------------------------------------------- admission


def test_the_tenant_with_the_least_counter_is_next_and_pays_in_advance() -> None:
    policy = FairShare()
    waiting = [view("a") for _ in range(5)] + [view("b", prompt=20) for _ in range(3)]
    order = policy.admission_order(waiting[::-1], context(waiting))
    # a pays 10 a time and b 20; equal counters go by arrival.
    assert tenants_of(order) == "abaabaab"
    for name in "ab":
        own = [v.sequence_id for v in order if v.tenant == name]
        assert own == sorted(own)


def test_a_weight_is_a_multiple_of_the_service() -> None:
    policy = FairShare()
    waiting = [view("a") for _ in range(4)] + [view("b") for _ in range(8)]
    order = policy.admission_order(waiting, context(waiting, weights={"b": 3.0}))
    assert Counter(tenants_of(order)[:8]) == {"a": 2, "b": 6}


def test_prompts_that_run_and_are_not_computed_yet_count_for_admission() -> None:
    policy = FairShare()
    running = [view("a", prompt=100, computed=40), decoding("a"), view("b", prompt=50)]
    waiting = [view("a"), view("b"), view("b"), view("b")]
    # 60 against 50 to begin with, then 60 against 60, where b has fewer lanes.
    order = policy.admission_order(waiting, context(waiting, running))
    assert tenants_of(order) == "bbab"


def test_what_was_generated_before_a_preemption_is_not_charged_again() -> None:
    policy = FairShare()
    again = view("a", prompt=1000, num_output_tokens=5, num_preemptions=1)
    waiting = [again, view("a"), view("b"), view("b")]
    assert tenants_of(policy.admission_order(waiting, context(waiting))) == "aabb"


def test_the_reason_names_no_other_tenant() -> None:
    policy = FairShare()
    a, b, c = view("a"), view("b"), view("c")
    assert policy.explain(a, context([a, b, c])) == (
        "its tenant had the least service of 3 that wait"
    )
    assert policy.explain(a, context([a], [c])) == "only its tenant waits, arrival order"


# --------------------------------------------------------------------------- lanes


def test_who_is_below_its_share_takes_the_lane_that_costs_the_least() -> None:
    policy = FairShare()
    running = [
        view("a", computed=5, prompt=50),
        view("a", prompt=50),
        decoding("a"),
        view("a", prompt=50),
    ]
    newcomer = view("b")
    victims = policy.victims(newcomer, running, context([newcomer], running))
    assert [running.index(v) for v in victims] == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("lanes", "held", "weights", "may"),
    [
        (4, "aaaa", {}, True),
        (4, "aaab", {}, True),
        (4, "aabb", {}, False),  # b has its share
        (1, "a", {}, False),  # a would be below its own
        (2, "aa", {}, True),
        (4, "aaaa", {"a": 7.0}, False),  # 3.5 lanes are a's: one less would be too few
        (4, "aaab", {"b": 3.0}, True),
        (4, "abbb", {"b": 3.0}, False),
        (4, "aacc", {}, True),  # each has 1.33 lanes: 2, 1, 1 is as near as it gets
        (4, "aabc", {}, False),
        (6, "aaaccc", {"b": 0.4}, False),  # b's share is half a lane: one would be more than theirs
        (5, "aaacc", {}, True),
        (4, "bbbb", {}, False),
    ],
)
def test_lanes_change_hands_only_from_above_a_share_to_below_one(
    lanes: int, held: str, weights: dict[str, float], may: bool
) -> None:
    policy = FairShare()
    running = [view(name) for name in held]
    newcomer = view("b")
    around = context([newcomer], running, lanes=lanes, weights=weights)
    victims = policy.victims(newcomer, running, around)
    assert bool(victims) is may
    assert all(v.tenant in "ac" for v in victims)


def test_computing_again_is_free_but_does_not_keep_others_first_tokens_back() -> None:
    """What a preempted flood computes again does not count as service, and yet others come between."""
    policy = FairShare()
    flood = view("a", prompt=1000, computed=100)
    chat = view("b", prompt=50, computed=0)
    around = context([], [flood, chat], lanes=4)
    policy.prefill_shares([flood, chat], 100, around)
    served(policy, b=100)
    assert policy.prefill_shares([flood, chat], 40, around) == {flood.sequence_id: 40}
    before = policy.counters["a"]
    again = ScheduledTokens("a", 0, 0, 500, flood.sequence_id)
    policy.on_step(record(again))
    assert policy.counters["a"] == before
    shares = policy.prefill_shares([flood, chat], 40, around)
    assert shares[chat.sequence_id] == 40


def test_only_the_tenant_with_the_least_counter_takes_a_lane() -> None:
    policy = FairShare()
    running = [view("a") for _ in range(6)]
    b, c = view("b"), view("c")
    around = context([b, c], running, lanes=6)
    policy.admission_order([b, c], around)
    served(policy, a=50, b=20, c=10)
    assert policy.victims(b, running, around) == ()
    assert len(policy.victims(c, running, around)) == 6
    # And not from one that had less, without what it is yet to be given in that lane.
    served(policy, c=100)
    served(policy, b=100)
    assert list(policy.victims(c, running, around)) == []
    served(policy, a=1000)
    assert len(policy.victims(c, running, around)) == 6
    assert FairShare(FairOptions(preempt=False)).victims(c, running, around) == ()


def test_when_memory_runs_out_tenants_above_their_share_yield_first() -> None:
    policy = FairShare()
    running = [
        view("b", computed=3),
        view("a", computed=9),
        view("a", computed=7),
        view("a", computed=7),
    ]
    order = policy.preemption_order(running, context((), running))
    assert [running.index(v) for v in order] == [3, 2, 1, 0]


# --------------------------------------------------------------------------- steps


def shares_of(policy: FairShare, prefilling: list[SequenceView], budget: int, **more: Any) -> Any:
    around = context((), prefilling + more.pop("others", []), **more)
    given = policy.prefill_shares(prefilling, budget, around)
    return [given.get(v.sequence_id, 0) for v in prefilling]


def test_within_a_tenant_one_prompt_is_computed_after_the_other() -> None:
    prefilling = [view("a", prompt=50, computed=20), view("a", prompt=50), view("a", prompt=50)]
    assert shares_of(FairShare(), prefilling, 100) == [30, 50, 20]
    assert shares_of(FairShare(), prefilling, 10) == [10, 0, 0]


def test_the_tenant_with_the_least_counter_gets_the_step_first() -> None:
    policy = FairShare()
    prefilling = [view("a", prompt=500), view("b", prompt=500)]
    policy.counters.observe(context(prefilling).tenants)
    served(policy, a=10)
    assert shares_of(policy, prefilling, 64) == [0, 64]
    served(policy, b=64)
    assert shares_of(policy, prefilling, 64) == [64, 0]
    # Over many steps, by weight.
    given = Counter[str]()
    for _ in range(400):
        around = context((), prefilling, weights={"b": 3.0})
        tokens = policy.prefill_shares(prefilling, 64, around)
        for v in prefilling:
            count = tokens.get(v.sequence_id, 0)
            given[v.tenant] += count
            served(policy, **{v.tenant: count})
    assert given["b"] / given["a"] == pytest.approx(3.0, rel=0.05)


def test_a_short_prompt_that_was_begun_is_finished_before_others_get_their_turn() -> None:
    policy = FairShare()
    flood = [view("a", prompt=1500, computed=640)] + [view("a", prompt=1500) for _ in range(2)]
    chat = view("b", prompt=150, computed=64)
    policy.counters.observe(context([*flood, chat]).tenants)
    served(policy, a=1000, b=1064)  # b came at 1000, and was charged for what it was given
    assert shares_of(policy, [*flood, chat], 64) == [0, 0, 0, 64]


def test_the_step_that_brings_a_first_token_carries_nothing_of_who_is_above_its_share() -> None:
    flood = [view("a", prompt=1500) for _ in range(3)]
    chat = view("b", prompt=40)
    policy = FairShare()
    served(policy, a=1000)
    assert shares_of(policy, [*flood, chat], 100) == [0, 0, 0, 40]
    eager = FairShare(FairOptions(defer=False))
    served(eager, a=1000)
    assert shares_of(eager, [*flood, chat], 100) == [60, 0, 0, 40]
    # Who is within its share is not in the way.
    policy = FairShare()
    served(policy, a=1000)
    assert shares_of(policy, [flood[0], chat], 100) == [60, 40]


def test_decodes_above_their_share_make_way_for_a_first_token() -> None:
    policy = FairShare()
    flood = [decoding("a") for _ in range(3)]
    own = decoding("b")
    chat = view("b", prompt=40)
    around = context((), [*flood, own, chat])
    served(policy, a=1000)
    assert policy.decodes([*flood, own], [chat], around) == [own]

    def stays(decodes: list[SequenceView], prefilling: SequenceView, **more: Any) -> bool:
        around = context((), [*decodes, prefilling], **more)
        return policy.decodes(decodes, [prefilling], around) is None

    assert not stays(flood, chat)
    assert stays(flood, view("a", prompt=40))  # its own tenant is above its share
    assert stays(flood, view("b", prompt=101))  # more than this step can finish
    assert stays(flood, view("b", prompt=40, num_output_tokens=3))  # has had its first token
    assert stays(flood[:2], chat)  # nobody is above its share
    served(policy, b=2000)
    assert stays(flood, chat)  # it has had more than they
    policy = FairShare(FairOptions(defer=False))
    assert stays(flood, chat)


# --------------------------------------------------------------------------- all together


class Flood:
    """A tenant that chats, beside one that sent 20 prompts of 300 tokens at once; steps cost time."""

    def __init__(self, policy: SchedulingPolicy, *, flood: int) -> None:
        self.runtime = ScriptedRuntime(lanes=4, context_length=500)
        self.runtime.before_step = self._before_step
        self.harness = EngineHarness(
            policy,
            runtime=self.runtime,
            scheduler=SchedulerConfig(max_prefill_tokens_while_decoding=64, target_step_s=0.1),
            step_s=0.0,
        )
        self.harness.submit("let it learn what steps cost " * 10, max_tokens=20)
        self.harness.run()
        self.flood = [
            self.harness.submit(self._prompt(i, 300), tenant="flood", max_tokens=30)
            for i in range(flood)
        ]
        self.chat: list[Submitted] = []

    def _before_step(self, step: StepInput) -> None:
        counts = np.bincount(step.lanes)
        decodes, prefill = int((counts == 1).sum()), int(counts[counts > 1].sum())
        self.harness.fake_clock.advance(0.01 + 0.001 * prefill + 0.004 * decodes)

    @staticmethod
    def _prompt(number: int, length: int) -> list[int]:
        return [(number * 31 + i * i) % 251 for i in range(length)]

    def worst_time_to_first_token(self) -> float:
        """Of ten messages, each sent some steps after the answer to the one before."""
        for number in range(10):
            for _ in range(3 + number % 4):
                self.harness.step()
                if not self.flood:
                    self.harness.fake_clock.advance(0.1)
            self.chat.append(
                self.harness.submit(self._prompt(500 + number, 60), tenant="chat", max_tokens=10)
            )
            while self.chat[-1].finish() is None:
                self.harness.step()
        times = [submitted.records[0].time_to_first_token_s for submitted in self.chat]
        return max(time for time in times if time is not None)


def test_who_chats_beside_a_flood_hardly_notices() -> None:
    alone = Flood(FairShare(), flood=0).worst_time_to_first_token()
    fair, fcfs = Flood(FairShare(), flood=20), Flood(FirstComeFirstServed(), flood=20)
    assert fair.worst_time_to_first_token() <= 2.5 * alone
    assert fcfs.worst_time_to_first_token() > 20 * alone
    for run in (fair, fcfs):
        run.harness.run()
        for submitted in (*run.flood, *run.chat):
            prompt = list(submitted.request.prompt_token_ids)
            asked = submitted.request.sampling.max_tokens or 0
            assert submitted.text() == run.runtime.expected_text(prompt, asked)
        assert run.harness.engine.scheduler.policy.num_errors == 0
    # Each message cost the flood one lane at most, and only the flood.
    assert 1 <= sum(s.records[0].num_preemptions for s in fair.flood) <= len(fair.chat)
    assert all(s.records[0].num_preemptions == 0 for s in fair.chat)
