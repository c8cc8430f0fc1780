"""The installation: plugins, models, the address to listen on."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stoker.config import DEFAULT_MODEL, ModelConfig
from stoker.discovery import resolve_model, split_reference
from stoker.errors import StokerError
from stoker.interfaces import Finding
from stoker.machine import format_bytes

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.discovery import PluginListing, Plugins
    from stoker.interfaces import BackendInfo
    from stoker.types import LocalModel

__all__ = ["FoundModel", "check_models", "check_plugins", "check_port", "find_models", "folders"]

logger = logging.getLogger("stoker.doctor")

_SLOW_IMPORT_MS = 150.0
_AT_HAND = ("file", "pypi", "scripted")
"""Schemes whose models are looked up without fetching anything."""


# --------------------------------------------------------------------------- plugins


def check_plugins(rows: Sequence[PluginListing]) -> Iterator[Finding]:
    """What loads, and what is refused and why.

    Args:
        rows: As ``stoker plugins`` lists them.
    """
    good = [row for row in rows if row.status in ("active", "available")]
    names = ", ".join(f"{row.name} {row.version}".strip() for row in good)
    yield Finding(level="ok", topic="plugins", message=f"{len(good)} load: {names}.")
    for row in rows:
        reason = row.reason or "it does not say why"
        if row.status == "broken":
            yield Finding(
                level="warning",
                topic="plugins",
                message=f"{reason}.",
                cure=f"Upgrade or uninstall {row.distribution}; `stoker -v plugins` shows more.",
            )
        elif row.status == "refused":
            left_out = "left out by STOKER_PLUGINS" in reason
            yield Finding(
                level="note" if left_out else "warning", topic="plugins", message=f"{reason}."
            )
        elif row.import_ms > _SLOW_IMPORT_MS:
            yield Finding(
                level="note",
                topic="plugins",
                message=f"The plugin {row.name!r} took {row.import_ms:.0f} ms to import; every "
                "`stoker` command pays that.",
                cure="Its entry module should import nothing heavy: tell its authors.",
            )


def folders(plugins: Plugins) -> Mapping[str, Path]:
    """Where the model sources keep what they fetch, by what for."""
    found: dict[str, Path] = {}
    for scheme, source in plugins.sources().items():
        try:
            places = source.factory().folders()
        except Exception as error:  # noqa: BLE001  # one source must not hide the others
            logger.warning("the model source %r cannot tell its folders: %s", scheme, error)
            continue
        for place in places:
            found[f"models of {scheme}:"] = place
    return found


# --------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that the configuration, or the default, asks for.

    Attributes:
        reference: What was asked for.
        local: Where it is; ``None`` if it is not here (yet).
        backend: The backend that will load it; ``None`` if none would.
        finding: What to say of it.
    """

    reference: str
    local: LocalModel | None
    backend: str | None
    finding: Finding


def find_models(config: Config, plugins: Plugins, extra: str | None = None) -> list[FoundModel]:
    """The models that would be served; nothing is fetched.

    Args:
        config: The configuration; without models it stands for the default model.
        plugins: Sources and backends.
        extra: Another reference to look at.
    """
    wanted = [(model.model, model.backend) for model in config.models or [ModelConfig()]]
    wanted += [(model.draft_model, "auto") for model in config.models if model.draft_model]
    wanted += [(extra, "auto")] if extra else []
    return [
        _find(reference, backend, config, plugins) for reference, backend in dict.fromkeys(wanted)
    ]


def check_models(found: Sequence[FoundModel], available: int) -> Iterator[Finding]:
    """What to say of the models, their size included.

    Args:
        found: The models.
        available: Bytes of memory that are free.
    """
    for model in found:
        yield model.finding
    total = sum(model.local.size_bytes for model in found if model.local is not None)
    if total > available:
        yield Finding(
            level="warning",
            topic="models",
            message=f"The models together are {format_bytes(total)} on disk, and {format_bytes(available)} "
            "of memory are free.",
            cure="Use smaller models or quantisations of them, or end other programs.",
        )


