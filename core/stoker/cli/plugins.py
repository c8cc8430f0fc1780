"""``stoker plugins``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stoker.cli.common import State, config_option, json_option, print_json, print_wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker.discovery import PluginListing

__all__ = ["command"]


@click.command("plugins")
@json_option
@click.option("--check", is_flag=True, help="Fail if any plugin is broken or refused.")
@config_option
@click.pass_context
def command(ctx: click.Context, config_path: str | None, as_json: bool, check: bool) -> int:
    """List plugins: where from, what they offer, in use or why not."""
    state = State.of(ctx)
    config, _ = state.config(config_path)
    rows = state.plugins.listing(config)
    if as_json:
        print_json(rows)
    else:
        _print(rows)
    bad = [row for row in rows if row.status in ("broken", "refused")]
    return 1 if check and bad else 0


def _print(rows: Sequence[PluginListing]) -> None:
    wide = max((len(row.name) for row in rows), default=0)
    for row in rows:
        source = f"{row.distribution} {row.version}".strip()
        took = f", import {row.import_ms:.1f} ms" if row.import_ms else ""
        click.echo(f"{row.name:<{wide}}  {row.status:<9}  {source}{took}")
        for kind, names in row.provides.items():
            print_wrapped(", ".join(names), f"    {kind:<14}")
        if row.reason is not None:
            print_wrapped(row.reason, "    ")
