"""The hooks of the entry-point group ``stoker``. Each is called once, at start or stop; never per request.

A plugin is a module (or any object) that an entry point of the group ``stoker`` names::

    [project.entry-points.stoker]
    my-plugin = "my_package"

and that implements hooks with ``@stoker.hookimpl``. It must import nothing heavy: factories do that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker.interfaces import (
        BackendInfo,
        CommandInfo,
        EvictionInfo,
        GrammarInfo,
        MiddlewareInfo,
        ModelSourceInfo,
        ObserverInfo,
        PolicyInfo,
        RouteInfo,
        ServerContext,
        ToolFormatInfo,
    )

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("stoker")
hookimpl = pluggy.HookimplMarker("stoker")

# --------------------------------------------------------------------------- registration


@hookspec
def stoker_register_backends() -> Sequence[BackendInfo]:  # type: ignore[empty-body]
    """Register backends: what turns a model on disk into a runtime.

    When: once, when the process starts.
    Returns: a list of ``BackendInfo``; names are unique over all plugins.
    Ordering: for ``backend = "auto"`` backends are asked in order of their names.
    Errors: an exception, or a name that is taken, makes the plugin broken; that stops the start only
        if the configuration asks for something of it.
    Example: ``return [BackendInfo(api_version=1, name="gguf", summary="...", factory=make_backend)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_policies() -> Sequence[PolicyInfo]:  # type: ignore[empty-body]
    """Register scheduling policies: who is admitted next, who loses a lane.

    When: once, when the process starts.
    Returns: a list of ``PolicyInfo``; names are unique over all plugins.
    Ordering: none; ``[scheduler] policy`` names the one that is used.
    Errors: as for backends.
    Example: ``return [PolicyInfo(api_version=1, name="short", summary="...", factory=ShortestPrompt)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_evictions() -> Sequence[EvictionInfo]:  # type: ignore[empty-body]
    """Register eviction strategies: which kept prefix goes first when room is needed.

    When: once, when the process starts.
    Returns: a list of ``EvictionInfo``; names are unique over all plugins.
    Ordering: none; ``[cache] eviction`` names the one that is used.
    Errors: as for backends.
    Example: ``return [EvictionInfo(api_version=1, name="lru", summary="...", factory=LeastRecentlyUsed)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_grammars() -> Sequence[GrammarInfo]:  # type: ignore[empty-body]
    """Register grammar compilers: what makes outputs follow a schema, an expression or a grammar.

    When: once, when the process starts.
    Returns: a list of ``GrammarInfo``; names are unique over all plugins.
    Ordering: none; ``[server] grammar`` names the one that is used.
    Errors: as for backends.
    Example: ``return [GrammarInfo(api_version=1, name="llguidance", summary="...", factory=make_compiler)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_tool_formats() -> Sequence[ToolFormatInfo]:  # type: ignore[empty-body]
    """Register tool formats: how families of models write tool calls.

    When: once, when the process starts.
    Returns: a list of ``ToolFormatInfo``; names are unique over all plugins.
    Ordering: ascending ``order``, then by name: the first that suits a model is used for it, unless
        ``[[models]] tool_format`` names one.
    Errors: as for backends.
    Example: ``return [ToolFormatInfo(api_version=1, name="hermes", summary="...", factory=Hermes)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_middleware() -> Sequence[MiddlewareInfo]:  # type: ignore[empty-body]
    """Register middleware: admission control and request transforms.

    When: once, when the process starts.
    Returns: a list of ``MiddlewareInfo``.
    Ordering: active middleware sees a request in ascending ``order``, then by name.
    Errors: as for backends.
    Example: ``return [MiddlewareInfo(api_version=1, name="quota", summary="...", factory=Quota)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_observers() -> Sequence[ObserverInfo]:  # type: ignore[empty-body]
    """Register observers: told of every step and every finished sequence.

    When: once, when the process starts.
    Returns: a list of ``ObserverInfo``.
    Ordering: by name. They cannot influence anything, so it should not matter.
    Errors: as for backends.
    Example: ``return [ObserverInfo(api_version=1, name="metrics", summary="...", factory=Metrics)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_model_sources() -> Sequence[ModelSourceInfo]:  # type: ignore[empty-body]
    """Register model sources: where a reference such as ``hf:owner/repo`` is looked up.

    When: once, when the process starts.
    Returns: a list of ``ModelSourceInfo``; the name is the scheme.
    Ordering: none; the scheme decides.
    Errors: as for backends.
    Example: ``return [ModelSourceInfo(api_version=1, name="hf", summary="...", factory=HuggingFaceSource)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_routes() -> Sequence[RouteInfo]:  # type: ignore[empty-body]
    """Register HTTP routes beside the core's own.

    When: once, when the process starts; the factories run when the application is built.
    Returns: a list of ``RouteInfo`` whose factories return Litestar route handlers.
    Ordering: none; a path that is taken is an error that names it.
    Errors: as for backends.
    Example: ``return [RouteInfo(api_version=1, name="hello", summary="...", factory=make_handlers)]``
    Since: API version 1.
    """


@hookspec
def stoker_register_commands() -> Sequence[CommandInfo]:  # type: ignore[empty-body]
    """Register subcommands of ``stoker``.

    When: once, when the process starts; the factory runs when the command does.
    Returns: a list of ``CommandInfo`` whose factories return click commands.
    Ordering: by name; the core's own commands cannot be replaced.
    Errors: as for backends.
    Example: ``return [CommandInfo(api_version=1, name="quota", summary="...", factory=make_command)]``
    Since: API version 1.
    """


# --------------------------------------------------------------------------- life cycle


@hookspec
def stoker_server_started(context: ServerContext) -> None:
    """Say that the server has loaded its models and is about to accept connections.

    When: once per server.
    Returns: nothing.
    Ordering: order of registration.
    Errors: logged with the plugin's name; the server goes on.
    Example: ``announce(context.models())``
    Since: API version 1.
    """


@hookspec
def stoker_server_stopped(context: ServerContext) -> None:
    """Say that the server has answered its last request and is about to close its models.

    When: once per server, also after a failure.
    Returns: nothing.
    Ordering: order of registration.
    Errors: logged with the plugin's name; the stop goes on.
    Example: ``flush()``
    Since: API version 1.
    """
