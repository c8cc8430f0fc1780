"""Lanes and KV that belong to a tenant whenever it needs them; others may borrow what it leaves idle.

This stands above the policy: a tenant below its reservation is served first, and what others borrowed of it
is taken back by preemption. Within its reservation, a tenant's sequences are never preempted for others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.config import TenantConfig
    from stoker.engine.sequence import Sequence
    from stoker.tenants import Tenants

__all__ = ["Reservations"]


class Reservations:
    """The reservations of one model.

    Args:
        tenants: Who has one; looked up anew for every step, because it may change.
        capacity_tokens: The model's KV tokens.
    """

    def __init__(self, tenants: Tenants, capacity_tokens: int) -> None:
        self._tenants = tenants
        self._capacity_tokens = capacity_tokens

    def holders(self) -> list[TenantConfig]:
        """The tenants that have a reservation."""
        return [t for t in self._tenants.configured() if t.reserved_lanes or t.reserved_kv]

    def kv_tokens(self, tenant: TenantConfig) -> int:
        """KV tokens reserved for a tenant."""
        return int(tenant.reserved_kv * self._capacity_tokens)

    def usage(self, running: Iterable[Sequence], name: str) -> tuple[int, int]:
        """Lanes and KV tokens that a tenant holds."""
        own = [s.num_tokens for s in running if s.request.tenant == name]
        return len(own), sum(own)

    def is_entitled(self, running: Iterable[Sequence], candidate: Sequence) -> bool:
        """Whether a waiting sequence's tenant would stay within its reservation with it.

        A reservation of lanes only, or of KV only, is bounded by what it names.
        """
        tenant = self._tenants.get(candidate.request.tenant)
        if not tenant.reserved_lanes and not tenant.reserved_kv:
            return False
        lanes, tokens = self.usage(running, tenant.name)
        if tenant.reserved_lanes and lanes >= tenant.reserved_lanes:
            return False
        return not tenant.reserved_kv or tokens + candidate.num_tokens <= self.kv_tokens(tenant)

    def is_protected(self, running: Iterable[Sequence], sequence: Sequence) -> bool:
        """Whether a running sequence stands within its tenant's reservation."""
        tenant = self._tenants.get(sequence.request.tenant)
        if not tenant.reserved_lanes and not tenant.reserved_kv:
            return False
        lanes, tokens = self.usage(running, tenant.name)
        if tenant.reserved_lanes and lanes > tenant.reserved_lanes:
            return False
        return not tenant.reserved_kv or tokens <= self.kv_tokens(tenant)

    def unclaimed(self, running: Iterable[Sequence], but_for: str) -> tuple[int, int]:
        """Lanes and KV tokens that are reserved for tenants other than ``but_for`` and not in use."""
        running = list(running)
        lanes = tokens = 0
        for tenant in self.holders():
            if tenant.name != but_for:
                held_lanes, held_tokens = self.usage(running, tenant.name)
                lanes += max(0, tenant.reserved_lanes - held_lanes)
                tokens += max(0, self.kv_tokens(tenant) - held_tokens)
        return lanes, tokens
