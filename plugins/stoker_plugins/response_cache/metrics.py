"""The response cache in ``/metrics``: read off it when it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stoker import ServerContext
from stoker_plugins.metrics import Metrics

if TYPE_CHECKING:
    from stoker_plugins.response_cache.middleware import ResponseCache

__all__ = ["CacheCollector", "register"]

_COUNTERS = {
    "queries": "Requests that might be answered from the response cache.",
    "hits": "Requests answered from the response cache.",
    "joins": "Requests answered together with an identical one under way.",
    "stores": "Answers stored in the response cache.",
    "moves": "Requests whose shared answer failed and that got a second one.",
}


def register(cache: ResponseCache, context: ServerContext) -> None:
    """Show a cache in the metrics of its server, if that has the bundled ones."""
    metrics = context.observers["metrics"]
    if isinstance(metrics, Metrics):
        metrics.registry.register(CacheCollector(cache))


class CacheCollector(Collector):
    """Metrics of one cache.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: ResponseCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """The metrics, as they are now."""
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(
                f"stoker_response_cache_{name}", text, labels=["model_name"]
            )
            for model, counts in self._cache.counts.items():
                family.add_metric([model], asdict(counts)[name])
            yield family
        store = self._cache.store
        store.expire()
        yield GaugeMetricFamily(
            "stoker_response_cache_bytes", "Memory of stored answers.", value=store.size_bytes
        )
        yield GaugeMetricFamily(
            "stoker_response_cache_answers", "Stored answers.", value=len(store)
        )
        evictions = CounterMetricFamily(
            "stoker_response_cache_evictions", "Answers that went, by reason.", labels=["reason"]
        )
        for reason, count in store.evictions.items():
            evictions.add_metric([reason], count)
        yield evictions
