"""From a model reference to a model on disk, through the model sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import msgspec

from stoker.decoding import did_you_mean
from stoker.discovery.plugins import Plugins
from stoker.errors import ConfigError, ModelError
from stoker.interfaces import ModelSourceInfo
from stoker.types import LocalModel

__all__ = ["resolve_model", "split_reference"]

# Two letters at least: ``C:\models`` is a path.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9-]+):(?P<rest>.*)", re.DOTALL)


def split_reference(reference: str) -> tuple[str, str]:
    """``("hf", "owner/repo")`` for ``hf:owner/repo``; a plain path has the scheme ``file``."""
    match = _SCHEME.fullmatch(reference)
    if match is None or _exists(reference):
        return "file", reference
    return match["scheme"].lower(), match["rest"]


def resolve_model(reference: str, plugins: Plugins, *, progress: bool = False) -> LocalModel:
    """The model that a reference names, fetched if need be.

    Args:
        reference: A path, or ``scheme:...`` of an installed model source.
        plugins: Where the sources are.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        ModelError: It is not there, or no source knows the scheme.
        PluginError: The source's plugin is broken.
    """
    scheme, rest = split_reference(reference)
    try:
        info = cast("ModelSourceInfo", plugins.require("model source", scheme))
    except ConfigError:
        known = sorted(plugins.sources())
        raise ModelError(
            f"{reference}: no model source has the scheme {scheme!r}."
            f"{did_you_mean(scheme, known)} Known: {', '.join(f'{name}:' for name in known)}"
            " and plain paths."
        ) from None
    model = info.factory().resolve(rest, progress=progress)
    return msgspec.structs.replace(model, reference=reference)


def _exists(reference: str) -> bool:
    try:
        return Path(reference).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a name too long, no home folder
        return False
