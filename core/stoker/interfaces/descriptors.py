"""How a plugin's objects are registered: what the hooks return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stoker.interfaces.caching import EvictionStrategy
from stoker.interfaces.policies import SchedulingPolicy
from stoker.interfaces.runtimes import Backend
from stoker.interfaces.serving import Middleware, ModelSource, Observer
from stoker.interfaces.structured import GrammarCompiler, ToolFormat

if TYPE_CHECKING:
    import click

__all__ = [
    "API_VERSION",
    "BackendInfo",
    "CommandInfo",
    "Descriptor",
    "EvictionInfo",
    "GrammarInfo",
    "MiddlewareInfo",
    "ModelSourceInfo",
    "ObserverInfo",
    "PolicyInfo",
    "RouteInfo",
    "ToolFormatInfo",
]

API_VERSION = 1
"""The plugin API that this stoker speaks. A plugin states the one it was written for."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """What every descriptor has.

    Attributes:
        api_version: The plugin API it was written for; a stoker that speaks another one refuses it.
        name: How configuration calls it; unique among its kind.
        summary: One line for ``stoker plugins``.
        options: Struct type of its ``[plugins.<name>]`` section; ``None`` if it takes no options.
    """

    api_version: int
    name: str
    summary: str
    options: type[msgspec.Struct] | None = None


class BackendInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``Backend``. The factory imports what is heavy."""

    factory: Callable[[], Backend]
    order: int = 100
    """Of the backends that accept a model, the one with the lowest order loads it."""


class PolicyInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``SchedulingPolicy``; one instance is built per model.

    The factory is called with an instance of ``options`` if there is such a type, else with nothing.
    """

    factory: Callable[..., SchedulingPolicy]


class EvictionInfo(Descriptor, frozen=True, kw_only=True):
    """Registers an ``EvictionStrategy``; one instance is built per model.

    The factory is called with an instance of ``options`` if there is such a type, else with nothing.
    """

    factory: Callable[..., EvictionStrategy]


class GrammarInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``GrammarCompiler``; one instance is built per model.

    The factory is called ``factory(tokenizer, info)`` or ``factory(tokenizer, info, options)`` with the
    model's ``Tokenizer`` and ``RuntimeInfo``.
    """

    factory: Callable[..., GrammarCompiler]


class ToolFormatInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``ToolFormat``.

    The factory is called with an instance of ``options`` if there is such a type, else with nothing.
    """

    factory: Callable[..., ToolFormat]
    order: int = 100
    """Of the formats that suit a model, the one with the lowest order is used."""


class MiddlewareInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``Middleware``; called ``factory(context)`` or ``factory(context, options)``."""

    factory: Callable[..., Middleware]
    active_by_default: bool = False
    order: int = 100
    """Lower sees a request earlier."""


class ObserverInfo(Descriptor, frozen=True, kw_only=True):
    """Registers an ``Observer``; called ``factory()`` or ``factory(options)``."""

    factory: Callable[..., Observer]
    active_by_default: bool = False


class ModelSourceInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``ModelSource``; ``name`` is its scheme."""

    factory: Callable[[], ModelSource]


class RouteInfo(Descriptor, frozen=True, kw_only=True):
    """Registers HTTP routes; called ``factory(context)`` or ``factory(context, options)``.

    The factory returns Litestar route handlers. Structs that a handler names in ``opt["schemas"]`` become
    components of the OpenAPI document, under their names.
    """

    factory: Callable[..., Sequence[Any]]
    active_by_default: bool = False


class CommandInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a subcommand of ``stoker``; the factory builds the click command when it is run."""

    factory: Callable[[], click.Command]
