"""What waits for a model, from the moment it is posted: counted on both sides of the inbox.

Requests enter on the event loop's thread and leave on the engine's, and admission control asks on a third
occasion; a lock keeps the figures together. It is taken per request, never per step or token.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from stoker.interfaces import TenantLoad
from stoker.types import Request

__all__ = ["Ahead", "WaitingTable"]


@dataclass(slots=True, frozen=True)
class Ahead:
    """What waited when a request arrived.

    Attributes:
        sequences: How many sequences.
        own: Of those, of the same tenant.
        tokens: Their prompt and requested tokens.
    """

    sequences: int = 0
    own: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Entry:
    request: Request
    tenant: str  # as it was counted: a request may be edited
    cost: int
    ahead: Ahead
    num_left: int


class WaitingTable:
    """The requests of which not every sequence has been admitted yet; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._tenants: dict[str, list[int]] = {}
        self._totals = [0, 0]

    def add(self, request: Request) -> None:
        """Count a request with all its sequences."""
        cost = len(request.prompt_token_ids) + (request.sampling.max_tokens or 0)
        with self._lock:
            of_tenant = self._tenants.setdefault(request.tenant, [0, 0])
            ahead = Ahead(self._totals[0], of_tenant[0], self._totals[1])
            self._entries[id(request)] = _Entry(request, request.tenant, cost, ahead, request.n)
            for counts in (of_tenant, self._totals):
                counts[0] += request.n
                counts[1] += request.n * cost

    def ahead_of(self, request: Request) -> Ahead:
        """What waited when the request was added."""
        with self._lock:
            entry = self._entries.get(id(request))
            return Ahead() if entry is None else entry.ahead

    def remove(self, request: Request, num_sequences: int = 1) -> None:
        """Some of a request's sequences do not wait any more."""
        with self._lock:
            entry = self._entries.get(id(request))
            if entry is None:
                return
            gone = min(num_sequences, entry.num_left)
            entry.num_left -= gone
            if not entry.num_left:
                del self._entries[id(request)]
            of_tenant = self._tenants[entry.tenant]
            for counts in (of_tenant, self._totals):
                counts[0] -= gone
                counts[1] -= gone * entry.cost
            if not of_tenant[0]:
                del self._tenants[entry.tenant]

    @property
    def num_sequences(self) -> int:
        """Sequences that wait."""
        return self._totals[0]

    @property
    def num_tokens(self) -> int:
        """Prompt and requested tokens of those."""
        return self._totals[1]

    def tenant(self, name: str) -> TenantLoad:
        """What a tenant has waiting."""
        with self._lock:
            num_waiting, tokens = self._tenants.get(name, (0, 0))
        return TenantLoad(num_waiting=num_waiting, waiting_tokens=tokens)

    def requests(self) -> list[Request]:
        """The requests, in order of arrival."""
        with self._lock:
            return [entry.request for entry in self._entries.values()]
