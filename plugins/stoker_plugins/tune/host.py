"""What a command of a plugin finds in its click context: the part of it that tuning needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from stoker import ModelError

if TYPE_CHECKING:
    from stoker import BackendInfo, LocalModel
    from stoker.config import Config
    from stoker.interfaces import Descriptor

__all__ = ["Host", "HostPlugins", "backend_for"]


class HostPlugins(Protocol):
    """All installed plugins."""

    def require(self, kind: str, name: str) -> Descriptor:
        """One of them; raises ``ConfigError`` if it is not there."""
        ...

    def active(self, kind: str, config: Config) -> Sequence[Descriptor]:
        """Those of a kind that a configuration switches on."""
        ...

    def options(
        self, descriptor: Descriptor, config: Config, extra: Mapping[str, Any] | None = None
    ) -> Any:
        """Its options, decoded."""
        ...


class Host(Protocol):
    """The state of this run of the command line."""

    @property
    def plugins(self) -> HostPlugins:
        """All installed plugins."""
        ...

    def config(
        self, path: str | None, overrides: Mapping[str, Any] = {}
    ) -> tuple[Config, dict[str, str]]:
        """The effective configuration, and where each setting comes from."""
        ...

    def resolve(self, reference: str) -> LocalModel:
        """The model that a reference names."""
        ...


def backend_for(host: Host, config: Config, name: str, local: LocalModel) -> BackendInfo:
    """The backend of that name, or for ``auto`` the first by order that accepts the model.

    Raises:
        ConfigError: There is no backend of that name.
        ModelError: None accepts it.
    """
    if name != "auto":
        return cast("BackendInfo", host.plugins.require("backend", name))
    backends = cast("Sequence[BackendInfo]", host.plugins.active("backend", config))
    for info in sorted(backends, key=lambda info: info.order):
        if info.factory().accepts(local):
            return info
    raise ModelError(f"no installed backend can load {local.path.name}")
