"""Overload: ten times more than stoker can serve, for a minute. What do the refused and the admitted feel?

    python bench/overload.py [--seconds 60] [--factor 10] [--queue 2] [--model scripted:x] [--json FILE]

Capacity is measured first and again at the end, with closed loops that keep all lanes and half of the queue
full; then requests arrive at random (Poisson) at ``--factor`` times that rate; then come probes, to see how
soon the server is back to normal.

The truth about ``Retry-After``: a request is refused because the queue is full, and it would be let in as
soon as one waiting request gets a lane. So the truth is the time from the refusal to the next such moment,
which the server's own account of every admitted request tells (arrival + ``queue_s``). That others come
before whoever was refused is left out: it depends on them, not on the server.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import math
import random
import statistics
import time
from pathlib import Path

import aiohttp
from client import Answer, ask, prompt, quantile, session
from serving import Running, stoker_server


class Load:
    """Requests of one kind against one server."""

    def __init__(self, running: Running, http: aiohttp.ClientSession, args: argparse.Namespace):
        self.running = running
        self.http = http
        self.args = args
        self.rng = random.Random(args.seed)
        self.timeout: float | None = None

    async def one(self) -> Answer:
        """One request; its prompt is new."""
        text = f"{self.rng.randrange(10_000)} {prompt(self.rng, self.args.words)}"
        fields = {} if self.timeout is None else {"timeout": self.timeout}
        return await ask(self.http, self.running.address, text, self.args.tokens, **fields)

    async def closed(self, clients: int, seconds: float) -> list[Answer]:
        """So many clients, one request after the other, until the time is up.

        Requests that come while the queue is full (at the start, when all come at once) come again.
        """
        answers: list[Answer] = []
        until = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < until:
                answer = await self.one()
                if answer.status == 429:
                    await asyncio.sleep(0.05)
                else:
                    answers.append(answer)

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers

    async def opened(self, rate: float, seconds: float) -> list[asyncio.Task[Answer]]:
        """Poisson arrivals for so long; returns when the last one was sent."""
        tasks: list[asyncio.Task[Answer]] = []
        at = time.perf_counter()
        until = at + seconds
        while (at := at + self.rng.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one()))
        return tasks


def rate_between(answers: list[Answer], start_s: float, end_s: float) -> float:
    """Tokens that came per second in a span of time."""
    return sum(start_s <= s < end_s for a in answers for s in a.stamps) / (end_s - start_s)


async def capacity(load: Load, args: argparse.Namespace) -> dict[str, float]:
    """The unloaded maximum: closed loops, without the first quarter and the end."""
    started = time.perf_counter()
    clients = args.lanes + args.queue // 2
    answers = await load.closed(clients, args.calibrate)
    bad = [a for a in answers if a.status != 200 or a.error]
    if bad:
        raise SystemExit(f"a request failed below capacity: {bad[0].status} {bad[0].error}")
    return {
        "tokens_per_s": rate_between(
            answers, started + args.calibrate / 4, started + args.calibrate
        ),
        "ttft_p50_s": quantile([a.ttft_s for a in answers], 0.5),
        "ttft_p95_s": quantile([a.ttft_s for a in answers], 0.95),
        "latency_p95_s": quantile([a.end_s - a.sent_s for a in answers], 0.95),
    }


async def watch(running: Running, samples: list[tuple[float, float]]) -> None:
    while True:
        samples.append((time.perf_counter(), running.rss_mib()))
        await asyncio.sleep(1)


async def admissions(load: Load, answers: list[Answer]) -> list[float]:
    """When each admitted request got its lane, by the server's account; sorted."""
    times = []
    for answer in answers:
        name = answer.headers["x-request-id"]
        async with load.http.get(f"{load.running.address}/v1/requests/{name}") as response:
            response.raise_for_status()
            details = await response.json()
        (sequence,) = details["sequences"]
        if sequence["admitted_by"]:
            times.append(answer.sent_s + sequence["queue_s"])
    return sorted(times)


def judge_retries(refused: list[Answer], admitted_s: list[float], end_s: float) -> dict[str, float]:
    """``Retry-After`` of each refusal against the next moment at which a place fell free."""
    told: list[float] = []
    true: list[float] = []
    for answer in refused:
        next_one = bisect.bisect_right(admitted_s, answer.end_s)
        if next_one < len(admitted_s) and answer.end_s < end_s:
            told.append(float(answer.headers["retry-after-ms"]) / 1e3)
            true.append(admitted_s[next_one] - answer.end_s)
    ratios = [a / max(b, 1e-3) for a, b in zip(told, true, strict=True)]
    # Means of groups of refusals in a row: chance evens out, drift does not.
    windows = [
        sum(told[at : at + 50]) / sum(true[at : at + 50]) for at in range(0, len(told) - 49, 50)
    ]
    return {
        "num": len(told),
        "told_mean_s": statistics.fmean(told),
        "true_mean_s": statistics.fmean(true),
        "ratio_of_means": statistics.fmean(told) / statistics.fmean(true),
        "ratio_p5": quantile(ratios, 0.05),
        "ratio_p50": quantile(ratios, 0.5),
        "ratio_p95": quantile(ratios, 0.95),
        "within_2x": statistics.fmean(0.5 <= r <= 2 for r in ratios),
        # A step is the grain of everything that happens: what is off by less is as good as right.
        "within_2x_or_a_step": statistics.fmean(
            0.5 <= r <= 2 or abs(a - b) <= 0.25 for r, a, b in zip(ratios, told, true, strict=True)
        ),
        "error_p50_s": quantile([abs(a - b) for a, b in zip(told, true, strict=True)], 0.5),
        "error_p95_s": quantile([abs(a - b) for a, b in zip(told, true, strict=True)], 0.95),
        "not_early": statistics.fmean(a >= b for a, b in zip(told, true, strict=True)),
        "windows_of_50": len(windows),
        "windows_within_2x": statistics.fmean(0.5 <= w <= 2 for w in windows)
        if windows
        else math.nan,
        "has_header_seconds": statistics.fmean("retry-after" in a.headers for a in refused),
    }


