"""Metrics of the prefix cache, beside vLLM's two: read off the engines when ``/metrics`` is asked."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from stoker import CacheReport

__all__ = ["CacheMetrics"]


class CacheMetrics:
    """What a ``CacheReport`` says, as counters and gauges.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"stoker_{name}", text, ("model_name", *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"stoker_{name}", text, ("model_name", "tier"), registry=registry)

        self._hits = counter(
            "prefix_cache_hit_tokens", "Prompt tokens found, by the way their KV came.", "way"
        )
        self._evictions = counter(
            "prefix_cache_evictions", "Kept prefixes that left a tier, by reason.", "tier", "reason"
        )
        self._evicted = counter(
            "prefix_cache_evicted_tokens", "Their tokens, by reason.", "tier", "reason"
        )
        self._waits = counter(
            "prefix_cache_shared_waits", "Requests that waited for another one's prefix."
        )
        self._damaged = counter(
            "prefix_cache_damaged_files", "Files of snapshots that were ignored and removed."
        )
        self._errors = counter(
            "prefix_cache_errors", "Failures of the eviction strategy and of snapshots.", "of"
        )
        self._tokens = gauge("prefix_cache_tokens", "Tokens whose KV is kept, by tier.")
        self._bytes = gauge("prefix_cache_bytes", "Their size, by tier; 0 if unknown.")
        self._seen: dict[tuple[Counter, tuple[str, ...]], int] = {}

    def show(self, model: str, report: CacheReport) -> None:
        """Take over a model's figures."""
        lanes, store = report.lanes, report.store
        for way, tokens in lanes.hit_tokens_by_way.items():
            self._follow(self._hits, tokens, model, way)
        self._show_evictions(model, "lane", lanes.evictions, lanes.evicted_tokens)
        self._follow(self._waits, lanes.num_shared_waits, model)
        strategy_errors = lanes.num_strategy_errors
        self._tokens.labels(model, "lane").set(lanes.retained_tokens)
        self._bytes.labels(model, "lane").set(lanes.retained_bytes)
        if store is not None:
            self._show_evictions(model, "snapshot", store.evictions, store.evicted_tokens)
            self._follow(self._damaged, store.num_damaged, model)
            strategy_errors += store.num_strategy_errors
            for name, tier in store.tiers.items():
                self._tokens.labels(model, name).set(tier.num_tokens)
                self._bytes.labels(model, name).set(tier.num_bytes)
        self._follow(self._errors, strategy_errors, model, "strategy")
        self._follow(self._errors, lanes.num_store_errors, model, "store")

    def _show_evictions(
        self, model: str, tier: str, counts: Mapping[str, int], tokens: Mapping[str, int]
    ) -> None:
        for reason, count in counts.items():
            self._follow(self._evictions, count, model, tier, reason)
            self._follow(self._evicted, tokens.get(reason, 0), model, tier, reason)

    def _follow(self, counter: Counter, total: int, *labels: str) -> None:
        """Let a counter follow one that the engine keeps since its start."""
        seen = self._seen.get((counter, labels), 0)
        counter.labels(*labels).inc(max(0, total - seen))
        self._seen[counter, labels] = max(seen, total)
