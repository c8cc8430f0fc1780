"""Runs a load through the real engine: its scheduler, its KV reuse and its sampler, without HTTP."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker import Observer, StepRecord
from stoker_plugins.tune.messages import Figures

if TYPE_CHECKING:
    from stoker.testing import EngineHarness, Submitted
    from stoker_plugins.tune.loads import Load, Round

__all__ = ["Rates", "busy_neighbour", "run_load"]

# Ends when its parent does, or in any case after the seconds it is given.
_SPIN = (
    "import os, sys, time\n"
    "parent, end = os.getppid(), time.monotonic() + float(sys.argv[1])\n"
    "while os.getppid() == parent and time.monotonic() < end:\n"
    "    for _ in range(20000): pass\n"
)


class Rates(Observer):
    """How fast steps of one kind compute.

    Attributes:
        prefill: Tokens and seconds of steps that only prefill.
        decode: Tokens and seconds of steps that only decode.
    """

    def __init__(self) -> None:
        self.prefill = (0, 0.0)
        self.decode = (0, 0.0)

    def on_step(self, record: StepRecord) -> None:
        """Count a step."""
        if record.num_prefill_tokens and not record.num_decode_tokens:
            tokens, seconds = self.prefill
            self.prefill = tokens + record.num_prefill_tokens, seconds + record.runtime_s
        elif record.num_decode_tokens and not record.num_prefill_tokens:
            tokens, seconds = self.decode
            self.decode = tokens + record.num_decode_tokens, seconds + record.runtime_s

    @staticmethod
    def of(counted: tuple[int, float]) -> float:
        """Tokens per second."""
        tokens, seconds = counted
        return tokens / seconds if seconds else 0.0


@dataclass(slots=True)
class _Turn:
    """One request under way, and when its tokens came."""

    submitted: Submitted
    sent_s: float
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    num_seen: int = 0
    done: bool = False

    def look(self, now_s: float) -> None:
        """Take what has been delivered since the last look."""
        fresh = self.submitted.deltas[self.num_seen :]
        self.num_seen += len(fresh)
        for delta in fresh:
            self.num_tokens += delta.num_tokens
            self.done |= delta.finish_reason is not None
            if delta.error is not None:
                raise RuntimeError(f"a request failed: {delta.error}")
            if delta.num_tokens:
                self.last_s = now_s
                if self.first_s is None:
                    self.first_s = now_s


@dataclass(slots=True)
class _Conversation:
    """A prompt that grows."""

    tokens: list[int]
    turns_left: int
    turn: _Turn | None = None


@dataclass(slots=True)
class _Run:
    """A load while it runs."""

    harness: EngineHarness
    stream: Sequence[int]
    at: int
    deadline_s: float
    turns: list[_Turn] = field(default_factory=list)

    def text(self, count: int) -> list[int]:
        """The next tokens of the text, which has no end."""
        length = len(self.stream)
        tokens = [self.stream[(self.at + i) % length] for i in range(count)]
        self.at += count
        return tokens

    def send(self, conversation: _Conversation, round_: Round) -> None:
        turn = _Turn(
            self.harness.submit(
                conversation.tokens, max_tokens=round_.output_tokens, ignore_eos=True
            ),
            time.monotonic(),
        )
        conversation.turn = turn
        conversation.turns_left -= 1
        self.turns.append(turn)

    def play(self, round_: Round) -> bool:
        """Play a round; false if the time is up."""
        shared = self.text(round_.shared_tokens)
        waiting = []
        for number in range(round_.conversations):
            # A step of its own for each, so that no two prompts begin alike beyond what is shared.
            self.at += 7 * number + 1
            talk = _Conversation([*shared, *self.text(round_.prompt_tokens)], round_.turns)
            self.send(talk, round_)
            waiting.append(talk)
        while waiting:
            self.harness.step()
            now_s = time.monotonic()
            for talk in waiting:
                if talk.turn is not None:
                    talk.turn.look(now_s)
            if now_s > self.deadline_s:
                return False
            for talk in [t for t in waiting if t.turn is not None and t.turn.done]:
                if not talk.turns_left:
                    waiting.remove(talk)
                    continue
                self._next(talk, round_)
        return True

    def _next(self, talk: _Conversation, round_: Round) -> None:
        if talk.turn is None:
            return
        encode = self.harness.runtime.tokenizer.encode
        said = encode(talk.turn.submitted.text(), add_special=False, parse_special=False)
        talk.tokens = [*talk.tokens, *said[: round_.output_tokens], *self.text(round_.turn_tokens)]
        self.send(talk, round_)


def run_load(
    harness: EngineHarness,
    load: Load,
    stream: Sequence[int],
    *,
    scale: float,
    limit_s: float,
    rates: Rates,
    salt: int = 0,
) -> Figures:
    """Run a load and weigh it.

    Args:
        harness: An engine on the real clock, idle.
        load: What to run.
        stream: Token ids of a text, for prompts.
        scale: Size of the load, 1 for the usual one.
        limit_s: When to give up; what is not there by then counts as coming at that moment.
        rates: The observer that the harness was made with.
        salt: Another text for another run, or its prompts would be found in KV.

    Raises:
        RuntimeError: A request failed.
    """
    rates.prefill, rates.decode = (0, 0.0), (0, 0.0)
    started_s = time.monotonic()
    run = _Run(harness, stream, 101 * salt, started_s + limit_s)
    info = harness.runtime.info
    room = min(info.context_length, info.kv_capacity_tokens) - 1
    complete = True
    for round_ in load.rounds:
        sized = round_.scaled(scale)
        if sized.longest > room:
            sized = round_.scaled(scale * room / sized.longest * 0.9)
        complete = complete and run.play(sized)
    ended_s = time.monotonic()
    for turn in run.turns:
        if not turn.done:
            harness.abort(turn.submitted)
    return _weigh(load, run.turns, started_s, ended_s, rates, complete)


def _weigh(
    load: Load,
    turns: Sequence[_Turn],
    started_s: float,
    ended_s: float,
    rates: Rates,
    complete: bool,
) -> Figures:
    seconds = max(ended_s - started_s, 1e-6)
    firsts = [(t.first_s if t.first_s is not None else ended_s) - t.sent_s for t in turns]
    gaps = 0.0
    num_gaps = 0
    for turn in turns:
        if turn.first_s is None:
            continue
        end_s = turn.last_s if turn.done else ended_s
        gaps += end_s - turn.first_s
        num_gaps += turn.num_tokens - 1
    generated = sum(turn.num_tokens for turn in turns)
    ttft_s = statistics.median(firsts)
    itl_s = gaps / num_gaps if num_gaps else seconds
    tokens_per_s = max(generated, 0.5) / seconds
    score = load.score(ttft_s, itl_s, tokens_per_s)
    return Figures(
        score=score if math.isfinite(score) else 0.0,
        seconds=seconds,
        ttft_s=ttft_s,
        itl_s=itl_s,
        tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=Rates.of(rates.prefill),
        decode_tokens_per_s=Rates.of(rates.decode),
        complete=complete,
    )


@contextlib.contextmanager
def busy_neighbour(limit_s: float) -> Iterator[None]:
    """A process that keeps one core busy, for as long as the block runs."""
    command = [sys.executable, "-I", "-c", _SPIN, str(limit_s)]
    neighbour = subprocess.Popen(  # noqa: S603 - our own interpreter and program
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        time.sleep(0.1)  # until it has started to spin
        yield
    finally:
        neighbour.kill()
        neighbour.wait()
