"""What several commands share: state, settings, options, tables."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pathlib import Path

    from stoker.config import Config
    from stoker.discovery import Plugins
    from stoker.settings import Origins
    from stoker.types import LocalModel

__all__ = [
    "State",
    "base_url",
    "config_option",
    "debug_option",
    "json_option",
    "line_width",
    "print_json",
    "print_table",
    "print_wrapped",
    "report",
]

F = TypeVar("F", bound=Callable[..., Any])
_MAX_WIDTH = 100


@dataclass
class State:
    """What lives as long as one run of the command line."""

    debug: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @classmethod
    def of(cls, ctx: click.Context) -> State:
        """The state of this run."""
        return ctx.ensure_object(cls)

    @cached_property
    def plugins(self) -> Plugins:
        """All plugins, found on first use."""
        from stoker.discovery import load_plugins

        return load_plugins()

    def config(self, path: str | None, overrides: Mapping[str, Any] = {}) -> tuple[Config, Origins]:
        """The effective configuration.

        Args:
            path: The value of ``--config``.
            overrides: Flags, by dotted key; those that are ``None`` were not given.
        """
        from stoker.settings import load_config

        return load_config(path, self.environ, overrides)

    def resolve(self, reference: str) -> LocalModel:
        """The model that a reference names, fetched if need be.

        Args:
            reference: What ``stoker serve`` takes.
        """
        from stoker.discovery import resolve_model

        return resolve_model(reference, self.plugins, progress=True)

    def config_file(self, path: str | None) -> Path | None:
        """The file that the configuration is read from, if there is one.

        Args:
            path: The value of ``--config``.
        """
        from stoker.settings import config_file

        return config_file(path, self.environ)


def _debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    State.of(ctx).debug |= value


def debug_option(function: F) -> F:
    """``-v/--debug``, also after the command's name."""
    option = click.option(
        "-v",
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_debug,
        help="Show tracebacks of errors.",
    )
    return option(function)


def config_option(function: F) -> F:
    """``--config FILE`` and ``--debug``."""
    option = click.option(
        "--config",
        "config_path",
        metavar="FILE",
        help="Configuration file.  [default: ./stoker.toml if there is one]",
    )
    return option(debug_option(function))


def json_option(function: F) -> F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def report(message: str) -> None:
    """One line on standard error."""
    click.echo(f"stoker: error: {' '.join(message.split())}", err=True)


def print_json(data: Any) -> None:
    """Data as indented JSON on standard output."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; where nobody measures the width, a line for each row, however long."""
    if not sys.stdout.isatty():
        lines = [columns, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for row in lines:
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            click.echo("   ".join(cells).rstrip())
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def line_width() -> int | None:
    """Where to break lines of text; ``None``, nowhere, where nobody measures the width."""
    if not sys.stdout.isatty():
        return None
    return min(shutil.get_terminal_size().columns, _MAX_WIDTH)


def print_wrapped(text: str, start: str) -> None:
    """Text on standard output, which stays to the right of ``start``."""
    width = line_width()
    if width is None:
        click.echo(start + text)
        return
    lines = textwrap.wrap(
        text,
        max(width - len(start), 1),
        break_long_words=False,
        break_on_hyphens=False,
    )
    for number, line in enumerate(lines):
        click.echo((" " * len(start) if number else start) + line)


def base_url(config: Config) -> str:
    """Where a server with this configuration would answer, as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.server.host, config.server.host)  # noqa: S104
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{config.server.port}"
