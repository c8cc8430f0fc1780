"""What HTTP streaming costs: SSE events per second over 64 clients, on a runtime that costs nothing.

The server runs on one core, the clients on another. Every token is one event; the clients count them.

    python bench/http_stream.py [--clients 64] [--tokens 800] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time

from serving import server


async def stream(host: str, port: int, body: bytes) -> int:
    """One streamed request over a raw socket; returns the number of events that carried a token."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    events = 0
    end = b""
    pattern = b'"text":"'
    data = b""
    while chunk := await reader.read(2**18):
        # What is left of the last chunk is too short to hold the pattern, so nothing counts twice.
        data = data[1 - len(pattern) :] + chunk
        events += data.count(pattern)
        end = (end + chunk)[-100:]
    writer.close()
    if not end.endswith(b"0\r\n\r\n") or b"[DONE]" not in end:
        raise SystemExit(f"a stream broke off: {end!r}")
    return events


async def measure(address: str, clients: int, tokens: int) -> tuple[float, int]:
    host, port = address.removeprefix("http://").split(":")
    bodies = [
        json.dumps(
            {"prompt": f"client {i}", "max_tokens": tokens, "temperature": 0, "stream": True}
        ).encode()
        for i in range(clients)
    ]
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream(host, int(port), body) for body in bodies))
    elapsed = time.perf_counter() - started
    return sum(counts) / elapsed, min(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    own, servers = ({cores[0]}, {cores[1]}) if len(cores) > 1 else (set(cores), set(cores))
    os.sched_setaffinity(0, own)
    arguments = ("scripted:bench", "--lanes", str(args.clients), "--context", str(args.tokens + 64))
    figures = []
    with server(*arguments, cores=servers) as address:
        asyncio.run(measure(address, args.clients, 50))  # warm-up, not counted
        for _ in range(args.rounds):
            rate, fewest = asyncio.run(measure(address, args.clients, args.tokens))
            if fewest < args.tokens:
                raise SystemExit(f"a stream carried {fewest} events for {args.tokens} tokens")
            figures.append(rate)
    print(
        f"{args.clients} clients, one event per token: median {statistics.median(figures):,.0f} events/s "
        f"on one core (rounds: {', '.join(f'{f:,.0f}' for f in figures)})"
    )


if __name__ == "__main__":
    main()
