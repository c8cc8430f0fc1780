"""What people are told about plugins: the rows of ``stoker plugins``, and refusals."""

from __future__ import annotations

from typing import Literal

import msgspec

from stoker.discovery.kinds import Kind
from stoker.discovery.plugin import Plugin
from stoker.errors import PluginConflictError, PluginContractError, PluginError, PluginLoadError
from stoker.interfaces import API_VERSION

__all__ = ["PluginListing", "asked_for", "row", "would_offer"]


class PluginListing(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``stoker plugins``.

    Attributes:
        name: The entry point's name.
        distribution: The distribution it comes from.
        version: The distribution's version.
        api_version: The plugin API it was written for; ``None`` if it could not say.
        status: ``active`` (in use under this configuration), ``available``, ``broken`` (it does not
            load) or ``refused`` (it loads but breaks a rule, is in conflict, or was left out).
        reason: Why it is broken or refused.
        provides: The names it offers, by kind.
        import_ms: Time to import it.
    """

    name: str
    distribution: str
    version: str
    api_version: int | None
    status: Literal["active", "available", "broken", "refused"]
    reason: str | None
    provides: dict[str, list[str]]
    import_ms: float


def row(plugin: Plugin, *, in_use: bool) -> PluginListing:
    """A plugin's row."""
    error = plugin.error
    status: Literal["active", "available", "broken", "refused"] = (
        "active" if in_use else "available"
    )
    if error is not None:
        # A plugin that was left out has no cause; one that raised has.
        raised = isinstance(error, PluginLoadError) and error.__cause__ is not None
        status = "broken" if raised else "refused"
    stated = [getattr(found, "api_version", None) for _, found in plugin.descriptors()]
    return PluginListing(
        name=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        api_version=next((v for v in stated if v), API_VERSION if error is None else None),
        status=status,
        reason=str(error) if error is not None else None,
        provides={
            kind: [str(getattr(item, "name", item)) for item in found]
            for kind, found in plugin.offered.items()
            if found
        },
        import_ms=round(plugin.import_ms, 2),
    )


def asked_for(plugin: Plugin, what: str) -> PluginError:
    """A broken plugin's error for whoever asked for ``what`` of it, with the cause chained."""
    error = plugin.error
    kept = type(error) if isinstance(error, PluginConflictError | PluginContractError) else None
    raised = (kept or PluginLoadError)(f"{what} is asked for, but {error}")
    raised.__cause__ = error.__cause__ if error is not None and error.__cause__ else error
    return raised


def would_offer(plugin: Plugin, kind: Kind, name: str) -> bool:
    """Whether a broken plugin would offer this: what its hooks said, else what it is called."""
    if plugin.offered:
        found = plugin.offered.get(kind, ())
        return any(getattr(descriptor, "name", None) == name for descriptor in found)
    own = (plugin.name, plugin.distribution)
    return name in own or plugin.distribution.endswith(f"-{name}")
