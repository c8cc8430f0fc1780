"""The torch backend beside transformers' own batching, and vLLM's CPU build where it is at hand.

    python bench/torch_streams.py FOLDER [--streams 16] [--rounds 3] [--vllm PYTHON]

All compute the same model from the same folder, in the same type, with the same threads and the same prompts,
greedily and to the same length; rounds take turns (A B C A B C), and one computes at a time. ``generate``
gets all prompts as one static batch of equal lengths, which is the best case for it. Ours runs through the
engine: scheduling, sampling and detokenization are in its time, and not in that of the others.

vLLM needs an environment of its own: PYTHON is that environment's interpreter. It is started once and waits
between its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WORDS = "river stone window garden market letter winter engine silver forest bridge candle".split()

VLLM = """
import json, os, sys, time
from vllm import LLM, SamplingParams
def main():
    job = json.loads(sys.stdin.readline())
    model = LLM(job["folder"], dtype=job["dtype"], max_model_len=1024, max_num_seqs=job["streams"],
                enable_prefix_caching=False, enforce_eager=job["eager"])
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        outputs = model.generate(prompts[:count], sampling, use_tqdm=False)
        took = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == job["tokens"] for o in outputs)
        print("took", took, file=sys.stderr, flush=True)
if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="ours with compile = true, too")
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without its compilation")
    arguments = parser.parse_args()
    contestants = make_contestants(arguments)
    for count in (arguments.streams, 1):
        print(
            f"\n{count} streams, prompts of {arguments.prompt}, {arguments.tokens} tokens each",
            flush=True,
        )
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for run in contestants.values():
            run(count)  # warm
        for _ in range(arguments.rounds):
            for name, run in contestants.items():
                rates[name].append(count * arguments.tokens / run(count))
            print("  " + "  ".join(f"{n} {r[-1]:.1f}" for n, r in rates.items()), flush=True)
        ours = rates["stoker"]
        for name, theirs in rates.items():
            if name != "stoker":
                ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
                print(
                    f"  stoker / {name}: median {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


def make_contestants(arguments: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """Each runs so many streams and returns the seconds that took."""
    import torch

    torch.set_num_threads(arguments.threads)
    runtime = load_runtime(arguments, compile_layers=False)
    prompts = make_prompts(runtime.tokenizer, arguments)
    contestants = {"stoker": engine_runner(runtime, prompts, arguments)}
    if arguments.compile:
        compiled = load_runtime(arguments, compile_layers=True)
        print("compiled:", compiled.info.settings["compiled"])
        contestants["stoker, compiled"] = engine_runner(compiled, prompts, arguments)
    contestants |= transformers_runners(prompts, arguments)
    if arguments.vllm:
        contestants["vLLM"] = vllm_runner(prompts, arguments)
    return contestants


def load_runtime(arguments: argparse.Namespace, *, compile_layers: bool) -> Any:
    import stoker
    from stoker_backend_torch.backend import TorchBackend
    from stoker_backend_torch.options import TorchOptions

    settings = stoker.LoadSettings(
        lanes=arguments.streams,
        context_length=1024,
        threads=arguments.threads,
        max_step_tokens=2048,
        options=TorchOptions(dtype=arguments.dtype, embeddings=False, compile=compile_layers),
    )
    model = stoker.LocalModel(path=arguments.folder, model_id="model", reference="bench")
    return TorchBackend().load(model, settings)


def make_prompts(tokenizer: Any, arguments: argparse.Namespace) -> list[list[int]]:
    """Texts that differ from their first word on, so that none is another's prefix."""
    prompts = []
    for index in range(arguments.streams):
        words = [WORDS[(index + step * (index + 1)) % len(WORDS)] for step in range(400)]
        text = f"{index} " + " ".join(words)
        tokens = tokenizer.encode(text, add_special=False, parse_special=False)
        prompts.append(tokens[: arguments.prompt])
    return prompts


def engine_runner(
    runtime: Any, prompts: list[list[int]], arguments: argparse.Namespace
) -> Callable[[int], float]:
    from stoker.config import CacheConfig, SchedulerConfig
    from stoker.testing import EngineHarness
    from stoker_plugins.policies.fcfs import FirstComeFirstServed

    def run(count: int) -> float:
        for lane in range(runtime.info.num_lanes):
            runtime.truncate(lane, 0)
        harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=runtime,
            # All prompts at once, as the others have it; and nothing is reused from a round before.
            scheduler=SchedulerConfig(
                max_num_batched_tokens=2048,
                max_prefill_tokens_while_decoding=2048,
                target_step_s=0.0,
            ),
            cache=CacheConfig(),
            clock=time.monotonic,
        )
        start = time.perf_counter()
        requests = [
            harness.submit(prompt, max_tokens=arguments.tokens, ignore_eos=True)
            for prompt in prompts[:count]
        ]
        harness.run()
        took = time.perf_counter() - start
        assert all(r.records[0].completion_tokens == arguments.tokens for r in requests)
        return took

    return run


def transformers_runners(
    prompts: list[list[int]], arguments: argparse.Namespace
) -> dict[str, Callable[[int], float]]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=dtype).eval()

    def static(count: int) -> float:
        ids = torch.tensor(prompts[:count])
        with torch.inference_mode():
            start = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                do_sample=False,
                pad_token_id=0,
            )
            took = time.perf_counter() - start
        assert output.shape[1] == arguments.prompt + arguments.tokens
        return took

    runners: dict[str, Callable[[int], float]] = {"generate": static}
    paged = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    config = GenerationConfig(
        max_new_tokens=arguments.tokens,
        min_new_tokens=arguments.tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def continuous(count: int) -> float:
        start = time.perf_counter()
        outputs = paged.generate_batch(
            inputs=prompts[:count], generation_config=config, progress_bar=False
        )
        took = time.perf_counter() - start
        assert len(outputs) == count
        assert all(len(o.generated_tokens) == arguments.tokens for o in outputs.values())
        return took

    try:
        continuous(1)
    except Exception as error:  # noqa: BLE001 - it is not for every machine
        print(
            f"transformers' continuous batching does not run here: {type(error).__name__}: {error}"
        )
    else:
        runners["generate_batch"] = continuous
    return runners


def vllm_runner(prompts: list[list[int]], arguments: argparse.Namespace) -> Callable[[int], float]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(os.environ.get("TMPDIR", "/tmp")) / f"vllm_worker_{os.getpid()}.py"
    script.write_text(VLLM)
    worker = subprocess.Popen(
        [arguments.vllm, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    stdin, stderr = worker.stdin, worker.stderr
    assert stdin is not None
    assert stderr is not None

    def tell(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()

    def wait(word: str) -> list[str]:
        last: list[str] = []
        for line in stderr:
            if line.split()[:1] == [word]:
                return line.split()
            last = [*last[-20:], line]
        sys.exit("vLLM ended:\n" + "".join(last))

    job = {
        "folder": str(arguments.folder),
        "dtype": arguments.dtype,
        "prompts": prompts,
        "tokens": arguments.tokens,
        "streams": arguments.streams,
        "eager": arguments.vllm_eager,
    }
    tell(json.dumps(job))
    wait("ready")

    def run(count: int) -> float:
        tell(str(count))
        return float(wait("took")[1])

    return run


if __name__ == "__main__":
    main()