async def measure(running: Running, args: argparse.Namespace) -> dict[str, object]:
    async with session() as http:
        load = Load(running, http, args)
        await load.one()
        alone = [await load.one() for _ in range(8)]
        before = await capacity(load, args)
        deadline_s = load.timeout = round(args.deadline * before["latency_p95_s"], 1)
        rate = args.factor * before["tokens_per_s"] / args.tokens
        samples: list[tuple[float, float]] = []
        watcher = asyncio.create_task(watch(running, samples))
        started = time.perf_counter()
        tasks = await load.opened(rate, args.seconds)
        ended = time.perf_counter()
        probes: list[asyncio.Task[Answer]] = []
        for at in range(args.probes):
            await asyncio.sleep(max(0.0, ended + 1.0 + 0.5 * at - time.perf_counter()))
            probes.append(asyncio.create_task(load.one()))
        answers = await asyncio.gather(*tasks)
        probed = await asyncio.gather(*probes)
        watcher.cancel()
        load.timeout = None
        served = [a for a in answers if a.status == 200]
        refused = [a for a in answers if a.status in (429, 503)]
        admitted_s = await admissions(load, served)
        after = await capacity(load, args)
    settled = started + min(5.0, args.seconds / 4)
    unloaded = statistics.fmean((before["tokens_per_s"], after["tokens_per_s"]))
    during = rate_between(answers, settled, ended)
    latencies = [a.end_s - a.sent_s for a in served]
    in_time = [
        a.finish_reason == "length" and not a.error and a.end_s - a.sent_s <= deadline_s
        for a in served
    ]
    waits = [(a.end_s - a.sent_s) * 1e3 for a in refused]
    rss = [mib for at, mib in samples if settled <= at <= ended]
    third = max(1, len(rss) // 3)
    return {
        "settings": running.settings,
        "alone": {"ttft_p50_s": quantile([a.ttft_s for a in alone], 0.5)},
        "capacity_before": before,
        "capacity_after": after,
        "throughput": {"during": during, "unloaded": unloaded, "ratio": during / unloaded},
        "arrivals": {
            "per_s": len(answers) / (ended - started),
            "sent": len(answers),
            "served": len(served),
            "refused": len(refused),
            "other": len(answers) - len(served) - len(refused),
        },
        "refused_ms": {
            "p50": quantile(waits, 0.5),
            "p99": quantile(waits, 0.99),
            "max": max(waits),
            "above_50": sum(w >= 50 for w in waits),
            "above_50_at_s": [
                round(a.sent_s - started, 1) for a in refused if a.end_s - a.sent_s >= 0.05
            ],
        },
        "retry_after": judge_retries(refused, admitted_s, ended),
        "admitted": {
            "deadline_s": deadline_s,
            "in_time": statistics.fmean(in_time),
            "latency_p50_s": quantile(latencies, 0.5),
            "latency_p95_s": quantile(latencies, 0.95),
            "latency_max_s": max(latencies),
        },
        "rss_mib": {
            "first_third": statistics.fmean(rss[:third]),
            "last_third": statistics.fmean(rss[-third:]),
            "max": max(rss),
        },
        "probes": [
            {"after_s": a.sent_s - ended, "status": a.status, "ttft_s": a.ttft_s} for a in probed
        ],
    }


def show(figures: dict[str, object]) -> None:
    for group, values in figures.items():
        if isinstance(values, dict):
            cells = "  ".join(f"{name} {_number(value)}" for name, value in values.items())
            print(f"{group:16s} {cells}")
        elif isinstance(values, list):
            for value in values:
                cells = "  ".join(f"{name} {_number(v)}" for name, v in value.items())
                print(f"{group:16s} {cells}")
        else:
            print(f"{group:16s} {values}")


def _number(value: object) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="what to serve; by default the default model")
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--queue", type=int, default=2, help="[admission] max_queue_requests")
    parser.add_argument("--factor", type=float, default=10.0, help="arrivals / capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--calibrate", type=float, default=20.0, help="length of a closed loop, s")
    parser.add_argument("--words", type=int, default=24, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument(
        "--deadline", type=float, default=1.5, help="timeout / p95 latency at capacity"
    )
    parser.add_argument(
        "--probes", type=int, default=8, help="after the end, every 0.5 s from 1 s on"
    )
    parser.add_argument("--config", default="", help="more of the configuration, as TOML")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    config = f"""\
[server]
drain_timeout_s = 0
history = 100000
[admission]
max_queue_requests = {args.queue}
{args.config}"""
    arguments = ["--policy", args.policy, "--lanes", str(args.lanes)]
    if args.model:
        arguments = [args.model, *arguments]
    with stoker_server("stoker", *arguments, config=config) as running:
        figures = asyncio.run(measure(running, args))
    show(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
