"""``stoker keys``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.common import State, config_option, json_option, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["command"]


def _file_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--file FILE``, ``--config FILE`` and ``--debug``."""
    option = click.option(
        "--file",
        "file",
        metavar="FILE",
        help="File of keys.  [default: the configured tenant_keys_file, else ./stoker-keys.toml]",
    )
    return option(config_option(function))


@click.group(
    "keys", no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
def command() -> None:
    """Make, list and revoke the API keys of tenants.

    Only digests are kept. A running server notices changes of its `[server] tenant_keys_file` by itself.
    """


@command.command("new")
@click.argument("tenant")
@click.option("--name", "label", default="", help="What to call the key, to tell it from others.")
@_file_option
@click.pass_context
def new(
    ctx: click.Context, tenant: str, label: str, file: str | None, config_path: str | None
) -> None:
    """Make a key for TENANT and print it, once: only its digest is kept."""
    import datetime

    from stoker.keys import add_key

    path = _path(ctx, file, config_path)
    today = datetime.datetime.now(datetime.UTC).date()
    key, entry = add_key(path, tenant, label, today)
    click.echo(key)
    click.echo(
        f"This is the only time the key is shown. {path} keeps its digest, {entry.digest}; "
        f"`stoker keys revoke {entry.id}` revokes it.",
        err=True,
    )


@command.command("list")
@json_option
@_file_option
@click.pass_context
def list_keys(ctx: click.Context, as_json: bool, file: str | None, config_path: str | None) -> None:
    """List the keys: whose they are, not what they are."""
    from stoker.keys import read_keys

    path = _path(ctx, file, config_path)
    entries = read_keys(path)
    columns = ("id", "tenant", "label", "created")
    rows = [
        (
            entry.id,
            entry.tenant,
            entry.label,
            entry.created.isoformat() if entry.created is not None else "",
        )
        for entry in entries
    ]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)


@command.command("revoke")
@click.argument("key_id", metavar="ID")
@_file_option
@click.pass_context
def revoke(ctx: click.Context, key_id: str, file: str | None, config_path: str | None) -> None:
    """Revoke the key with this ID, as `stoker keys list` shows it."""
    from stoker.keys import revoke_key

    entry = revoke_key(_path(ctx, file, config_path), key_id)
    label = f" ({entry.label})" if entry.label else ""
    click.echo(f"revoked {entry.id} of {entry.tenant}{label}")


def _path(ctx: click.Context, file: str | None, config_path: str | None) -> Path:
    """The file that is meant; says how to make a server use it if none is configured."""
    from stoker.keys import DEFAULT_KEYS_FILE

    if file is not None:
        return Path(file).expanduser()
    config, _ = State.of(ctx).config(config_path)
    if config.server.tenant_keys_file is not None:
        return Path(config.server.tenant_keys_file).expanduser()
    click.echo(
        f"No file of keys is configured; using ./{DEFAULT_KEYS_FILE}. For a server to use it, write "
        f'`tenant_keys_file = "{DEFAULT_KEYS_FILE}"` under [server] in stoker.toml.',
        err=True,
    )
    return Path(DEFAULT_KEYS_FILE)
