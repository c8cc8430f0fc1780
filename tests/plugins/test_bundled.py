"""The bundled policy and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from litestar.testing import create_test_client

from stoker import (
    EngineSnapshot,
    LoadSnapshot,
    Observer,
    SchedulingPolicy,
    ServedModel,
    ServerContext,
    TenantConfig,
    TenantLoad,
)
from stoker.config import Config
from stoker.errors import ConfigError
from stoker.testing import EngineHarness, ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed
from stoker_plugins.metrics import Metrics, make_routes


class Context(ServerContext):
    """A server that says what the test wants."""

    def __init__(self, load: LoadSnapshot, observers: Mapping[str, Observer] | None = None) -> None:
        self.config = Config()
        self.observers = observers or {}
        self._load = load

    def models(self) -> Sequence[ServedModel]:
        info = ScriptedRuntime().info
        return [
            ServedModel(
                model_id="model", reference="m", backend="b", created=0, size_bytes=0, info=info
            )
        ]

    def load(self, model: str) -> LoadSnapshot:
        return self._load

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        return TenantLoad()

    def snapshot(self, model: str) -> EngineSnapshot:
        raise KeyError(model)

    def policy(self, model: str) -> SchedulingPolicy:
        raise KeyError(model)

    def tenant(self, name: str) -> TenantConfig:
        return TenantConfig(name=name)

    @property
    def uptime_s(self) -> float:
        return 1.0


def test_fcfs_keeps_the_order_of_arrival() -> None:
    harness = EngineHarness(FirstComeFirstServed(), runtime=ScriptedRuntime(lanes=1))
    requests = [harness.submit(f"{i}", max_tokens=2) for i in range(5)]
    ended: list[int] = []
    while harness.engine.has_work:
        harness.step()
        ended += [i for i, r in enumerate(requests) if r.finish() is not None and i not in ended]
    assert ended == [0, 1, 2, 3, 4]


def test_metrics_count_what_happened_under_the_fields_names() -> None:
    metrics = Metrics()
    harness = EngineHarness(FirstComeFirstServed(), observers=[metrics])
    prompt = "a prompt of 23 characters"[:23]
    for _ in range(2):
        harness.submit(prompt, max_tokens=7)
        harness.run()
    load = LoadSnapshot(num_running=2, num_waiting=1, kv_tokens_used=5, kv_tokens_capacity=50)
    handlers = make_routes(Context(load, {"metrics": metrics}))
    with create_test_client(list(handlers), logging_config=None) as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, float] = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name.replace('model_name="model"', "").replace("{}", "")] = float(value)
    expected: dict[str, Any] = {
        "stoker_num_requests_running": 2,
        "stoker_num_requests_waiting": 1,
        "stoker_kv_cache_usage_ratio": 0.1,
        "stoker_prompt_tokens_total": 23 + 1,  # the second time all but the last were in KV
        "stoker_generation_tokens_total": 14,
        "stoker_prefix_cache_queries_total": 46,
        "stoker_prefix_cache_hits_total": 22,
        "stoker_num_preemptions_total": 0,
        "stoker_policy_errors_total": 0,
        "stoker_time_to_first_token_seconds_count": 2,
        "stoker_inter_token_latency_seconds_count": 12,
        "stoker_request_queue_time_seconds_count": 2,
        "stoker_e2e_request_latency_seconds_count": 2,
        'stoker_request_success_total{finished_reason="length",}': 2,
        'stoker_request_success_total{finished_reason="error",}': 0,
    }
    assert {name: values.get(name) for name in expected} == expected


def test_the_metrics_route_needs_its_observer() -> None:
    with pytest.raises(ConfigError, match="needs the observer 'metrics'"):
        make_routes(Context(LoadSnapshot()))
