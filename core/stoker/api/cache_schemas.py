"""The bodies of ``/v1/cache``."""

from typing import Literal

import msgspec

__all__ = [
    "CacheEvictions",
    "CacheList",
    "CacheTenant",
    "CacheTier",
    "CacheTotals",
    "ClearedCache",
    "ClearedModel",
    "ModelCache",
    "RecentEviction",
]


class CacheTier(msgspec.Struct, kw_only=True):
    """What lies in one tier of a model's prefix cache.

    Attributes:
        tier: `lane` (the runtime's own KV memory, of idle lanes), `host` or `disk` (snapshots).
        entries: Kept prefixes.
        tokens: Tokens whose KV they hold.
        bytes: Their size; 0 if the runtime does not say.
        pinned: How many of them are pinned.
        capacity_bytes: Most bytes there may be; `null` if there is no such limit, or not for you to see.
    """

    tier: str
    entries: int
    tokens: int
    bytes: int
    pinned: int = 0
    capacity_bytes: int | None = None


class CacheTenant(msgspec.Struct, kw_only=True):
    """What a tenant has in one tier.

    Attributes:
        tenant: Whose requests computed it.
        tier: See `CacheTier`.
        entries: Kept prefixes.
        tokens: Their tokens.
        bytes: Their size.
        hits: How many requests have found them.
    """

    tenant: str
    tier: str
    entries: int
    tokens: int
    bytes: int
    hits: int


class RecentEviction(msgspec.Struct, kw_only=True):
    """A kept prefix that was given up.

    Attributes:
        seconds_ago: When.
        reason: Why: `capacity`, `no_room`, `tokens`, `bytes`, `ttl`, `takeover`, `replaced`, `damaged`,
            `unwritten` or `cleared`.
        tier: Where it was.
        tenant: Whose it was.
        tokens: Its tokens.
        bytes: Its size; 0 if unknown.
        idle_s: Since it was last used.
        hits: How many requests had found it.
        stored: Whether it is kept in a lower tier.
    """

    seconds_ago: float
    reason: str
    tier: str
    tenant: str
    tokens: int
    bytes: int
    idle_s: float
    hits: int
    stored: bool


class CacheEvictions(msgspec.Struct, kw_only=True):
    """Evictions for one reason since the start.

    Attributes:
        tier: `lane` or `snapshot`.
        reason: See `RecentEviction`.
        count: How many.
        tokens: Their tokens.
    """

    tier: str
    reason: str
    count: int
    tokens: int


class CacheTotals(msgspec.Struct, kw_only=True):
    """What became of a model's prefix cache since the start.

    Attributes:
        queries: Requests that were looked up.
        hits: Of those, requests that found something.
        query_tokens: Prompt tokens looked up.
        hit_tokens: Of those, tokens that did not have to be computed.
        hits_by_way: Hits by the way the KV came: `takeover`, `share`, `copy` or `restore`.
        hit_tokens_by_way: Their tokens.
        evictions: By tier and reason.
        shared_waits: Requests that waited for another one to compute the prefix they share.
        shared_wait_s: How long, together.
        pins_evicted: Pinned prefixes that had to yield to running requests.
        strategy_errors: Failures of the eviction strategy.
        store_errors: Failures of the store of snapshots, of snapshots and of restores.
        damaged_files: Files of snapshots that were ignored and removed.
        disk_problem: Why there is no disk tier though one is configured.
        prefill_s_per_token: Measured cost of computing a prompt token; 0 while unknown, like the others.
        copy_s_per_token: Of copying a token's KV.
        snapshot_s_per_token: Of making a snapshot.
        restore_s_per_token: Of restoring one.
    """

    queries: int
    hits: int
    query_tokens: int
    hit_tokens: int
    hits_by_way: dict[str, int]
    hit_tokens_by_way: dict[str, int]
    evictions: list[CacheEvictions]
    shared_waits: int
    shared_wait_s: float
    pins_evicted: int
    strategy_errors: int
    store_errors: int
    damaged_files: int
    disk_problem: str
    prefill_s_per_token: float
    copy_s_per_token: float
    snapshot_s_per_token: float
    restore_s_per_token: float


class ModelCache(msgspec.Struct, kw_only=True):
    """The prefix cache of one model.

    Attributes:
        model: Its id.
        tenant: Whose part of it this is: your own, or `null` for everybody's, which administrators see.
        tiers: What lies where.
        tenants: The same by tenant.
        recent: The last evictions, at most 50, the latest first.
        totals: What became of it since the start; for administrators, else `null`.
    """

    model: str
    object: Literal["cache"] = "cache"
    tenant: str | None
    tiers: list[CacheTier]
    tenants: list[CacheTenant]
    recent: list[RecentEviction]
    totals: CacheTotals | None


class CacheList(msgspec.Struct, kw_only=True):
    """The prefix caches of the served models.

    Attributes:
        eviction: The eviction strategy.
        isolation: Who shares prefixes: see `[cache] isolation`.
        data: One for each model.
    """

    object: Literal["list"] = "list"
    eviction: str
    isolation: str
    data: list[ModelCache]


class ClearedModel(msgspec.Struct, kw_only=True):
    """A model whose prefix cache was emptied.

    Attributes:
        model: Its id.
        dropped: How many kept prefixes were dropped or cut down to what is pinned.
    """

    model: str
    dropped: int


class ClearedCache(msgspec.Struct, kw_only=True):
    """The answer to emptying the prefix caches."""

    object: Literal["cache.cleared"] = "cache.cleared"
    data: list[ClearedModel]
