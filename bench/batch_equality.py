"""How often batching changes a greedy text of the real default model.

Runs 32 prompts one at a time and then all at once, and compares; a text of another prompt would be a mix-up.

    python bench/batch_equality.py [--prompts 32] [--tokens 64]
"""

from __future__ import annotations

import argparse
import asyncio

import aiohttp
from serving import server

SUBJECTS = (
    "rivers engines paper gardens winter signals copper bridges windows letters markets oceans forests "
    "candles mirrors ladders valleys harbors thunder pockets silver meadows cotton planets baskets hammers "
    "lanterns orchards compasses feathers islands journeys"
).split()


async def ask(session: aiohttp.ClientSession, address: str, prompt: str, tokens: int) -> str:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    async with session.post(f"{address}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        answer = await response.json()
    return str(answer["choices"][0]["message"]["content"])


async def compare(address: str, prompts: list[str], tokens: int) -> tuple[list[str], list[str]]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        alone = [await ask(session, address, prompt, tokens) for prompt in prompts]
        together = await asyncio.gather(*(ask(session, address, p, tokens) for p in prompts))
    return alone, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    subjects = SUBJECTS[: args.prompts]
    prompts = [f"Write two sentences about {subject}." for subject in subjects]
    with server() as address:
        alone, together = asyncio.run(compare(address, prompts, args.tokens))
    if len(set(alone)) < len(alone):
        raise SystemExit("two prompts got the same text alone: a mix-up could not be told")
    differing = 0
    for subject, one, many in zip(subjects, alone, together, strict=True):
        if one != many:
            differing += 1
            shared = next((i for i, (a, b) in enumerate(zip(one, many, strict=False)) if a != b), 0)
            ends = f"{one[shared : shared + 30]!r} / {many[shared : shared + 30]!r}"
            print(f"{subject}: parts after {shared} characters: {ends}")
    mixed = sum(many in alone and alone.index(many) != at for at, many in enumerate(together))
    print(
        f"{differing} of {len(prompts)} greedy texts differ between alone and {len(prompts)} at once"
    )
    print(f"{mixed} texts belong to another prompt")


if __name__ == "__main__":
    main()
