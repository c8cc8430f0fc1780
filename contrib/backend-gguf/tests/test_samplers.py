"""Filters that are named like llama.cpp's do what llama.cpp's do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest

from stoker import SamplingParams
from stoker.engine.dry import Dry
from stoker.engine.filters import exclude_top_choices, typical
from stoker.engine.logprobs import TokenNames
from stoker_backend_gguf.runtime import GgufRuntime

pytestmark = [pytest.mark.model]

TEXT = (
    'The sea: "blue and wide".\nThe sea was blue, and the sky was blue, and the sea was wide, and '
    "the sky was blue, and the sea was blue, and the sky was blue, and the sea was"
)


class Candidates:
    """llama.cpp's array of candidates over a row of logits."""

    def __init__(self, logits: np.ndarray[Any, Any]) -> None:
        count = len(logits)
        self.data = (llama_cpp.llama_token_data * count)()
        for token, logit in enumerate(logits.tolist()):
            self.data[token] = llama_cpp.llama_token_data(token, logit, 0.0)
        self.array = llama_cpp.llama_token_data_array(
            ctypes.cast(self.data, ctypes.POINTER(llama_cpp.llama_token_data)), count, -1, False
        )

    def apply(self, sampler: Any, accepted: Sequence[int] = ()) -> dict[int, float]:
        """The candidates that are left, with their logits."""
        for token in accepted:
            llama_cpp.llama_sampler_accept(sampler, token)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self.array))
        llama_cpp.llama_sampler_free(sampler)
        left = (self.array.data[i] for i in range(self.array.size))
        return {item.id: item.logit for item in left}


@pytest.mark.parametrize("breakers", [("\n", ":", '"', "*"), (" the sky",), (",", " w"), ("~",)])
@pytest.mark.parametrize(("allowed", "last_n"), [(2, -1), (1, 12), (4, 40), (0, 20)])
def test_dry(
    load: Callable[..., GgufRuntime], breakers: tuple[str, ...], allowed: int, last_n: int
) -> None:
    runtime = load(lanes=1)
    vocab = runtime._model.vocab
    tokens = runtime.tokenizer.encode(TEXT, add_special=False, parse_special=False)
    params = SamplingParams(
        dry_multiplier=0.8,
        dry_allowed_length=allowed,
        dry_penalty_last_n=last_n,
        dry_sequence_breakers=breakers,
    )
    ours = np.zeros(runtime.info.vocab_size, np.float32)
    Dry(params, TokenNames(runtime.tokenizer)).apply(ours, np.array(tokens, np.int32))
    strings = (ctypes.c_char_p * len(breakers))(*(text.encode() for text in breakers))
    sampler = llama_cpp.llama_sampler_init_dry(
        vocab, 0.8, 1.75, allowed, last_n if last_n > 0 else 1024, strings, len(breakers)
    )
    theirs = Candidates(np.zeros_like(ours)).apply(sampler, tokens)
    np.testing.assert_allclose(ours, [theirs[i] for i in range(len(ours))], rtol=1e-5)


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_typical(mass: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=800).astype(np.float32)
    theirs = Candidates(logits).apply(llama_cpp.llama_sampler_init_typical(mass, 1))
    assert set(typical(np.exp(logits - logits.max()), mass).tolist()) == set(theirs)


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_xtc(threshold: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=100).astype(np.float32)
    theirs = Candidates(logits).apply(llama_cpp.llama_sampler_init_xtc(1.0, threshold, 1, 1))
    kept = exclude_top_choices(np.exp(logits - logits.max()), threshold)
    assert set(range(100) if kept is None else kept.tolist()) == set(theirs)
