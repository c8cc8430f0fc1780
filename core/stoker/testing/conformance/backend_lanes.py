"""The backend suite: one text, however it is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stoker.testing.conformance.backend_base import BackendSuite, lanes_needed, some
from stoker.testing.conformance.base import check, fail
from stoker.testing.conformance.driving import (
    Cuts,
    LaneDriver,
    Reference,
    Run,
    check_same,
    distance,
)
from stoker.testing.conformance.subjects import BackendUnderTest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BackendLanes"]

_MIX = (
    "Each token may attend to its own lane's KV only, at its own position: look at how lanes and positions "
    "become masks, and at which rows of the output are whose."
)
_ORDER = (
    "Row i of the output belongs to the i-th row that wants logits. The lanes of a step come in any order: "
    "gather by the order of the rows, not of the lanes."
)


class BackendLanes(BackendSuite):
    """A prompt's greedy text is the same alone, batched, chunked and beside others."""

    def test_step_output_has_the_shape_and_type(self, driver: LaneDriver) -> None:
        """``step`` must answer ``float32[R, vocab]``: one row for each row that wants logits, none else.

        To fix: gather the rows of ``wants_logits``, in order, and convert them to float32.
        """
        tokens = _any_tokens(driver, 6)
        for wants, count in (("none", 0), ("last", 1), ([1, 4], 2), ("all", 6)):
            driver.truncate(0, 0)
            logits = driver.step(Run(0, tokens, wants))  # type: ignore[arg-type]
            check(
                logits.shape == (count, driver.info.vocab_size) and logits.dtype == np.float32,
                f"{count} rows wanted logits and step() gave {logits.dtype}{list(logits.shape)}",
                f"Return float32[{count}, vocab_size={driver.info.vocab_size}].",
            )
            check(np.isfinite(logits).all(), "step() gave logits that are not finite")

    def test_batched_is_as_alone(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """Prompts computed and decoded side by side give other logits than alone.

        To fix: a lane may see its own KV only, and row i of the output belongs to the i-th row that wants
        logits, whatever the order of the lanes in the step.
        """
        lanes_needed(driver, 2)
        # Not the order of the memory, nor its reverse, which two texts in three lanes would not show.
        order = [driver.info.num_lanes - 1, *range(driver.info.num_lanes - 1)][:3]
        mine = dict(zip(order, some(references, len(order)), strict=True))
        # Of one length, so that each prompt is computed in one piece and still beside the others.
        pieces = {lane: driver.cuts.plain(len(one.prompt)) for lane, one in mine.items()}
        rows = _prefill_together(driver, {lane: one.prompt for lane, one in mine.items()}, pieces)
        for at in range(backend.num_tokens):
            if at:
                runs = [Run(lane, [one.tokens[at - 1]]) for lane, one in mine.items()]
                rows = dict(zip(order, driver.step(*runs), strict=True))
            for lane, one in mine.items():
                beside = f"lane {lane} beside {len(order) - 1} others, token {at}"
                _check_owner(rows[lane], lane, at, mine, backend.tolerance, beside)
                check_same(rows[lane], one.rows[at], backend.tolerance, beside, _MIX)

    def test_chunked_is_as_whole(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A prompt computed in several steps gives other logits than in one.

        To fix: positions go on where the lane ends, and each chunk attends to all that is in the lane.
        """
        one = references[0]
        for name, lengths in driver.cuts.others(len(one.prompt)).items():
            driver.truncate(0, 0)
            row = driver.prefill(0, one.prompt, lengths)
            _check_text(
                backend, driver, one, row, f"a prompt of {len(one.prompt)} tokens cut {name}"
            )

    def test_any_chunks_are_as_whole(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """As above, for cuts for which the runtime promises no same bits: they may only round otherwise.

        To fix: see ``test_chunked_is_as_whole``.
        """
        one = references[0]
        count = len(one.prompt)
        for cut in sorted({1, 3, count // 2, count - 1}):
            driver.truncate(0, 0)
            row = driver.prefill(0, one.prompt, [cut, count - cut])
            _check_text(backend, driver, one, row, f"a prompt of {count} tokens cut after {cut}")

    def test_promised_cuts_give_the_same_bits(
        self, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """``Capabilities.exact_block`` promises more than the runtime keeps.

        Prompts that are cut as promised must leave KV of the same bits; one token more, computed in the
        same way, shows it. The prefix cache relies on it (``[cache] exact``).

        To fix: raise ``exact_block``, ``exact_from``, or set ``exact_tail="whole"``, until it holds; or
        promise nothing (``exact_block=0``).
        """
        cuts = driver.cuts
        if not cuts.is_promised:
            pytest.skip("capabilities.exact_block is 0: the runtime promises no bits")
        one = references[0]
        want = None
        for name, lengths in {
            "plain": cuts.plain(len(one.prompt)),
            **cuts.others(len(one.prompt)),
        }.items():
            driver.truncate(0, 0)
            driver.prefill(0, one.prompt, lengths)
            got = driver.step(Run(0, one.tokens[:1]))[0]
            if want is None:
                want = got
            check(
                np.array_equal(got, want),
                f"with exact_block={cuts.block} the KV of a prompt of {len(one.prompt)} tokens cut {name} "
                f"({lengths}) has other bits: logits are {distance(got, want):.3g} standard deviations apart",
                "Declare in Capabilities what kernels really keep: a larger exact_block, exact_from, "
                'exact_tail="whole", or exact_block=0.',
            )

    def test_prefill_and_decode_mix(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """A step that decodes one lane and prefills another gives other logits than either alone.

        To fix: rows of one token and runs of many may stand in any order in a step.
        """
        lanes_needed(driver, 2)
        first, second = some(references, 2)
        row = driver.prefill(1, first.prompt)
        lengths = driver.cuts.others(len(second.prompt))["into uneven pieces"]
        done, chunk_row = 0, row
        for at, length in enumerate(lengths):
            chunk = Run(0, second.prompt[done : done + length])
            done += length
            if at >= backend.num_tokens - 1:  # the other text is no longer than this
                chunk_row = driver.step(chunk)[0]
                continue
            check_same(row, first.rows[at], backend.tolerance, f"decoded token {at}", _MIX)
            decode = Run(1, [first.tokens[at]])
            if at % 2:
                row, chunk_row = driver.step(decode, chunk)
            else:
                chunk_row, row = driver.step(chunk, decode)
        _check_text(backend, driver, second, chunk_row, "a prompt chunked beside a decoding lane")

    def test_rows_are_those_that_were_asked_for(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """Logits come back for other positions than those of ``wants_logits``.

        To fix: several rows of a lane may want logits (speculative decoding, scored prompts), and rows of a
        lane in the middle of the step; gather exactly those rows, in their order.
        """
        one, other = some(references, 2)
        prompt = _one_piece(one.prompt, driver.cuts)
        alone = driver.step(Run(0, prompt))[0]
        driver.truncate(0, 0)
        every = driver.step(Run(0, prompt, "all"))
        check_same(every[-1], alone, backend.tolerance, "the last of many wanted rows", _GATHER)
        chosen = sorted({0, 2, len(prompt) // 2, len(prompt) - 1})
        driver.truncate(0, 0)
        for got, index in zip(driver.step(Run(0, prompt, chosen)), chosen, strict=True):
            which = f"row {index} of rows {chosen}"
            check_same(got, every[index], backend.tolerance, which, _GATHER)
        if driver.info.num_lanes < 2:
            return
        room = max(4, driver.info.max_step_tokens - len(prompt))
        second = _one_piece(other.prompt[:room], driver.cuts)
        driver.truncate(0, 0)
        mixed = driver.step(Run(1, second, [1, 3]), Run(0, prompt, [2]))
        driver.truncate(1, 0)
        theirs = driver.step(Run(1, second, "all"))
        wanted = (theirs[1], theirs[3], every[2])
        for index, (row, want) in enumerate(zip(mixed, wanted, strict=True)):
            check_same(row, want, backend.tolerance, f"wanted row {index} of two lanes", _GATHER)

    def test_several_tokens_of_a_lane_at_once(
        self, backend: BackendUnderTest, driver: LaneDriver, references: list[Reference]
    ) -> None:
        """Tokens that are verified together (speculative decoding) give other logits than one by one.

        To fix: within a step, a row attends to the rows of its lane before it and not to those after it.
        """
        one = references[0]
        few = 3
        driver.prefill(0, one.prompt)
        rows = driver.step(Run(0, one.tokens[:few], "all"))
        for index, row in enumerate(rows):
            check_same(
                row,
                one.rows[index + 1],
                backend.tolerance,
                f"token {index} of {few} that were verified at once",
                _GATHER,
            )
        if driver.info.capabilities.truncation != "any":
            return
        kept = len(one.prompt) + 1
        check(
            driver.truncate(0, kept) == kept,
            f"truncate(0, {kept}) did not keep {kept} tokens",
            'Keep what is asked for, or declare Capabilities.truncation = "reset".',
        )
        row = driver.step(Run(0, one.tokens[1:2]))[0]
        check_same(
            row, one.rows[2], backend.tolerance, "after a rejected guess was truncated", _GATHER
        )

    def test_a_step_of_max_step_tokens(self, driver: LaneDriver) -> None:
        """A step of ``max_step_tokens`` tokens fails.

        To fix: report in ``RuntimeInfo.max_step_tokens`` what one step can really hold.
        """
        most, context = driver.info.max_step_tokens, driver.info.context_length
        left = min(most, driver.info.kv_capacity_tokens)
        runs = []
        for lane in range(driver.info.num_lanes):
            count = min(left, context)
            left -= count
            if count:
                runs.append(Run(lane, _any_tokens(driver, count)))
        logits = driver.step(*runs)
        check(len(logits) == len(runs), f"{len(runs)} rows wanted logits, {len(logits)} came back")


_GATHER = "Gather the rows of wants_logits, in order. A row sees its lane up to its own position, no further."


def _check_owner(
    row: NDArray[np.float32],
    lane: int,
    at: int,
    mine: dict[int, Reference],
    tolerance: float,
    problem: str,
) -> None:
    """Fail if a row is that of another lane of the step."""
    if distance(row, mine[lane].rows[at]) <= tolerance:
        return
    for other, one in mine.items():
        if one is not mine[lane] and distance(row, one.rows[at]) <= tolerance / 4:
            fail(f"{problem}: its row has the logits of lane {other}", _ORDER)


def _one_piece(prompt: list[int], cuts: Cuts) -> list[int]:
    """As much of a prompt as may be computed in one piece."""
    whole = len(prompt) - len(prompt) % cuts.block
    return prompt[:whole] if whole else prompt


def _any_tokens(driver: LaneDriver, count: int) -> list[int]:
    text = driver.runtime.tokenizer.encode("one two three", add_special=False, parse_special=False)
    return [text[i % len(text)] for i in range(count)]


def _prefill_together(
    driver: LaneDriver, prompts: dict[int, list[int]], pieces: dict[int, list[int]]
) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Compute prompts side by side; the logits of each one's last token, by lane."""
    rows = {}
    while any(pieces.values()):
        budget, runs = driver.info.max_step_tokens, []
        for lane, lengths in pieces.items():
            if lengths and lengths[0] <= budget:
                length = lengths.pop(0)
                budget -= length
                start = driver.lengths[lane]
                runs.append(Run(lane, prompts[lane][start : start + length]))
        logits = driver.step(*runs)
        rows.update({run.lane: row for run, row in zip(runs, logits, strict=True)})
    return rows


def _check_text(
    backend: BackendUnderTest,
    driver: LaneDriver,
    one: Reference,
    row: np.ndarray[tuple[int], np.dtype[np.float32]],
    problem: str,
) -> None:
    """Lane 0 holds a prompt, ``row`` are its last logits: what follows must be the reference."""
    rows = [row, *driver.follow(0, one.tokens[:-1])]
    for at, (got, want) in enumerate(zip(rows, one.rows, strict=True)):
        check_same(got, want, backend.tolerance, f"{problem}, generated token {at}", _CHUNKS)


_CHUNKS = (
    "A chunk goes on at the position where its lane ends and attends to everything in the lane; only the "
    "last token of a prompt wants logits."
)
