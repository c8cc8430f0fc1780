"""One streamed chat request, timed; and what to say of many times."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import time

import aiohttp

WORDS = (
    "river stone engine paper garden winter signal copper bridge window letter market ocean forest candle "
    "mirror ladder valley harbor thunder pocket silver meadow cotton planet basket hammer lantern orchard"
).split()


@dataclasses.dataclass
class Answer:
    """What came of one request. Times are of ``time.perf_counter``.

    Attributes:
        sent_s: When it was sent.
        status: HTTP status; 0 if the connection failed.
        stamps: When each event with text came.
        end_s: When the answer ended.
        prompt_tokens: As the server counted.
        completion_tokens: As the server counted.
        finish_reason: Of the last event.
        error: The error's code or message, before or within the stream.
        headers: Of the answer.
    """

    sent_s: float
    status: int = 0
    stamps: list[float] = dataclasses.field(default_factory=list)
    end_s: float = math.nan
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """Time to the first token; NaN if there was none."""
        return self.stamps[0] - self.sent_s if self.stamps else math.nan


def prompt(rng: random.Random, words: int) -> str:
    """About one token for each word."""
    return " ".join(rng.choices(WORDS, k=words))


def session(tenant: str | None = None) -> aiohttp.ClientSession:
    """A session whose requests are a tenant's, without any limit of its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"x-stoker-tenant": tenant} if tenant else {},
    )


async def ask(
    http: aiohttp.ClientSession,
    address: str,
    text: str,
    max_tokens: int,
    answer: Answer | None = None,
    **fields: object,
) -> Answer:
    """One greedy streamed request of exactly ``max_tokens`` tokens.

    Args:
        http: Whose request it is.
        address: The server's.
        text: The user's message.
        max_tokens: Of the answer.
        answer: Filled while it runs, for whoever wants to look before it ends.
        fields: More fields of the body.
    """
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    answer = answer or Answer(0.0)
    answer.sent_s = time.perf_counter()
    try:
        async with http.post(f"{address}/v1/chat/completions", json=body) as response:
            answer.status = response.status
            answer.headers = {k.lower(): v for k, v in response.headers.items()}
            if response.status != 200:
                found = await response.json()
                answer.error = found["error"].get("code") or found["error"]["message"]
            else:
                async for line in response.content:
                    _read(line, answer)
    except (aiohttp.ClientError, ConnectionError) as error:
        answer.error = repr(error)
    answer.end_s = time.perf_counter()
    return answer


def _read(line: bytes, answer: Answer) -> None:
    if not line.startswith(b"data: {"):
        return
    event = json.loads(line[6:])
    if "error" in event:
        answer.error = event["error"].get("code") or event["error"]["message"]
        return
    for choice in event.get("choices", ()):
        if choice["delta"].get("content"):
            answer.stamps.append(time.perf_counter())
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]


async def cancel(tasks: list[asyncio.Task[Answer]]) -> None:
    """End requests that nobody waits for any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
