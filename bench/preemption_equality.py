"""How often losing its lane changes a greedy text of the real default model.

Runs prompts one at a time, and then together at low priority while urgent requests keep taking their lanes
(policy ``priority``), and compares the texts.

    python bench/preemption_equality.py [--prompts 8] [--tokens 64] [--lanes 4]
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import aiohttp
from serving import server

SUBJECTS = (
    "rivers engines paper gardens winter signals copper bridges windows letters markets".split()
)


async def ask(
    http: aiohttp.ClientSession, address: str, subject: str, tokens: int, **more: Any
) -> str:
    content = f"Write two sentences about {subject}."
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    async with http.post(
        f"{address}/v1/chat/completions", json=body | {"max_tokens": tokens}
    ) as response:
        response.raise_for_status()
        answer = await response.json()
    return str(answer["choices"][0]["message"]["content"])


async def preemptions(http: aiohttp.ClientSession, address: str) -> float:
    async with http.get(f"{address}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("stoker_num_preemptions_total")
    )


async def compare(
    address: str, subjects: list[str], tokens: int, lanes: int
) -> tuple[list[str], list[str], float]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        alone = [await ask(http, address, subject, tokens) for subject in subjects]
        low = [
            asyncio.create_task(ask(http, address, subject, tokens, priority=100))
            for subject in subjects
        ]
        while not all(task.done() for task in low):
            await asyncio.sleep(1.0)
            urgent = [
                ask(http, address, f"number {i}", 8, priority=-100) for i in range(lanes // 2)
            ]
            await asyncio.gather(*urgent)
        return alone, [task.result() for task in low], await preemptions(http, address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=4)
    args = parser.parse_args()
    subjects = SUBJECTS[: args.prompts]
    with server("--policy", "priority", "--lanes", str(args.lanes)) as address:
        alone, preempted, count = asyncio.run(compare(address, subjects, args.tokens, args.lanes))
    differing = [s for s, a, b in zip(subjects, alone, preempted, strict=True) if a != b]
    print(
        f"{len(differing)} of {len(subjects)} greedy texts differ after {count:.0f} preemptions"
        f"{': ' + ', '.join(differing) if differing else ''}"
    )


if __name__ == "__main__":
    main()
