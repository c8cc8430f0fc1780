"""Finds plugins by entry points, checks them, and hands them out as typed descriptors."""

from stoker.discovery.kinds import CORE_COMMANDS, HOOKS, LIFE_CYCLE, Kind
from stoker.discovery.listing import PluginListing
from stoker.discovery.loading import load_plugins
from stoker.discovery.plugin import Plugin
from stoker.discovery.plugins import Plugins
from stoker.discovery.references import resolve_model, split_reference

__all__ = [
    "CORE_COMMANDS",
    "HOOKS",
    "LIFE_CYCLE",
    "Kind",
    "Plugin",
    "PluginListing",
    "Plugins",
    "load_plugins",
    "resolve_model",
    "split_reference",
]
