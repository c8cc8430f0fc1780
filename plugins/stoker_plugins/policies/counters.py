"""Virtual token counters: how much service each tenant has had for its weight."""

from __future__ import annotations

from collections.abc import Mapping

from stoker import TenantShare

__all__ = ["Counters"]

_MAX_IDLE = 1024  # tenants without work whose counters are remembered
_REBASE_AT = 2.0**40  # tokens; far below 2**53, from where on a float cannot count single ones


class Counters:
    """One counter for each tenant, and the rules by which they move.

    A counter only grows: by what its tenant was served, divided by its weight, and by a lift when the tenant
    begins to wait again: nobody saves up credit by staying away.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._last_left: str | None = None

    def __getitem__(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def __len__(self) -> int:
        return len(self._counters)

    def weight(self, tenant: str) -> float:
        """A tenant's weight, as it was last seen; 1 if it never was."""
        return self._weights.get(tenant, 1.0)

    def charge(self, tenant: str, price: float) -> None:
        """Count service for a tenant.

        Args:
            tenant: Who was served.
            price: Tokens times their price, before division by the weight.
        """
        self._counters[tenant] = self[tenant] + price / self.weight(tenant)

    def observe(self, tenants: Mapping[str, TenantShare]) -> None:
        """Take note of who waits: those that begin to are lifted, those that stopped have left.

        A tenant that begins to wait is lifted to the least counter of those that wait already; if nobody
        does, to the counter of who was the last to stop. No counter is ever lowered.
        """
        for name, share in tenants.items():
            self._weights[name] = share.weight
        waiting = [name for name, share in tenants.items() if share.num_waiting]
        left = self._waiting.difference(waiting)
        if left:
            self._waiting -= left
            # If several left at once, the newcomer must not get below any of them.
            self._last_left = max(sorted(left), key=self.__getitem__)
        for name in waiting:
            if name not in self._waiting:
                self._counters[name] = max(self[name], self._floor())
                self._waiting.add(name)
        self._tidy(tenants)

    def nobody_waits(self) -> None:
        """Take note that the queue is empty."""
        if self._waiting:
            self._last_left = max(sorted(self._waiting), key=self.__getitem__)
            self._waiting.clear()

    def _floor(self) -> float:
        """Where a tenant that begins to wait starts."""
        if self._waiting:
            return min(self[name] for name in self._waiting)
        return self[self._last_left] if self._last_left is not None else 0.0

    def _tidy(self, tenants: Mapping[str, TenantShare]) -> None:
        """Keep the counters few and small; what is forgotten is what a lift would make up for first."""
        floor = self._floor()
        if floor > _REBASE_AT:
            self._counters = {name: max(0.0, c - floor) for name, c in self._counters.items()}
        if len(self._counters) <= _MAX_IDLE + len(tenants):
            return
        idle = [name for name in self._counters if name not in tenants and name != self._last_left]
        idle.sort(key=lambda name: (self[name], name))
        for name in idle[: len(idle) - _MAX_IDLE // 2]:
            del self._counters[name]
            self._weights.pop(name, None)
