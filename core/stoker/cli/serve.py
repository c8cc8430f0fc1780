"""``stoker serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stoker.cli.common import State, config_option

if TYPE_CHECKING:
    from stoker.config import Config

__all__ = ["command"]


@click.command("serve")
@click.argument("model", required=False)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 8000]")
@click.option("--backend", help="Backend that loads the model.  [default: auto]")
@click.option("--policy", help="Scheduling policy.  [default: fcfs]")
@click.option("--lanes", type=int, help="Sequences that run at once.")
@click.option("--context", type=int, help="Most tokens of one request, prompt and answer.")
@click.option("--threads", type=int, help="Compute threads.")
@click.option("--no-profile", is_flag=True, help="Ignore what `stoker tune` found.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    help="Key that clients must present; may be repeated. Better kept in a file: api_keys_file.",
)
@click.option(
    "--strict/--no-strict", default=None, help="Refuse request parameters that are not supported."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-format", type=click.Choice(["auto", "pretty", "json"]))
@config_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config_path: str | None,
    api_keys: tuple[str, ...],
    log_level: str | None,
    log_format: str | None,
    **flags: Any,
) -> int:
    """Serve a model behind an OpenAI-compatible API.

    MODEL is a path (model.gguf), a reference (hf:owner/repo/file.gguf, pypi:package) or the id of a
    configured model. Without it the configured models are served, or else a small default model.
    """
    state = State.of(ctx)
    overrides = {
        "server.host": flags["host"],
        "server.port": flags["port"],
        "server.api_keys": list(api_keys) or None,
        "server.strict": flags["strict"],
        "models.model": flags["model"],
        "models.backend": flags["backend"],
        "models.lanes": flags["lanes"],
        "models.context": flags["context"],
        "scheduler.policy": flags["policy"],
        "performance.threads": flags["threads"],
        "performance.profile": "off" if flags["no_profile"] else None,
        "logging.level": log_level,
        "logging.format": log_format,
    }
    file = state.config_file(config_path)
    if file is not None:
        config_path = str(file)  # by name: if it is gone when it is read again, that is a mistake

    def load() -> Config:
        return state.config(config_path, overrides)[0]

    config, origins = state.config(config_path, overrides)
    state.plugins.check(config)
    # The server brings Litestar and numpy: only now, when nothing is left to refuse.
    from stoker.serving import serve

    return serve(config, state.plugins, load, file, origins)
