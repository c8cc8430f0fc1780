"""One entry point of the group ``stoker`` and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker.discovery.kinds import Kind

if TYPE_CHECKING:
    import pluggy

    from stoker.errors import PluginError
    from stoker.interfaces import Descriptor

__all__ = ["BUNDLED", "Plugin"]

BUNDLED = "stoker"
"""The distribution whose plugins come with the core: always loaded, never displaced."""


@dataclass(slots=True)
class Plugin:
    """One entry point of the group ``stoker``.

    Attributes:
        name: The entry point's name.
        distribution: The distribution it comes from.
        version: The distribution's version.
        error: Why it cannot be used; ``None`` if it can.
        offered: What its hooks returned, also where it was refused for it.
        life_cycle: Its start and stop hooks, by name.
        import_ms: Time to import it.
    """

    name: str
    distribution: str
    version: str = ""
    error: PluginError | None = None
    offered: dict[Kind, list[Descriptor]] = field(default_factory=dict)
    life_cycle: dict[str, pluggy.HookImpl] = field(default_factory=dict)
    import_ms: float = 0.0

    @property
    def bundled(self) -> bool:
        """Whether it comes with the core."""
        return self.distribution == BUNDLED

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"plugin {self.name!r} ({f'{self.distribution} {self.version}'.strip()})"

    def descriptors(self) -> Iterable[tuple[Kind, Descriptor]]:
        """Everything it offers, with its kind."""
        for kind, found in self.offered.items():
            for descriptor in found:
                yield kind, descriptor
