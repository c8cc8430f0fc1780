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
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from stoker import ConfigError, FinishReason, Observer, RequestRecord, ServerContext, StepRecord

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


class Metrics(Observer):
    """Counts steps and requests of all models in a registry of its own."""

    def __init__(self) -> None:
        # A time stamp beside every counter is noise. (The library left this function untyped.)
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._models: dict[str, _ModelMetrics] = {}
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
        self.kv_usage = gauge("kv_cache_usage_ratio", "KV tokens of running sequences / capacity.")
        self.kv_retained = gauge("kv_cache_retained_ratio", "KV tokens kept for reuse / capacity.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.preemptions = counter("num_preemptions", "Sequences that lost their lane.")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found.")
        self.policy_errors = counter("policy_errors", "Failures of the scheduling policy.")
        self.runtime_errors = counter("runtime_errors", "Steps that the runtime failed.")
        self.finished = counter("request_success", "Sequences ended.", ("finished_reason",))
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
            found = self._models[model] = _ModelMetrics(self, model)
        return found

    def on_step(self, record: StepRecord) -> None:
        """Count a step."""
        self.of(record.model).on_step(record)

    def on_finish(self, record: RequestRecord) -> None:
        """Count a finished sequence."""
        self.of(record.model).on_finish(record)


class _ModelMetrics:
    """One model's metrics with the label bound: no look-up per step."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._finished = {
            reason: metrics.finished.labels(model, reason.value) for reason in FinishReason
        }
        self.running = metrics.running.labels(model)
        self.waiting = metrics.waiting.labels(model)
        self.kv_usage = metrics.kv_usage.labels(model)
        self.kv_retained = metrics.kv_retained.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._generation_tokens = metrics.generation_tokens.labels(model)
        self._preemptions = metrics.preemptions.labels(model)
        self._ttft = metrics.ttft.labels(model)
        self._itl = metrics.itl.labels(model)
        self._queue = metrics.queue.labels(model)
        self._latency = metrics.latency.labels(model)
        self._step_time = metrics.step_time.labels(model)
        self._runtime_time = metrics.runtime_time.labels(model)
        self._batch_tokens = metrics.batch_tokens.labels(model)
        # Counters that the engine keeps since its start: the metric follows by the difference.
        self._running_totals = {
            "num_cache_queries": metrics.cache_queries.labels(model),
            "num_cache_hits": metrics.cache_hits.labels(model),
            "num_policy_errors": metrics.policy_errors.labels(model),
            "num_runtime_errors": metrics.runtime_errors.labels(model),
        }
        self._seen = dict.fromkeys(self._running_totals, 0)

    def on_step(self, record: StepRecord) -> None:
        self._prompt_tokens.inc(record.num_prefill_tokens)
        self._generation_tokens.inc(record.num_generated_tokens)
        if record.num_preemptions:
            self._preemptions.inc(record.num_preemptions)
        for name, total in self._running_totals.items():
            value: int = getattr(record, name)
            if value != self._seen[name]:
                total.inc(value - self._seen[name])
                self._seen[name] = value
        self._step_time.observe(record.duration_s)
        self._runtime_time.observe(record.runtime_s)
        self._batch_tokens.observe(record.num_prefill_tokens + record.num_decode_tokens)
        for gap in record.token_gaps_s:
            self._itl.observe(gap)

    def on_finish(self, record: RequestRecord) -> None:
        self._finished[record.finish_reason].inc()
        self._queue.observe(record.queue_s)
        self._latency.observe(record.total_s)
        if record.time_to_first_token_s is not None:
            self._ttft.observe(record.time_to_first_token_s)


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
            model.kv_usage.set(load.kv_tokens_used / capacity)
            model.kv_retained.set(load.kv_tokens_retained / capacity)
        return Response(
            generate_latest(metrics.registry),
            media_type="text/plain; version=0.0.4",
        )

    return [show_metrics]
