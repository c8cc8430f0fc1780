"""What a decode step costs beside the runtime: planning, sampling, detokenizing, publishing.

    python bench/hot_path.py [--streams 1 8 16 32] [--steps 200] [--sampled]

The real model's engine without threads or HTTP, one step after the other: the share of a step that is not
spent inside ``Runtime.step``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from chunk import load

import numpy as np

from stoker import Observer
from stoker.config import SchedulerConfig
from stoker.testing import EngineHarness
from stoker_plugins.fcfs import FirstComeFirstServed


class Steps(Observer):
    """Keeps what decode-only steps cost."""

    def __init__(self) -> None:
        self.records = []

    def on_step(self, record: object) -> None:
        if not record.num_prefill_tokens:
            self.records.append(record)


def measure(runtime: object, streams: int, steps: int, *, sampled: bool) -> str:
    observer = Steps()
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=runtime,
        observers=[observer],
        clock=time.perf_counter,
        scheduler=SchedulerConfig(target_step_s=0),
    )
    rng = np.random.default_rng(streams)
    how = {"temperature": 0.8, "top_p": 0.95, "top_k": 40} if sampled else {"temperature": 0.0}
    for index in range(streams):
        harness.submit(
            rng.integers(100, 40_000, 64).tolist(),
            max_tokens=steps,
            ignore_eos=True,
            seed=index,
            **how,
        )
    started = time.perf_counter()
    harness.run()
    wall = time.perf_counter() - started
    records = [r for r in observer.records if r.num_decode_tokens == streams]
    whole = statistics.median(r.duration_s for r in records)
    beside = statistics.median(r.duration_s - r.runtime_s for r in records)
    share = sum(r.duration_s - r.runtime_s for r in records) / sum(r.duration_s for r in records)
    return (
        f"{streams:3d} streams: step {whole * 1e3:6.2f} ms, beside the runtime {beside * 1e3:5.3f} ms "
        f"= {100 * share:.2f} %; {streams * steps / wall:.0f} tokens/s with prefill"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", help="a GGUF file; by default SmolLM2")
    parser.add_argument(
        "--sampled", action="store_true", help="temperature 0.8, top-p 0.95, top-k 40"
    )
    arguments = parser.parse_args()
    runtime = load(arguments.model, None)
    for streams in arguments.streams:
        print(measure(runtime, streams, arguments.steps, sampled=arguments.sampled), flush=True)
    runtime.close()


if __name__ == "__main__":
    main()
