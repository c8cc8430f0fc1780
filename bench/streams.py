"""Does batching pay? Output tokens/s of the real default model for 1, 4, 8, 16, 32 streams, interleaved.

python bench/streams.py [--rounds 3] [--tokens 96] [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time

import aiohttp
from serving import server

WORDS = "river stone engine paper garden winter signal copper bridge window letter market".split()


async def one(
    session: aiohttp.ClientSession, address: str, prompt: str, tokens: int
) -> list[float]:
    """The arrival times of one stream's content events."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stamps: list[float] = []
    usage = 0
    async with session.post(f"{address}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                stamps.append(time.perf_counter())
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
    if usage != tokens:
        raise SystemExit(f"asked for {tokens} tokens, got {usage}")
    return stamps


async def measure(address: str, streams: int, tokens: int, seed: int) -> tuple[float, float, float]:
    """Output tokens/s, median time to first token (ms), median inter-token latency (ms)."""
    rng = random.Random(f"{streams}-{seed}")
    prompts = [
        f"Write a long story about {' '.join(rng.choices(WORDS, k=16))}." for _ in range(streams)
    ]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        stamps = await asyncio.gather(*(one(session, address, p, tokens) for p in prompts))
        elapsed = time.perf_counter() - started
    gaps = [b - a for s in stamps for a, b in itertools.pairwise(s)]
    first = statistics.median(s[0] - started for s in stamps)
    return streams * tokens / elapsed, first * 1e3, statistics.median(gaps) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--url", help="a running server; by default one is started")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    args = parser.parse_args()
    place = contextlib.nullcontext(args.url) if args.url else server()
    rows: dict[int, list[tuple[float, float, float]]] = {count: [] for count in args.counts}
    with place as address:
        asyncio.run(measure(address, 2, 16, -1))  # warm-up, not counted
        for seed in range(args.rounds):
            for count in args.counts:
                rows[count].append(asyncio.run(measure(address, count, args.tokens, seed)))
    base = statistics.median(r[0] for r in rows[args.counts[0]])
    print("streams  tokens/s   ratio   TTFT p50 ms   ITL p50 ms   rounds (tokens/s)")
    for count, figures in rows.items():
        rate, first, gap = (statistics.median(f[i] for f in figures) for i in range(3))
        rounds = ", ".join(f"{f[0]:.0f}" for f in figures)
        print(
            f"{count:7d}  {rate:8.1f}  {rate / base:5.2f}x  {first:12.0f}  {gap:11.1f}   {rounds}"
        )


if __name__ == "__main__":
    main()
