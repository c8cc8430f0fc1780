"""``/v1/cache``: what the prefix caches keep and why something went; and how to empty them."""

from collections import defaultdict
from typing import Any

import msgspec
from litestar import Request, delete, get
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.cache_schemas import (
    CacheEvictions,
    CacheList,
    CacheTenant,
    CacheTier,
    CacheTotals,
    ClearedCache,
    ClearedModel,
    ModelCache,
    RecentEviction,
)
from stoker.api.openapi import json_operation
from stoker.config import Config
from stoker.errors import PermissionDeniedError
from stoker.interfaces import CacheEntry, CacheReport, Eviction
from stoker.logs import CURRENT_REQUEST
from stoker.router import Router
from stoker.tenants import ANONYMOUS

__all__ = ["cache_routes"]

AnyRequest = Request[Any, Any, Any]

_MAX_RECENT = 50
_TIERS = ("lane", "host", "disk")


def cache_routes(config: Config, router: Router) -> list[HTTPRouteHandler]:
    """The handlers that show the caches: all of them to ``[server] admins``, to others what is theirs.

    Neither tokens nor salts are shown to anybody.

    Args:
        config: Who is an administrator.
        router: What is asked.
    """

    @get(
        "/v1/cache",
        summary="What the prefix caches keep, and what was evicted and why",
        tags=["cache"],
        operation_id="get_cache",
        operation_class=json_operation("CacheList"),
    )
    async def get_cache(request: AnyRequest) -> ASGIApp:
        tenant = _tenant()
        whose = None if tenant in config.server.admins else tenant
        data = [_describe(router, model, whose) for model in _models(request, router)]
        body = CacheList(
            eviction=config.cache.eviction, isolation=config.cache.isolation, data=data
        )
        return _json(body)

    @delete(
        "/v1/cache",
        status_code=200,
        summary="Drop what the prefix caches keep, but for pinned prefixes; for administrators",
        tags=["cache"],
        operation_id="clear_cache",
        operation_class=json_operation("ClearedCache"),
    )
    async def clear_cache(request: AnyRequest) -> ASGIApp:
        if (tenant := _tenant()) not in config.server.admins:
            raise PermissionDeniedError(
                f"the tenant {tenant} may not empty caches; [server] admins says who may"
            )
        cleared = [
            ClearedModel(model=model, dropped=await router.clear_cache(model))
            for model in _models(request, router)
        ]
        return _json(ClearedCache(data=cleared))

    return [get_cache, clear_cache]


def _models(request: AnyRequest, router: Router) -> list[str]:
    """The model that ``?model=`` names, or all."""
    named = request.query_params.get("model")
    if named is not None:
        return [router.find(named).model_id]
    return [served.model_id for served in router.models()]


def _describe(router: Router, model: str, whose: str | None) -> ModelCache:
    """One model's cache.

    Args:
        router: What knows it.
        model: The model's id.
        whose: Show only what is this tenant's; ``None`` for everything.
    """
    report = router.cache(model)
    entries = [e for e in router.cache_entries(model) if whose is None or e.tenant == whose]
    recent = [*report.lanes.recent, *(() if report.store is None else report.store.recent)]
    recent = [eviction for eviction in recent if whose is None or eviction.tenant == whose]
    recent.sort(key=lambda eviction: eviction.at_s, reverse=True)
    now_s = router.clock()
    return ModelCache(
        model=model,
        tenant=whose,
        tiers=_tiers(entries, report, show_limits=whose is None),
        tenants=_tenants(entries),
        recent=[_recent(eviction, now_s) for eviction in recent[:_MAX_RECENT]],
        totals=_totals(report) if whose is None else None,
    )


def _tiers(entries: list[CacheEntry], report: CacheReport, *, show_limits: bool) -> list[CacheTier]:
    there = {} if report.store is None else report.store.tiers
    tiers = []
    for name in _TIERS:
        if name != "lane" and name not in there:
            continue
        found = [entry for entry in entries if entry.tier == name]
        tiers.append(
            CacheTier(
                tier=name,
                entries=len(found),
                tokens=sum(entry.num_tokens for entry in found),
                bytes=sum(entry.num_bytes for entry in found),
                pinned=sum(entry.pinned for entry in found),
                capacity_bytes=there[name].capacity_bytes
                if show_limits and name in there
                else None,
            )
        )
    return tiers


def _tenants(entries: list[CacheEntry]) -> list[CacheTenant]:
    by_tenant: dict[tuple[str, str], list[CacheEntry]] = defaultdict(list)
    for entry in entries:
        by_tenant[entry.tenant, entry.tier].append(entry)
    return [
        CacheTenant(
            tenant=tenant,
            tier=tier,
            entries=len(found),
            tokens=sum(entry.num_tokens for entry in found),
            bytes=sum(entry.num_bytes for entry in found),
            hits=sum(entry.num_hits for entry in found),
        )
        for (tenant, tier), found in sorted(by_tenant.items())
    ]


def _recent(eviction: Eviction, now_s: float) -> RecentEviction:
    return RecentEviction(
        seconds_ago=round(max(0.0, now_s - eviction.at_s), 3),
        reason=eviction.reason,
        tier=eviction.tier,
        tenant=eviction.tenant,
        tokens=eviction.num_tokens,
        bytes=eviction.num_bytes,
        idle_s=round(max(0.0, eviction.age_s), 3),
        hits=eviction.num_hits,
        stored=eviction.stored,
    )


def _totals(report: CacheReport) -> CacheTotals:
    lanes, store = report.lanes, report.store
    evictions = [
        CacheEvictions(
            tier="lane", reason=reason, count=count, tokens=lanes.evicted_tokens.get(reason, 0)
        )
        for reason, count in sorted(lanes.evictions.items())
    ]
    if store is not None:
        evictions += [
            CacheEvictions(
                tier="snapshot",
                reason=reason,
                count=count,
                tokens=store.evicted_tokens.get(reason, 0),
            )
            for reason, count in sorted(store.evictions.items())
        ]
    return CacheTotals(
        queries=lanes.num_queries,
        hits=lanes.num_hits,
        query_tokens=lanes.query_tokens,
        hit_tokens=lanes.hit_tokens,
        hits_by_way=dict(lanes.hits_by_way),
        hit_tokens_by_way=dict(lanes.hit_tokens_by_way),
        evictions=evictions,
        shared_waits=lanes.num_shared_waits,
        shared_wait_s=round(lanes.shared_wait_s, 3),
        pins_evicted=lanes.num_pins_evicted,
        strategy_errors=lanes.num_strategy_errors
        + (0 if store is None else store.num_strategy_errors),
        store_errors=lanes.num_store_errors,
        damaged_files=0 if store is None else store.num_damaged,
        disk_problem="" if store is None else store.disk_problem,
        prefill_s_per_token=lanes.prefill_s_per_token,
        copy_s_per_token=lanes.copy_s_per_token,
        snapshot_s_per_token=lanes.snapshot_s_per_token,
        restore_s_per_token=lanes.restore_s_per_token,
    )


def _tenant() -> str:
    context = CURRENT_REQUEST.get()
    return ANONYMOUS if context is None else context.tenant


def _json(body: Any) -> ASGIApp:
    return ASGIResponse(body=msgspec.json.encode(body), media_type="application/json")
