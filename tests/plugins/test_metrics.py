"""What the metrics say of preemptions, errors, refusals and tenants."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import pytest
from prometheus_client.exposition import generate_latest

from stoker import (
    CacheReport,
    CacheStats,
    DeadlineError,
    FinishReason,
    Observer,
    PolicyContext,
    RequestRecord,
    SequenceView,
    StepRecord,
    StoreStats,
    TierUsage,
)
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime
from stoker.types import Preemption, SequenceTrace
from stoker_plugins.fcfs import FirstComeFirstServed
from stoker_plugins.metrics import Metrics


def values(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, ``model_name`` left out."""
    found = {}
    for line in generate_latest(metrics.registry).decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.replace('model_name="m"', "").replace("{,", "{").replace(",}", "}")
            found[name.replace("{}", "")] = float(value)
    return found


def record(
    tenant: str = "t",
    reason: FinishReason = FinishReason.STOP,
    code: str | None = None,
    preemptions: tuple[str, ...] = (),
    num_preemptions: int = 0,
) -> RequestRecord:
    lost = [Preemption(after_s=1.0, reason=reason, lost_tokens=5) for reason in preemptions]
    trace = SequenceTrace(
        status="finished", queue_s=0.5, total_s=2.0, prompt_tokens=10, preemptions=lost
    )
    return RequestRecord(
        request_id="r",
        model="m",
        tenant=tenant,
        finish_reason=reason,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=3,
        queue_s=0.5,
        time_to_first_token_s=None,
        total_s=2.0,
        num_preemptions=num_preemptions or len(preemptions),
        error_code=code,
        trace=trace,
    )


def test_preemptions_are_counted_by_reason() -> None:
    metrics = Metrics()
    metrics.on_finish(record(preemptions=("policy", "policy", "reader")))
    metrics.on_finish(record(preemptions=("policy",), num_preemptions=20))
    found = values(metrics)
    name = "stoker_preemptions_by_reason_total"
    assert found[f'{name}{{reason="policy"}}'] == 3
    assert found[f'{name}{{reason="reader"}}'] == 1
    assert found[f'{name}{{reason="unlisted"}}'] == 19


def test_recomputed_tokens_and_reasons_come_from_the_engine() -> None:
    """KV memory for 60 tokens cannot hold three sequences of 40: two give way, and go on."""
    metrics = Metrics()
    options = ScriptedOptions(kv_capacity_tokens=60)
    runtime = ScriptedRuntime(lanes=3, context_length=60, options=options)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, observers=[metrics])
    for prompt in ("one", "two", "six"):
        harness.submit(prompt * 3, max_tokens=30)
    harness.run()
    found = {name.replace('model_name="model"', ""): n for name, n in values(metrics).items()}
    by_reason = [n for name, n in found.items() if name.startswith("stoker_preemptions_by_reason")]
    assert sum(by_reason) > 0
    assert found["stoker_num_preemptions_total{}"] == sum(by_reason)
    assert found["stoker_recomputed_tokens_total{}"] > 0


def test_errors_and_refusals_are_counted_by_code() -> None:
    metrics = Metrics()
    code = DeadlineError.default_code
    for _ in range(2):
        metrics.on_finish(record(reason=FinishReason.ERROR, code=code))
    metrics.on_finish(record(reason=FinishReason.ERROR))
    metrics.on_finish(record(reason=FinishReason.ABORT))
    metrics.on_refuse("m", "t", "queue_full")
    metrics.on_refuse("", "t", "model_not_found")
    found = values(metrics)
    assert found['stoker_request_errors_total{code="deadline_exceeded"}'] == 2
    assert found['stoker_request_errors_total{code="internal_error"}'] == 1
    assert found['stoker_request_success_total{finished_reason="error"}'] == 3
    assert found['stoker_requests_refused_total{code="queue_full"}'] == 1
    refused = [n for name, n in found.items() if "refused" in name and "model_not_found" in name]
    assert refused == [1]


