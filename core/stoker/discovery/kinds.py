"""What a plugin can offer: the kinds, their hooks and their descriptors."""

from __future__ import annotations

from typing import Literal

from stoker.interfaces import (
    BackendInfo,
    CommandInfo,
    Descriptor,
    EvictionInfo,
    GrammarInfo,
    MiddlewareInfo,
    ModelSourceInfo,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
    ToolFormatInfo,
)

__all__ = ["ADVICE", "CORE_COMMANDS", "HOOKS", "LIFE_CYCLE", "PLURALS", "SWITCHED", "Kind"]

Kind = Literal[
    "backend", "policy", "eviction", "grammar", "tool format", "middleware", "observer", "model source",
    "route", "command",
]  # fmt: skip

HOOKS: dict[Kind, tuple[str, type[Descriptor]]] = {
    "backend": ("stoker_register_backends", BackendInfo),
    "policy": ("stoker_register_policies", PolicyInfo),
    "eviction": ("stoker_register_evictions", EvictionInfo),
    "grammar": ("stoker_register_grammars", GrammarInfo),
    "tool format": ("stoker_register_tool_formats", ToolFormatInfo),
    "middleware": ("stoker_register_middleware", MiddlewareInfo),
    "observer": ("stoker_register_observers", ObserverInfo),
    "model source": ("stoker_register_model_sources", ModelSourceInfo),
    "route": ("stoker_register_routes", RouteInfo),
    "command": ("stoker_register_commands", CommandInfo),
}
"""Kind -> the hook that registers it and the descriptor type that the hook returns a list of."""

LIFE_CYCLE = ("stoker_server_started", "stoker_server_stopped")
"""The hooks that are told of a server's life instead of registering something."""

PLURALS: dict[Kind, str] = {
    "backend": "backends",
    "policy": "policies",
    "eviction": "evictions",
    "grammar": "grammars",
    "tool format": "tool formats",
    "middleware": "middleware",
    "observer": "observers",
    "model source": "model sources",
    "route": "routes",
    "command": "commands",
}

ADVICE: dict[Kind, str] = {
    "backend": " Backends are packages: pip install stoker-backend-{name}.",
    "policy": " Policies can be packages: pip install stoker-policy-{name}.",
}

SWITCHED: tuple[Kind, ...] = ("middleware", "observer", "route")
"""What ``[plugins.<name>]`` switches on; the other kinds are chosen by other settings."""

CORE_COMMANDS = ("serve", "chat", "models", "pull", "plugins", "config", "keys", "cache", "doctor")
"""Subcommands that no plugin can replace, in the order of ``stoker --help``."""
