"""Architectures from file to logits: what is loaded computes what transformers does, the rest is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import build_step, forward

import stoker

Load = Callable[..., stoker.Runtime]

VOCABULARY, WINDOW = 263, 8
TEXT = np.random.default_rng(7).integers(3, VOCABULARY, 40).tolist()
OTHER = np.random.default_rng(8).integers(3, VOCABULARY, 40).tolist()
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _BASE | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = _BASE | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, **_EXPERTS,
}  # fmt: skip
_TURNS = ["sliding_attention", "full_attention"] * 3
_SHARED = _GROUPED | {  # the last two layers use keys and values of earlier ones
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": _TURNS, "sliding_window": WINDOW,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "cohere": _GROUPED,
    "deepseek_v3": _LATENT,  # keys and values of different widths
    "gemma2": _GROUPED | {"sliding_window": WINDOW},  # has no SDPA
    "gemma3n_text": _SHARED | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": _SHARED,  # layers of different widths
    "gpt2": _BASE,  # learned positions, no linear layers but its head
    "gpt_neox": _BASE | {"intermediate_size": 96},  # a decoder that says is_decoder = false
    "granite": _GROUPED,
    "hunyuan_v1_moe": _GROUPED | {"num_experts": 4, **_EXPERTS},  # looks at its layers' weights
    "llama4_text": _GROUPED | {"intermediate_size_mlp": 96, "num_local_experts": 4},
    "olmo2": _GROUPED,
    "opt": _BASE | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": _GROUPED | {"sliding_window": WINDOW},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v32": (
        _LATENT | {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2},
        "cannot be batched",
    ),
    "doge": (_GROUPED, "makes masks of its own"),
    "falcon": (_BASE | {"alibi": True}, "outside transformers' attention interface"),
    "lfm2": (
        _GROUPED | {"layer_types": ["conv", "full_attention"] * 2},
        "does not keep keys and values in every layer",
    ),
    "minimax_m3_vl_text": (
        _GROUPED
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2}
        | {"index_head_dim": 16, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
        "wants block_indices",
    ),
}


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """``make(kind, values)``: a folder with a random model, and the model."""

    def save(kind: str, values: dict[str, Any]) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[kind](**values)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # with the usual small weights all attention is alike
                    parameter.mul_(6.0 if "q" in name.rpartition(".")[0] else 3.0)
        folder = shutil.copytree(tiny_folder, tmp_path / kind)
        model.save_pretrained(folder)
        return folder, model

    return save


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
def test_the_logits_are_transformers_own(make: Any, load: Load, kind: str) -> None:
    folder, model = make(kind, SERVED[kind])
    truth, other = forward(model, TEXT), forward(model, OTHER)
    runtime = load(folder, lanes=3, context=64, device="cpu", dtype="float32")
    near = {"atol": 2e-4 * float(np.abs(truth).max()), "rtol": 0}

    def run(*rows: Any) -> np.ndarray[Any, Any]:
        return runtime.step(build_step(*rows, every=True)).logits.copy()

    first = run((2, TEXT[:20], 0), (0, OTHER[:5], 0))
    np.testing.assert_allclose(first, np.concatenate([truth[:20], other[:5]]), **near)
    for at in range(20, 24):
        both = run((0, OTHER[at - 15 : at - 14], at - 15), (2, TEXT[at : at + 1], at))
        np.testing.assert_allclose(both, np.stack([other[at - 15], truth[at]]), **near)
    runtime.copy_prefix(2, 1, 22)
    rest = run((0, OTHER[9:30], 9), (1, TEXT[22:], 22))
    np.testing.assert_allclose(rest, np.concatenate([other[9:30], truth[22:]]), **near)
    assert runtime.embed([TEXT[:5]]).shape == (1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_computed_wrongly_is_refused(make: Any, load: Load, kind: str) -> None:
    values, message = REFUSED[kind]
    folder, _ = make(kind, values)
    with pytest.raises(stoker.ModelError, match=message):
        load(folder, device="cpu", dtype="float32")


@pytest.mark.slow
def test_a_window_that_attention_is_not_told_of_bounds_the_context(make: Any, load: Load) -> None:
    values = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 30}
    folder, model = make("phimoe", values)
    runtime = load(folder, device="cpu", dtype="float32")
    assert runtime.info.context_length == 30
    assert "The context is 30 tokens instead of 128" in runtime.info.warnings[-1]
    got = runtime.step(build_step((0, TEXT[:30], 0), every=True)).logits
    np.testing.assert_allclose(got, forward(model, TEXT[:30]), atol=1e-4)
