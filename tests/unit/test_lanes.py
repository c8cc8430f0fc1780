"""Which lane a newcomer gets, and what happens to what idle ones retain."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import Request, SamplingParams
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.lanes import LanePool
from stoker.engine.prefix_tree import common_prefix
from stoker.engine.sequence import NO_LANE, Sequence, SequenceStatus
from stoker.testing import ScriptedOptions, ScriptedRuntime


def sequence(tokens: list[int], computed: int = 0) -> Sequence:
    request = Request(
        request_id="r", model="m", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=4)
    )
    made = Sequence(request, 0, None, Detokenizer(TokenText(lambda _: b"")), 10_000)  # type: ignore[arg-type]
    made.num_computed = computed
    return made


def pool(
    lanes: int = 4, *, locality: bool = False, copies: bool = True, **options: object
) -> LanePool:
    runtime = ScriptedRuntime(lanes=lanes, context_length=2000, options=ScriptedOptions(**options))  # type: ignore[arg-type]
    can = msgspec.structs.replace(
        runtime.info.capabilities, lane_locality=locality, copy_prefix=copies
    )
    runtime.info = msgspec.structs.replace(runtime.info, capabilities=can)
    return LanePool(runtime)


def run(lanes: LanePool, tokens: list[int]) -> Sequence:
    """Let a sequence compute all of its tokens."""
    made = sequence(tokens)
    lanes.acquire(made)
    runtime = lanes._runtime
    assert isinstance(runtime, ScriptedRuntime)
    runtime._lengths[made.lane] = len(tokens)
    made.num_computed = len(tokens)
    return made


def visit(lanes: LanePool, tokens: list[int]) -> int:
    """Run a sequence and release it; returns the lane it had."""
    made = run(lanes, tokens)
    lane = made.lane
    lanes.release(made)
    return lane


@pytest.mark.slow
@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_the_longest_common_prefix_wins_and_the_rest_is_truncated() -> None:
    lanes = pool()
    first = run(lanes, list(range(100)))
    second = run(lanes, list(range(60)) + [500] * 40)
    homes = first.lane, second.lane
    lanes.release(first)
    lanes.release(second)
    newcomer = sequence(list(range(90)))
    lanes.acquire(newcomer)
    # Its last token must be computed again: the logits after it are not in KV.
    assert (newcomer.lane, newcomer.num_computed, newcomer.num_cached) == (homes[0], 89, 89)


def test_without_a_match_the_lowest_empty_lane_then_the_oldest() -> None:
    lanes = pool(lanes=3)
    assert [visit(lanes, [10 * i] * 5) for i in range(3)] == [0, 1, 2]
    assert visit(lanes, [777] * 5) == 0
    assert visit(lanes, [888] * 5) == 1


def test_a_short_match_does_not_cost_a_long_conversation() -> None:
    lanes = pool()
    home = visit(lanes, [1, 2, 3, *range(100, 1000)])
    stranger = sequence([1, 2, 3, *range(2000, 2050)])
    lanes.acquire(stranger)
    assert stranger.lane != home
    back = sequence([1, 2, 3, *range(100, 1000), 7])
    lanes.acquire(back)
    assert (back.lane, back.num_cached) == (home, 903)


def test_with_lane_locality_newcomers_go_next_to_busy_lanes() -> None:
    lanes = pool(lanes=8, locality=True)
    for i in range(8):
        visit(lanes, [i * 50] * 30)
    busy = run(lanes, [7, 7, 7])
    taken = {busy.lane}
    for i in range(3):
        neighbour = run(lanes, [900 + i] * 5)
        assert min(abs(neighbour.lane - lane) for lane in taken) == 1
        taken.add(neighbour.lane)


def test_eviction_takes_the_oldest_first_and_only_what_is_needed() -> None:
    lanes = pool(lanes=3, kv_capacity_tokens=30)
    for start in (0, 100, 200):
        visit(lanes, list(range(start, start + 10)))
    assert lanes.retained_tokens == 30
    assert lanes.make_room(5)
    assert lanes.retained_tokens == 20
    again = sequence(list(range(100, 110)))
    lanes.acquire(again)
    assert again.num_cached == 9
    assert lanes.make_room(20)
    assert not lanes.make_room(22)
    assert not lanes.evict_all()


def test_memory_that_can_only_be_reset_reports_what_it_kept() -> None:
    lanes = pool(truncation="reset")
    visit(lanes, list(range(50)))
    extended = sequence(list(range(60)))
    lanes.acquire(extended)
    assert extended.num_cached == 50
    lanes.release(extended)
    shorter = sequence(list(range(20)))
    lanes.acquire(shorter)
    assert (shorter.num_cached, shorter.num_computed) == (0, 0)


def test_a_lane_changes_hands_only_through_acquire_and_release() -> None:
    lanes = pool(lanes=2)
    first, second = run(lanes, [1, 2]), run(lanes, [3, 4])
    assert {first.lane, second.lane} == {0, 1}
    assert lanes.num_free == 0
    assert lanes.used_tokens == 4
    lanes.release(first)
    lanes.release(first)
    assert (lanes.num_free, first.lane) == (1, NO_LANE)


def test_illegal_transitions_are_refused() -> None:
    made = sequence([1])
    with pytest.raises(RuntimeError, match="illegal transition"):
        made.move_to(SequenceStatus.DECODE)
    made.move_to(SequenceStatus.FINISHED)
    for status in SequenceStatus:
        with pytest.raises(RuntimeError, match="illegal transition"):
            made.move_to(status)


def test_a_longer_prefix_is_copied_from_a_busy_lane() -> None:
    lanes = pool(3)
    common = list(range(100))
    owner = run(lanes, [*common, 1, 2, 3])
    visit(lanes, [*common[:10], 7])
    newcomer = sequence([*common, 8, 9])
    lanes.acquire(newcomer)
    assert (newcomer.num_computed, newcomer.num_cached) == (100, 100)
    assert newcomer.lane != owner.lane
    assert lanes._runtime._lengths[newcomer.lane] == 100  # type: ignore[attr-defined]
    # The last token is computed even if all of it could be copied: its logits are needed.
    again = sequence(common[:50])
    lanes.acquire(again)
    assert again.num_computed == 49


def test_a_few_tokens_of_a_long_lane_are_not_worth_a_copy() -> None:
    lanes = pool(2)
    run(lanes, [*range(12), *range(100, 200)])
    short = sequence([*range(12), 5, 6])
    lanes.acquire(short)
    assert short.num_computed == 0
    lanes = pool(2, copies=False)
    run(lanes, list(range(100)))
    unable = sequence([*range(100), 5])
    lanes.acquire(unable)
    assert unable.num_computed == 0


def test_a_copy_that_fails_costs_only_its_time() -> None:
    lanes = pool(2)
    run(lanes, list(range(100)))

    def fail(source: int, target: int, num_tokens: int) -> None:
        raise RuntimeError("no")

    lanes._runtime.copy_prefix = fail  # type: ignore[method-assign]
    newcomer = sequence([*range(100), 5])
    lanes.acquire(newcomer)
    assert newcomer.num_computed == 0
    assert lanes.num_errors == 1
    assert lanes.num_free == 0
