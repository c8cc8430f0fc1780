"""What is kept and what goes: limits, age, pins, floors, scopes, strategies, and the ways back in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from stoker import CacheEntry, EvictionStrategy
from stoker.config import CacheConfig, TenantConfig
from stoker.engine.retention import Kept
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed


def make(
    lanes: int = 4,
    *,
    options: ScriptedOptions | None = None,
    tenants: Sequence[TenantConfig] = (),
    eviction: EvictionStrategy | None = None,
    **cache: Any,
) -> EngineHarness:
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=lanes, context_length=1000, options=options),
        cache=CacheConfig(**cache),
        tenants=tenants,
        eviction=eviction,
    )


def ask(harness: EngineHarness, prompt: str, **how: Any) -> Submitted:
    request = harness.submit(prompt, **({"max_tokens": 1} | how))
    harness.run()
    harness.fake_clock.advance(1.0)
    return request


def cached(request: Submitted) -> int:
    last = request.finish()
    assert last is not None
    assert last.usage is not None
    return last.usage.cached_tokens


def kept(harness: EngineHarness) -> list[str]:
    held = harness.engine.scheduler.lanes.retention.kept.values()
    return sorted({chr(int(k.tokens[0])) for k in held})


def test_limits_take_the_least_recently_used_and_say_why() -> None:
    harness = make(max_tokens=100)
    for letter in "abc":
        ask(harness, letter * 40)
    assert kept(harness) == ["b", "c"]
    stats = harness.engine.scheduler.lanes.stats()
    assert (stats.evictions, stats.evicted_tokens) == ({"tokens": 1}, {"tokens": 40})
    (gone,) = stats.recent
    assert (gone.reason, gone.num_tokens, gone.tier, gone.tenant) == (
        "tokens",
        40,
        "lane",
        "anonymous",
    )
    assert (stats.num_entries, stats.retained_tokens) == (2, 80)


def test_what_nobody_used_for_too_long_is_dropped_also_while_the_engine_is_idle() -> None:
    harness = make(ttl_s=10.0)
    ask(harness, "a" * 40)
    harness.fake_clock.advance(5)
    ask(harness, "b" * 40)
    harness.fake_clock.advance(5)
    harness.engine.scheduler.lanes.expire()
    assert kept(harness) == ["b"]
    assert cached(ask(harness, "a" * 40)) == 0


def test_a_pinned_prompt_outlives_limits_age_and_clearing() -> None:
    harness = make(lanes=3, max_tokens=50, ttl_s=10.0)
    lanes = harness.engine.scheduler.lanes
    lanes.pin(b"p" * 60)
    ask(harness, "p" * 60)
    harness.fake_clock.advance(100)
    for letter in "abcabc":
        ask(harness, letter * 45)
    lanes.clear()
    assert kept(harness) == ["p"]
    assert cached(ask(harness, "p" * 60 + "question")) == 60
    assert lanes.stats().num_pinned >= 1
    assert [e.pinned for e in lanes.entries() if e.num_tokens >= 60]


def test_running_requests_win_over_pins_and_that_is_counted() -> None:
    harness = make(lanes=2)
    lanes = harness.engine.scheduler.lanes
    lanes.pin(b"p" * 60)
    ask(harness, "p" * 60)
    both = [harness.submit(letter * 30, max_tokens=3) for letter in "ab"]
    harness.run()
    assert lanes.stats().num_pins_evicted == 1
    assert all(r.finish() for r in both)


def test_when_room_is_short_a_pinned_lane_shrinks_to_its_pin() -> None:
    harness = make(lanes=3, options=ScriptedOptions(kv_capacity_tokens=200))
    harness.engine.scheduler.lanes.pin(b"p" * 60)
    ask(harness, "p" * 60 + "q" * 60)
    ask(harness, "a" * 130)
    assert cached(ask(harness, "p" * 60 + "x")) == 60


def test_a_tenants_floor_goes_after_everybody_elses() -> None:
    tenants = [TenantConfig(name="acme", cache_floor_tokens=40)]
    harness = make(tenants=tenants, max_tokens=100)
    ask(harness, "a" * 40, tenant="acme")
    for letter in "bcd":
        ask(harness, letter * 40)
    assert kept(harness) == ["a", "d"]
    # Above its floor it is like everybody.
    ask(harness, "A" * 40, tenant="acme")
    assert kept(harness) == ["A", "a"] or kept(harness) == ["A", "d"]


@pytest.mark.parametrize("isolation", ["none", "tenant"])
def test_nobody_finds_what_another_scope_has_computed(isolation: str) -> None:
    harness = make(isolation=isolation)
    prompt = "s" * 100
    ask(harness, prompt, tenant="acme", cache_salt="x")
    assert cached(ask(harness, prompt, tenant="acme")) == 0
    assert cached(ask(harness, prompt, tenant="acme", cache_salt="y")) == 0
    assert cached(ask(harness, prompt, tenant="acme", cache_salt="x")) == 99
    found = cached(ask(harness, prompt, tenant="other", cache_salt="x"))
    assert found == (99 if isolation == "none" else 0)


def test_isolated_tenants_may_copy_what_is_pinned() -> None:
    harness = make(isolation="tenant")
    harness.engine.scheduler.lanes.pin(b"p" * 60)
    ask(harness, "p" * 60)
    request = ask(harness, "p" * 60 + "q", tenant="acme")
    assert cached(request) == 60
    assert request.traces()[0].cached_by == "copy"
    # The rest of that lane is nobody's but its own.
    ask(harness, "p" * 60 + "private" * 10)
    assert cached(ask(harness, "p" * 60 + "private" * 10, tenant="other")) == 60


class Wrong(EvictionStrategy):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Any:
        return self.answer(entries)


@pytest.mark.parametrize(
    "answer",
    [lambda e: 1 / 0, lambda e: e[1:], lambda e: [*e, *e], lambda e: None, lambda e: [1, 2]],
    ids=["raises", "too-few", "twice", "none", "no-entries"],
)
def test_a_bad_strategy_costs_a_counter(answer: Any) -> None:
    harness = make(max_tokens=100, eviction=Wrong(answer))
    for letter in "abc":
        ask(harness, letter * 40)
    assert kept(harness) == ["b", "c"]
    assert harness.engine.scheduler.lanes.stats().num_strategy_errors > 0


def test_the_strategy_says_who_goes() -> None:
    harness = make(max_tokens=100, eviction=Wrong(lambda entries: entries[::-1]))
    for letter in "abc":
        ask(harness, letter * 40)
    assert "a" in kept(harness)


def test_a_conversation_is_taken_over_and_another_start_copies() -> None:
    harness = make()
    first = ask(harness, "s" * 100 + "a" * 400)
    onward = ask(harness, "s" * 100 + "a" * 400 + "more")
    assert onward.traces()[0].cached_by == "takeover"
    other = ask(harness, "s" * 100 + "b" * 30)
    assert (other.traces()[0].cached_by, cached(other)) == ("copy", 100)
    # So that both are still there.
    assert cached(ask(harness, "s" * 100 + "a" * 400 + "yet more")) >= 500
    assert first.traces()[0].cached_by == ""
    stats = harness.engine.scheduler.lanes.stats()
    assert stats.num_hits == sum(stats.hits_by_way.values()) == 3
    assert stats.hit_tokens == sum(stats.hit_tokens_by_way.values())
    assert [e.num_hits for e in harness.engine.scheduler.lanes.entries() if e.num_hits]


def test_memory_that_cannot_copy_takes_over() -> None:
    harness = make(options=ScriptedOptions(copy_prefix=False))
    ask(harness, "s" * 30 + "a" * 800)
    # A long conversation is worth more than a short beginning.
    other = ask(harness, "s" * 200)
    assert (other.traces()[0].cached_by, cached(other)) == ("", 0)
    other = ask(harness, "s" * 30 + "a" * 800 + "b")
    assert (other.traces()[0].cached_by, cached(other)) == ("takeover", 830)


def test_a_text_can_be_found_while_it_is_written() -> None:
    harness = make(insert_every=10, share_in_flight=False)
    writer = harness.submit("w" * 40, max_tokens=100)
    for _ in range(60):
        harness.step()
    follower = harness.submit("w" * 40 + writer.text(), max_tokens=1)
    harness.step()
    harness.step()
    assert cached(follower) >= 40 + len(writer.text()) - 10


def test_kept_entries_have_ids_of_their_own() -> None:
    harness = make()
    for letter in "abc":
        ask(harness, letter * 40)
    ids = [k.entry_id for k in harness.engine.scheduler.lanes.retention.kept.values()]
    assert len(set(ids)) == 3
    assert all(isinstance(k, Kept) for k in harness.engine.scheduler.lanes.retention.kept.values())
