"""What the prefix cache shows and asks: its entries, who is evicted first, and where evicted KV may go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CacheEntry",
    "CacheReport",
    "CacheStats",
    "Eviction",
    "EvictionStrategy",
    "SnapshotStore",
    "StoreStats",
    "StoredPrefix",
    "TierUsage",
]

Tier = Literal["lane", "host", "disk"]


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A prefix that is kept: the KV of an idle lane, or a snapshot of one.

    Attributes:
        entry_id: Unique while the entry lives, within its tier; what orderings are checked by.
        tier: ``lane`` (the runtime's own memory), ``host`` or ``disk`` (snapshots).
        tenant: Whose request computed it.
        salt: The isolation scope it belongs to: only requests of the same scope find it. It is derived
            from what clients keep secret: never show it.
        num_tokens: Tokens whose KV it holds.
        num_bytes: Their size; 0 if the runtime does not say.
        created_s: When it was kept.
        last_used_s: When a request last found it, or when it was kept.
        num_hits: How many requests have found it.
        pinned: Whether it is to be kept whatever comes (``[cache] pin``).
    """

    entry_id: int
    tier: Tier
    tenant: str
    salt: str
    num_tokens: int
    num_bytes: int
    created_s: float
    last_used_s: float
    num_hits: int = 0
    pinned: bool = False


class EvictionStrategy(ABC):
    """Says in which order kept prefixes go; when and how many, the core decides.

    Called on the engine's thread when room is needed: be quick. The core never evicts pinned entries or
    those within a tenant's floor while there are others, and drops what is older than ``[cache] ttl_s``
    under every strategy.
    """

    @abstractmethod
    def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
        """All of ``entries``, the first to be evicted first.

        An exception, or anything but a permutation, costs a counter and a fall back to LRU.
        """


class Eviction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A kept prefix that was given up.

    Attributes:
        at_s: When.
        reason: ``capacity`` (running requests need the KV memory), ``no_room`` (the runtime found no room
            where the count said there was), ``tokens`` (above ``max_tokens``), ``bytes`` (above
            ``max_bytes``), ``ttl`` (too old), ``takeover`` (another request took its lane) or ``cleared`` (an
            administrator asked for it); see ``StoreStats`` for those of snapshots.
        tier: Where it was.
        tenant: Whose it was.
        num_tokens: Tokens that were lost, beyond what the next request still shares.
        num_bytes: Their size; 0 if unknown.
        age_s: Since it was last used.
        num_hits: How many requests had found it.
        stored: Whether a snapshot of it was kept.
    """

    at_s: float
    reason: str
    tier: Tier
    tenant: str
    num_tokens: int
    num_bytes: int
    age_s: float
    num_hits: int = 0
    stored: bool = False


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the prefix cache of a model since the start.

    Attributes:
        num_queries: Requests that were looked up.
        num_hits: Of those, requests that found something.
        query_tokens: Prompt tokens looked up.
        hit_tokens: Of those, tokens that did not have to be computed.
        hits_by_way: Hits by the way the KV came: ``takeover`` (an idle lane as it was), ``share`` (copied
            where lanes share memory), ``copy`` or ``restore`` (from a snapshot).
        hit_tokens_by_way: Their tokens.
        evictions: Evictions by reason; see ``Eviction``.
        evicted_tokens: Their tokens.
        num_entries: Prefixes that idle lanes keep now.
        num_pinned: Of those, pinned ones.
        retained_tokens: Their tokens.
        retained_bytes: Their bytes; 0 if the runtime does not say how large its KV is.
        num_shared_waits: Requests that waited for another one to compute the prefix they share.
        shared_wait_s: How long, together.
        num_pins_evicted: Pinned prefixes that had to yield to running requests.
        num_strategy_errors: How often the eviction strategy failed.
        num_store_errors: How often the store of snapshots, a snapshot or a restore failed.
        prefill_s_per_token: Measured cost of computing a prompt token; 0 while unknown.
        copy_s_per_token: Measured cost of copying a token's KV between lanes; 0 while unknown.
        restore_s_per_token: Measured cost of restoring a token's KV; 0 while unknown.
        snapshot_s_per_token: Measured cost of making a snapshot; 0 while unknown.
        recent: The last evictions, oldest first.
    """

    num_queries: int = 0
    num_hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    hits_by_way: Mapping[str, int] = {}
    hit_tokens_by_way: Mapping[str, int] = {}
    evictions: Mapping[str, int] = {}
    evicted_tokens: Mapping[str, int] = {}
    num_entries: int = 0
    num_pinned: int = 0
    retained_tokens: int = 0
    retained_bytes: int = 0
    num_shared_waits: int = 0
    shared_wait_s: float = 0.0
    num_pins_evicted: int = 0
    num_strategy_errors: int = 0
    num_store_errors: int = 0
    prefill_s_per_token: float = 0.0
    copy_s_per_token: float = 0.0
    restore_s_per_token: float = 0.0
    snapshot_s_per_token: float = 0.0
    recent: Sequence[Eviction] = ()


class TierUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a tier of the store of snapshots.

    Attributes:
        num_entries: Snapshots.
        num_tokens: Tokens whose KV they hold.
        num_bytes: Their size.
        capacity_bytes: Most bytes there may be.
    """

    num_entries: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    capacity_bytes: int = 0


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the store of snapshots of a model since the start.

    Attributes:
        tiers: What lies in ``host`` and ``disk`` now; only the tiers there are.
        num_hits: Snapshots handed out.
        evictions: Snapshots that left a tier, by reason: ``bytes`` (too much), ``ttl`` (too old),
            ``replaced`` (a longer one holds the same), ``damaged`` (its file could not be used),
            ``unwritten`` (the disk could not keep up or failed) or ``cleared`` (an administrator asked).
        evicted_tokens: Their tokens.
        num_damaged: Files that were ignored and removed: short, corrupt, or of another model or format.
        num_strategy_errors: How often the eviction strategy failed.
        disk_problem: Why there is no disk tier though one is configured; empty if there is.
        recent: The last evictions, oldest first.
    """

    tiers: Mapping[str, TierUsage] = {}
    num_hits: int = 0
    evictions: Mapping[str, int] = {}
    evicted_tokens: Mapping[str, int] = {}
    num_damaged: int = 0
    num_strategy_errors: int = 0
    disk_problem: str = ""
    recent: Sequence[Eviction] = ()


class CacheReport(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix cache of a model, lanes and snapshots.

    Attributes:
        lanes: The first tier: what idle lanes keep.
        store: The second one; ``None`` if there is none.
    """

    lanes: CacheStats = CacheStats()
    store: StoreStats | None = None


class StoredPrefix(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A snapshot that begins as a request does.

    Attributes:
        key: What ``SnapshotStore.get`` knows it by.
        num_tokens: Tokens it holds.
        num_shared: How many of those, from the first, the request shares.
        num_block_tokens: As it was put; see ``SnapshotStore.put``.
        num_bytes: Its size.
        tier: ``host`` or ``disk``.
    """

    key: str
    num_tokens: int
    num_shared: int
    num_block_tokens: int
    num_bytes: int
    tier: Tier


class SnapshotStore(ABC):
    """The second tier: snapshots of evicted lanes.

    ``entries`` and ``stats`` may be called from any thread, all else comes from the engine's. Whatever a
    method raises is counted and costs no more than the hit.
    """

    @abstractmethod
    def put(
        self,
        tokens: NDArray[np.int32],
        salt: str,
        tenant: str,
        snapshot: bytes,
        seconds_to_make: float,
        num_block_tokens: int = 0,
    ) -> bool:
        """Keep a snapshot.

        Args:
            tokens: The ``n`` tokens whose KV it holds.
            salt: The isolation scope; only requests of the same one may find it.
            tenant: Whose request computed it.
            snapshot: What ``Runtime.snapshot`` returned.
            seconds_to_make: What computing it anew would probably cost: what it is worth.
            num_block_tokens: How many of the first tokens were computed as whole blocks; handed back in
                ``StoredPrefix`` (see ``Capabilities.exact_block``).

        Returns:
            Whether it is kept.
        """

    @abstractmethod
    def match(self, tokens: NDArray[np.int32], salt: str) -> StoredPrefix | None:
        """The snapshot that shares the most tokens with a prompt, of its scope; ``None`` if none does."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """A snapshot's bytes, as they were put; ``None`` if it is gone, damaged or not ready.

        Counts as a hit.
        """

    def is_ready(self, key: str, timeout_s: float = 0.0) -> bool:
        """Whether ``get`` would not have to read from disk.

        If it would, reading begins, on another thread: ask as soon as a request that could use the snapshot
        is queued, and again when it is its turn. A snapshot that turns out to be damaged is dropped: it is
        not ready then, and ``match`` does not find it again.

        Args:
            key: Of a ``StoredPrefix``.
            timeout_s: Wait so long for it; for when nobody else is held up by that.
        """
        return True

    @abstractmethod
    def evict(self, now_s: float) -> int:
        """Drop what is too old or too much; returns how many. Called now and then."""

    def clear(self) -> int:
        """Drop everything; returns how many snapshots that were."""
        return 0

    @abstractmethod
    def entries(self) -> list[CacheEntry]:
        """What is kept, from any thread."""

    def stats(self) -> StoreStats:
        """Counters, from any thread."""
        return StoreStats()

    @abstractmethod
    def close(self) -> None:
        """Free everything. May be called twice."""
