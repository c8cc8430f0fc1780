"""Drives a runtime's lanes by hand: prompts cut in any way, and logits compared fairly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Literal

import numpy as np

from stoker.engine.exactness import ExactBlocks
from stoker.interfaces import Runtime
from stoker.testing.conformance.base import check, fail
from stoker.types import DeviceStepOutput, StepInput, StepOutput

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Cuts", "LaneDriver", "Reference", "Run", "check_same", "distance"]

Wants = Literal["last", "all", "none"] | Sequence[int]


@dataclass(frozen=True)
class Run:
    """Some tokens of one lane in a step, from where the lane ends.

    Attributes:
        lane: The lane.
        tokens: The tokens.
        wants: Which of them want logits: ``last``, ``all``, ``none``, or their indices.
    """

    lane: int
    tokens: Sequence[int]
    wants: Wants = "last"

    def mask(self) -> list[bool]:
        """Which rows want logits."""
        count = len(self.tokens)
        chosen = {
            "last": {count - 1},
            "all": set(range(count)),
            "none": set(),
        }.get(self.wants, ()) if isinstance(self.wants, str) else self.wants  # fmt: skip
        return [i in chosen for i in range(count)]


class LaneDriver:
    """A runtime, and how many tokens each lane holds.

    Args:
        runtime: The runtime; its lanes are emptied.

    Attributes:
        lengths: Tokens in each lane.
        cuts: How prompts may be cut.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.info = runtime.info
        self.cuts = Cuts(runtime)
        self.lengths = [0] * runtime.info.num_lanes
        for lane in range(runtime.info.num_lanes):
            self.truncate(lane, 0)

    def build(self, *runs: Run) -> StepInput:
        """The input of a step."""
        positions = [self.lengths[run.lane] + i for run in runs for i in range(len(run.tokens))]
        return StepInput(
            token_ids=np.array([token for run in runs for token in run.tokens], np.int32),
            positions=np.array(positions, np.int32),
            lanes=np.array([run.lane for run in runs for _ in run.tokens], np.int32),
            wants_logits=np.array([want for run in runs for want in run.mask()], np.bool_),
        )

    def try_step(self, *runs: Run) -> StepOutput:
        """Compute a step; its logits are copied. Without room the lanes count as they were."""
        step = self.build(*runs)
        try:
            output = self.runtime.step(step)
        except Exception as error:
            error.add_note(
                f"step() raised, for {len(step.lanes)} tokens of the lanes {[run.lane for run in runs]}. By "
                f"what steps and truncate() answered before, the lanes hold {self.lengths} tokens."
            )
            raise
        check(
            isinstance(output, StepOutput | DeviceStepOutput),
            f"step() returned a {type(output).__name__}",
            "Return a stoker.StepOutput: StepOutput(logits), or StepOutput(empty, no_room=True).",
        )
        if output.no_room:
            return output
        logits = np.array(output.logits)
        wanted = (int(step.wants_logits.sum()), self.info.vocab_size)
        check(
            logits.shape == wanted,
            f"{wanted[0]} rows wanted logits, and step() gave an array of shape {list(logits.shape)}",
            f"Return float32[{wanted[0]}, vocab_size={wanted[1]}]: a row for each True in wants_logits.",
        )
        for run in runs:
            self.lengths[run.lane] += len(run.tokens)
        return StepOutput(logits)

    def step(self, *runs: Run) -> NDArray[np.float32]:
        """Compute a step that must find room; its logits, ``float32[R, vocab]``."""
        output = self.try_step(*runs)
        if output.no_room:
            held = sum(self.lengths)
            fail(
                f"no_room for {sum(len(run.tokens) for run in runs)} tokens while the lanes hold {held} of "
                f"kv_capacity_tokens={self.info.kv_capacity_tokens} (lengths {self.lengths})",
                "Say no_room only if a lane would exceed context_length, or all lanes the KV capacity.",
            )
        return output.logits

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Truncate a lane; how many tokens it holds then."""
        kept = self.runtime.truncate(lane, num_tokens)
        check(
            isinstance(kept, int | np.integer) and 0 <= kept <= num_tokens,
            f"truncate({lane}, {num_tokens}) returned {kept!r}",
            "Return how many tokens were kept: no more than were asked for.",
        )
        self.lengths[lane] = int(kept)
        return int(kept)

    def prefill(
        self, lane: int, tokens: Sequence[int], lengths: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        """Compute tokens in pieces; the logits of the last one, ``float32[vocab]``.

        Args:
            lane: The lane.
            tokens: The tokens.
            lengths: Of the pieces; by default as long as they can be in an empty lane.
        """
        at = 0
        *firsts, last = self.cuts.plain(len(tokens)) if lengths is None else lengths
        for length in firsts:
            self.step(Run(lane, tokens[at : at + length], "none"))
            at += length
        row: NDArray[np.float32] = self.step(Run(lane, tokens[at : at + last]))[0]
        return row

    def follow(self, lane: int, tokens: Iterable[int]) -> list[NDArray[np.float32]]:
        """Feed tokens one by one; the logits after each."""
        return [self.step(Run(lane, [token]))[0] for token in tokens]


class Cuts:
    """How a prompt may be cut so that its KV is what the runtime promises: see ``Capabilities.exact_block``.

    Args:
        runtime: The runtime.

    Attributes:
        block: The block length; 1 if any cut will do.
        is_promised: Whether it promises anything.
    """

    def __init__(self, runtime: Runtime) -> None:
        capabilities = runtime.info.capabilities
        self.is_promised = capabilities.exact_block > 0
        self.block = capabilities.exact_block or 1
        self._whole_tail = capabilities.exact_tail == "whole" and self.block > 1
        self._rule = ExactBlocks(self.block, capabilities.exact_from, whole_tail=self._whole_tail)
        self._most = runtime.info.max_step_tokens

    def plain(self, count: int) -> list[int]:
        """As long as possible."""
        return self._cut(count, cycle([count]))

    def others(self, count: int) -> dict[str, list[int]]:
        """Other ways, by their names."""
        return {
            "into the shortest pieces": self._cut(count, cycle([1])),
            "into uneven pieces": self._cut(count, cycle([3 * self.block, 1, 5 * self.block, 2])),
            "in halves": self._cut(count, cycle([max(1, count // 2)])),
        }

    def kept(self, count: int, prompt: int) -> int:
        """The longest beginning, of at most ``count`` tokens of a prompt, that computing can go on from."""
        own = self._rule.boundary(prompt)
        if self.block == 1:
            return count
        if count < own:
            return count - count % self.block
        return own if self._whole_tail and count < prompt else count

    def rest(self, start: int, prompt: int) -> list[int]:
        """Pieces of what follows the first ``start`` tokens of a prompt."""
        pieces = []
        at = 0
        for length in self.plain(prompt):
            if at + length > start:
                pieces.append(at + length - max(at, start))
            at += length
        return pieces

    def _cut(self, count: int, wanted: Iterator[int]) -> list[int]:
        body = count if self.block == 1 else self._rule.boundary(count)
        pieces: list[int] = []
        left = body
        while left:
            length = min(next(wanted), left, self._most)
            length = length if self.block == 1 else max(self.block, length - length % self.block)
            pieces.append(length)
            left -= length
        left = count - body
        if left and self._whole_tail:
            return [*pieces, left]
        while left:
            pieces.append(min(next(wanted), left, self.block - 1))
            left -= pieces[-1]
        return pieces


@dataclass(frozen=True)
class Reference:
    """What a prompt is answered with when nothing else runs.

    Attributes:
        prompt: The prompt.
        tokens: The tokens that greedy decoding gives.
        rows: The logits before each of them.
    """

    prompt: list[int]
    tokens: list[int]
    rows: list[NDArray[np.float32]]

    @classmethod
    def compute(cls, driver: LaneDriver, prompt: list[int], count: int, lane: int = 0) -> Reference:
        """Generate ``count`` tokens greedily in an empty lane, which is emptied afterwards."""
        driver.truncate(lane, 0)
        row = driver.prefill(lane, prompt)
        tokens, rows = [int(row.argmax())], [row]
        while len(tokens) < count:
            row = driver.step(Run(lane, tokens[-1:]))[0]
            tokens.append(int(row.argmax()))
            rows.append(row)
        driver.truncate(lane, 0)
        return cls(prompt, tokens, rows)


def distance(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Root mean square of the difference of two rows, in standard deviations of the second one."""
    difference = got.astype(np.float64) - want
    return float(np.sqrt(np.mean(difference**2)) / (np.std(want) + 1e-9))


def check_same(
    got: NDArray[np.float32],
    want: NDArray[np.float32],
    tolerance: float,
    problem: str,
    advice: str,
) -> None:
    """Fail unless two rows of logits are the same but for rounding.

    Where the best token leads by more than rounding explains, it must be the best one in both.
    """
    check(bool(np.isfinite(got).all()), f"{problem}: the logits are not finite", advice)
    apart = distance(got, want)
    check(
        apart <= tolerance,
        f"{problem}: the logits are {apart:.3g} standard deviations apart, and at most {tolerance:g} "
        "is rounding",
        advice,
    )
    second, first = np.partition(want, -2)[-2:] if len(want) > 1 else (-np.inf, want[0])
    if first - second > 4 * tolerance * float(np.std(want)):
        check(
            int(got.argmax()) == int(want.argmax()),
            f"{problem}: greedy decoding takes token {int(got.argmax())}, not {int(want.argmax())}",
            advice,
        )
