"""What idle lanes keep: limits, pins and floors, who goes first, and a record of who went.

The strategy orders; here what is protected is put last, and everything is counted.
Nothing here touches a runtime: ``lanes.py`` does what is decided.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.eviction import GuardedStrategy
from stoker.interfaces import CacheEntry, Eviction
from stoker.tenants import ANONYMOUS, Tenants

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.config import CacheConfig
    from stoker.interfaces import EvictionStrategy, RuntimeInfo
    from stoker.types import Request

__all__ = ["Kept", "Retention"]

_MAX_RECENT = 256
_ids = itertools.count(1)


@dataclass(slots=True)
class Kept:
    """The KV of an idle lane.

    Attributes:
        tokens: What it holds, ``int32[n]``.
        scope: Who may find it.
        tenant: Whose request computed it.
        num_block: How many of the first tokens were computed as whole blocks.
        created_s: When it was first kept.
        last_used_s: When a request last found it, or when it was kept.
        num_hits: How many requests have found it.
        entry_id: Unique.
    """

    tokens: NDArray[np.int32]
    scope: str
    tenant: str
    num_block: int
    created_s: float
    last_used_s: float
    num_hits: int = 0
    entry_id: int = field(default_factory=lambda: next(_ids))


class Retention:
    """The kept prefixes of one runtime's idle lanes.

    Args:
        config: Limits, pins, isolation.
        info: For the size of a token's KV.
        tenants: For their floors.
        strategy: Which prefix goes first.
        clock: Monotonic seconds.

    Attributes:
        kept: By lane.
        pins: Prefixes of the public scope that stay.
        num_pins_evicted: Pins that had to yield.
        evictions: Evictions by reason.
        evicted_tokens: Tokens lost by reason.
        recent: The last evictions.
    """

    def __init__(
        self,
        config: CacheConfig,
        info: RuntimeInfo,
        tenants: Tenants,
        strategy: EvictionStrategy | None,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._strategy = GuardedStrategy(strategy)
        self._clock = clock
        self._bytes_per_token = info.kv_bytes / max(1, info.kv_capacity_tokens)
        self.kept: dict[int, Kept] = {}
        self.pins: list[NDArray[np.int32]] = []
        self.public_scope = self.scope(ANONYMOUS, "")
        self.num_pins_evicted = 0
        self.evictions: Counter[str] = Counter()
        self.evicted_tokens: Counter[str] = Counter()
        self.recent: deque[Eviction] = deque(maxlen=_MAX_RECENT)

    # ------------------------------------------------------------------ scopes and sizes

    def scope(self, tenant: str, salt: str) -> str:
        """Who may find what a tenant computed under a salt: those of the same scope."""
        return f"{tenant}\0{salt}" if self._config.isolation == "tenant" else salt

    def scope_of(self, request: Request) -> str:
        """The scope of a request."""
        return self.scope(request.tenant, request.cache_salt)

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept; from any thread."""
        return sum(len(kept.tokens) for kept in list(self.kept.values()))

    def num_bytes(self, num_tokens: int) -> int:
        """Size of so many tokens; 0 if unknown."""
        return round(self._bytes_per_token * num_tokens)

    def entry(self, kept: Kept, *, pinned: bool) -> CacheEntry:
        """What strategies and people see of a kept prefix."""
        return CacheEntry(
            entry_id=kept.entry_id,
            tier="lane",
            tenant=kept.tenant,
            salt=kept.scope,
            num_tokens=len(kept.tokens),
            num_bytes=self.num_bytes(len(kept.tokens)),
            created_s=kept.created_s,
            last_used_s=kept.last_used_s,
            num_hits=kept.num_hits,
            pinned=pinned,
        )

    # ------------------------------------------------------------------ pins, floors, order

    def pinned(self, scope: str, tokens: NDArray[np.int32]) -> int:
        """How many of the first tokens are a pinned prefix, all of it; 0 if none is."""
        if scope != self.public_scope:
            return 0
        whole = [len(p) for p in self.pins if np.array_equal(p, tokens[: len(p)])]
        return max(whole, default=0)

    def order(self, others: Iterable[tuple[str, NDArray[np.int32]]] = ()) -> dict[int, int]:
        """The lanes that keep something, the first to be evicted first, with what protects each.

        Args:
            others: Scopes and tokens of busy lanes: a pinned prefix that one of these holds, too, is safe.

        Returns:
            Lane to protection: 0 none; tokens of a pinned prefix that is nowhere else if positive; -1 within
            its tenant's floor.
        """
        order = self._ordered()
        totals: Counter[str] = Counter()
        for kept in self.kept.values():
            totals[kept.tenant] += len(kept.tokens)
        # The last of several that hold a pin is its keeper.
        safe = {self.pinned(scope, tokens) for scope, tokens in others} if self.pins else set()
        pins: dict[int, int] = {}
        for lane in reversed(order) if self.pins else ():
            kept = self.kept[lane]
            pin = self.pinned(kept.scope, kept.tokens)
            if pin and pin not in safe:
                pins[lane] = pin
                safe.add(pin)
        protection: dict[int, int] = {}
        for lane in order:
            kept = self.kept[lane]
            rest = totals[kept.tenant] - len(kept.tokens)
            if lane in pins:
                protection[lane] = pins[lane]
            elif rest < self._tenants.get(kept.tenant).cache_floor_tokens:
                protection[lane] = -1
            else:
                totals[kept.tenant] = rest
                protection[lane] = 0
        # Those without protection first, then floors, then pins; sorting is stable.
        return dict(sorted(protection.items(), key=lambda item: (item[1] != 0) + (item[1] > 0)))

    def _ordered(self) -> list[int]:
        """The strategy's order of lanes."""
        lanes = {kept.entry_id: lane for lane, kept in self.kept.items()}
        entries = [self.entry(kept, pinned=False) for kept in self.kept.values()]
        return [lanes[entry_id] for entry_id in self._strategy.order(entries, self._clock())]

    @property
    def num_strategy_errors(self) -> int:
        """How often the strategy failed."""
        return self._strategy.num_errors

    # ------------------------------------------------------------------ limits

    def excess(self) -> str:
        """The limit that is exceeded: ``tokens``, ``bytes`` or none (an empty string)."""
        config = self._config
        if not (config.max_tokens or config.max_bytes):
            return ""
        tokens = self.num_tokens
        if config.max_tokens and tokens > config.max_tokens:
            return "tokens"
        return "bytes" if config.max_bytes and self.num_bytes(tokens) > config.max_bytes else ""

    def expired(self) -> list[int]:
        """Lanes whose prefix nobody has used for too long; pins do not age."""
        if not (self._config.ttl_s and self.kept):
            return []
        limit_s = self._clock() - self._config.ttl_s
        old = [lane for lane, kept in self.kept.items() if kept.last_used_s <= limit_s]
        return [lane for lane in old if not self._is_pinned(self.kept[lane])]

    def _is_pinned(self, kept: Kept) -> bool:
        return self.pinned(kept.scope, kept.tokens) > 0

    # ------------------------------------------------------------------ records

    def count(self, kept: Kept, reason: str, num_lost: int, *, stored: bool, pin: bool) -> None:
        """Note that tokens of a kept prefix are given up, and whether a pinned prefix is lost with them."""
        self.num_pins_evicted += pin
        now_s = self._clock()
        self.evictions[reason] += 1
        self.evicted_tokens[reason] += num_lost
        self.recent.append(
            Eviction(
                at_s=now_s,
                reason=reason,
                tier="lane",
                tenant=kept.tenant,
                num_tokens=num_lost,
                num_bytes=self.num_bytes(num_lost),
                age_s=now_s - kept.last_used_s,
                num_hits=kept.num_hits,
                stored=stored,
            )
        )

    def entries(self) -> list[CacheEntry]:
        """What is kept; from any thread."""
        return [self.entry(k, pinned=self._is_pinned(k)) for k in list(self.kept.values())]
