"""A plugin's section of the configuration, decoded into the plugin's own struct."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stoker.decoding import check_keys, decode, struct_fields
from stoker.errors import ConfigError

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.interfaces import Descriptor

__all__ = ["decode_options"]


def decode_options(
    descriptor: Descriptor,
    namesakes: Iterable[Descriptor],
    config: Config,
    extra: Mapping[str, Any] | None,
) -> Any | None:
    """``[plugins.<name>]`` with ``extra`` on top, as an instance of ``descriptor.options``.

    An observer and a route may share a name and so a section; each takes the keys it knows, and what
    none of the ``namesakes`` knows is refused.

    Raises:
        ConfigError: Names ``plugins.<name>.<key>`` and what is wrong with it.
    """
    where = f"plugins.{descriptor.name}"
    section = {**config.plugins.get(descriptor.name, {}), **(extra or {})}
    section.pop("enabled", None)
    known: set[str] = set()
    for namesake in (descriptor, *namesakes):
        if namesake.options is not None:
            known.update(struct_fields(namesake.options))
    if section and not known:
        key = next(iter(section))
        raise ConfigError(f"{where}.{key}: {descriptor.name} takes no options")
    check_keys(section, known, where)
    if descriptor.options is None:
        return None
    own = struct_fields(descriptor.options)
    return decode({key: section[key] for key in section if key in own}, descriptor.options, where)
