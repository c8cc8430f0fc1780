"""Whatever is reused, copied, restored or preempted: greedy text is that of a request that runs alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stoker import CacheEntry, SnapshotStore, StoredPrefix
from stoker.config import CacheConfig, SchedulerConfig, TenantConfig
from stoker.engine.exactness import ExactBlocks
from stoker.engine.prefix_tree import common_prefix
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed

SYSTEM = "you are a stoker and you keep the boiler fed; " * 3
STARTS = ("", "a", SYSTEM[:7], SYSTEM[:64], SYSTEM, SYSTEM + "and you sing. ", "x" * 100)
SALTS = ("", "", "salt")
TENANTS = ("anonymous", "acme")


@dataclass
class Stored:
    tokens: NDArray[np.int32]
    salt: str
    snapshot: bytes
    num_block: int


class DictStore(SnapshotStore):
    """A second tier without limits."""

    def __init__(self) -> None:
        self.kept: dict[str, Stored] = {}
        self.num_restored = 0

    def put(self, tokens, salt, tenant, snapshot, seconds_to_make, num_block_tokens=0) -> bool:  # type: ignore[no-untyped-def]
        key = str(len(self.kept))
        self.kept[key] = Stored(tokens.copy(), salt, snapshot, num_block_tokens)
        return True

    def match(self, tokens: NDArray[np.int32], salt: str) -> StoredPrefix | None:
        found = [
            StoredPrefix(
                key=key,
                num_tokens=len(s.tokens),
                num_shared=common_prefix(s.tokens, tokens),
                num_block_tokens=s.num_block,
                num_bytes=len(s.snapshot),
                tier="host",
            )
            for key, s in self.kept.items()
            if s.salt == salt
        ]
        return max(found, key=lambda f: f.num_shared, default=None)

    def get(self, key: str) -> bytes | None:
        self.num_restored += 1
        return self.kept[key].snapshot

    def evict(self, now_s: float) -> int:
        return 0

    def entries(self) -> list[CacheEntry]:
        return []

    def close(self) -> None:
        self.kept.clear()


class World:
    """An engine in which everything happens, and what must hold after each thing."""

    def __init__(self, seed: int, block: int, *, whole_tail: bool = False) -> None:
        self.dice = dice = random.Random(seed)
        self.whole_tail = whole_tail
        lanes = dice.choice([2, 3, 5])
        self.runtime = ScriptedRuntime(
            lanes=lanes,
            context_length=400,
            max_step_tokens=64,
            options=ScriptedOptions(
                exact_block=block,
                exact_from=0 if whole_tail else dice.choice([0, 0, 30]),
                exact_tail="whole" if whole_tail else "any",
                snapshot=dice.random() < 0.5,
                copy_prefix=dice.random() < 0.8,
                truncation=dice.choice(["any", "any", "any", "reset"]),
                # Preempted, it computes again in one piece what it had generated token by token.
                kv_capacity_tokens=None if whole_tail else dice.choice([None, 400, 700]),
            ),
        )
        self.store = DictStore()
        self.harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=self.runtime,
            scheduler=SchedulerConfig(
                max_num_batched_tokens=dice.choice([24, 64]),
                max_prefill_tokens_while_decoding=dice.choice([5, 16, 64]),
                target_step_s=dice.choice([0.0, 0.01]),
            ),
            cache=CacheConfig(
                insert_every=dice.choice([1, 5]),
                isolation=dice.choice(["none", "tenant"]),
                max_tokens=dice.choice([0, 0, 150]),
                ttl_s=dice.choice([0.0, 0.3]),
                share_in_flight=dice.random() < 0.8,
            ),
            tenants=[TenantConfig(name="acme", cache_floor_tokens=dice.choice([0, 100]))],
            store=self.store,
        )
        self.lanes = self.harness.engine.scheduler.lanes
        self.lanes.costs.restore.value = 1e-9  # snapshots are always worth their while here
        self.lanes.costs.snapshot.value = 1e-9
        if dice.random() < 0.5:
            self.lanes.pin(SYSTEM.encode())
        self.requests: list[Submitted] = []

    def act(self) -> None:
        dice = self.dice
        what = dice.choices(["step", "submit", "abort", "preempt", "clear"], [60, 20, 3, 5, 1])[0]
        running = list(self.harness.engine.scheduler.running.values())
        if what == "submit":
            prompt = dice.choice(STARTS) + dice.choice("abc") * dice.randint(1, 20)
            if self.requests and dice.random() < 0.4:  # a conversation goes on
                before = dice.choice(self.requests)
                prompt = bytes(before.request.prompt_token_ids).decode() + before.text() + "go on"
            if len(prompt) > 300:
                return
            self.requests.append(
                self.harness.submit(
                    prompt,
                    n=dice.choice([1, 1, 2]),
                    max_tokens=dice.randint(1, 30),
                    tenant=dice.choice(TENANTS),
                    cache_salt=dice.choice(SALTS),
                )
            )
        elif what == "abort" and self.requests:
            self.harness.abort(dice.choice(self.requests))
        elif what == "preempt" and len(running) > 1 and not self.whole_tail:
            self.harness.engine.scheduler.preempt(dice.choice(running), "policy")
        elif what == "clear":
            self.lanes.clear()
        else:
            self.harness.step()
        self.check()

    def check(self) -> None:
        lanes, runtime = self.lanes, self.runtime
        for lane in range(lanes.num_lanes):
            owner, kept = lanes._owner[lane], lanes.retention.kept.get(lane)
            if owner is not None:
                held = owner.tokens[: owner.num_computed]
                boundary = lanes.blocks.boundary(owner.num_prompt)
                scope = lanes.retention.scope_of(owner.request)
                assert kept is None
                assert lanes._tree.depth(lane) <= len(held)
            else:
                held = kept.tokens if kept else np.empty(0, np.int32)
                boundary, scope = (kept.num_block, kept.scope) if kept else (0, "")
                assert lanes._tree.depth(lane) == len(held)
            in_blocks = boundary if lanes.blocks.block > 1 else 0
            assert int(runtime._lengths[lane]) == len(held)
            checked = held[:in_blocks] if self.whole_tail else held
            state = runtime.state_after(checked.tolist(), in_blocks)
            assert int(runtime._states[lane, len(checked)]) == state, "a lane holds something else"
            known = held[: lanes._tree.depth(lane)]
            assert not len(known) or lanes._tree.match(scope, known)[lane] == len(known)
        assert lanes.retained_tokens + lanes.used_tokens <= lanes.capacity_tokens
        assert set(lanes.retention.kept) <= set(lanes._idle)

    def finish(self) -> None:
        self.harness.run()
        self.check()
        for request in self.requests:
            prompt = list(request.request.prompt_token_ids)
            whole = self.runtime.expected_text(prompt, request.request.sampling.max_tokens or 0)
            for index in range(request.request.n):
                end = request.finish(index)
                assert end is not None
                text = request.text(index)
                assert whole == text or (end.finish_reason == "abort" and whole.startswith(text))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "whole_tail"), [(1, False), (8, False), (8, True)])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_nothing_that_is_reused_changes_the_text(block: int, whole_tail: bool, seed: int) -> None:
    world = World(seed, block, whole_tail=whole_tail)
    for _ in range(120):
        world.act()
    world.finish()


def chat(harness: EngineHarness, *prompts: str) -> list[Submitted]:
    done = []
    for prompt in prompts:
        done.append(harness.submit(prompt, max_tokens=6))
        harness.run()
    return done


@pytest.mark.parametrize(("exact", "same"), [(True, True), (False, False)])
def test_without_the_rule_a_hit_changes_the_text(exact: bool, same: bool) -> None:
    runtime = ScriptedRuntime(lanes=2, options=ScriptedOptions(exact_block=8))
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, cache=CacheConfig(exact=exact))
    requests = chat(harness, SYSTEM + "first", SYSTEM + "second one")
    truth = [runtime.expected_text(list(r.request.prompt_token_ids), 6) for r in requests]
    assert ([r.text() for r in requests] == truth) is same
    last = requests[1].finish()
    assert last is not None
    assert last.usage is not None
    assert last.usage.cached_tokens == (len(SYSTEM) // 8 * 8 if exact else len(SYSTEM))


def test_a_prompt_is_reused_as_far_as_it_would_be_computed_in_the_same_kinds() -> None:
    rule = ExactBlocks(8)
    assert rule.usable(20, 16, 16) == 20  # the same blocks, and what follows them
    assert rule.usable(20, 16, 24) == 16  # the newcomer computes its third block as a block
    assert rule.usable(20, 24, 16) == 16  # the source did
    assert rule.usable(13, 16, 16) == 8
    assert rule.usable(5, 0, 0) == 5
    assert rule.usable(5, 0, 8) == 0
    assert ExactBlocks(1).usable(13, 13, 20) == 13


def test_where_every_shape_is_a_kind_of_its_own_only_blocks_are_reused() -> None:
    rule = ExactBlocks(8, whole_tail=True)
    assert [rule.boundary(n) for n in (1, 2, 9, 10, 16, 17, 18)] == [0, 0, 0, 8, 8, 8, 16]
    assert rule.usable(20, 16, 16) == 16
    runtime = ScriptedRuntime(lanes=2, options=ScriptedOptions(exact_block=8, exact_tail="whole"))
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    told = "a question of twenty-seven"
    first, again, more = chat(harness, told, told, told + " and on")
    for request in (first, again, more):
        want = runtime.expected_text(list(request.request.prompt_token_ids), 6)
        assert request.text() == want
    ends = [request.finish() for request in (again, more)]
    cached = [end.usage.cached_tokens for end in ends if end is not None and end.usage is not None]
    assert cached == [24, 24]


def test_short_prompts_have_no_blocks_where_the_runtime_says_so() -> None:
    options = ScriptedOptions(exact_block=8, exact_from=60)
    runtime = ScriptedRuntime(lanes=2, options=options)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    first = chat(harness, "a question of twenty-seven")[0]
    told = "a question of twenty-seven" + first.text()
    again, long = chat(harness, told + "and on", told + "and on" * 8)
    truth = [runtime.expected_text(list(r.request.prompt_token_ids), 6) for r in (again, long)]
    assert [again.text(), long.text()] == truth
    ends = [request.finish() for request in (again, long)]
    cached = [end.usage.cached_tokens for end in ends if end is not None and end.usage is not None]
    # All of the conversation, its answer too; the long prompt has blocks, and those were never computed.
    assert cached == [len(told) - 1, 0]


def test_blocks_that_no_step_has_room_for_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    runtime = ScriptedRuntime(lanes=4, max_step_tokens=16, options=ScriptedOptions(exact_block=16))
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    assert harness.engine.scheduler.lanes.blocks.block == 1
    assert "max_num_batched_tokens" in caplog.text
