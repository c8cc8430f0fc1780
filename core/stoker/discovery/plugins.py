"""Everything that was found, as one object that is passed down. There is no global registry."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from stoker.decoding import did_you_mean
from stoker.discovery.kinds import ADVICE, HOOKS, LIFE_CYCLE, PLURALS, SWITCHED, Kind
from stoker.discovery.listing import PluginListing, asked_for, row, would_offer
from stoker.discovery.options import decode_options
from stoker.discovery.plugin import BUNDLED, Plugin
from stoker.errors import ConfigError, PluginConflictError
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

if TYPE_CHECKING:
    from stoker.config import Config, ModelConfig
    from stoker.interfaces import ServerContext

__all__ = ["Plugins"]

logger = logging.getLogger("stoker.plugins")

D = TypeVar("D", bound=Descriptor)


class Plugins:
    """All plugins, by kind and name.

    Args:
        plugins: As ``load_plugins`` found them.
        contested: Names that two plugins claim, with the error for whoever asks for one.
        missing: Names that ``STOKER_PLUGINS`` lists and nobody has.
    """

    def __init__(
        self,
        plugins: Iterable[Plugin],
        *,
        contested: Mapping[tuple[Kind, str], PluginConflictError] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self._plugins = list(plugins)
        self._contested = dict(contested or {})
        self._missing = tuple(missing)
        self._by_kind: dict[Kind, dict[str, Descriptor]] = {kind: {} for kind in HOOKS}
        self._owner: dict[tuple[Kind, str], Plugin] = {}
        for plugin in self._plugins:
            if plugin.error is None:
                for kind, descriptor in plugin.descriptors():
                    if (kind, descriptor.name) not in self._contested:
                        self._by_kind[kind][descriptor.name] = descriptor
                        self._owner[kind, descriptor.name] = plugin

    @classmethod
    def of(cls, *descriptors: Descriptor, distribution: str = BUNDLED) -> Plugins:
        """Plugins made of these descriptors alone, without entry points: for tests and embedding."""
        plugin = Plugin(name="of", distribution=distribution)
        for kind, (_, type_) in HOOKS.items():
            plugin.offered[kind] = [found for found in descriptors if isinstance(found, type_)]
        return cls([plugin])

    # ----------------------------------------------------------------------- what there is

    def backends(self) -> Mapping[str, BackendInfo]:
        """Backends by name."""
        return self._all("backend", BackendInfo)

    def policies(self) -> Mapping[str, PolicyInfo]:
        """Scheduling policies by name."""
        return self._all("policy", PolicyInfo)

    def evictions(self) -> Mapping[str, EvictionInfo]:
        """Eviction strategies by name."""
        return self._all("eviction", EvictionInfo)

    def grammars(self) -> Mapping[str, GrammarInfo]:
        """Grammar compilers by name."""
        return self._all("grammar", GrammarInfo)

    def middleware(self) -> Mapping[str, MiddlewareInfo]:
        """Middleware by name, active or not."""
        return self._all("middleware", MiddlewareInfo)

    def observers(self) -> Mapping[str, ObserverInfo]:
        """Observers by name, active or not."""
        return self._all("observer", ObserverInfo)

    def sources(self) -> Mapping[str, ModelSourceInfo]:
        """Model sources by scheme."""
        return self._all("model source", ModelSourceInfo)

    def routes(self) -> Mapping[str, RouteInfo]:
        """Routes by name, active or not."""
        return self._all("route", RouteInfo)

    def commands(self) -> Mapping[str, CommandInfo]:
        """Subcommands by name."""
        return self._all("command", CommandInfo)

    def _all(self, kind: Kind, _type: type[D]) -> Mapping[str, D]:
        return cast("dict[str, D]", dict(sorted(self._by_kind[kind].items())))

    # ----------------------------------------------------------------------- what is asked for

    def require(self, kind: str, name: str) -> Descriptor:
        """The descriptor of that kind and name.

        Args:
            kind: ``backend``, ``policy``, ``eviction``, ``middleware``, ``observer``, ``model source``,
                ``route`` or ``command``.
            name: Its name.

        Raises:
            PluginLoadError: The plugin that offers it is broken; the cause is chained.
            PluginContractError: It breaks the plugin contract.
            PluginConflictError: Two plugins claim the name.
            ConfigError: Nobody offers it; names what there is, the nearest first.
        """
        found = self._lookup(cast("Kind", kind), name)
        if found is not None:
            return found
        known = self._by_kind[cast("Kind", kind)]
        broken = [plugin.name for plugin in self._plugins if plugin.error is not None]
        raise ConfigError(
            f"there is no {kind} {name!r}.{did_you_mean(name, known)}"
            f" Installed {PLURALS[cast('Kind', kind)]}: {', '.join(sorted(known)) or 'none'}."
            + ADVICE.get(cast("Kind", kind), "").format(name=name)
            + (f" Broken or refused plugins: {', '.join(broken)}." if broken else "")
        )

    def _lookup(self, kind: Kind, name: str) -> Descriptor | None:
        """The descriptor, ``None``, or the error of the plugin that would offer it."""
        if (kind, name) in self._contested:
            raise self._contested[kind, name]
        if name in self._by_kind[kind]:
            return self._by_kind[kind][name]
        for plugin in self._plugins:
            if plugin.error is not None and would_offer(plugin, kind, name):
                raise asked_for(plugin, f"the {kind} {name!r}")
        return None

    def active(self, kind: str, config: Config) -> list[Descriptor]:
        """The descriptors of one kind that this configuration switches on.

        Middleware, observers and routes are on if ``[plugins.<name>]`` stands in the configuration, or
        if they are on by default and come with stoker itself; ``enabled = false`` switches them off.
        Of the other kinds all are on that are not switched off. ``[metrics] enabled = false`` switches
        the observer and the route of that name off.

        Returns:
            Middleware by ``order`` and name, the rest by name.
        """
        asked = cast("Kind", kind)
        found = [
            descriptor
            for descriptor in self._by_kind[asked].values()
            if self._is_on(asked, descriptor, config)
        ]
        found.sort(key=lambda descriptor: (getattr(descriptor, "order", 0), descriptor.name))
        return found

    def _is_on(self, kind: Kind, descriptor: Descriptor, config: Config) -> bool:
        name = descriptor.name
        if name == "metrics" and kind in ("observer", "route") and not config.metrics.enabled:
            return False
        section = config.plugins.get(name)
        if section is not None:
            return bool(section.get("enabled", True))
        if kind not in SWITCHED:
            return True
        by_default = bool(getattr(descriptor, "active_by_default", False))
        return by_default and self._owner[kind, name].bundled

    def options(
        self, descriptor: Descriptor, config: Config, extra: Mapping[str, Any] | None = None
    ) -> Any | None:
        """The options of a plugin: ``[plugins.<name>]`` with ``extra`` on top, decoded strictly.

        Returns:
            An instance of ``descriptor.options``; ``None`` if it takes no options.

        Raises:
            ConfigError: Names ``plugins.<name>.<key>`` and what is wrong with it.
        """
        return decode_options(descriptor, self._namesakes(descriptor.name), config, extra)

    def _namesakes(self, name: str) -> list[Descriptor]:
        return [found[name] for found in self._by_kind.values() if name in found]

    def check(self, config: Config) -> None:
        """Refuse a configuration that asks for what is not there, or sets options wrongly.

        Raises:
            ConfigError: A name or an option is unknown or wrong.
            PluginError: A plugin that is asked for is broken, refused or contested.
        """
        if self._missing:
            names = [plugin.name for plugin in self._plugins]
            raise ConfigError(
                f"STOKER_PLUGINS: there is no plugin {self._missing[0]!r}."
                f"{did_you_mean(self._missing[0], names)} Installed: {', '.join(names)}."
            )
        for name, section in config.plugins.items():
            if not isinstance(section.get("enabled", True), bool):
                raise ConfigError(f"plugins.{name}.enabled: must be true or false")
            self._check_section(name, section)
        policy = self._configured("scheduler.policy", "policy", config.scheduler.policy)
        for chosen in (policy, self.eviction(config), self.grammar(config)):
            if chosen is not None:
                self.options(chosen, config)
        for index, model in enumerate(config.models):
            self.tool_formats(config, model)
            if model.backend != "auto":
                where = f"models[{index}].backend"
                backend = self._configured(where, "backend", model.backend)
                self.options(backend, config, model.options)
        for kind in HOOKS:
            for descriptor in self.active(kind, config):
                self.options(descriptor, config)

    def eviction(self, config: Config) -> EvictionInfo | None:
        """The eviction strategy that is asked for; ``None`` for the core's own.

        That is what the default stands for where no plugin offers it, as in ``Plugins.of``.

        Raises:
            ConfigError: Nobody offers it.
            PluginError: Its plugin is broken, refused or contested.
        """
        name = config.cache.eviction
        if name == type(config.cache)().eviction and self._lookup("eviction", name) is None:
            return None
        return cast(EvictionInfo, self._configured("cache.eviction", "eviction", name))

    def grammar(self, config: Config) -> GrammarInfo | None:
        """The grammar compiler that is asked for; ``None`` if structured outputs are switched off.

        They are, too, where no plugin offers the default one, as in ``Plugins.of``.

        Raises:
            ConfigError: Nobody offers it.
            PluginError: Its plugin is broken, refused or contested.
        """
        name = config.server.grammar
        if name == "none":
            return None
        if name == type(config.server)().grammar and self._lookup("grammar", name) is None:
            return None
        return cast(GrammarInfo, self._configured("server.grammar", "grammar", name))

    def tool_formats(self, config: Config, model: ModelConfig) -> list[ToolFormatInfo]:
        """The tool formats that a model may have, in the order in which they are tried.

        Raises:
            ConfigError: Nobody offers the one that is asked for.
            PluginError: Its plugin is broken, refused or contested.
        """
        if model.tool_format == "none":
            return []
        if model.tool_format == "auto":
            return cast("list[ToolFormatInfo]", self.active("tool format", config))
        info = self._configured("models.tool_format", "tool format", model.tool_format)
        return [cast(ToolFormatInfo, info)]

    def _configured(self, setting: str, kind: Kind, name: str) -> Descriptor:
        try:
            return self.require(kind, name)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from None

    def _check_section(self, name: str, section: Mapping[str, Any]) -> None:
        on = section.get("enabled", True)
        known = False
        for kind in HOOKS:
            # A section that switches a broken plugin off asks for nothing.
            known |= name in self._by_kind[kind] if not on else bool(self._lookup(kind, name))
        for plugin in self._plugins:
            if plugin.name == name:
                known = True
                if plugin.error is not None and on:
                    raise asked_for(plugin, f"[plugins.{name}]")
        if not known:
            names = {found for kind in HOOKS for found in self._by_kind[kind]}
            names.update(plugin.name for plugin in self._plugins)
            raise ConfigError(
                f"plugins.{name}: there is no plugin of this name.{did_you_mean(name, names)}"
                " `stoker plugins` lists what is installed."
            )

    # ----------------------------------------------------------------------- listing, life cycle

    def listing(self, config: Config | None = None) -> list[PluginListing]:
        """One row per entry point; without a configuration only what is always on is active."""
        return [row(plugin, in_use=self._in_use(plugin, config)) for plugin in self._plugins]

    def _in_use(self, plugin: Plugin, config: Config | None) -> bool:
        """Whether the configuration makes use of anything of a plugin."""
        if plugin.bundled:
            return True
        if config is None:
            return False
        if config.plugins.get(plugin.name, {"enabled": False}).get("enabled", True):
            return True
        return any(
            self._uses(kind, descriptor, config) for kind, descriptor in plugin.descriptors()
        )

    def _uses(self, kind: Kind, descriptor: Descriptor, config: Config) -> bool:
        name = descriptor.name
        if kind in SWITCHED:
            return self._is_on(kind, descriptor, config)
        if kind == "policy":
            return config.scheduler.policy == name
        if kind == "eviction":
            return config.cache.eviction == name
        if kind == "grammar":
            return config.server.grammar == name
        if kind == "tool format":
            wanted = {model.tool_format for model in config.models} or {"auto"}
            return name in wanted or ("auto" in wanted and self._is_on(kind, descriptor, config))
        if kind == "backend":
            wanted = {model.backend for model in config.models} or {"auto"}
            return name in wanted or ("auto" in wanted and self._is_on(kind, descriptor, config))
        if kind == "model source":
            return any(model.model.startswith(f"{name}:") for model in config.models)
        return False

    def started(self, context: ServerContext) -> None:
        """Call ``stoker_server_started`` of every plugin in use; their errors are logged."""
        self._tell(LIFE_CYCLE[0], context)

    def stopped(self, context: ServerContext) -> None:
        """Call ``stoker_server_stopped`` of every plugin in use; their errors are logged."""
        self._tell(LIFE_CYCLE[1], context)

    def _tell(self, hook: str, context: ServerContext) -> None:
        for plugin in self._plugins:
            implementation = plugin.life_cycle.get(hook)
            if plugin.error is not None or implementation is None:
                continue
            if not self._in_use(plugin, context.config):
                continue
            arguments = [context for name in implementation.argnames if name == "context"]
            try:
                implementation.function(*arguments)
            except Exception:
                logger.exception("%s: %s failed", plugin.label, hook)
