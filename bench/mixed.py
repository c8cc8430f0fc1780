"""Mixed load: how long do running streams stand still while long prompts arrive?

Four streams write; then long prompts come one after another, and then in pairs. Gaps between the streams'
tokens from the first long prompt to the last one's end, the servers in turn.

    python bench/mixed.py [--llama-server PATH] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from pathlib import Path

from client import Answer, ask, cancel, prompt, quantile, session
from serving import llama_server, stoker_server

CONFIG = "[server]\ndrain_timeout_s = 0\n"


async def one_round(address: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    long_prompts: list[Answer] = []
    async with session() as http:

        def long_prompt() -> asyncio.Task[Answer]:
            words = rng.randrange(args.words - 150, args.words + 150)
            return asyncio.create_task(ask(http, address, prompt(rng, words), 8))

        await ask(http, address, "Hello.", 8)
        streams = [Answer(0.0) for _ in range(args.streams)]
        tasks = [
            asyncio.create_task(
                ask(http, address, f"Write about {prompt(rng, 12)}.", args.tokens, a)
            )
            for a in streams
        ]
        while any(len(answer.stamps) < 8 for answer in streams):
            if failed := [task.result() for task in tasks if task.done()]:
                raise SystemExit(f"a stream failed: {failed[0].status} {failed[0].error}")
            await asyncio.sleep(0.05)
        started = time.perf_counter()
        for size in [1] * args.singles + [2] * args.pairs:
            long_prompts += await asyncio.gather(*(long_prompt() for _ in range(size)))
            await asyncio.sleep(0.5)
        ended = time.perf_counter()
        if any(task.done() for task in tasks):
            raise SystemExit("a stream ended before the last long prompt: raise --tokens")
        await cancel(tasks)
    for answer in long_prompts:
        if answer.status != 200 or answer.error or not answer.stamps:
            raise SystemExit(f"a long prompt failed: {answer.status} {answer.error}")
    gaps: list[float] = []
    for answer in streams:
        # A stream that stands still from its last token to the end counts, too.
        inside = [s for s in answer.stamps if started <= s <= ended]
        before = [s for s in answer.stamps if s < started][-1:]
        gaps += [b - a for a, b in itertools.pairwise([*before, *inside, ended])]
    return {
        "worst_gap_s": max(gaps),
        "p99_gap_s": quantile(gaps, 0.99),
        "p50_gap_s": quantile(gaps, 0.5),
        "num_gaps": len(gaps),
        "long_ttft_p50_s": statistics.median(a.ttft_s for a in long_prompts),
        "long_prompt_tokens": statistics.median(a.prompt_tokens for a in long_prompts),
        "elapsed_s": ended - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-server", help="its binary; without it only stoker is measured")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream, at most")
    parser.add_argument("--words", type=int, default=1300, help="of a long prompt, about")
    parser.add_argument("--singles", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument(
        "--target-step", type=float, help="[scheduler] target_step_s, if not default"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    config = CONFIG
    if args.target_step is not None:
        config += f"[scheduler]\ntarget_step_s = {args.target_step}\n"
    sides = {"stoker": lambda: stoker_server("stoker", "--policy", args.policy, config=config)}
    if args.llama_server:
        sides["llama-server"] = lambda: llama_server(args.llama_server)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for seed in range(args.rounds):
        for name, start in sides.items():
            with start() as running:
                if not rounds[name]:
                    print(f"{name}: {running.settings}")
                rounds[name].append(asyncio.run(one_round(running.address, args, seed)))
                print(
                    f"  {name}: worst gap {rounds[name][-1]['worst_gap_s'] * 1e3:.0f} ms",
                    flush=True,
                )
    print("\ngaps between tokens of the running streams, ms; the long prompts' time to first token")
    print("                worst     p99     p50    gaps   long TTFT p50   worst of each round")
    for name, got in rounds.items():
        worst = max(r["worst_gap_s"] for r in got)
        p99, p50, ttft = (
            statistics.median(r[key] for r in got)
            for key in ("p99_gap_s", "p50_gap_s", "long_ttft_p50_s")
        )
        each = ", ".join(f"{r['worst_gap_s'] * 1e3:.0f}" for r in got)
        count = sum(r["num_gaps"] for r in got)
        print(
            f"{name:14s} {worst * 1e3:6.0f}  {p99 * 1e3:6.0f}  {p50 * 1e3:6.0f}  {count:6.0f}"
            f"  {ttft * 1e3:14.0f}   {each}"
        )
    if args.llama_server:
        ratios = [
            a["worst_gap_s"] / b["worst_gap_s"]
            for a, b in zip(rounds["stoker"], rounds["llama-server"], strict=True)
        ]
        shown = ", ".join(f"{r:.3f}" for r in ratios)
        print(f"stoker's worst gap / llama-server's: {statistics.median(ratios):.3f} ({shown})")
    if args.json:
        Path(args.json).write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
