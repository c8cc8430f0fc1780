"""From entry points to checked plugins: every way in which one can be broken, kept to itself.

What is wrong with a plugin is remembered, not raised: it matters only if the configuration asks for
something of it (``Plugins.require``). A plugin is taken whole or not at all.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence

import importlib_metadata

from stoker.discovery.contract import register
from stoker.discovery.kinds import Kind
from stoker.discovery.plugin import Plugin
from stoker.discovery.plugins import Plugins
from stoker.errors import PluginConflictError, PluginError, PluginLoadError

__all__ = ["GROUP", "load_plugins"]

GROUP = "stoker"


def load_plugins(
    entry_points: Iterable[importlib_metadata.EntryPoint] | None = None,
    only: Sequence[str] | None = None,
) -> Plugins:
    """Find, import and check all plugins. Never fails because of one.

    Args:
        entry_points: Where to look; by default everything installed.
        only: Names of the entry points to load beside the bundled ones; by default what the
            environment variable ``STOKER_PLUGINS`` lists (``a,b``; empty: the bundled ones only), and
            all if it is not set.
    """
    if entry_points is None:
        entry_points = importlib_metadata.entry_points(group=GROUP)
    if only is None and "STOKER_PLUGINS" in os.environ:
        only = [name.strip() for name in os.environ["STOKER_PLUGINS"].split(",") if name.strip()]
    pairs = [(_describe(entry_point), entry_point) for entry_point in entry_points]
    # The bundled plugins come first, so that nobody can take a name from them.
    pairs.sort(key=lambda pair: (not pair[0].bundled, pair[0].distribution, pair[0].name))
    plugins = [plugin for plugin, _ in pairs]
    if only is not None:
        _leave_out(plugins, only)
    _refuse_shared_entry_points(plugins)
    for plugin, entry_point in pairs:
        if plugin.error is None:
            _load(plugin, entry_point)
    contested = _refuse_taken_names(plugins)
    missing = [name for name in only or () if name not in {plugin.name for plugin in plugins}]
    return Plugins(plugins, contested=contested, missing=missing)


def _describe(entry_point: importlib_metadata.EntryPoint) -> Plugin:
    distribution = entry_point.dist
    if distribution is None:
        return Plugin(name=entry_point.name, distribution="no distribution")
    name = re.sub(r"[-_.]+", "-", distribution.name or "unknown").lower()
    return Plugin(name=entry_point.name, distribution=name, version=distribution.version or "")


def _leave_out(plugins: Iterable[Plugin], only: Sequence[str]) -> None:
    for plugin in plugins:
        if not plugin.bundled and plugin.name not in only:
            plugin.error = PluginLoadError(f"{plugin.label} is left out by STOKER_PLUGINS")


def _refuse_shared_entry_points(plugins: Sequence[Plugin]) -> None:
    """Two distributions with one entry-point name: both are refused, except a bundled one."""
    holders: dict[str, list[Plugin]] = {}
    for plugin in plugins:
        if plugin.error is None:
            holders.setdefault(plugin.name, []).append(plugin)
    for name, claimants in holders.items():
        if len(claimants) == 1:
            continue
        names = " and ".join(plugin.distribution for plugin in claimants)
        for plugin in claimants:
            if not plugin.bundled:
                plugin.error = PluginConflictError(
                    f"the entry-point name {name!r} is claimed by {names}: uninstall one of them"
                )


def _refuse_taken_names(plugins: Iterable[Plugin]) -> dict[tuple[Kind, str], PluginConflictError]:
    """Two plugins with one name of one kind: the later is refused, and the name is contested.

    "Later" is by name of distribution, which is no reason to trust one more than the other. So a
    contested name cannot be asked for at all, unless it is the bundled plugins', whose names are safe.

    Returns:
        The contested names, with the error for whoever asks.
    """
    taken: dict[tuple[Kind, str], Plugin] = {}
    contested: dict[tuple[Kind, str], PluginConflictError] = {}
    for plugin in plugins:
        if plugin.error is not None:
            continue
        for kind, descriptor in plugin.descriptors():
            holder = taken.get((kind, descriptor.name))
            if holder is None:
                continue
            error = PluginConflictError(
                f"the {kind} {descriptor.name!r} is registered by {holder.label} and by "
                f"{plugin.label}: uninstall one, or name the one you want in STOKER_PLUGINS"
            )
            plugin.error = plugin.error or error
            if not holder.bundled:
                contested[kind, descriptor.name] = error
        if plugin.error is None:
            taken.update({(kind, found.name): plugin for kind, found in plugin.descriptors()})
    return contested


def _load(plugin: Plugin, entry_point: importlib_metadata.EntryPoint) -> None:
    """Import a plugin, check it and call its registration hooks; failures end up in ``error``."""
    started = time.perf_counter()
    try:
        module = entry_point.load()
        plugin.import_ms = (time.perf_counter() - started) * 1e3
        register(plugin, module)
    except PluginError as error:
        plugin.error = error
    # Whatever somebody else's code raises, even SystemExit, must not take the others down.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        plugin.error = PluginLoadError(f"{plugin.label} is broken: {_say(error)}")
        plugin.error.__cause__ = error
    if not plugin.import_ms:
        plugin.import_ms = (time.perf_counter() - started) * 1e3


def _say(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
