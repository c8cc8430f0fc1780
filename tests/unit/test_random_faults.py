"""Random lives of an engine: whatever goes wrong, nobody else pays for it, and nothing leaks.

Each life is drawn from one seed: a machine (lanes, KV memory, budgets), a policy, tenants, requests, readers,
and faults of the runtime, the policy, an observer and the clients. After every step the engine's books are
compared with the truth; at the end everything must be over and every table empty.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pytest

import stoker_plugins
from stoker import (
    FinishReason,
    Observer,
    PolicyInfo,
    RequestRecord,
    SchedulingPolicy,
    StepInput,
    StepRecord,
)
from stoker.config import CacheConfig, SchedulerConfig, SpeculationConfig, TenantConfig
from stoker.engine.drafters import Drafter
from stoker.engine.ngram import NgramDrafter
from stoker.engine.readers import ReaderLimits
from stoker.engine.sequence import Sequence, SequenceStatus
from stoker.errors import (
    DeadlineError,
    EngineError,
    RequestCancelledError,
    SlowReaderError,
    UnavailableError,
)
from stoker.testing import (
    EngineHarness,
    FakeClock,
    Fault,
    FaultyPolicy,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    Submitted,
)

TENANTS = ("alice", "bob", "carol", "anonymous")
MAX_TOKENS = 40
# A runtime that fails every step of several and forgets all it had computed is slow, but gets there.
MOST_STEPS = 20_000
CONTEXT = 90
SPOILT_LOGITS = (Fault.NAN, Fault.INFINITE)
POISON = ord("#")
GARBAGE: list[Any] = [
    *(None, 7, "nonsense", (), [None], {}, math.nan, itertools.repeat(None), object()),
    *(dict.fromkeys(range(3), math.nan), dict.fromkeys(range(10**5), -5), [object()] * 2000),
]

_dice = random.Random(0)
PROMPTS = [
    ("the same beginning " if i % 3 == 0 else "")
    + "".join(_dice.choices("abcdefgh ", k=_dice.randint(1, 30)))
    for i in range(60)
]


@functools.cache
def truth(prompt: str, end_every: int, block: int) -> str:
    """What the scripted model writes after a prompt, ``MAX_TOKENS`` of it at most."""
    runtime = ScriptedRuntime(options=ScriptedOptions(end_every=end_every, exact_block=block))
    return runtime.expected_text(list(prompt.encode()), MAX_TOKENS)


class Books(Observer):
    """Counts what it is told, and sometimes fails at it."""

    def __init__(self, dice: random.Random, share_failing: float) -> None:
        self.dice = dice
        self.share_failing = share_failing
        self.num_failed = 0
        self.steps: list[StepRecord] = []
        self.ends: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self._fail_sometimes()

    def on_finish(self, record: RequestRecord) -> None:
        self.ends.append(record)
        self._fail_sometimes()

    def _fail_sometimes(self) -> None:
        if self.dice.random() < self.share_failing:
            self.num_failed += 1
            raise KeyError("an observer's trouble")


class Guesser(Drafter):
    """Guesses what the scripted model says, wrong at a random place, and sometimes fails."""

    def __init__(self, dice: random.Random, end_every: int) -> None:
        self.dice = dice
        self.is_free = dice.random() < 0.5
        self.fails = dice.choice([0.0, 0.0, 0.01])
        self.model = ScriptedRuntime(options=ScriptedOptions(end_every=end_every))

    def propose(
        self, sequences: Rows[Sequence], limits: Mapping[int, int]
    ) -> dict[int, np.ndarray[Any, Any]]:
        if self.dice.random() < self.fails:
            raise RuntimeError("a drafter's trouble")
        drafts = {}
        for sequence in self.dice.sample(list(sequences), self.dice.randint(0, len(sequences))):
            known = sequence.tokens[: sequence.num_tokens].tolist()
            text = self.model.expected_text(known, limits[sequence.sequence_id])
            draft = np.frombuffer(text.encode() + b"xyz", np.uint8).astype(np.int32)
            draft[self.dice.randint(0, len(draft) - 1)] = self.dice.choice([-1, 97, 261])
            drafts[sequence.sequence_id] = draft
        return drafts

    def forget(self, sequence_id: int) -> None:
        pass


class Life:
    """One engine from its birth to its last request.

    Args:
        seed: Decides everything.
        policy: Decides about the policy instead; it is one of the bundled ones.
    """

    def __init__(self, seed: int, policy: PolicyInfo | None = None) -> None:
        self.dice = dice = random.Random(seed)
        self.seed = seed
        self.end_every = dice.choice([0, 11, 23])
        lanes = dice.randint(1, 5)
        tight = dice.random() < 0.5
        max_step_tokens = dice.randint(lanes, 64)
        # In every second life a token's KV depends on the piece that it is computed in.
        self.block = 4 if seed % 2 and max_step_tokens >= lanes + 4 else 1
        inner = ScriptedRuntime(
            lanes=lanes,
            context_length=CONTEXT,
            max_step_tokens=max_step_tokens,
            options=ScriptedOptions(
                end_every=self.end_every,
                exact_block=self.block,
                kv_capacity_tokens=dice.randint(CONTEXT, CONTEXT + 60) if tight else None,
                truncation=dice.choice(["any", "reset"]),
                samples=seed % 5 < 2,
            ),
        )
        self.inner = inner
        self.clock = FakeClock()
        # What may go wrong in this life, and how often.
        self.faults: list[Fault] = (
            dice.sample(list(Fault), dice.randint(1, 4)) if dice.random() < 0.7 else []
        )
        if dice.random() < 0.15:  # two that meet: while one is looked into, the other strikes
            self.faults = [Fault.RAISE_AFTER, Fault.NO_ROOM]
        self.share_faulty = dice.choice([0.02, 0.1, 0.5, 1.0])
        self.only_crowds = dice.random() < 0.5
        self.poisoned = dice.choice([None, None, *(f for f in Fault if f not in SPOILT_LOGITS)])
        self.share_stuck = dice.choice([0.0, 0.0, 0.0, 0.05, 0.5])
        self.blamed: set[int] = set()
        self.runtime = FaultyRuntime(inner, self._fault, self._truncates)
        self.books = Books(dice, dice.choice([0.0, 0.0, 0.3]))
        self.num_raised = self.num_spoilt = 0
        self.spoils = dice.choice([0.0, 0.0, 0.1, 1.0])
        self.lanes = lanes
        self.policy_name, self.policy = self._policy(policy)
        self.harness = EngineHarness(
            FaultyPolicy(self.policy, self._spoil)
            if self.spoils or dice.random() < 0.3
            else self.policy,
            runtime=self.runtime,
            scheduler=self._scheduler_config(),
            cache=CacheConfig(prefix_reuse=dice.random() < 0.8),
            observers=[self.books],
            clock=self.clock,
            tenants=self._tenants(),
            reader_limits=ReaderLimits(
                max_unread_tokens=dice.choice([2, 5, 4096]), timeout_s=dice.choice([0.3, 30.0])
            ),
            drafter=self._drafter(),
            speculation=SpeculationConfig(adaptive=seed % 3 == 0, max_draft_tokens=seed % 7 + 1),
        )
        self.engine = self.harness.engine
        self.requests: list[Submitted] = []
        self.prompts: dict[str, str] = {}
        self.poisonous: set[str] = set()
        self.aborted: set[str] = set()
        self.cancelled: dict[str, Exception] = {}
        self.slow: set[str] = set()
        self.num_seen: dict[str, int] = {}
        self.alive: dict[int, Sequence] = {}
        self.is_shut_down = False

    # ------------------------------------------------------------------ what it is made of

    def _policy(self, wanted: PolicyInfo | None) -> tuple[str, SchedulingPolicy]:
        info = wanted or self.dice.choice(stoker_plugins.stoker_register_policies())
        options = () if info.options is None else (info.options(),)
        return info.name, info.factory(*options)

    def _drafter(self) -> Drafter | None:
        dice = random.Random(-1 - self.seed)
        chosen = dice.randint(0, 3)
        if chosen < 2:
            return Guesser(dice, self.end_every)
        return NgramDrafter(1, 2) if chosen == 2 else None

    def _scheduler_config(self) -> SchedulerConfig:
        dice = self.dice
        self.lends = dice.random() < 0.6
        return SchedulerConfig(
            max_num_batched_tokens=dice.randint(self.lanes, 64),
            max_prefill_tokens_while_decoding=dice.randint(1, 40),
            target_step_s=dice.choice([0.0, 0.0, 0.004, 0.02]),
            lend_reserved=self.lends,
        )

    def _tenants(self) -> list[TenantConfig]:
        dice = self.dice
        if dice.random() < 0.4:
            return []
        # One lane at least stays with those who have no reservation: what is never lent must be enough.
        spare = self.lanes - 1
        configs = []
        for name in dice.sample(TENANTS, dice.randint(1, 3)):
            reserved = dice.randint(0, spare)
            spare -= reserved
            configs.append(
                TenantConfig(
                    name=name,
                    weight=dice.choice([0.5, 1.0, 4.0]),
                    reserved_lanes=reserved,
                    reserved_kv=dice.choice([0.0, 0.1, 0.3]),
                )
            )
        return configs

    # ------------------------------------------------------------------ what goes wrong

    def _owners(self, step: StepInput) -> list[Sequence]:
        owners = self.engine.scheduler.lanes._owner
        found = [owners[lane] for lane in dict.fromkeys(step.lanes.tolist())]
        assert all(found), f"seed {self.seed}: a step uses an idle lane"
        return [owner for owner in found if owner is not None]

    def _fault(self, step: StepInput) -> Fault | None:
        self.clock.advance(0.001 + 0.0002 * len(step.token_ids))
        owners = self._owners(step)
        if self.poisoned is not None and POISON in step.token_ids:
            return self.poisoned
        if not self.faults or (self.only_crowds and len(owners) == 1):
            return None
        if self.dice.random() >= self.share_faulty:
            return None
        fault = self.dice.choice(self.faults)
        if len(owners) == 1 or fault in SPOILT_LOGITS:
            self.blamed |= {owner.sequence_id for owner in owners}
        return fault

    def _truncates(self, lane: int) -> bool:
        if self.dice.random() >= self.share_stuck:
            return True
        owner = self.engine.scheduler.lanes._owner[lane]
        if owner is not None:
            self.blamed.add(owner.sequence_id)
        self.stuck = True
        return False

    stuck = False

    def _spoil(self, method: str, honest: Callable[[], Any]) -> Any:
        if self.dice.random() >= self.spoils:
            return honest()
        if self.dice.random() < 0.5:
            self.num_raised += 1
            raise RuntimeError(method)
        self.num_spoilt += 1
        answer = honest()
        kinds: list[Callable[[], Any]] = [lambda: self.dice.choice(GARBAGE), lambda: [answer]]
        if isinstance(answer, list | tuple):
            kinds += [
                *(lambda: answer[1:], lambda: [*answer, *answer]),
                *(lambda: answer[::-1], lambda: [*answer, None]),
            ]
        return self.dice.choice(kinds)()

    # ------------------------------------------------------------------ what clients do

    def submit(self) -> None:
        dice, now_s = self.dice, self.clock()
        prompt = dice.choice(PROMPTS)
        is_poisonous = self.poisoned is not None and dice.random() < 0.15
        if is_poisonous:
            at = dice.randint(0, len(prompt))
            prompt = prompt[:at] + "#" + prompt[at:]
        request = self.harness.submit(
            prompt,
            n=dice.choice([1, 1, 1, 2, 3]),
            tenant=dice.choice(TENANTS),
            priority=dice.randint(0, 3),
            max_tokens=dice.randint(1, MAX_TOKENS),
            stop=dice.choice([(), (), (), ("e",), ("th", "t a"), ("zzzz",)]),
            queue_deadline_s=now_s + dice.random() if dice.random() < 0.1 else None,
            deadline_s=now_s + 2 * dice.random() if dice.random() < 0.15 else None,
        )
        key = request.request.request_id
        self.requests.append(request)
        self.prompts[key] = prompt
        if is_poisonous:
            self.poisonous.add(key)
        if dice.random() < 0.1:
            self.slow.add(key)
            request.reads = False
        self.num_seen[key] = 0
        self.alive |= {s.sequence_id: s for s in request.sequences}

    def act(self) -> None:
        """One thing that happens."""
        dice = self.dice
        action = dice.choices(
            ["step", "submit", "abort", "cancel", "read", "stall", "wait"],
            [60, 25, 3, 3, 4, 3, 1],
        )[0]
        if action == "step":
            self.harness.step()
        elif action == "submit":
            self.submit()
        elif action == "wait":
            self.clock.advance(0.1)
        elif self.requests:
            getattr(self, f"_{action}")(dice.choice(self.requests))
        self.check()

    def _abort(self, request: Submitted) -> None:
        self.aborted.add(request.request.request_id)
        self.harness.abort(request)

    def _cancel(self, request: Submitted) -> None:
        error = RequestCancelledError("cancelled")
        if any(request.finish(i) is None for i in range(request.request.n)):
            self.cancelled[request.request.request_id] = error
        self.harness.cancel(request, error)

    def _read(self, request: Submitted) -> None:
        request.num_read = request.num_sent
        if self.dice.random() < 0.5:
            request.reads = True

    def _stall(self, request: Submitted) -> None:
        self.slow.add(request.request.request_id)
        request.reads = False

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """The invariants, between any two things that happen."""
        self._check_lanes()
        self._check_queues()
        for request in self.requests:
            self._check_deltas(request)

    def _check_lanes(self) -> None:
        scheduler = self.engine.scheduler
        lanes = scheduler.lanes
        owned = {s.lane: s for s in scheduler.running.values()}
        assert len(owned) == len(scheduler.running), "a lane has two owners"
        assert {at: o for at, o in enumerate(lanes._owner) if o is not None} == owned
        assert set(lanes._idle) == set(range(lanes.num_lanes)) - set(owned)
        assert lanes.used_tokens + lanes.retained_tokens <= lanes.capacity_tokens
        for lane in range(lanes.num_lanes):
            held = int(self.inner._lengths[lane])
            if lane in owned:
                assert held == owned[lane].num_computed, "KV and sequence disagree"
            elif lane not in lanes._unknown:
                kept = lanes.retention.kept.get(lane)
                assert held == (0 if kept is None else len(kept.tokens)), "KV and kept disagree"
                assert lanes._tree.depth(lane) == held, "KV and the tree disagree"
            assert lanes._tree.depth(lane) <= held or lane in lanes._unknown

    def _check_queues(self) -> None:
        scheduler = self.engine.scheduler
        groups = (scheduler.waiting, scheduler.running, scheduler.paused)
        ids = [key for group in groups for key in group]
        assert len(ids) == len(set(ids)), "a sequence is in two places"
        for key in [k for k, s in self.alive.items() if s.status is SequenceStatus.FINISHED]:
            del self.alive[key]
        assert set(ids) == set(self.alive)
        assert {s.sequence_id for group in self.engine._sequences.values() for s in group} == set(
            ids
        )
        for group, statuses in zip(groups, _STATUSES, strict=True):
            assert {s.status for s in group.values()} <= statuses
        fresh = [s for s in self.alive.values() if s.admitted_s is None]
        load = self.engine.load()
        assert load.num_waiting == len(fresh)
        assert load.waiting_tokens == sum(map(_cost, fresh))
        for tenant in TENANTS:
            own = [s for s in fresh if s.request.tenant == tenant]
            found = self.engine.tenant_load(tenant)
            assert (found.num_waiting, found.waiting_tokens) == (len(own), sum(map(_cost, own)))

    def _check_deltas(self, request: Submitted) -> None:
        key = request.request.request_id
        if len(request.deltas) == self.num_seen[key]:
            return
        self.num_seen[key] = len(request.deltas)
        unread = request.num_sent - request.num_read
        assert unread <= self.engine._readers.max_unread + request.request.n, "it piles up"
        for index in range(request.request.n):
            deltas = [d for d in request.deltas if d.index == index]
            expected, reason = self._truth(request)
            text = "".join(d.text for d in deltas)
            ends = [d for d in deltas if d.finish_reason is not None]
            assert ends in ([], deltas[-1:]), "something follows the last delta"
            if not ends:
                assert expected.startswith(text)
                continue
            self._check_end(request, ends[0].finish_reason, ends[0].error)
            assert ends[0].usage is not None
            assert ends[0].usage.completion_tokens == sum(d.num_tokens for d in deltas)
            if ends[0].finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert (text, ends[0].finish_reason) == (expected, reason)
            else:
                # Also what was held back because a stop string might have begun.
                whole = truth(self.prompts[key], self.end_every, self.block)
                assert whole.startswith(text)

    def _truth(self, request: Submitted) -> tuple[str, FinishReason]:
        """Its whole text, and how it should end."""
        sampling = request.request.sampling
        whole = truth(self.prompts[request.request.request_id], self.end_every, self.block)
        limit = sampling.max_tokens or 0
        text = whole[:limit]
        reason = FinishReason.LENGTH if len(text) == limit else FinishReason.STOP
        found = [at + len(stop) for stop in sampling.stop if (at := text.find(stop)) >= 0]
        if found:
            # The stop string that is complete first ends it; the text is cut where the earliest begins.
            seen = text[: min(found)]
            text = text[: min(at for s in sampling.stop if (at := seen.find(s)) >= 0)]
            reason = FinishReason.STOP
        return text, reason

    def _check_end(
        self, request: Submitted, reason: FinishReason | None, error: Exception | None
    ) -> None:
        key = request.request.request_id
        assert (error is not None) == (reason is FinishReason.ERROR)
        if reason is FinishReason.ABORT:
            assert key in self.aborted
        elif isinstance(error, RequestCancelledError):
            assert error is self.cancelled[key]
        elif isinstance(error, SlowReaderError):
            assert key in self.slow
        elif isinstance(error, DeadlineError):
            deadlines = (request.request.queue_deadline_s, request.request.deadline_s)
            assert any(d is not None and d <= self.clock() for d in deadlines)
        elif isinstance(error, UnavailableError):
            assert self.is_shut_down
        elif error is not None:
            assert isinstance(error, EngineError)
            ids = {s.sequence_id for s in request.sequences}
            blamed = bool(ids & self.blamed) or key in self.poisonous or self.stuck
            assert blamed, f"{error!r} hit an innocent request"

    # ------------------------------------------------------------------ all of it

    def live(self) -> None:
        """Live it.

        Raises:
            AssertionError: With the seed.
        """
        try:
            for _ in range(self.dice.randint(5, 50)):
                self.act()
            self._come_to_rest()
            self._check_rest()
        except Exception as error:
            raise AssertionError(f"seed {self.seed} ({self.policy_name}): {error!r}") from error

    def _come_to_rest(self) -> None:
        """Let everything finish, with faults going on or over."""
        if self.dice.random() < 0.15:
            self.is_shut_down = True
            shutdown = UnavailableError("the server is shutting down")
            self.harness._deliver(lambda outbox: self.engine.abort_all(shutdown, outbox))
        if self.dice.random() < 0.5:
            self.faults, self.poisoned, self.share_stuck, self.spoils = [], None, 0.0, 0.0
        for _ in range(MOST_STEPS):
            if not (self.engine.has_work or self.engine.scheduler.paused):
                return
            if self.dice.random() < 0.1:
                for request in self.requests:
                    self._read(request)
            self.harness.step()
            self.check()
        raise RuntimeError("something is stuck")

    def _check_rest(self) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        lanes = scheduler.lanes
        assert len(lanes._idle) == lanes.num_lanes
        assert lanes.used_tokens == 0
        tables = (
            *(scheduler.waiting, scheduler.running, scheduler.paused),
            *(engine._sequences, engine._waiting._entries, engine._waiting._tenants),
            *(engine._readers._seen, engine._readers._slow, scheduler._admitted),
        )
        assert not any(tables)
        for name, value in vars(self.policy).items():
            if isinstance(value, dict | list | set):
                assert len(value) <= len(TENANTS), f"{name} of the policy keeps growing"
        self._check_records()
        self._check_counters()

    def _check_records(self) -> None:
        for request in self.requests:
            assert len(request.records) == request.request.n
            assert sum(d.finish_reason is not None for d in request.deltas) == request.request.n
            for trace in request.traces():
                assert trace.status == "finished"
                assert 0 <= trace.queue_s <= trace.total_s
                assert trace.paused_s >= 0
                assert len(trace.preemptions) == min(trace.num_preemptions, 16)
                assert 0 <= trace.cached_tokens + trace.computed_tokens <= trace.prompt_tokens
                if trace.completion_tokens:
                    assert trace.cached_tokens + trace.computed_tokens == trace.prompt_tokens
                    assert trace.time_to_first_token_s is not None
                    assert trace.admitted_by

    def _check_counters(self) -> None:
        engine, steps = self.engine, self.books.steps
        assert len(self.books.ends) == sum(r.request.n for r in self.requests)
        assert engine.num_observer_errors == self.books.num_failed
        generated = sum(d.num_tokens for r in self.requests for d in r.deltas)
        assert sum(s.num_generated_tokens for s in steps) == generated
        assert sum(s.num_preemptions for s in steps) == engine.reporter._told_preemptions
        assert engine.scheduler.num_preemptions == sum(r.num_preemptions for r in self.books.ends)
        errors = engine.scheduler.policy.num_errors
        assert self.num_raised <= errors <= self.num_raised + self.num_spoilt
        assert (engine.num_runtime_errors > 0) <= (
            self.runtime.num_failed + self.runtime.num_failed_truncations > 0
        )


_STATUSES = (
    {SequenceStatus.WAITING, SequenceStatus.PREEMPTED},
    {SequenceStatus.PREFILL, SequenceStatus.DECODE},
    {SequenceStatus.PREEMPTED},
)


def _cost(sequence: Sequence) -> int:
    return sequence.num_prompt + (sequence.sampling.max_tokens or 0)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_random_lives(block: int) -> None:
    for seed in range(block * 50, (block + 1) * 50):
        Life(seed).live()


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 7))
def test_many_random_lives(block: int) -> None:
    for seed in range(block * 200, (block + 1) * 200):
        Life(seed).live()


@pytest.mark.contrib
@pytest.mark.slow
def test_random_lives_under_a_policy_of_another_distribution() -> None:
    (priority,) = pytest.importorskip("stoker_policy_priority").stoker_register_policies()
    for seed in range(200):
        Life(seed, priority).live()
