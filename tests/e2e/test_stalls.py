"""A long prompt among running streams, on the real model: nobody waits for more than a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker import LoadSettings, LocalModel, Observer, Runtime, StepRecord
from stoker.testing import EngineHarness
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions
from stoker_plugins.fcfs import FirstComeFirstServed

pytestmark = [pytest.mark.model, pytest.mark.slow]


class Steps(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def runtime(model_path: Path) -> Iterator[Runtime]:
    model = LocalModel(path=model_path, model_id="m", reference="m")
    settings = LoadSettings(lanes=8, context_length=2048, options=GgufOptions())
    loaded = GgufBackend().load(model, settings)
    yield loaded
    loaded.close()


def test_a_900_token_prompt_among_4_streams(runtime: Runtime) -> None:
    steps = Steps()
    harness = EngineHarness(
        FirstComeFirstServed(), runtime=runtime, observers=[steps], clock=time.perf_counter
    )
    streams = [
        harness.submit(f"Story {i}: once upon a time", max_tokens=60, ignore_eos=True)
        for i in range(4)
    ]
    for _ in range(10):
        harness.step()
    assert all(len(stream.deltas) >= 9 for stream in streams)
    steps.records.clear()
    words = "river stone engine paper garden winter signal copper bridge window " * 90
    long_prompt = runtime.tokenizer.encode(words, add_special=False, parse_special=False)[:900]
    assert len(long_prompt) == 900
    long = harness.submit(long_prompt, max_tokens=4, ignore_eos=True)
    while long.finish() is None:
        harness.step()
    mixed = [r for r in steps.records if r.num_prefill_tokens]
    assert sum(r.num_prefill_tokens for r in mixed) == 900
    # Every one of the steps that computed the long prompt gave every stream its token ...
    assert all(r.num_decode_tokens == 4 for r in mixed)
    # ... so that no gap between two tokens exceeds twice the longest single step.
    worst_gap_s = max(gap for r in steps.records for gap in r.token_gaps_s)
    longest_step_s = max(r.duration_s for r in steps.records)
    assert worst_gap_s <= 2 * longest_step_s
    harness.run()
