"""The command group, lazily: a command's module is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from stoker import __version__
from stoker.cli.common import State, report
from stoker.decoding import did_you_mean
from stoker.discovery import CORE_COMMANDS
from stoker.errors import ConfigError, PluginError, PluginLoadError, StokerError

__all__ = ["run"]

_INTERRUPTED = 130  # what shells report for SIGINT


class _Group(click.Group):
    """The core's commands, then the plugins'."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*CORE_COMMANDS, *State.of(ctx).plugins.commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in CORE_COMMANDS:
            command: click.Command = importlib.import_module(f"stoker.cli.{cmd_name}").command
            return command
        plugins = State.of(ctx).plugins
        try:
            plugins.require("command", cmd_name)
        except ConfigError:
            return None
        info = plugins.commands()[cmd_name]
        try:
            command = info.factory()
        except Exception as error:
            raise PluginLoadError(
                f"the plugin command {cmd_name!r} is broken: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(command, click.Command):
            raise PluginLoadError(f"the plugin command {cmd_name!r} is no click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"there is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without building those of plugins."""
        core = []
        for name in CORE_COMMANDS:
            command = self.get_command(ctx, name)
            core.append((name, command.get_short_help_str(80) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(core)
        extra = [(name, info.summary) for name, info in State.of(ctx).plugins.commands().items()]
        if extra:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(extra)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="stoker %(version)s")
@click.option("-v", "--debug", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def _stoker(ctx: click.Context, debug: bool) -> None:
    """Serve local language models behind an OpenAI-compatible API.

    `stoker serve` serves a small default model; `stoker COMMAND --help` explains a command. Settings come
    from ./stoker.toml, STOKER_* variables and flags, in this order: the later wins.
    """
    State.of(ctx).debug |= debug


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and turn every error into one line and an exit code."""
    state = State()
    try:
        result = _stoker.main(
            list(argv) if argv is not None else None,
            prog_name="stoker",
            standalone_mode=False,
            obj=state,
        )
    except click.Abort:
        return _INTERRUPTED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.ClickException, StokerError) as error:
        return _fail(state, error)
    except Exception as error:  # noqa: BLE001  # the last stop before the user's terminal
        return _fail(state, error)
    return result if isinstance(result, int) else 0


def _fail(state: State, error: Exception) -> int:
    if state.debug:
        traceback.print_exception(error)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "stoker"
        text = error.format_message()
        report(f"{text}{'' if text.endswith(('.', '?')) else '.'} Try '{command} --help'.")
        return 2
    if isinstance(error, click.ClickException):
        report(error.format_message())
        return error.exit_code
    if isinstance(error, StokerError):
        report(str(error))
        return 2 if isinstance(error, ConfigError | PluginError) else 1
    report(f"unexpected {type(error).__name__}: {error} (use `stoker -v` to see where)")
    return 1
