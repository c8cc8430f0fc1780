"""Prometheus metrics: an observer that counts, and the route that shows. Names and buckets follow vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import MediaType, Response, get
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from stoker import ConfigError, FinishReason, Observer, RequestRecord, ServerContext, StepRecord
from stoker_plugins.metrics_cache import CacheMetrics

__all__ = ["Metrics", "make_routes"]

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_MAX_TENANTS = 100
"""Tenants that have labels of their own; a trusted proxy may name any number of them."""
_OTHER_TENANTS = "other"
_UNLISTED = "unlisted"
"""The reason of preemptions beyond those that a trace lists."""


class Metrics(Observer):
    """Counts steps and requests of all models in a registry of its own.

    Attributes:
        registry: What ``/metrics`` shows; other plugins may register collectors of their own in it.
    """

    def __init__(self) -> None:
        # A time stamp beside every counter is noise. (The library left this function untyped.)
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._models: dict[str, _ModelMetrics] = {}
        self._tenants: set[str] = set()
        labels = ("model_name",)

        def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> Counter:
            return Counter(f"stoker_{name}", text, labels + extra, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"stoker_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"stoker_{name}", text, labels, buckets=buckets, registry=self.registry
            )

        self.running = gauge("num_requests_running", "Sequences that hold a lane.")
        self.waiting = gauge("num_requests_waiting", "Sequences in the queue.")
        self.paused = gauge("num_requests_paused", "Sequences that wait for their reader.")
        self.kv_usage = gauge("kv_cache_usage_ratio", "KV tokens of running sequences / capacity.")
        self.kv_retained = gauge("kv_cache_retained_ratio", "KV tokens kept for reuse / capacity.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.preemptions = counter("num_preemptions", "Sequences that lost their lane.")
        self.preemptions_by_reason = counter(
            "preemptions_by_reason", "The same, of ended sequences, by reason.", ("reason",)
        )
        self.recomputed_tokens = counter(
            "recomputed_tokens", "Tokens computed again after a preemption."
        )
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found.")
        self.cache = CacheMetrics(self.registry)
        self.policy_errors = counter("policy_errors", "Failures of the scheduling policy.")
        self.slow_policy_calls = counter("slow_policy_calls", "Policy calls of over 50 ms.")
        self.policy_seconds = counter("policy_seconds", "Time spent in the policy.")
        self.observer_errors = counter("observer_errors", "Failures of observers.")
        self.runtime_errors = counter("runtime_errors", "Steps that the runtime failed.")
        self.drafts = counter("spec_decode_num_drafts", "Drafts verified.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens computed.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Of those, accepted.")
        self.accepted_per_position = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their place in the draft, from 0.",
            ("position",),
        )
        self.drafter_errors = counter("drafter_errors", "Failures of the drafter.")
        self.finished = counter("request_success", "Sequences ended.", ("finished_reason",))
        self.errors = counter(
            "request_errors", "Sequences that ended with an error, by its code.", ("code",)
        )
        self.refused = counter(
            "requests_refused", "Requests refused before they were queued, by code.", ("code",)
        )
        self.tenant_prompt = counter(
            "tenant_prompt_tokens", "Prompt tokens of ended sequences.", ("tenant",)
        )
        self.tenant_generation = counter(
            "tenant_generation_tokens", "Tokens generated by ended sequences.", ("tenant",)
        )
        self.tenant_queue = Summary(
            "stoker_tenant_queue_time_seconds",
            "Time that ended sequences spent in the queue.",
            ("model_name", "tenant"),
            registry=self.registry,
        )
        self.ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens.", _ITL_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Time in the queue.", _REQUEST_BUCKETS)
        self.latency = histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_BUCKETS)
        self.step_time = histogram("step_duration_seconds", "One step of the loop.", _STEP_BUCKETS)
        self.runtime_time = histogram(
            "step_runtime_seconds", "Of that, the runtime.", _STEP_BUCKETS
        )
        self.batch_tokens = histogram("iteration_tokens", "Tokens of one step.", _BATCH_BUCKETS)

    def of(self, model: str) -> _ModelMetrics:
        """The metrics of one model; made, at zero, when first asked for."""
        found = self._models.get(model)
        if found is None:
            # Two threads may come here at once; they must not end up with one each.
            found = self._models.setdefault(model, _ModelMetrics(self, model))
        return found

    def tenant_label(self, tenant: str) -> str:
        """How a tenant is called in labels: by its name, or ``other`` if there are too many."""
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= _MAX_TENANTS:
            return _OTHER_TENANTS
        self._tenants.add(tenant)
        return tenant

    def on_step(self, record: StepRecord) -> None:
        """Count a step."""
        self.of(record.model).on_step(record)

    def on_finish(self, record: RequestRecord) -> None:
        """Count a finished sequence."""
        self.of(record.model).on_finish(record)

    def on_refuse(self, model: str, tenant: str, code: str) -> None:
        """Count a refused request."""
        self.refused.labels(model, code).inc()


class _ModelMetrics:
    """One model's metrics with the label bound: no look-up per step."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._finished = {
            reason: metrics.finished.labels(model, reason.value) for reason in FinishReason
        }
        self.running = metrics.running.labels(model)
        self.waiting = metrics.waiting.labels(model)
        self.paused = metrics.paused.labels(model)
        self.kv_usage = metrics.kv_usage.labels(model)
        self.kv_retained = metrics.kv_retained.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._generation_tokens = metrics.generation_tokens.labels(model)
        self._preemptions = metrics.preemptions.labels(model)
        self._recomputed = metrics.recomputed_tokens.labels(model)
        self._ttft = metrics.ttft.labels(model)
        self._itl = metrics.itl.labels(model)
        self._queue = metrics.queue.labels(model)
        self._latency = metrics.latency.labels(model)
        self._step_time = metrics.step_time.labels(model)
        self._runtime_time = metrics.runtime_time.labels(model)
        self._batch_tokens = metrics.batch_tokens.labels(model)
        self._drafts = metrics.drafts.labels(model)
        self._draft_tokens = metrics.draft_tokens.labels(model)
        self._accepted_tokens = metrics.accepted_tokens.labels(model)
        self._policy_seconds = metrics.policy_seconds.labels(model)
        # Counters that the engine keeps since its start: the metric follows by the difference.
        self._running_totals = {
            "num_cache_queries": metrics.cache_queries.labels(model),
            "num_cache_hits": metrics.cache_hits.labels(model),
            "num_policy_errors": metrics.policy_errors.labels(model),
            "num_runtime_errors": metrics.runtime_errors.labels(model),
            "num_slow_policy_calls": metrics.slow_policy_calls.labels(model),
            "num_observer_errors": metrics.observer_errors.labels(model),
            "num_drafter_errors": metrics.drafter_errors.labels(model),
        }
        self._seen = dict.fromkeys(self._running_totals, 0)

    def on_step(self, record: StepRecord) -> None:
        self._prompt_tokens.inc(record.num_prefill_tokens)
        self._generation_tokens.inc(record.num_generated_tokens)
        if record.num_preemptions:
            self._preemptions.inc(record.num_preemptions)
        if record.num_recomputed_tokens:
            self._recomputed.inc(record.num_recomputed_tokens)
        for name, total in self._running_totals.items():
            value: int = getattr(record, name)
            if value != self._seen[name]:
                total.inc(value - self._seen[name])
                self._seen[name] = value
        self._step_time.observe(record.duration_s)
        self._runtime_time.observe(record.runtime_s)
        self._batch_tokens.observe(record.num_prefill_tokens + record.num_decode_tokens)
        self._policy_seconds.inc(record.policy_s)
        if record.num_drafts:
            self._count_drafts(record)
        for gap in record.token_gaps_s:
            self._itl.observe(gap)

    def _count_drafts(self, record: StepRecord) -> None:
        self._drafts.inc(record.num_drafts)
        self._draft_tokens.inc(record.num_draft_tokens)
        self._accepted_tokens.inc(record.num_accepted_tokens)
        per_position = self._metrics.accepted_per_position
        for position, count in enumerate(record.accepted_per_position):
            per_position.labels(self._model, str(position)).inc(count)

    def on_finish(self, record: RequestRecord) -> None:
        self._finished[record.finish_reason].inc()
        self._queue.observe(record.queue_s)
        self._latency.observe(record.total_s)
        if record.time_to_first_token_s is not None:
            self._ttft.observe(record.time_to_first_token_s)
        if record.finish_reason is FinishReason.ERROR:
            code = record.error_code or "internal_error"
            self._metrics.errors.labels(self._model, code).inc()
        self._count_preemptions(record)
        self._count_tenant(record)

    def _count_preemptions(self, record: RequestRecord) -> None:
        listed = () if record.trace is None else record.trace.preemptions
        by_reason = self._metrics.preemptions_by_reason
        for preemption in listed:
            by_reason.labels(self._model, preemption.reason).inc()
        if record.num_preemptions > len(listed):
            unlisted = record.num_preemptions - len(listed)
            by_reason.labels(self._model, _UNLISTED).inc(unlisted)

    def _count_tenant(self, record: RequestRecord) -> None:
        metrics = self._metrics
        labels = (self._model, metrics.tenant_label(record.tenant))
        metrics.tenant_prompt.labels(*labels).inc(record.prompt_tokens)
        metrics.tenant_generation.labels(*labels).inc(record.completion_tokens)
        metrics.tenant_queue.labels(*labels).observe(record.queue_s)


def make_routes(context: ServerContext) -> Sequence[Any]:
    """The ``/metrics`` route; gauges are read off the engines when it is asked.

    Raises:
        ConfigError: The ``metrics`` observer, which counts, is not active.
    """
    metrics = context.observers.get("metrics")
    if not isinstance(metrics, Metrics):
        raise ConfigError("the route plugin 'metrics' needs the observer 'metrics'; enable both")

    @get("/metrics", media_type=MediaType.TEXT, sync_to_thread=False, tags=["operations"])
    def show_metrics() -> Response[bytes]:
        """Metrics in Prometheus' text format."""
        for served in context.models():
            load = context.load(served.model_id)
            model = metrics.of(served.model_id)
            capacity = max(load.kv_tokens_capacity, 1)
            model.running.set(load.num_running)
            model.waiting.set(load.num_waiting)
            model.paused.set(load.num_paused)
            model.kv_usage.set(load.kv_tokens_used / capacity)
            model.kv_retained.set(load.kv_tokens_retained / capacity)
            metrics.cache.show(served.model_id, context.cache(served.model_id))
        return Response(
            generate_latest(metrics.registry),
            media_type="text/plain; version=0.0.4",
        )

    return [show_metrics]
