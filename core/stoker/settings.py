"""Reads the configuration: ``stoker.toml`` < environment ``STOKER_*`` < flags.

Environment variables:

* ``STOKER_<SECTION>_<FIELD>``: any setting of a section, e.g. ``STOKER_SERVER_PORT=8123``. Lists are
  separated by commas.
* ``STOKER_MODEL``: serve this model, and only this one; ``STOKER_MODEL_<FIELD>``
  (``STOKER_MODEL_LANES=8``) sets a field of every model.
* ``STOKER_PLUGINS__<NAME>__<KEY>``: a plugin's option; dashes of the name are underscores. The value
  is read as TOML (``5``, ``true``, ``["a"]``), or as text where it is no TOML.
* Tenants stand in the file only.
* ``STOKER_CONFIG`` (the file), ``STOKER_PLUGINS`` (limits which plugins load), ``STOKER_CACHE`` (where
  assembled models lie) and ``STOKER_API_KEY`` (what ``stoker chat`` and ``stoker models`` present to a
  server) are read elsewhere.

Any other ``STOKER_*`` variable is refused: it would be a setting that silently does nothing.
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stoker.checks import check_config, tables
from stoker.config import DEFAULT_MODEL, Config, ModelConfig
from stoker.decoding import decode, did_you_mean, struct_fields
from stoker.errors import ConfigError

__all__ = ["DEFAULT_FILE", "OTHER_VARIABLES", "Origins", "config_file", "load_config"]

DEFAULT_FILE = "stoker.toml"

OTHER_VARIABLES = frozenset({"STOKER_CONFIG", "STOKER_PLUGINS", "STOKER_CACHE", "STOKER_API_KEY"})
"""``STOKER_*`` variables that are not settings."""

Origins = dict[str, str]
"""Dotted key -> ``default``, the file's path, ``environment STOKER_X`` or ``flag --x``."""

_NOT_IN_ENVIRONMENT = ("models", "plugins", "tenants")  # written differently there, or not at all
_PLUGIN_PREFIX = "STOKER_PLUGINS__"

# Flags that are not called like their setting.
_FLAGS = {
    "models.model": "argument MODEL",
    "server.api_keys": "flag --api-key",
    "logging.level": "flag --log-level",
    "logging.format": "flag --log-format",
    "performance.profile": "flag --no-profile",
}


def load_config(
    path: str | None, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[Config, Origins]:
    """The effective configuration, and where each setting comes from.

    Args:
        path: The file that ``--config`` names; ``None`` takes ``STOKER_CONFIG``, or ``./stoker.toml``
            if there is one.
        environ: The environment.
        overrides: Flags, by dotted key: ``{"server.port": 8123}``. ``models.model`` serves one model
            only: the configured one of that ``id`` or reference, else a new one. Any other
            ``models.<field>`` is set on every model. Values of ``None`` are ignored.

    Raises:
        ConfigError: Names the setting, its origin and what to do.
    """
    tree, origins = _read_file(path or environ.get("STOKER_CONFIG") or None)
    _check_shape(tree, origins)
    models: dict[str, tuple[Any, str]] = {}
    for dotted, value, origin in (*_from_environment(environ), *_from_flags(overrides)):
        section, _, rest = dotted.partition(".")
        if section == "models":
            models[rest] = (value, origin)
        elif section == "plugins":
            name, _, key = rest.partition(".")
            tree.setdefault("plugins", {}).setdefault(name, {})[key] = value
            origins[dotted] = origin
        else:
            tree.setdefault(section, {})[rest] = value
            origins[dotted] = origin
    _apply_to_models(tree, origins, models)
    config = decode(tree, Config, origin=lambda dotted: _origin_of(dotted, origins))
    check_config(config, lambda dotted: _origin_of(dotted, origins))
    return config, _complete(config, origins)


def config_file(path: str | None, environ: Mapping[str, str]) -> Path | None:
    """The file that ``load_config`` would read; ``None`` if there is none.

    Args:
        path: The file that ``--config`` names.
        environ: The environment.
    """
    named = path or environ.get("STOKER_CONFIG") or None
    file = Path(named or DEFAULT_FILE).expanduser()
    return file if named is not None or file.is_file() else None


# --------------------------------------------------------------------------- sources


def _read_file(path: str | None) -> tuple[dict[str, Any], Origins]:
    file = Path(path or DEFAULT_FILE).expanduser()
    if path is None and not file.is_file():
        return {}, {}
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or DEFAULT_FILE}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path or DEFAULT_FILE}: not valid TOML: {error}") from error
    return tree, dict.fromkeys(_leaves(tree), str(path or DEFAULT_FILE))


