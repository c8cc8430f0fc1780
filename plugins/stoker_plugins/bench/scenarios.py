"""Loads with names: each shows one property of a server."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from stoker_plugins.bench.workload import Load, Session, Shot, prose, system, user

__all__ = ["ALL", "DEFAULT", "SUMMARIES", "check", "scenario"]

DEFAULT = ("solo", "decode8", "prefix")

SUMMARIES = {
    "solo": "4 chats, one after the other: latency",
    "decode8": "16 chats, 8 at once (decodeN: 2N chats, N at once): batching",
    "sampled": "decode16 with temperature, top_p and top_k: the sampler's cost",
    "prefix": "24 users of one 600-word system prompt, 12 at once: prefix reuse",
    "turns": "12 conversations of 4 turns: reuse across turns",
    "mixed": "4 long answers while 900-word prompts arrive: what the streams feel",
    "burst": "64 short chats at once: queueing",
    "copy": "3 texts to repeat: speculation",
    "agents": "8 agents of 6 steps on one 500-word instruction, short answers: growing histories",
}
ALL = ("solo", "decode8", "decode16", "decode32", *list(SUMMARIES)[2:])

_SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 40}


def check(name: str) -> str | None:
    """What is wrong with a scenario's name; nothing if it is one."""
    if name in _LOADS:
        return None
    found = re.fullmatch(r"decode(\d{1,4})", name)
    if found and 1 <= int(found[1]) <= 512:
        return None
    known = ", ".join(["decodeN (N up to 512)", *sorted(_LOADS), "all"])
    return f"there is no scenario {name!r}: there are {known}"


def scenario(name: str, seed: str) -> Load:
    """The load of a scenario.

    Args:
        name: One that ``check`` finds right.
        seed: The same seed gives the same load.
    """
    rng = random.Random(f"{name} {seed}")
    if name in _LOADS:
        return _LOADS[name](rng)
    return _decode(rng, int(name.removeprefix("decode")))


def _chat(rng: random.Random, words: int, tokens: int, **fields: Any) -> Shot:
    question = user(f"Write a long story about {prose(rng, words)}.")
    return Shot((question,), tokens, **fields)


def _each_alone(shots: list[Shot]) -> Iterator[Session]:
    return (Session((shot,)) for shot in shots)


def _solo(rng: random.Random) -> Load:
    return Load(_each_alone([_chat(rng, 24, 96) for _ in range(4)]), 1)


def _decode(rng: random.Random, clients: int, **fields: Any) -> Load:
    shots = [_chat(rng, 16, 96, **fields) for _ in range(2 * clients)]
    return Load(_each_alone(shots), clients)


def _sampled(rng: random.Random) -> Load:
    return _decode(rng, 16, extra=_SAMPLING)


def _prefix(rng: random.Random) -> Load:
    rules = system(f"You are a careful assistant. Rules: {prose(rng, 600)}")
    shots = [Shot((rules, user(f"Question {n}: {prose(rng, 8)}?")), 32) for n in range(24)]
    return Load(_each_alone(shots), 12)


def _conversation(
    rng: random.Random, opening: str, turns: int, said: int, answered: int, tokens: int
) -> Session:
    """A conversation whose answers are written beforehand, so that every target gets the same prompts."""
    history = [system(opening)]
    shots = []
    for turn in range(turns):
        history.append(user(f"Turn {turn}: {prose(rng, said)}"))
        shots.append(Shot(tuple(history), tokens))
        history.append({"role": "assistant", "content": prose(rng, answered)})
    return Session(tuple(shots))


def _turns(rng: random.Random) -> Load:
    sessions = [
        _conversation(rng, f"You are guide number {n}. {prose(rng, 60)}", 4, 40, 20, 24)
        for n in range(12)
    ]
    return Load(iter(sessions), 12)


def _agents(rng: random.Random) -> Load:
    rules = f"You are an agent. These are your tools: {prose(rng, 500)}"
    sessions = [_conversation(rng, rules, 6, 40, 12, 16) for _ in range(8)]
    return Load(iter(sessions), 8)


def _mixed(rng: random.Random) -> Load:
    steady = [Session((_chat(rng, 12, 200, group="decoder"),), 0.0) for _ in range(4)]
    long = [Session((_chat(rng, 900, 8, group="long prompt"),), 1.0 + 0.5 * n) for n in range(4)]
    return Load(iter(steady + long), gap_group="decoder")


def _burst(rng: random.Random) -> Load:
    return Load(_each_alone([_chat(rng, 12, 24) for _ in range(64)]), 64)


def _copy(rng: random.Random) -> Load:
    shots = [
        Shot((user(f"Repeat this text word for word, several times:\n{prose(rng, 60)}"),), 160)
        for _ in range(3)
    ]
    return Load(_each_alone(shots), 1)


_LOADS: dict[str, Callable[[random.Random], Load]] = {
    "solo": _solo,
    "sampled": _sampled,
    "prefix": _prefix,
    "turns": _turns,
    "mixed": _mixed,
    "burst": _burst,
    "copy": _copy,
    "agents": _agents,
}
