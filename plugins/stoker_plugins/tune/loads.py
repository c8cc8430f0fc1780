"""Short versions of what servers are used for, and how their speed is weighed.

A load is a few rounds of conversations. A conversation has turns; each turn's prompt is all that was said
before and some new text. All conversations of a round begin at once, the next round begins when all are over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["BESIDE_WEIGHT", "LOADS", "Load", "Round", "combine"]

BESIDE_WEIGHT = 1 / 3
"""What a run beside a busy process counts, where both are measured: a setting that is 1.4 times as fast alone
and half as fast in company is none the better for it."""


@dataclass(frozen=True, slots=True)
class Round:
    """Conversations that begin at once.

    Attributes:
        conversations: How many.
        turns: Turns of each.
        shared_tokens: Tokens that all their prompts begin with.
        prompt_tokens: Tokens of the first prompt, after those.
        turn_tokens: New prompt tokens of each later turn.
        output_tokens: Tokens generated in each turn.
    """

    conversations: int
    turns: int = 1
    shared_tokens: int = 0
    prompt_tokens: int = 64
    turn_tokens: int = 24
    output_tokens: int = 24

    def scaled(self, scale: float) -> Round:
        """The same with shorter or longer texts; as many conversations and turns."""

        def size(tokens: int, least: int) -> int:
            return max(least, round(tokens * scale)) if tokens else 0

        return Round(
            conversations=self.conversations,
            turns=self.turns,
            shared_tokens=size(self.shared_tokens, 32),
            prompt_tokens=size(self.prompt_tokens, 8),
            turn_tokens=size(self.turn_tokens, 4),
            output_tokens=size(self.output_tokens, 4),
        )

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        later = (self.turns - 1) * self.turn_tokens + self.turns * self.output_tokens
        return self.shared_tokens + self.prompt_tokens + later


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured, and what of it counts.

    Attributes:
        name: What ``--load`` takes.
        summary: One line for people.
        rounds: What happens.
        first_token: Weight of the time to the first token.
        next_token: Weight of the time between tokens.
        throughput: Weight of generated tokens per second; the three add up to 1.
    """

    name: str
    summary: str
    rounds: tuple[Round, ...]
    first_token: float = 0.0
    next_token: float = 0.0
    throughput: float = 0.0

    def score(self, ttft_s: float, itl_s: float, tokens_per_s: float) -> float:
        """The weighted geometric mean of speeds; higher is better."""
        floor = 1e-9
        logarithm = (
            -self.first_token * math.log(max(ttft_s, floor))
            - self.next_token * math.log(max(itl_s, floor))
            + self.throughput * math.log(max(tokens_per_s, floor))
        )
        return math.exp(logarithm)


LOADS = {
    load.name: load
    for load in (
        Load(
            name="interactive",
            summary="one chat, then three at once: first token 50 %, next tokens 50 %",
            rounds=(
                Round(1, turns=2, prompt_tokens=160, output_tokens=32),
                Round(3, turns=2, prompt_tokens=160, output_tokens=24),
            ),
            first_token=0.5,
            next_token=0.5,
        ),
        Load(
            name="throughput",
            summary="24 requests at once, on the lanes there are: tokens per second",
            rounds=(Round(24, prompt_tokens=80, output_tokens=32),),
            throughput=1.0,
        ),
        Load(
            name="agents",
            summary="8 agents, one long instruction, 3 turns: first token 50 %, tokens per second 50 %",
            rounds=(
                Round(
                    8,
                    turns=3,
                    shared_tokens=512,
                    prompt_tokens=24,
                    turn_tokens=32,
                    output_tokens=12,
                ),
            ),
            first_token=0.5,
            throughput=0.5,
        ),
    )
}


def combine(alone: float, beside: float | None) -> float:
    """One score of a run alone and, if there was one, a run beside a busy process."""
    if beside is None:
        return alone
    return math.exp((1 - BESIDE_WEIGHT) * math.log(alone) + BESIDE_WEIGHT * math.log(beside))
