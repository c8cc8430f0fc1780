"""``stoker models``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click
import msgspec

from stoker.cli.common import (
    State,
    config_option,
    json_option,
    print_json,
    print_table,
)
from stoker.errors import PluginError, StokerError
from stoker.machine import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stoker.config import Config
    from stoker.discovery import Plugins
    from stoker.types import LocalModel

__all__ = ["ModelRow", "command"]

logger = logging.getLogger("stoker.cli")


class ModelRow(msgspec.Struct, kw_only=True):
    """One model that can be served, or is.

    Attributes:
        id: Its id in the API.
        reference: What ``stoker serve`` takes.
        path: Where it lies; ``None`` if that is not known.
        size_bytes: Its size; ``None`` if that is not known.
        backend: The installed backend that accepts it, if any does.
        configured: Whether the configuration serves it.
        loaded: Whether the server that was asked serves it; ``None`` if none answered.
        problem: Why it cannot be served, if that is known.
    """

    id: str
    reference: str
    path: str | None = None
    size_bytes: int | None = None
    backend: str | None = None
    configured: bool = False
    loaded: bool | None = None
    problem: str | None = None


@click.command("models")
@json_option
@click.option(
    "--url", help="Server to ask what is loaded.  [default: the configured one, if it runs]"
)
@click.option("--api-key", envvar="STOKER_API_KEY", help="Key to present to the server.")
@config_option
@click.pass_context
def command(
    ctx: click.Context,
    config_path: str | None,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """List the models that can be served, with sizes, and those that are loaded."""
    from stoker.cli.remote import find_server

    state = State.of(ctx)
    config, _ = state.config(config_path)
    server = find_server(config, url, api_key)
    loaded = server.models() if url else server.models_if_running()
    rows = _collect(config, state.plugins, loaded)
    if as_json:
        print_json(rows)
        return
    print_table(
        ["model", "reference", "size", "backend", "state"],
        [
            [
                row.id,
                row.reference,
                format_bytes(row.size_bytes) if row.size_bytes is not None else "-",
                row.backend or "-",
                _state(row),
            ]
            for row in rows
        ],
    )


def _state(row: ModelRow) -> str:
    words = ["loaded"] if row.loaded else []
    words += ["configured"] if row.configured else []
    words += [row.problem] if row.problem else []
    return ", ".join(words) or "available"


def _collect(config: Config, plugins: Plugins, loaded: list[str] | None) -> list[ModelRow]:
    """Configured models first, then what the sources have, then what only the server knows."""
    rows: dict[str, ModelRow] = {}
    for local in _available(plugins):
        rows[local.reference] = _row(local, plugins)
    for model in reversed(config.models):
        row = rows.pop(model.model, None) or _configured(model.model, plugins)
        row.id, row.configured = model.id or row.id, True
        rows = {model.model: row, **rows}
    if loaded is not None:
        for row in rows.values():
            row.loaded = row.id in loaded
        for name in loaded:
            if name not in {row.id for row in rows.values()}:
                rows[f"server:{name}"] = ModelRow(id=name, reference="-", loaded=True)
    return list(rows.values())


def _available(plugins: Plugins) -> Iterable[LocalModel]:
    for scheme, source in plugins.sources().items():
        try:
            yield from source.factory().available()
        except Exception as error:  # noqa: BLE001  # one source must not hide the others
            logger.warning("the model source %r cannot list its models: %s", scheme, error)


def _configured(reference: str, plugins: Plugins) -> ModelRow:
    """A configured model that no source listed: looked up without fetching anything."""
    from stoker.discovery import resolve_model, split_reference

    scheme, _ = split_reference(reference)
    if scheme not in ("file", "pypi"):  # looking up others may download
        return ModelRow(id=reference, reference=reference)
    try:
        return _row(resolve_model(reference, plugins), plugins)
    except StokerError as error:
        return ModelRow(id=reference, reference=reference, problem=str(error))


def _row(local: LocalModel, plugins: Plugins) -> ModelRow:
    here = local.path.exists()
    return ModelRow(
        id=local.model_id,
        reference=local.reference,
        path=str(local.path),
        size_bytes=local.size_bytes,
        backend=_backend(local, plugins) if here else None,
        problem=None if here else "assembled on first use",
    )


def _backend(local: LocalModel, plugins: Plugins) -> str | None:
    for name, info in sorted(plugins.backends().items(), key=lambda item: item[1].order):
        try:
            if info.factory().accepts(local):
                return name
        except (PluginError, ImportError, OSError) as error:
            logger.warning("the backend %r cannot look at %s: %s", name, local.path, error)
    return None
