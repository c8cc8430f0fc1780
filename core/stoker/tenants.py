"""Who uses the server: settings by tenant, shared by the API, the middleware and the schedulers.

The table is replaced as a whole when the configuration is read again, so that any thread may look into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from stoker.config import TenantConfig

__all__ = ["ANONYMOUS", "DEFAULT_TENANT", "EVERYBODY_ELSE", "Tenants", "is_tenant_name"]

ANONYMOUS = "anonymous"
"""The tenant of requests that nobody signed, while there are no keys."""
DEFAULT_TENANT = "default"
"""The tenant of ``[server] api_keys``."""
EVERYBODY_ELSE = "*"
"""The entry that stands for every tenant without one of its own."""

_MAX_MADE = 10_000  # tenants without an entry that are kept at hand; there is no end of names
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_tenant_name(name: str) -> bool:
    """Whether ``name`` can be a tenant's."""
    return _NAME.fullmatch(name) is not None


class Tenants:
    """The settings of every tenant; safe to use from any thread.

    Args:
        configs: The entries of ``[[tenants]]``.
    """

    def __init__(self, configs: Iterable[TenantConfig] = ()) -> None:
        self.replace(configs)

    def replace(self, configs: Iterable[TenantConfig]) -> None:
        """Take other settings, at once and as a whole."""
        table = {config.name: config for config in configs}
        others = table.pop(EVERYBODY_ELSE, TenantConfig(name=EVERYBODY_ELSE))
        made: dict[str, TenantConfig] = {}
        self._table = (table, others, made)

    def get(self, name: str) -> TenantConfig:
        """A tenant's settings: its own entry, or that of everybody else under its name."""
        table, others, made = self._table
        found = table.get(name) or made.get(name)
        if found is None:
            found = msgspec.structs.replace(others, name=name)
            if len(made) < _MAX_MADE:
                made[name] = found
        return found

    def configured(self) -> list[TenantConfig]:
        """The tenants that have an entry of their own."""
        return list(self._table[0].values())
