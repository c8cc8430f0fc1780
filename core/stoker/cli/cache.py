"""``stoker cache``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.common import State, config_option, json_option, print_json
from stoker.machine import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["command"]

_SHOWN_RECENT = 10
_WIDTH = 10_000  # where nobody measures it: whole words


@click.command("cache")
@click.option("--model", help="Of this model only.")
@click.option("--clear", is_flag=True, help="Drop everything that is kept but for pinned prefixes.")
@click.option(
    "--watch",
    is_flag=False,
    flag_value=2.0,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Show it again every so many seconds, until Ctrl-C.  [default: 2]",
)
@json_option
@click.option("--url", help="Server to ask.  [default: the configured one]")
@click.option("--api-key", envvar="STOKER_API_KEY", help="Key to present to the server.")
@config_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config_path: str | None,
    model: str | None,
    clear: bool,
    watch: float | None,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """Show what the prefix cache of a running server keeps: hits, sizes, evictions and why.

    With a key of an administrator ([server] admins) it shows everything, with others the tenant's own.
    """
    from stoker.cli.remote import find_server

    if watch is not None and (as_json or clear):
        raise click.UsageError("--watch goes with neither --json nor --clear", ctx)
    config, _ = State.of(ctx).config(config_path)
    server = find_server(config, url, api_key)
    if clear:
        cleared = server.clear_cache(model)
        if as_json:
            print_json(cleared)
        for row in () if as_json else cleared["data"]:
            click.echo(f"{row['model']}: dropped {_count(row['dropped'], 'kept prefix')}")
        return
    answer = server.cache(model)
    if as_json:
        print_json(answer)
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    if watch is None:
        console.print(_page(answer))
        return
    _watch(console, watch, answer, lambda: server.cache(model))


def _watch(console: Console, seconds: float, answer: Mapping[str, Any], ask: Any) -> None:
    """Show it again and again until somebody has seen enough."""
    from rich.live import Live

    try:
        if not console.is_terminal:
            while True:
                console.print(_page(answer))
                time.sleep(seconds)
                answer = ask()
        with Live(_page(answer), console=console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(seconds)
                live.update(_page(ask()), refresh=True)
    except KeyboardInterrupt:
        return


def _page(answer: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for cache in answer["data"]:
        whose = "" if cache["tenant"] is None else f", what is {cache['tenant']}'s"
        heading = f"{cache['model']} (eviction {answer['eviction']}{whose})"
        parts.append(Text(heading, style="bold"))
        parts += [Text(line) for line in _totals(cache["totals"])]
        parts += _tables(cache)
    return Group(*parts)


def _totals(totals: Mapping[str, Any] | None) -> Iterable[str]:
    """Hits, costs and trouble, a line each; nothing for those who may not see them."""
    if totals is None:
        return
    share = totals["hit_tokens"] / totals["query_tokens"] if totals["query_tokens"] else 0.0
    yield (
        f"hits: {totals['hits']:,} of {_count(totals['queries'], 'request')}, "
        f"{totals['hit_tokens']:,} of {totals['query_tokens']:,} prompt tokens ({share:.0%})"
    )
    if totals["hits_by_way"]:
        tokens = totals["hit_tokens_by_way"]
        ways = totals["hits_by_way"].items()
        yield "by way: " + ", ".join(f"{way} {n:,} ({tokens[way]:,} tokens)" for way, n in ways)
    if totals["shared_waits"]:
        yield (
            f"waited for a prefix that another one computed: {_count(totals['shared_waits'], 'request')}"
            f", {totals['shared_wait_s']:.1f} s together"
        )
    costs = [
        f"{name} {totals[f'{what}_s_per_token'] * 1e3:.3g} ms"
        for name, what in _COSTS
        if totals[f"{what}_s_per_token"]
    ]
    if costs:
        yield "cost of a token: " + ", ".join(costs)
    for what, text in _TROUBLE:
        if totals[what]:
            yield f"{text}: {totals[what]:,}"
    if totals["disk_problem"]:
        yield f"no snapshots on disk: {totals['disk_problem']}"


_COSTS = (("compute", "prefill"), ("copy", "copy"), ("save", "snapshot"), ("restore", "restore"))
_TROUBLE = (
    ("pins_evicted", "pinned prefixes that had to yield"),
    ("strategy_errors", "failures of the eviction strategy"),
    ("store_errors", "failures of the store of snapshots"),
    ("damaged_files", "damaged files of snapshots"),
)


def _tables(cache: Mapping[str, Any]) -> Iterable[RenderableType]:
    yield _table(
        ["tier", "prefixes", "tokens", "size", "limit", "pinned"],
        [
            [
                tier["tier"],
                f"{tier['entries']:,}",
                f"{tier['tokens']:,}",
                _size(tier["bytes"]),
                "-" if tier["capacity_bytes"] is None else format_bytes(tier["capacity_bytes"]),
                f"{tier['pinned']:,}",
            ]
            for tier in cache["tiers"]
        ],
    )
    if len({row["tenant"] for row in cache["tenants"]}) > 1:
        yield _table(
            ["tenant", "tier", "prefixes", "tokens", "size", "hits"],
            [
                [
                    row["tenant"],
                    row["tier"],
                    f"{row['entries']:,}",
                    f"{row['tokens']:,}",
                    _size(row["bytes"]),
                    f"{row['hits']:,}",
                ]
                for row in cache["tenants"]
            ],
        )
    evictions = () if cache["totals"] is None else cache["totals"]["evictions"]
    if evictions:
        yield _table(
            ["evicted from", "why", "times", "tokens"],
            [
                [row["tier"], row["reason"], f"{row['count']:,}", f"{row['tokens']:,}"]
                for row in evictions
            ],
        )
    if cache["recent"]:
        yield _table(
            [
                "last evictions",
                "from",
                "why",
                "tenant",
                "tokens",
                "size",
                "unused for",
                "hits",
                "kept",
            ],
            [
                [
                    f"{_seconds(row['seconds_ago'])} ago",
                    row["tier"],
                    row["reason"],
                    row["tenant"],
                    f"{row['tokens']:,}",
                    _size(row["bytes"]),
                    _seconds(row["idle_s"]),
                    f"{row['hits']:,}",
                    "below" if row["stored"] else "no",
                ]
                for row in cache["recent"][:_SHOWN_RECENT]
            ],
        )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _size(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else "-"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("x") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
