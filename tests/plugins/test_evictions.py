"""The bundled eviction strategies: permutations, and each its own order."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import CacheEntry, EvictionStrategy
from stoker.discovery import load_plugins
from stoker_plugins.evictions.fifo import FirstInFirstOut
from stoker_plugins.evictions.lfu import LeastFrequentlyUsed
from stoker_plugins.evictions.lru import LeastRecentlyUsed
from stoker_plugins.evictions.options import LfuOptions

NOW_S = 10_000.0
STRATEGIES: list[EvictionStrategy] = [
    LeastRecentlyUsed(),
    LeastFrequentlyUsed(),
    LeastFrequentlyUsed(LfuOptions(half_life_s=0)),
    FirstInFirstOut(),
]


def entry(entry_id: int, created_s: float = 0, used_s: float = 0, hits: int = 0) -> CacheEntry:
    return CacheEntry(
        entry_id=entry_id,
        tier="lane",
        tenant="t",
        salt="",
        num_tokens=10,
        num_bytes=100,
        created_s=created_s,
        last_used_s=max(used_s, created_s),
        num_hits=hits,
    )


@st.composite
def entries(draw: st.DrawFn) -> list[CacheEntry]:
    facts = st.tuples(
        st.sampled_from([0.0, 1.0, 50.0]) | st.floats(0, NOW_S),
        st.sampled_from([0.0, 1.0, 50.0]) | st.floats(0, NOW_S),
        st.sampled_from([0, 1, 10**6]),
    )
    return [entry(i, *fact) for i, fact in enumerate(draw(st.lists(facts, max_size=12)))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@given(made=entries(), seed=st.integers(0, 99))
def test_an_order_is_a_permutation_and_depends_on_the_entries_alone(
    strategy: EvictionStrategy, made: list[CacheEntry], seed: int
) -> None:
    order = strategy.order(made, NOW_S)
    assert sorted(e.entry_id for e in order) == list(range(len(made)))
    shuffled = random.Random(seed).sample(made, len(made))
    assert list(strategy.order(shuffled, NOW_S)) == list(order)


@pytest.mark.slow
@given(made=entries())
def test_lru_and_fifo_go_by_their_times(made: list[CacheEntry]) -> None:
    used = [e.last_used_s for e in LeastRecentlyUsed().order(made, NOW_S)]
    assert used == sorted(used)
    created = [e.created_s for e in FirstInFirstOut().order(made, NOW_S)]
    assert created == sorted(created)


@pytest.mark.slow
@given(made=entries())
def test_lfu_without_ageing_goes_by_hits_and_with_it_by_hits_and_rest(
    made: list[CacheEntry],
) -> None:
    plain = LeastFrequentlyUsed(LfuOptions(half_life_s=0))
    hits = [e.num_hits for e in plain.order(made, NOW_S)]
    assert hits == sorted(hits)
    order = LeastFrequentlyUsed().order(made, NOW_S)
    for first, second in itertools.pairwise(order):
        # Never one that was found more often, and later, before the other.
        assert not (first.num_hits > second.num_hits and first.last_used_s > second.last_used_s)


def test_old_fame_fades_by_half_lives() -> None:
    aged = LeastFrequentlyUsed(LfuOptions(half_life_s=10))
    famous = entry(1, used_s=NOW_S - 45, hits=15)  # 16 uses, 4.5 half-lives ago: 0.7
    fresh = entry(2, used_s=NOW_S, hits=0)
    assert [e.entry_id for e in aged.order([famous, fresh], NOW_S)] == [1, 2]
    famous = entry(1, used_s=NOW_S - 35, hits=15)  # 3.5 half-lives: 1.4
    assert [e.entry_id for e in aged.order([famous, fresh], NOW_S)] == [2, 1]


def test_ageing_survives_any_time() -> None:
    aged = LeastFrequentlyUsed(LfuOptions(half_life_s=1e-6))
    older, newer = entry(1, used_s=1, hits=9), entry(2, used_s=2, hits=9)
    assert [e.entry_id for e in aged.order([newer, older], 1e9)] == [1, 2]


def test_they_are_registered_and_their_options_decode() -> None:
    found = load_plugins().evictions()
    assert {"lru", "lfu", "fifo"} <= set(found)
    assert found["lfu"].options is LfuOptions
    for info in (found["lru"], found["fifo"]):
        assert isinstance(info.factory(), EvictionStrategy)
    assert isinstance(found["lfu"].factory(LfuOptions()), EvictionStrategy)
