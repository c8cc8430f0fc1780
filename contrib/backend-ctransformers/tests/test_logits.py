"""Logits equal those of the same weights in transformers' model code, however the tokens come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import legacy_ggml
from legacy_ggml import ARCHITECTURES, CONTEXT, HEADS, LAYERS, WIDTH, make_model
from stoker_backend_ctransformers.runtime import CTransformersRuntime

# float16 tables for exp and GELU, float16 keys and values in most architectures, and activations that are
# rounded to float16 before they meet such weights. The logits have a standard deviation of 1.5.
TOLERANCE = 0.05
PROMPTS = ([7], [1, 2, 3, 4, 5], [(17 * i + 5) % 250 for i in range(70)])


def reference(architecture: str) -> Callable[[list[int]], np.ndarray[Any, Any]]:
    """``logits(tokens)``: float32[len(tokens), vocab] by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written = make_model(architecture)
    weights = {name: torch.from_numpy(values) for name, values in written.tensors.items()}
    size = len(written.tokens)
    shape: dict[str, Any] = {"vocab_size": size, "attn_implementation": "eager"}
    if architecture in {"gpt2", "starcoder"}:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **shape, n_positions=CONTEXT, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS
            )
        )
        names = {"wte": "wte.weight", "wpe": "wpe.weight", "ln_f/g": "ln_f.weight"}
        names |= {"ln_f/b": "ln_f.bias"}
        state = {}
        for name, values in weights.items():
            name = name.removeprefix("model/")
            if name.startswith("h"):
                layer, *path, kind = name[1:].split("/")
                name = ".".join(["h", layer, *path, "bias" if kind == "b" else "weight"])
                values = values.T if values.ndim == 2 else values  # Conv1D
            state["transformer." + names.get(name, name)] = values
        state["lm_head.weight"] = weights["model/wte"]
    elif architecture == "gptj":
        model = transformers.GPTJForCausalLM(
            transformers.GPTJConfig(
                **shape,
                n_positions=CONTEXT,
                n_embd=WIDTH,
                n_head=HEADS,
                n_layer=LAYERS,
                rotary_dim=4,
            )
        )
        state = weights
    elif architecture == "gpt_neox":
        model = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                **shape,
                max_position_embeddings=CONTEXT,
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                num_hidden_layers=LAYERS,
                intermediate_size=4 * WIDTH,
                hidden_act="gelu_new",
                rotary_pct=0.5,
                use_parallel_residual=True,
                tie_word_embeddings=False,
            )
        )
        state = {**weights, "lm_head.weight": weights["embed_out.weight"]}
        del state["embed_out.weight"]
    elif architecture == "mpt":
        model = transformers.MptForCausalLM(
            transformers.MptConfig(
                **shape, d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=CONTEXT
            )
        )
        state = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    elif architecture == "falcon":
        model = transformers.FalconForCausalLM(
            transformers.FalconConfig(
                **shape,
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                num_hidden_layers=LAYERS,
                multi_query=True,
                parallel_attn=True,
                new_decoder_architecture=False,
                bias=False,
                alibi=False,
                tie_word_embeddings=False,
            )
        )
        state = weights
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **shape,
                max_position_embeddings=2048,
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                num_hidden_layers=LAYERS,
                intermediate_size=96,
                rms_norm_eps=5e-6,
                tie_word_embeddings=False,
            )
        )
        state = _llama_state(weights)
    lacking, extra = model.load_state_dict(state, strict=False)
    assert not extra
    assert all(name.endswith((".bias", "inv_freq")) and "attn" in name for name in lacking), lacking
    model.eval()

    def logits(tokens: list[int]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            found: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].numpy()
        return found

    return logits


def _llama_state(weights: dict[str, Any]) -> dict[str, Any]:
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    state = {"model.embed_tokens.weight": weights["tok_embeddings.weight"]}
    state |= {
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for name, values in weights.items():
        if not name.startswith("layers."):
            continue
        _, layer, path = name.removesuffix(".weight").split(".", 2)
        if path in {"attention.wq", "attention.wk"}:
            # Files have the halves of a rotated pair side by side, transformers has them apart.
            values = values.view(HEADS, -1, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
        state[f"model.layers.{layer}.{names[path]}.weight"] = values
    return state


@pytest.mark.slow  # imports torch and transformers
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_transformers(
    architecture: str, load: Callable[..., CTransformersRuntime], run: Callable[..., Any]
) -> None:
    expected = reference(architecture)
    for half in (False, True):
        runtime = load(architecture, half=half)
        for prompt in PROMPTS:
            wanted = expected(prompt)
            # Every row of the whole prompt, then in chunks of three sizes in three lanes at once.
            runtime.truncate(0, 0)
            found = run(runtime, (0, prompt, 0), every=True)
            np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
            assert np.abs(found - wanted).mean() < TOLERANCE / 20
            for lane in range(3):
                runtime.truncate(lane, 0)
            for start in range(len(prompt)):
                chunks = [
                    (lane, prompt[start : start + size], start)
                    for lane, size in enumerate((1, 7, 33))
                    if start % size == 0
                ]
                rows = run(runtime, *chunks)
                for row, (_, tokens, first) in zip(rows, chunks, strict=True):
                    np.testing.assert_allclose(row, wanted[first + len(tokens) - 1], atol=TOLERANCE)


def test_files_of_both_types_have_the_same_weights() -> None:
    model = make_model("gpt2")
    assert len(model.to_bytes(half=True)) < len(model.to_bytes())
    assert legacy_ggml.make_model("gpt2", seed=1).to_bytes() != model.to_bytes()
