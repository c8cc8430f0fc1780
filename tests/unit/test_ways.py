"""How a newcomer comes by KV depends on what that costs, as measured."""

from __future__ import annotations

import pytest

from stoker import StoredPrefix
from stoker.engine.costs import CostModel
from stoker.engine.transfers import TransferCosts
from stoker.engine.ways import IdleLane, Source, Way, choose, restoring

EMPTY = IdleLane(1)


def costs(*, copy: float = 0.0, restore: float = 0.0, shares: bool = False) -> TransferCosts:
    """Measured costs as parts of what computing a token costs; 0 for not measured."""
    made = TransferCosts(shares_kv=shares)
    made.steps = CostModel()
    made.steps.observe(1000, 0, 1.0)
    made.copy.value = copy * made.prefill_s
    made.restore.value = restore * made.prefill_s
    return made


def talk(shared: int, held: int = 1000, protection: int = 0) -> IdleLane:
    return IdleLane(0, held, shared=shared, usable=shared, recency=1.0, protection=protection)


@pytest.mark.parametrize(
    ("shared", "copy", "way"),
    [
        (1000, 0.0, Way.TAKEOVER),  # nothing is lost
        (500, 0.01, Way.COPY),  # half a conversation would be
        (500, 0.2, Way.TAKEOVER),  # but copying it costs more than that is worth
        (40, 0.01, Way.COPY),
        (10, 0.01, Way.NONE),  # too little to bother
    ],
)
def test_a_conversation_is_copied_or_taken_over(shared: int, copy: float, way: Way) -> None:
    choice = choose([talk(shared), EMPTY], [Source(0, 1000, shared)], costs(copy=copy))
    assert choice.way is way
    assert choice.num_tokens == (0 if way is Way.NONE else shared)
    assert choice.lane == (0 if way is Way.TAKEOVER else 1)


def test_shared_memory_shares_even_a_little() -> None:
    choice = choose([talk(10), EMPTY], [Source(0, 1000, 10)], costs(shares=True), shares_kv=True)
    assert (choice.way, choice.num_tokens, choice.source) == (Way.SHARE, 10, 0)


def test_what_is_protected_is_given_up_last() -> None:
    pinned, floor = talk(0, protection=900), talk(0, protection=-1)
    plain = IdleLane(2, 1000, recency=1.0)
    for protected in (pinned, floor):
        assert choose([protected, plain], [], costs()).lane == 2
    assert choose([pinned, IdleLane(2, 1000, recency=1.0, protection=-1)], [], costs()).lane == 2
    assert choose([pinned], [], costs()).lane == 0
    # To go on from a pinned prefix costs it nothing.
    assert choose([talk(950, protection=900), plain], [], costs()).way is Way.TAKEOVER


@pytest.mark.parametrize(("restore", "way"), [(0.1, Way.RESTORE), (2.0, Way.NONE)])
def test_a_snapshot_is_restored_where_that_is_cheaper(restore: float, way: Way) -> None:
    stored = StoredPrefix(
        key="k", num_tokens=1000, num_shared=900, num_block_tokens=0, num_bytes=1, tier="host"
    )
    measured = costs(restore=restore)
    best = choose([EMPTY], [], measured)
    assert restoring(best, [EMPTY], stored, 900, measured).way is way
    assert measured.is_worth_storing(1000, 1000) is (way is Way.RESTORE)
    assert not measured.is_worth_storing(10, 10)
    assert not measured.is_worth_storing(1000, 10)
    assert not measured.is_worth_storing(1000, 1000, chance=0.0)


def test_costs_are_learned() -> None:
    measured = costs()
    measured.copy.observe(100, 1.0)
    assert measured.copy.value == pytest.approx(0.01)
    for _ in range(50):
        measured.copy.observe(100, 0.1)
    assert measured.copy.value == pytest.approx(0.001, rel=0.01)