def _find(reference: str, backend: str, config: Config, plugins: Plugins) -> FoundModel:
    default = " (the default model)" if reference == DEFAULT_MODEL else ""
    local = _available(reference, plugins)
    scheme, _ = split_reference(reference)
    if local is not None and not local.path.exists():
        message = (
            f"{reference}{default} is here in parts; they are put together when it is first served."
        )
        return FoundModel(
            reference, None, None, Finding(level="note", topic="models", message=message)
        )
    if local is None and scheme in _AT_HAND:
        try:
            local = resolve_model(reference, plugins)
        except (StokerError, OSError) as error:
            return _not_found(reference, f"{error}.")
    if local is None:
        finding = Finding(
            level="note",
            topic="models",
            message=f"{reference} is not on this machine; it is fetched when it is first served.",
            cure=f"`stoker pull {reference}` fetches it now.",
        )
        return FoundModel(reference, None, None, finding)
    try:
        name = _backend(local, backend, config, plugins)
    except (StokerError, ImportError, OSError) as error:
        return _not_found(reference, f"its backend cannot be asked: {error}.", local)
    if name is None:
        message = f"{reference}{default}: none of the installed backends accepts {local.path}."
        cure = (
            "Install one that does: stoker-backend-gguf (GGUF), stoker-backend-torch (safetensors) or "
            "stoker-backend-ctransformers (GGML files from before GGUF)."
        )
        return FoundModel(
            reference,
            local,
            None,
            Finding(level="problem", topic="models", message=message, cure=cure),
        )
    size = format_bytes(local.size_bytes)
    message = f"{local.model_id}{default}: {size}, loaded by {name}, in {local.path}."
    return FoundModel(reference, local, name, Finding(level="ok", topic="models", message=message))


def _not_found(reference: str, why: str, local: LocalModel | None = None) -> FoundModel:
    if not why.startswith(reference):
        why = f"{reference}: {why}"
    finding = Finding(level="problem", topic="models", message=why)
    return FoundModel(reference, local, None, finding)


def _available(reference: str, plugins: Plugins) -> LocalModel | None:
    """A model that its source has on this machine already, if only in parts."""
    scheme, _ = split_reference(reference)
    source = plugins.sources().get(scheme)
    if source is None or scheme == "file":
        return None
    try:
        known = source.factory().available()
    except Exception as error:  # noqa: BLE001  # somebody else's code
        logger.warning("the model source %r cannot list its models: %s", scheme, error)
        return None
    fitting = [
        m for m in known if m.reference == reference or m.reference.startswith(f"{reference}/")
    ]
    return fitting[0] if fitting else None


def _backend(local: LocalModel, wanted: str, config: Config, plugins: Plugins) -> str | None:
    """The backend that loads a model, as ``serve`` chooses it."""
    if wanted != "auto":
        plugins.require("backend", wanted)
        return wanted
    for info in cast("list[BackendInfo]", plugins.active("backend", config)):
        try:
            if info.factory().accepts(local):
                return info.name
        except Exception as error:  # noqa: BLE001  # somebody else's code; it gets a finding of its own
            logger.debug("the backend %r cannot look at %s: %s", info.name, local.path, error)
    return None


# --------------------------------------------------------------------------- the address


def check_port(host: str, port: int, running: Sequence[str] | None) -> Finding:
    """Whether a server could listen there.

    Args:
        host: ``[server] host``.
        port: ``[server] port``.
        running: The models of the server that answers there; ``None`` if none does.
    """
    where = f"{host}:{port}"
    if port == 0:
        return Finding(level="ok", topic="address", message="The server takes a free port.")
    if running is not None:
        models = ", ".join(running) or "no model"
        return Finding(
            level="note",
            topic="address",
            message=f"A server runs at {where} already and serves {models}.",
        )
    try:
        _bind(host, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "another program uses it" if taken else error.strerror or str(error)
        return Finding(
            level="problem",
            topic="address",
            message=f"The server cannot listen at {where}: {reason}.",
            cure="End that program, or choose another: `stoker serve --port 0` takes a free one."
            if taken
            else "Choose another address: [server] host and port.",
        )
    return Finding(level="ok", topic="address", message=f"{where} is free.")


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
