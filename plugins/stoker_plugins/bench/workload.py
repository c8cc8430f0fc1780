"""What is sent, and when: requests, conversations, arrival processes and lengths, all drawn from a seed."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Lengths",
    "Load",
    "Message",
    "Session",
    "Shot",
    "TokensPerWord",
    "custom_load",
    "poisson",
    "prose",
    "system",
    "user",
]

Message = Mapping[str, str]

# Common words: nearly every tokenizer has each, with the space before it, as one token.
_WORDS = (
    "river stone engine paper garden winter signal bridge window letter market ocean forest mirror valley "
    "harbor silver cotton planet basket island journey marble temple summer morning village mountain road "
    "water light house number story music table picture doctor friend family school teacher student "
    "country city street office company history science nature animal flower color father mother brother "
    "sister second minute hour month year money price power energy system change reason answer question "
    "problem result example point place world people person child woman man king queen ship train horse"
).split()


@dataclass(frozen=True, slots=True)
class Shot:
    """One request.

    Attributes:
        messages: Of the chat.
        max_tokens: Of the answer.
        group: Whose figures it counts for, besides the whole's.
        extra: More fields of the body, such as sampling parameters.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of one client, each sent when the one before has ended.

    Attributes:
        shots: The requests.
        at_s: When the first is due, in seconds after the start; ``None`` as soon as a client is free.
    """

    shots: tuple[Shot, ...]
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What one round sends to one target.

    Attributes:
        sessions: In order of ``at_s``; drawn while the round runs, so that a long one fits into memory.
        concurrency: Clients that take the sessions without a time of their own.
        gap_group: The group whose worst gap is reported; empty for all.
    """

    sessions: Iterator[Session]
    concurrency: int = 1
    gap_group: str = ""


def user(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    """A system message."""
    return {"role": "system", "content": text}


def prose(rng: random.Random, num_words: int) -> str:
    """So many random words."""
    return " ".join(rng.choices(_WORDS, k=num_words))


def poisson(rng: random.Random, rate: float) -> Iterator[float]:
    """Arrival times of a Poisson process, in seconds since the first: independent, exponential gaps.

    Args:
        rng: Where the gaps come from.
        rate: Arrivals a second, on average.
    """
    now_s = 0.0
    while True:
        yield now_s
        now_s += rng.expovariate(rate)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts.

    Attributes:
        text: As the user wrote it.
        draw: Draws a count, at least 1.
    """

    text: str
    draw: Callable[[random.Random], int]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Understand ``64``, ``16-128``, ``normal:MEAN,DEVIATION`` or ``lognormal:MEDIAN,SIGMA``.

        Raises:
            ValueError: It is none of these; the message says what is.
        """
        number = r"(\d+(?:\.\d+)?)"
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
            low, high = int(found[1]), int(found[2] or found[1])
            if not 1 <= low <= high:
                raise ValueError(f"{text!r} must be at least 1, and its ends in order")
            return cls(text, lambda rng: rng.randint(low, high))
        if found := re.fullmatch(f"(normal|lognormal):{number},{number}", text):
            middle, spread = float(found[2]), float(found[3])
            if middle < 1:
                raise ValueError(f"{text!r}: the middle must be at least 1")
            if found[1] == "normal":
                return cls(text, lambda rng: max(1, round(rng.gauss(middle, spread))))
            if spread > 5:
                raise ValueError(f"{text!r}: sigma, of the logarithm, must be at most 5")
            mu = math.log(middle)
            return cls(text, lambda rng: max(1, round(rng.lognormvariate(mu, spread))))
        raise ValueError(
            f"{text!r} is no length: use 64, 16-128, normal:MEAN,DEVIATION or lognormal:MEDIAN,SIGMA"
        )


@dataclass(frozen=True, slots=True)
class TokensPerWord:
    """How the target's tokenizer counts our words, measured by two requests.

    Attributes:
        slope: Tokens of one more word.
        overhead: Tokens of an empty prompt: the chat template's.
    """

    slope: float = 1.0
    overhead: float = 0.0

    @classmethod
    def measured(cls, few: tuple[int, int], many: tuple[int, int]) -> TokensPerWord:
        """From two prompts, each as (words, tokens)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        if slope <= 0:
            return cls()
        return cls(slope, max(0.0, few[1] - slope * few[0]))

    def words(self, num_tokens: int) -> int:
        """The words of a whole prompt of about so many tokens, at least one."""
        return max(1, round((num_tokens - self.overhead) / self.slope))

    def words_within(self, num_tokens: int) -> int:
        """The words of a part of a prompt of about so many tokens, at least one."""
        return max(1, round(num_tokens / self.slope))


def custom_load(
    seed: str,
    *,
    prompt: Lengths,
    output: Lengths,
    words: TokensPerWord,
    shared_prefix: int = 0,
    concurrency: int = 1,
    rate: float | None = None,
    limit: int,
    extra: Mapping[str, Any] | None = None,
) -> Load:
    """A load of independent requests.

    Args:
        seed: What prompts, lengths and arrivals are drawn from.
        prompt: Tokens of the prompts, shared part included.
        output: Tokens of the answers.
        words: The tokenizer's measure.
        shared_prefix: Tokens that all prompts begin with.
        concurrency: Clients of a closed loop.
        rate: Requests a second of an open loop, in a Poisson process; ``None`` for a closed loop.
        limit: Requests.
        extra: More fields of the bodies.
    """
    rng = random.Random(f"prompts {seed}")
    shared = prose(rng, words.words_within(shared_prefix)) if shared_prefix else ""
    opening = (system(shared),) if shared else ()
    arrivals: Iterator[float | None] = itertools.repeat(None)
    if rate is not None:
        # Its own generator: the same arrivals whatever the prompts are.
        arrivals = poisson(random.Random(f"arrivals {seed}"), rate)

    def sessions() -> Iterator[Session]:
        for at_s in itertools.islice(arrivals, limit):
            own = max(1, prompt.draw(rng) - shared_prefix)
            question = user(prose(rng, words.words(own)))
            yield Session((Shot((*opening, question), output.draw(rng), extra=extra or {}),), at_s)

    return Load(sessions(), concurrency)
