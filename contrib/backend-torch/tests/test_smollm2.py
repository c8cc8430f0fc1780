"""The real model: the same text as transformers' own ``generate``, through the real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stoker
from stoker.config import SchedulerConfig
from stoker.testing import EngineHarness
from stoker_backend_torch.backend import TorchBackend
from stoker_backend_torch.options import TorchOptions
from stoker_plugins.policies.fcfs import FirstComeFirstServed

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "def fibonacci(n):\n",
]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def make_runtime(smollm2_folder: Path) -> Iterator[Callable[..., stoker.Runtime]]:
    loaded: list[stoker.Runtime] = []

    def make(dtype: str) -> stoker.Runtime:
        settings = stoker.LoadSettings(
            lanes=4,
            context_length=512,
            max_step_tokens=256,
            options=TorchOptions(dtype=dtype, embeddings=False),
        )
        model = stoker.LocalModel(path=smollm2_folder, model_id="smollm2", reference="x")
        loaded.append(TorchBackend().load(model, settings))
        return loaded[-1]

    yield make
    for runtime in loaded:
        runtime.close()


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> Callable[[torch.dtype], Any]:
    def load(dtype: torch.dtype) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=dtype).eval()

    return load


def test_greedy_text_is_that_of_generate(
    make_runtime: Callable[..., stoker.Runtime], reference: Callable[..., Any]
) -> None:
    """In float32, where kernels differ by too little to change a token; all prompts at once, in chunks."""
    runtime = make_runtime("float32")
    scheduler = SchedulerConfig(max_num_batched_tokens=32, max_prefill_tokens_while_decoding=7)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, scheduler=scheduler)
    # Twice: the second time a lane holds a prefix of every prompt already.
    for _ in range(2):
        requests = [
            harness.submit(prompt, max_tokens=NUM_TOKENS, wants_token_ids=True)
            for prompt in PROMPTS
        ]
        harness.run()
        got = [
            [token for delta in request.deltas for token in delta.token_ids or ()]
            for request in requests
        ]
    model = reference(torch.float32)
    for request, tokens in zip(requests, got, strict=True):
        prompt = request.request.prompt_token_ids
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=2,
            )
        expected = output[0, len(prompt) :].tolist()
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == len(expected) or expected[len(tokens)] in runtime.info.end_token_ids


def test_logits_in_bfloat16_are_as_near_as_two_kernels_are(
    make_runtime: Callable[..., stoker.Runtime], reference: Callable[..., Any]
) -> None:
    runtime = make_runtime("bfloat16")
    tokens = runtime.tokenizer.encode(PROMPTS[1] * 6, add_special=False, parse_special=False)
    model = reference(torch.bfloat16)
    with torch.inference_mode():
        truth = model(torch.tensor([tokens])).logits[0].float().numpy()
        exact = model.float()(torch.tensor([tokens])).logits[0].numpy()
    rows = np.arange(len(tokens), dtype=np.int32)
    step = stoker.StepInput(
        np.array(tokens, np.int32), rows, np.full_like(rows, 3), np.ones(len(tokens), np.bool_)
    )
    got = runtime.step(step).logits
    # What bfloat16 itself costs is the measure: our rounding is no worse than transformers' own.
    ours, theirs = np.abs(got - exact).mean(), np.abs(truth - exact).mean()
    assert ours < 1.25 * theirs
    margin = np.sort(exact, 1)[:, -1] - np.sort(exact, 1)[:, -2]
    sure = margin > 8 * np.abs(truth - exact).mean()
    assert sure.mean() > 0.3
    assert (got.argmax(1) == exact.argmax(1))[sure].all()
