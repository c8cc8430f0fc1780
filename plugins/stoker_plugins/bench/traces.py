"""Production traces: when requests came, how long they were, what they shared; scaled to fit a machine."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from stoker.errors import ConfigError
from stoker_plugins.bench.workload import Load, Session, Shot, TokensPerWord, prose, user

__all__ = ["BUNDLED", "Scale", "TraceRow", "read_trace", "trace_load"]

BUNDLED = {
    "azure-code": "azure-code.csv",
    "azure-conversation": "azure-conversation.csv",
    "mooncake": "mooncake.jsonl",
}
"""Excerpts that come with stoker; see ``excerpts/README.md`` for where they are from, and their licences."""

_AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
_BLOCK_TOKENS = 512  # of one of Mooncake's hash ids


class TraceRow(msgspec.Struct, frozen=True):
    """One request of a trace.

    Attributes:
        timestamp: Milliseconds after the trace's start.
        input_length: Tokens of the prompt.
        output_length: Tokens of the answer.
        hash_ids: One for each 512 tokens of the prompt; equal ids are equal blocks after equal prefixes.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """How a trace is fitted to a machine.

    Attributes:
        speedup: Time runs so many times faster.
        lengths: Factor of all token counts.
        max_prompt: Longest prompt, in tokens; longer ones are cut.
        max_output: Longest answer, in tokens.
    """

    speedup: float = 1.0
    lengths: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None

    def prompt(self, tokens: int) -> int:
        """Tokens of a prompt."""
        return _fitted(tokens, self.lengths, self.max_prompt)

    def output(self, tokens: int) -> int:
        """Tokens of an answer."""
        return _fitted(tokens, self.lengths, self.max_output)


def _fitted(tokens: int, factor: float, most: int | None) -> int:
    scaled = max(1, round(tokens * factor))
    return scaled if most is None else min(scaled, most)


def read_trace(name: str, limit: int) -> list[TraceRow]:
    """The first requests of a trace, in order of time, the first at 0.

    Args:
        name: Of a bundled excerpt, or of a file in Azure's CSV or Mooncake's JSONL format.
        limit: Most requests.

    Raises:
        ConfigError: It is not there, or not in one of the formats.
    """
    if name in BUNDLED:
        source = resources.files(__package__) / "excerpts" / BUNDLED[name]
        rows = list(itertools.islice(_rows(name, iter(source.read_text().splitlines())), limit))
    else:
        try:
            with Path(name).open(encoding="utf-8") as lines:
                rows = list(itertools.islice(_rows(name, lines), limit))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            known = ", ".join(BUNDLED)
            raise ConfigError(
                f"--trace: {name}: {reason} (bundled traces: {known}; or name a file)"
            ) from error
    if not rows:
        raise ConfigError(f"--trace: {name}: there are no requests in it")
    start = min(row.timestamp for row in rows)
    rows.sort(key=lambda row: row.timestamp)
    return [msgspec.structs.replace(row, timestamp=row.timestamp - start) for row in rows]


def _rows(name: str, lines: Iterator[str]) -> Iterator[TraceRow]:
    first = next(lines, "").strip()
    if first == _AZURE_HEADER:
        parse, first_line = _azure, 2
    elif first.startswith("{"):
        parse, first_line = _mooncake, 1
        lines = itertools.chain((first,), lines)
    else:
        raise ConfigError(
            f"--trace: {name}: unknown format; it must begin with the line {_AZURE_HEADER} (Azure), or "
            'each line must be an object with "timestamp", "input_length" and "output_length" (Mooncake)'
        )
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            row = parse(line.strip())
        except (ValueError, msgspec.MsgspecError) as error:
            raise ConfigError(f"--trace: {name}, line {number}: {error}") from error
        if row.input_length < 0 or row.output_length < 0:
            raise ConfigError(f"--trace: {name}, line {number}: lengths must not be negative")
        yield row


def _azure(line: str) -> TraceRow:
    stamp, context, generated = line.split(",")
    # Seven digits of a second's fraction are one more than Python knows.
    whole, _, fraction = stamp.partition(".")
    when = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    ms = when.timestamp() * 1e3 + float(f"0.{fraction or 0}") * 1e3
    return TraceRow(ms, int(context), int(generated))


def _mooncake(line: str) -> TraceRow:
    return msgspec.json.decode(line, type=TraceRow)


def trace_load(
    rows: list[TraceRow],
    seed: str,
    *,
    scale: Scale,
    words: TokensPerWord,
    extra: dict[str, Any] | None = None,
) -> Load:
    """The open-loop load of a trace.

    Args:
        rows: From ``read_trace``.
        seed: What the prompts' texts are drawn from.
        scale: Fits it to the machine.
        words: The tokenizer's measure.
        extra: More fields of the bodies.
    """

    def sessions() -> Iterator[Session]:
        for number, row in enumerate(rows):
            prompt = user(_prompt(row, f"{seed} {number}", seed, scale, words))
            shot = Shot((prompt,), scale.output(row.output_length), extra=extra or {})
            yield Session((shot,), row.timestamp / 1e3 / scale.speedup)

    return Load(sessions())


def _prompt(row: TraceRow, own_seed: str, seed: str, scale: Scale, words: TokensPerWord) -> str:
    """Random words; with hash ids, block by block, the same text for the same id."""
    total = words.words(scale.prompt(row.input_length))
    if not row.hash_ids:
        return prose(random.Random(own_seed), total)
    block = words.words_within(max(1, round(_BLOCK_TOKENS * scale.lengths)))
    text: list[str] = []
    for index, hash_id in enumerate(row.hash_ids):
        rest = total - index * block
        if rest <= 0:
            break
        # A whole block, cut if it is the last: what is cut is still a prefix of the shared block.
        block_words = prose(random.Random(f"{seed} block {hash_id}"), block).split(" ")
        text += block_words[:rest]
    missing = total - len(text)
    if missing > 0:
        text.append(prose(random.Random(own_seed), missing))
    return " ".join(text)
