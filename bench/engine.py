"""What the engine itself costs: tokens/s over 64 sequences on a runtime that costs nothing.

Two figures: the loop alone, driven by hand, and the loop's thread with its asyncio readers (all that a
served token passes but HTTP).

    python bench/engine.py [--sequences 64] [--tokens 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from stoker import Request, SamplingParams
from stoker.config import CacheConfig, SchedulerConfig
from stoker.engine.client import EngineClient
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.testing import EngineHarness, ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed


def by_hand(sequences: int, tokens: int) -> float:
    runtime = ScriptedRuntime(lanes=sequences, context_length=tokens + 64)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    for i in range(sequences):
        harness.submit(f"prompt {i}", max_tokens=tokens)
    started = time.perf_counter()
    harness.run()
    return sequences * tokens / (time.perf_counter() - started)


async def threaded(sequences: int, tokens: int) -> float:
    runtime = ScriptedRuntime(lanes=sequences, context_length=tokens + 64)
    engine = ModelEngine(
        "model",
        runtime,
        FirstComeFirstServed(),
        SchedulerConfig(),
        CacheConfig(),
        [],
        time.monotonic,
    )
    loop = EngineLoop("cpu", time.monotonic)
    loop.engines.append(engine)
    client = EngineClient(engine, loop)
    loop.start()

    async def read(i: int) -> int:
        request = Request(
            request_id=str(i),
            model="model",
            prompt_token_ids=list(f"prompt {i}".encode()),
            sampling=SamplingParams(temperature=0.0, max_tokens=tokens),
            arrival_s=time.monotonic(),
        )
        count = 0
        async for batch in client.submit(request):
            count += sum(delta.num_tokens for delta in batch)
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*(read(i) for i in range(sequences)))
    elapsed = time.perf_counter() - started
    loop.stop()
    if counts != [tokens] * sequences:
        raise SystemExit(f"lost or doubled tokens: {counts}")
    return sum(counts) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    alone, served = [], []
    for _ in range(args.rounds):
        alone.append(by_hand(args.sequences, args.tokens))
        served.append(asyncio.run(threaded(args.sequences, args.tokens)))
    for name, figures in (("loop alone", alone), ("loop thread + asyncio readers", served)):
        print(
            f"{name:32s} median {statistics.median(figures):9,.0f} tokens/s   "
            f"(rounds: {', '.join(f'{f:,.0f}' for f in figures)})"
        )


if __name__ == "__main__":
    main()
