"""Whether a plugin keeps the contract: its hooks, what they return, the API it was written for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import pluggy

from stoker import hookspecs
from stoker.decoding import did_you_mean
from stoker.discovery.kinds import CORE_COMMANDS, HOOKS, LIFE_CYCLE
from stoker.discovery.plugin import Plugin
from stoker.errors import PluginConflictError, PluginContractError
from stoker.interfaces import API_VERSION, Descriptor

__all__ = ["register"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_KNOWN_HOOKS = (*(hook for hook, _ in HOOKS.values()), *LIFE_CYCLE)


def register(plugin: Plugin, module: Any) -> None:
    """Check a plugin's module, call its registration hooks and keep what they return.

    Raises:
        PluginContractError: It breaks the contract.
        PluginConflictError: It registers one of the core's own commands.
        Exception: Whatever its hooks raise.
    """
    manager = pluggy.PluginManager("stoker")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=plugin.name)
        _refuse_unknown_hooks(plugin, manager)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        text = " ".join(str(error).split())
        raise PluginContractError(f"{plugin.label} breaks the hook contract: {text}") from error
    found = {caller.name: caller for caller in manager.get_hookcallers(module) or ()}
    _refuse_undecorated(plugin, module, found)
    # One plugin per manager: what get_hookimpls() returns is this plugin's.
    implementations = {
        name: implementation
        for name, caller in found.items()
        for implementation in caller.get_hookimpls()
    }
    for name, implementation in implementations.items():
        _check_function(plugin, name, implementation)
    for kind, (hook, expected) in HOOKS.items():
        if hook in implementations:
            plugin.offered[kind] = _call(plugin, hook, implementations[hook])
            _check_descriptors(plugin, hook, plugin.offered[kind], expected)
    plugin.life_cycle = {
        name: implementations[name] for name in LIFE_CYCLE if name in implementations
    }
    _refuse_core_commands(plugin)


def _refuse_unknown_hooks(plugin: Plugin, manager: pluggy.PluginManager) -> None:
    """Name misspelt hooks with their nearest match; ``check_pending`` has no suggestion."""
    for name in vars(manager.hook):
        if name.startswith("_") or name in _KNOWN_HOOKS:
            continue
        raise PluginContractError(
            f"{plugin.label} implements an unknown hook {name!r}.{did_you_mean(name, _KNOWN_HOOKS)}"
        )


def _refuse_undecorated(plugin: Plugin, module: Any, found: Iterable[str]) -> None:
    for name in _KNOWN_HOOKS:
        if name not in found and callable(getattr(module, name, None)):
            raise PluginContractError(
                f"{plugin.label}: {name} lacks the decorator @stoker.hookimpl"
            )
    if not found:
        raise PluginContractError(
            f"{plugin.label} implements no hook: decorate at least one of "
            f"{', '.join(_KNOWN_HOOKS)} with @stoker.hookimpl"
        )


def _check_function(plugin: Plugin, name: str, implementation: pluggy.HookImpl) -> None:
    function = implementation.function
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginContractError(
            f"{plugin.label}: {name} is async, but hooks are called and not awaited: write 'def'"
        )
    if implementation.wrapper or implementation.hookwrapper:
        raise PluginContractError(f"{plugin.label}: {name} is a wrapper, which no hook allows")


def _call(plugin: Plugin, hook: str, implementation: pluggy.HookImpl) -> list[Descriptor]:
    returned: object = implementation.function()
    if inspect.iscoroutine(returned):
        returned.close()
    if not isinstance(returned, list | tuple):
        raise PluginContractError(
            f"{plugin.label}: {hook} returned {type(returned).__name__} instead of a list"
        )
    return list(returned)


def _check_descriptors(
    plugin: Plugin, hook: str, found: Sequence[object], expected: type[Descriptor]
) -> None:
    seen: set[str] = set()
    for item in found:
        # A descriptor of another API version may differ in any other way too: say that first.
        version = getattr(item, "api_version", API_VERSION)
        if isinstance(item, Descriptor) and version != API_VERSION:
            raise PluginContractError(_version_problem(plugin, version))
        if not isinstance(item, expected):
            raise PluginContractError(
                f"{plugin.label}: {hook} returned a {type(item).__name__} among its descriptors; "
                f"it must return {expected.__name__} only"
            )
        problem = _descriptor_problem(item)
        if problem is None and item.name in seen:
            problem = "is registered twice"
        if problem is not None:
            raise PluginContractError(f"{plugin.label}: {hook}: {item.name!r} {problem}")
        seen.add(item.name)


def _version_problem(plugin: Plugin, version: object) -> str:
    said = f"{plugin.label} was written for plugin API {version}, this stoker speaks {API_VERSION}"
    if isinstance(version, int) and version < API_VERSION:
        return f"{said}: upgrade the plugin (pip install --upgrade {plugin.distribution})"
    return f"{said}: upgrade stoker (pip install --upgrade stoker)"


def _descriptor_problem(descriptor: Any) -> str | None:
    name, options = descriptor.name, descriptor.options
    if not (isinstance(name, str) and _NAME.fullmatch(name) and len(name) > 1):
        return "is no name: use two or more lower-case letters and digits, words joined by dashes"
    if not isinstance(descriptor.summary, str):
        return "has a summary that is no text"
    if not callable(getattr(descriptor, "factory", None)):
        return "has a factory that cannot be called"
    if options is not None and not (
        isinstance(options, type) and issubclass(options, msgspec.Struct)
    ):
        return "has options that are no msgspec.Struct type"
    if not isinstance(getattr(descriptor, "order", 0), int):
        return "has an order that is no integer"
    return None


def _refuse_core_commands(plugin: Plugin) -> None:
    for descriptor in plugin.offered.get("command", ()):
        if descriptor.name in CORE_COMMANDS:
            raise PluginConflictError(
                f"{plugin.label} registers the command {descriptor.name!r}, which is stoker's own"
            )