def test_tenants_have_counters_of_their_own_as_long_as_there_are_few() -> None:
    metrics = Metrics()
    for i in range(150):
        metrics.on_finish(record(f"tenant-{i}"))
    metrics.on_finish(record("tenant-7"))
    metrics.on_finish(record("tenant-149"))
    found = values(metrics)
    assert found['stoker_tenant_prompt_tokens_total{tenant="tenant-7"}'] == 20
    assert found['stoker_tenant_generation_tokens_total{tenant="tenant-7"}'] == 6
    assert found['stoker_tenant_queue_time_seconds_sum{tenant="tenant-7"}'] == pytest.approx(1.0)
    assert found['stoker_tenant_generation_tokens_total{tenant="other"}'] == 51 * 3
    labels = [name for name in found if name.startswith("stoker_tenant_prompt_tokens_total")]
    assert len(labels) == 101


def test_the_cache_is_shown_as_it_stands_and_counters_only_grow() -> None:
    metrics = Metrics()
    lanes = CacheStats(
        hit_tokens_by_way={"takeover": 70, "restore": 30},
        evictions={"capacity": 2},
        evicted_tokens={"capacity": 200},
        retained_tokens=500,
        retained_bytes=5000,
        num_store_errors=1,
    )
    store = StoreStats(
        tiers={"host": TierUsage(num_tokens=300, num_bytes=3000)},
        evictions={"bytes": 4},
        evicted_tokens={"bytes": 400},
        num_damaged=1,
    )
    metrics.cache.show("m", CacheReport(lanes=lanes, store=store))
    metrics.cache.show("m", CacheReport(lanes=lanes, store=store))
    found = values(metrics)
    assert found['stoker_prefix_cache_hit_tokens_total{way="takeover"}'] == 70
    assert found['stoker_prefix_cache_hit_tokens_total{way="restore"}'] == 30
    name = "stoker_prefix_cache_evictions_total"
    by_reason = {key: n for key, n in found.items() if key.startswith(name)}
    assert sorted(by_reason.values()) == [2, 4]
    assert found['stoker_prefix_cache_tokens{tier="lane"}'] == 500
    assert found['stoker_prefix_cache_tokens{tier="host"}'] == 300
    assert found['stoker_prefix_cache_bytes{tier="host"}'] == 3000
    more = msgspec.structs.replace(lanes, hit_tokens_by_way={"takeover": 75})
    metrics.cache.show("m", CacheReport(lanes=more))
    found = values(metrics)
    assert found['stoker_prefix_cache_hit_tokens_total{way="takeover"}'] == 75


def test_slow_policies_and_failing_observers_are_counted() -> None:
    class Broken(Observer):
        def on_step(self, record: StepRecord) -> None:
            raise RuntimeError("no")

    class Slow(FirstComeFirstServed):
        def admission_order(
            self, waiting: Sequence[SequenceView], context: PolicyContext
        ) -> Sequence[SequenceView]:
            time.sleep(0.06)
            return super().admission_order(waiting, context)

    metrics = Metrics()
    harness = EngineHarness(Slow(), observers=[metrics, Broken()], clock=time.monotonic)
    harness.submit("a", max_tokens=3)
    harness.run()
    found = {name.replace('model_name="model"', ""): v for name, v in values(metrics).items()}
    assert found["stoker_slow_policy_calls_total{}"] >= 1
    assert found["stoker_policy_seconds_total{}"] >= 0.06
    assert (
        found["stoker_observer_errors_total{}"] == 2
    )  # the last step's failure comes with the next


def test_drafts_are_counted_as_vllm_counts_them() -> None:
    metrics = Metrics()
    for accepted, per_position in ((3, [2, 1, 0]), (1, [1])):
        step = StepRecord(
            model="m",
            started_s=0.0,
            duration_s=0.1,
            runtime_s=0.1,
            num_prefill_tokens=0,
            num_decode_tokens=4,
            num_generated_tokens=4 + accepted,
            num_running=4,
            num_waiting=0,
            num_preemptions=0,
            num_drafts=2,
            num_draft_tokens=5,
            num_accepted_tokens=accepted,
            accepted_per_position=per_position,
            num_drafter_errors=1,
        )
        metrics.on_step(step)
    found = values(metrics)
    assert found["stoker_spec_decode_num_drafts_total"] == 4
    assert found["stoker_spec_decode_num_draft_tokens_total"] == 10
    assert found["stoker_spec_decode_num_accepted_tokens_total"] == 4
    per_position = "stoker_spec_decode_num_accepted_tokens_per_pos_total"
    assert [found[f'{per_position}{{position="{at}"}}'] for at in range(3)] == [3, 1, 0]
    assert found["stoker_drafter_errors_total"] == 1
