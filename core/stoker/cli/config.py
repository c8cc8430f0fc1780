"""``stoker config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from stoker.cli.common import State, config_option, json_option, print_json, print_table

__all__ = ["command"]


@click.command("config")
@json_option
@click.option("--check", is_flag=True, help="Also check names and options of plugins.")
@config_option
@click.pass_context
def command(ctx: click.Context, config_path: str | None, as_json: bool, check: bool) -> None:
    """Show the effective configuration and where each setting comes from.

    Secrets are masked.
    """
    from stoker.masking import printable

    state = State.of(ctx)
    config, origins = state.config(config_path)
    if check:
        state.plugins.check(config)
    data = printable(config)
    if as_json:
        print_json({"config": data, "origins": origins})
        return
    print_table(
        ["setting", "value", "from"],
        [[dotted, _show(_look_up(data, dotted)), origin] for dotted, origin in origins.items()],
    )
    if check:
        click.echo("The configuration is valid.")


def _look_up(data: Mapping[str, Any], dotted: str) -> Any:
    """The value of an origin's key: ``section.field``, ``models[0].field`` or ``plugins.name.key``."""
    where, _, field = dotted.rpartition(".")
    if where.startswith(("models[", "tenants[")):
        section, _, index = where[:-1].partition("[")
        return data[section][int(index)][field]
    if where.startswith("plugins."):
        return data["plugins"][where.removeprefix("plugins.")][field]
    return data[where][field]


def _show(value: Any) -> str:
    import msgspec

    return "-" if value is None else msgspec.json.encode(value).decode()
