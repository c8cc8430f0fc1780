"""``stoker pull``."""

from __future__ import annotations

import click

from stoker.cli.common import State, debug_option
from stoker.machine import format_bytes

__all__ = ["command"]


@click.command("pull")
@click.argument("reference")
@debug_option
@click.pass_context
def command(ctx: click.Context, reference: str) -> None:
    """Fetch a model, so that it can be served without a network.

    REFERENCE is what `stoker serve` takes, e.g. hf:owner/repo or hf:owner/repo/file.gguf.
    """
    from stoker.discovery import resolve_model

    model = resolve_model(reference, State.of(ctx).plugins, progress=True)
    click.echo(f"{model.path}  {format_bytes(model.size_bytes)}")
