"""Starvation: what does a tenant that chats feel while another floods the server?

Tenant ``flood`` sends 50 prompts of about 1,500 tokens at once. Tenant ``chat`` sends short messages, one
after the other. Time to first token of the chat alone and beside the flood, for each server, the servers in
turn.

    python bench/fairness.py [--llama-server PATH] [--rounds 2] [--json FILE]

A side's round ends when the chat has its messages or after ``--limit`` seconds; a message without a first
token by then counts with the time that it has waited, and the figure is marked ``>``. Throughput beside the
flood is what stoker's ``/metrics`` count, without what was computed again after preemptions; of llama-server
it is the prompts whose first token came, and the tokens that came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
from client import Answer, ask, cancel, prompt, quantile, session
from serving import Running, llama_server, stoker_server

CONFIG = """\
[server]
trusted_proxies = ["127.0.0.1"]
drain_timeout_s = 0
[admission]
queue_timeout_s = 0
"""

Side = Callable[[], contextlib.AbstractContextManager[Running]]


@dataclasses.dataclass
class Chat:
    """Times to first token, and whether the last one is only a lower bound.

    Attributes:
        ttfts: Of each message.
        queues: Of that, the wait for a lane, of servers that tell.
        gaps: Between tokens.
        open_end: Whether the last message got no token.
    """

    queues: list[float] = dataclasses.field(default_factory=list)
    ttfts: list[float] = dataclasses.field(default_factory=list)
    gaps: list[float] = dataclasses.field(default_factory=list)
    open_end: bool = False


def message(rng: random.Random) -> str:
    return f"{rng.randrange(10_000)}: write about {prompt(rng, rng.randrange(14, 26))}."


async def chat(address: str, args: argparse.Namespace, rng: random.Random, until_s: float) -> Chat:
    """One message after the other, with pauses of no fixed length, so that steps cannot be met in rhythm."""
    result = Chat()
    async with session("chat") as http:
        for _ in range(args.messages):
            answer = Answer(0.0)
            task = asyncio.create_task(
                ask(http, address, message(rng), args.chat_tokens, answer, **args.chat_fields)
            )
            done, _ = await asyncio.wait({task}, timeout=max(0.0, until_s - time.perf_counter()))
            if not done:
                await cancel([task])
                waited = time.perf_counter() - answer.sent_s
                if answer.stamps or waited > 1:
                    result.ttfts.append(answer.ttft_s if answer.stamps else waited)
                    result.open_end = not answer.stamps
                break
            if answer.status != 200 or answer.error:
                raise SystemExit(f"a chat message failed: {answer.status} {answer.error}")
            result.ttfts.append(answer.ttft_s)
            result.queues += await queue_times(http, address, answer)
            result.gaps += [b - a for a, b in zip(answer.stamps, answer.stamps[1:], strict=False)]
            await asyncio.sleep(rng.uniform(0.5, 1.5) * args.think)
    return result


async def queue_times(http: aiohttp.ClientSession, address: str, answer: Answer) -> list[float]:
    """How long a request waited for a lane, if the server tells."""
    name = answer.headers.get("x-request-id")
    async with http.get(f"{address}/v1/requests/{name}") as response:
        if response.status != 200:
            return []
        return [s["queue_s"] for s in (await response.json())["sequences"]]


async def computed(http: aiohttp.ClientSession, address: str) -> float | None:
    """Tokens that stoker has computed so far, each once; ``None`` of a server that does not count."""
    async with http.get(f"{address}/metrics") as response:
        if response.status != 200:
            return None
        text = await response.text()
    totals = dict(re.findall(r"^stoker_(\w+)_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE))
    prompts, answers, again = (
        float(totals.get(name, 0)) for name in ("prompt", "generation", "recomputed")
    )
    return prompts + answers - again


async def one_round(address: str, args: argparse.Namespace, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    async with session("warm-up") as http:
        await ask(http, address, "Hello.", 8)
    solo = await chat(address, args, rng, math.inf)
    async with session("flood") as http:
        flood = [Answer(0.0) for _ in range(args.flood)]
        texts = [f"{i}: {prompt(rng, args.flood_words)}" for i in range(args.flood)]
        count = await computed(http, address)
        started = time.perf_counter()
        tasks = [
            asyncio.create_task(ask(http, address, text, args.flood_tokens, answer))
            for text, answer in zip(texts, flood, strict=True)
        ]
        await asyncio.sleep(args.head_start)
        beside = await chat(address, args, rng, started + args.limit)
        elapsed = time.perf_counter() - started
        is_over = all(task.done() for task in tasks)
        more = await computed(http, address)
        await cancel(tasks)
    failed = [a for a in flood if a.error]
    if failed:
        raise SystemExit(f"the flood failed: {failed[0].status} {failed[0].error}")
    size = next((a.prompt_tokens for a in flood if a.prompt_tokens), 0)
    if is_over:
        elapsed = max(a.end_s for a in flood) - started
    begun = sum(bool(a.stamps) for a in flood)
    tokens: float = begun * size + sum(len(a.stamps) for a in flood)
    if count is not None and more is not None:
        tokens = more - count
    return {
        "solo": solo,
        "beside": beside,
        "flood_prompt_tokens": size,
        "tokens_per_s": tokens / elapsed,
        "flood_finished": sum(bool(a.finish_reason) for a in flood),
        "flood_is_over": is_over,
        "elapsed_s": elapsed,
    }


def sides(args: argparse.Namespace) -> dict[str, Side]:
    config = CONFIG
    if args.target_step is not None:
        config += f"[scheduler]\ntarget_step_s = {args.target_step}\n"

    def stoker(policy: str) -> Side:
        return lambda: stoker_server(f"stoker {policy}", "--policy", policy, config=config)

    found: dict[str, Side] = {f"stoker {policy}": stoker(policy) for policy in args.policies}
    if args.llama_server:
        found["llama-server"] = lambda: llama_server(args.llama_server)
    return found


def report(name: str, rounds: list[dict[str, object]]) -> dict[str, object]:
    solo: list[Chat] = [r["solo"] for r in rounds]
    beside: list[Chat] = [r["beside"] for r in rounds]
    alone = [t for c in solo for t in c.ttfts]
    under = [t for c in beside for t in c.ttfts]
    figures: dict[str, object] = {
        "messages": len(under),
        "open_end": any(c.open_end for c in beside),
    }
    for share in (0.5, 0.95):
        label = f"p{share * 100:.0f}"
        figures[f"solo_{label}_s"] = quantile(alone, share)
        figures[f"beside_{label}_s"] = quantile(under, share)
        figures[f"ratio_{label}"] = quantile(under, share) / quantile(alone, share)
        figures[f"rounds_ratio_{label}"] = [
            quantile(b.ttfts, share) / quantile(a.ttfts, share)
            for a, b in zip(solo, beside, strict=True)
        ]
    figures["solo_gap_p50_s"] = quantile([g for c in solo for g in c.gaps], 0.5)
    figures["beside_gap_p50_s"] = quantile([g for c in beside for g in c.gaps], 0.5)
    figures["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in rounds)
    figures["flood_finished"] = [r["flood_finished"] for r in rounds]
    figures["flood_prompt_tokens"] = rounds[0]["flood_prompt_tokens"]
    figures["rounds"] = [
        {k: dataclasses.asdict(v) if isinstance(v, Chat) else v for k, v in r.items()}
        for r in rounds
    ]
    more = ">" if figures["open_end"] else ""
    ratios = ", ".join(f"{more}{r:.2f}" for r in figures["rounds_ratio_p95"])
    ms = {
        key: figures[f"{key}_s"] * 1e3
        for key in ("solo_p50", "solo_p95", "beside_p50", "beside_p95")
    }
    print(
        f"{name:20s} {len(alone):5d} {ms['solo_p50']:7.0f} {ms['solo_p95']:7.0f} {len(under):5d}"
        f" {more}{ms['beside_p50']:8.0f} {more}{ms['beside_p95']:8.0f}"
        f" {more}{figures['ratio_p50']:7.2f} {more}{figures['ratio_p95']:7.2f}"
        f" {figures['tokens_per_s']:9.0f}   {ratios}"
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-server", help="its binary; without it only stoker is measured")
    parser.add_argument("--policies", nargs="*", default=["fair", "fcfs"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--messages", type=int, default=24)
    parser.add_argument("--chat-tokens", type=int, default=32)
    parser.add_argument("--think", type=float, default=0.5, help="mean pause between messages, s")
    parser.add_argument("--flood", type=int, default=50)
    parser.add_argument("--flood-words", type=int, default=1450)
    parser.add_argument("--flood-tokens", type=int, default=64)
    parser.add_argument("--head-start", type=float, default=2.0, help="of the flood, s")
    parser.add_argument("--limit", type=float, default=150.0, help="longest time beside the flood")
    parser.add_argument(
        "--target-step", type=float, help="[scheduler] target_step_s, if not default"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    args.chat_fields = {}
    found = sides(args)
    rounds: dict[str, list[dict[str, object]]] = {name: [] for name in found}
    for seed in range(args.rounds):
        for name, start in found.items():
            with start() as running:
                if not rounds[name]:
                    print(f"{name}: {running.settings}")
                rounds[name].append(asyncio.run(one_round(running.address, args, seed)))
    print(
        "\ntime to first token of the chat, ms; ratio to alone; prompt and output tokens/s of all\n"
        "                     alone  p50     p95   beside   p50       p95      p50x     p95x  tokens/s"
        "   p95x of each round"
    )
    figures = {name: report(name, got) for name, got in rounds.items()}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
