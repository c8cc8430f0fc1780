"""The backend suite: what becomes of a lane's KV, and what happens when there is no room for more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stoker.testing.conformance.backend_base import BackendSuite, lanes_needed, some
from stoker.testing.conformance.base import check, fail
from stoker.testing.conformance.driving import LaneDriver, Reference, Run, check_same
from stoker.testing.conformance.subjects import BackendUnderTest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BackendMemory"]

_COPY = (
    "copy_prefix(source, target, n) makes the first n tokens of source the whole of target: no token fewer, "
    "none more, and each lane goes on by itself afterwards."
)
_ROOM = "Look whether a step fits before anything is written; else answer StepOutput(no_room=True)."


class BackendMemory(BackendSuite):
    """Truncation, copies and snapshots are exact, lanes leak nothing, and no room is an answer."""

    def test_truncate_and_go_on(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """After ``truncate`` a lane goes on otherwise than one that never held more.

        To fix: keep exactly the first ``num_tokens`` tokens, hide or free the rest, and return how many are
        left; if only fewer can be kept, declare ``truncation="reset"``.
        """
        one, other = some(references, 2)
        count = len(one.prompt)
        for asked in sorted({1, count // 2, count - 1, count}):
            keep = driver.cuts.kept(asked, count)
            driver.truncate(0, 0)
            driver.prefill(0, one.prompt)
            driver.follow(0, other.tokens[:3])  # what must be forgotten
            kept = driver.truncate(0, keep)
            check(
                kept == keep or driver.info.capabilities.truncation == "reset",
                f"truncate(0, {keep}) kept {kept} tokens",
                'Keep what is asked for, or declare Capabilities.truncation = "reset".',
            )
            _go_on(backend, driver, 0, one, f"after truncate(0, {keep}) of {count + 3} tokens")

    def test_truncate_keeps_no_more_than_there_is(
        self, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """``truncate`` says that a lane holds tokens which it does not hold.

        To fix: return the smaller of ``num_tokens`` and the lane's length.
        """
        one = references[0]
        driver.prefill(0, one.prompt)
        kept = driver.truncate(0, driver.info.context_length)
        check(
            kept == len(one.prompt),
            f"a lane of {len(one.prompt)} tokens was truncated to {driver.info.context_length}, and truncate "
            f"returned {kept}",
            "Return how many tokens the lane holds afterwards.",
        )
        check(driver.truncate(0, 0) == 0, "truncate(lane, 0) left something")

    def test_a_reused_lane_leaks_nothing(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A request that takes over the lane of an aborted one gets another text than in a fresh lane.

        To fix: after ``truncate(lane, 0)`` masks, lengths, counters and recurrent state begin anew.
        """
        one, other = some(references, 2)
        last = driver.info.num_lanes - 1
        for lane in {0, last}:
            for held in (
                len(other.prompt),
                len(other.prompt) // 2,
            ):  # after, and within, its prefill
                driver.truncate(lane, 0)
                driver.prefill(lane, other.prompt[:held], [held])
                driver.truncate(lane, 0)
                _go_on(backend, driver, lane, one, f"in lane {lane} after an aborted request")

    def test_an_abort_does_not_disturb_others(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """Freeing one lane changes what another one computes.

        To fix: ``truncate`` touches its own lane only.
        """
        lanes_needed(driver, 2)
        one, other = some(references, 2)
        driver.prefill(1, one.prompt)
        for at, token in enumerate(one.tokens[:-1]):
            driver.truncate(0, 0)
            driver.prefill(0, other.prompt[: 4 + at], [4 + at])
            if at % 2:
                driver.truncate(0, 0)
            row = driver.step(Run(1, [token]))[0]
            problem = f"lane 1, generated token {at}, while lane 0 comes and goes"
            check_same(row, one.rows[at + 1], backend.tolerance, problem, _LEAK)

    # ------------------------------------------------------------------ copies and snapshots

    def test_a_copied_prefix_is_as_computed(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A lane that was given a prefix of another one gets another text than one that computed it.

        To fix: copy exactly the first ``num_tokens`` tokens, and what the target held before is gone.
        """
        _needs(driver, "copy_prefix")
        lanes_needed(driver, 2)
        one, other = some(references, 2)
        count = len(one.prompt)
        for asked in sorted({2, count // 2, count - 1, count}):
            length = driver.cuts.kept(asked, count)
            for lane in (0, 1):
                driver.truncate(lane, 0)
            driver.prefill(0, one.prompt)
            driver.prefill(1, other.prompt)  # must be gone
            _copy(driver, 0, 1, length)
            _go_on(backend, driver, 1, one, f"after copy_prefix of {length} of {count} tokens")

    def test_a_copy_and_its_source_go_their_own_ways(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """What happens to the source after ``copy_prefix`` changes the copy, or the other way round.

        To fix: where lanes share memory, count references, and copy a block before it is written to.
        """
        _needs(driver, "copy_prefix")
        lanes_needed(driver, 2)
        one, other = some(references, 2)
        count = len(one.prompt)
        driver.prefill(0, one.prompt)
        _copy(driver, 0, 1, count)
        driver.follow(1, other.tokens[:2])  # the copy goes on
        for at, token in enumerate(one.tokens[:2]):
            row = driver.step(Run(0, [token]))[0]
            check_same(row, one.rows[at + 1], backend.tolerance, "the source of a copy", _COPY)
        driver.truncate(1, 0)
        _copy(driver, 0, 1, count)
        driver.truncate(0, 0)  # the source ends, and its lane is used by somebody else
        driver.prefill(0, other.prompt)
        _go_on(backend, driver, 1, one, "a copy whose source was freed and used again")

    def test_copying_nothing_empties_the_target(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """``copy_prefix(source, target, 0)`` leaves something in the target.

        To fix: the target holds the first 0 tokens of the source afterwards, that is none.
        """
        _needs(driver, "copy_prefix")
        lanes_needed(driver, 2)
        one, other = some(references, 2)
        driver.prefill(0, other.prompt)
        driver.prefill(1, other.prompt)
        _copy(driver, 0, 1, 0)
        _go_on(backend, driver, 1, one, "after copy_prefix of nothing")

    def test_a_restored_snapshot_is_as_computed(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A lane that was restored from a snapshot gets another text than one that computed its KV.

        To fix: a snapshot is all of a lane's KV and its length, as bytes; ``restore`` puts it into any lane,
        whatever that held, and returns the number of tokens.
        """
        _needs(driver, "snapshot")
        one, other = some(references, 2)
        target = driver.info.num_lanes - 1
        driver.prefill(0, one.prompt)
        snapshot = driver.runtime.snapshot(0)
        check(
            isinstance(snapshot, bytes), f"snapshot() returned {type(snapshot).__name__}, not bytes"
        )
        _go_on(backend, driver, 0, one, "the lane that a snapshot was made of")
        driver.truncate(target, 0)
        driver.prefill(target, other.prompt)  # must be gone
        restored = driver.runtime.restore(target, snapshot)
        check(
            restored == len(one.prompt),
            f"restore() returned {restored} for a snapshot of {len(one.prompt)} tokens",
            "Return the number of tokens that the lane holds now.",
        )
        driver.lengths[target] = restored
        _go_on(backend, driver, target, one, "a restored lane")

    # ------------------------------------------------------------------ no room

    def test_a_full_lane_is_an_answer(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A step beyond ``context_length`` raises, computes, or changes lanes, instead of saying ``no_room``.

        To fix: compare each lane's end with ``context_length`` first; a lane can be filled exactly.
        """
        one = references[0]
        limit = driver.info.context_length
        filler = (one.prompt * (limit // len(one.prompt) + 1))[: limit - 1]
        driver.prefill(0, filler)
        runs = [Run(0, one.tokens[:2])]
        room = driver.info.kv_capacity_tokens >= limit + len(one.prompt) + backend.num_tokens
        if driver.info.num_lanes > 1 and room:
            driver.prefill(1, one.prompt)
            runs.insert(0, Run(1, one.tokens[:1]))
        _expect_no_room(driver, *runs)
        if len(runs) > 1:
            row = driver.step(runs[0])[0]
            check_same(row, one.rows[1], backend.tolerance, "another lane after a no_room", _ROOM)
        logits = driver.step(Run(0, one.tokens[:1]))  # exactly full is fine
        check(len(logits) == 1, "a lane could not be filled to context_length", _ROOM)

    def test_full_memory_is_an_answer(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """When all lanes together hold ``kv_capacity_tokens``, a step raises or changes something.

        To fix: see ``test_a_full_lane_is_an_answer``, for the memory as a whole.
        """
        info = driver.info
        if info.kv_capacity_tokens >= info.num_lanes * info.context_length:
            pytest.skip(
                "every lane can be full at once: kv_capacity_tokens is lanes x context_length"
            )
        lanes_needed(driver, 2)
        one = references[0]
        driver.prefill(0, one.prompt)
        lane, refused = 1, None
        while refused is None:
            check(lane < info.num_lanes, "the lanes hold more than kv_capacity_tokens", _ROOM)
            count = min(len(one.prompt), info.context_length - driver.lengths[lane])
            if not count:
                lane += 1
                continue
            run = Run(lane, one.prompt[:count], "none")
            try:
                full = driver.try_step(run).no_room
            except Exception as error:  # noqa: BLE001 - whatever it raises, it is the wrong thing
                fail(f"a step while the lanes hold {driver.lengths} raised {error!r}", _ROOM)
            if full:
                refused = run
            check(
                sum(driver.lengths) <= info.kv_capacity_tokens,
                f"the lanes hold {sum(driver.lengths)} tokens, more than kv_capacity_tokens="
                f"{info.kv_capacity_tokens}",
                _ROOM,
            )
        _expect_no_room(driver, Run(0, one.tokens[:1]), refused)
        driver.truncate(lane, 0)
        if lane > 1:
            driver.truncate(1, 0)
        _go_on(backend, driver, 0, one, "after a step with another lane found no room")


_LEAK = "A lane's KV, mask and length are its own; look at what truncate writes."


def _needs(driver: LaneDriver, capability: str) -> None:
    if not getattr(driver.info.capabilities, capability):
        pytest.skip(f"Capabilities.{capability} is false")


def _copy(driver: LaneDriver, source: int, target: int, count: int) -> None:
    driver.runtime.copy_prefix(source, target, count)
    driver.lengths[target] = count


def _expect_no_room(driver: LaneDriver, *runs: Run) -> None:
    """A step for which there is no room says so, with an array of no rows."""
    try:
        output = driver.try_step(*runs)
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is the wrong thing
        fail(f"a step that cannot fit (lanes hold {driver.lengths}) raised {error!r}", _ROOM)
    check(
        output.no_room and np.shape(output.logits) == (0, driver.info.vocab_size),
        f"a step that cannot fit (lanes hold {driver.lengths}) was answered no_room={output.no_room} and "
        f"logits of shape {list(np.shape(output.logits))}",
        f"{_ROOM} Its logits are float32[0, {driver.info.vocab_size}].",
    )


def _go_on(
    backend: BackendUnderTest, driver: LaneDriver, lane: int, one: Reference, problem: str
) -> None:
    """Compute what a lane lacks of a prompt, and the text after it: it must be the reference."""
    start, count = driver.lengths[lane], len(one.prompt)
    got: list[NDArray[np.float32]] = []
    if start < count:
        got.append(driver.prefill(lane, one.prompt[start:], driver.cuts.rest(start, count)))
    got += driver.follow(lane, one.tokens[:-1])
    for row, want in zip(got, one.rows[-len(got) :], strict=True):
        check_same(row, want, backend.tolerance, problem, f"{_LEAK} {_COPY}")