def _leaves(value: Any, dotted: str = "") -> Iterator[str]:
    """Dotted names of everything below ``value``, with their parents."""
    if dotted:
        yield dotted
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{dotted}[{index}]")


def _check_shape(tree: Mapping[str, Any], origins: Origins) -> None:
    """Decode the file alone first, so that its mistakes are reported as its own."""
    decode(tree, Config, origin=lambda dotted: _origin_of(dotted, origins))


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """``(dotted key, value, origin)`` of every setting in the environment."""
    settings = _variables()
    for variable in sorted(environ):
        if not variable.startswith("STOKER_") or variable in OTHER_VARIABLES:
            continue
        text, origin = environ[variable], f"environment {variable}"
        if variable.startswith(_PLUGIN_PREFIX):
            name, _, key = variable.removeprefix(_PLUGIN_PREFIX).partition("__")
            if not (name and key):
                raise ConfigError(f"{variable}: write it as STOKER_PLUGINS__<NAME>__<KEY>")
            yield f"plugins.{name.lower().replace('_', '-')}.{key.lower()}", _toml(text), origin
        elif variable in settings:
            dotted, type_ = settings[variable]
            raw: Any = text
            if typing.get_origin(type_) is list:
                raw = [item.strip() for item in text.split(",") if item.strip()]
            yield dotted, decode(raw, type_, dotted, strict=False, origin=origin), origin
        else:
            hint = did_you_mean(variable, {*settings, *OTHER_VARIABLES})
            if variable.startswith("STOKER_PLUGINS_"):
                hint = " A plugin's option is written STOKER_PLUGINS__<NAME>__<KEY>."
            raise ConfigError(f"{variable}: no setting is read from this variable.{hint}")


def _variables() -> dict[str, tuple[str, Any]]:
    """Environment variable -> dotted key and type."""
    found: dict[str, tuple[str, Any]] = {}
    for section, struct in struct_fields(Config).items():
        if section in _NOT_IN_ENVIRONMENT:
            continue
        for field, type_ in struct_fields(struct).items():
            found[f"STOKER_{section}_{field}".upper()] = (f"{section}.{field}", type_)
    for field, type_ in struct_fields(ModelConfig).items():
        if field != "options":
            found[f"STOKER_MODEL_{field}".upper()] = (f"models.{field}", type_)
    found["STOKER_MODEL"] = found.pop("STOKER_MODEL_MODEL")
    return found


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _from_flags(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for dotted, value in overrides.items():
        if value is not None:
            field = dotted.rpartition(".")[2].replace("_", "-")
            yield dotted, value, _FLAGS.get(dotted, f"flag --{field}")


def _apply_to_models(
    tree: dict[str, Any], origins: Origins, models: Mapping[str, tuple[Any, str]]
) -> None:
    """Put the settings of ``models.<field>`` onto the list of models."""
    entries: list[dict[str, Any]] = tree.get("models") or [{}]
    changes = dict(models)
    if "model" in changes:
        wanted, origin = changes.pop("model")
        chosen = [entry for entry in entries if wanted in (entry.get("id"), entry.get("model"))]
        if chosen:
            index = entries.index(chosen[0])
            kept = {
                "models[0]" + dotted.removeprefix(f"models[{index}]"): where
                for dotted, where in origins.items()
                if dotted.startswith(f"models[{index}]")
            }
        else:
            chosen, kept = [{"model": wanted}], {"models[0].model": origin}
        for dotted in [dotted for dotted in origins if dotted.startswith("models")]:
            del origins[dotted]
        origins.update(kept)
        entries = chosen[:1]
    for field, (value, origin) in changes.items():
        for index, entry in enumerate(entries):
            entry[field] = value
            origins[f"models[{index}].{field}"] = origin
    for entry in entries:
        entry.setdefault("model", DEFAULT_MODEL)
    tree["models"] = entries


# --------------------------------------------------------------------------- origins


def _origin_of(dotted: str, origins: Origins) -> str:
    """Where a key, or the nearest thing above it, was read."""
    while dotted:
        if dotted in origins:
            return origins[dotted]
        dotted = re.sub(r"(\.[^.\[\]]*|\[[^\]]*\]|^[^.\[\]]*)$", "", dotted)
    return "default"


def _complete(config: Config, origins: Origins) -> Origins:
    """An origin for every field there is, in order; the parents are dropped."""
    dotted = (f"{where}.{field}" for _, where, table in tables(config) for field in table)
    return {key: origins.get(key, "default") for key in dotted}
