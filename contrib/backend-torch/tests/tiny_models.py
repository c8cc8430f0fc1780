"""Small random models of several architectures, and steps over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import stoker
from stoker_backend_torch.attention import KvMemory
from stoker_backend_torch.block_attention import GatheredAttention
from stoker_backend_torch.blocks import BlockTables
from stoker_backend_torch.kv import ContiguousKv
from stoker_backend_torch.paged import PagedKv
from stoker_backend_torch.probe import look_at
from stoker_backend_torch.runtime import TorchRuntime

VOCABULARY, LANES, CONTEXT, WINDOW = 300, 6, 96, 8
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**_BASE),
    "qwen3": lambda: Qwen3Config(**_BASE),
    # Every head its own: nothing to fold.
    "llama_mha": lambda: LlamaConfig(**(_BASE | {"num_key_value_heads": 4})),
    "mistral": lambda: MistralConfig(**_BASE, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(**_BASE, sliding_window=WINDOW, layer_types=_SLIDING),
    "gemma2": lambda: Gemma2Config(  # soft caps of scores
        **_BASE, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: GptOssConfig(  # sinks, and experts
        **_BASE,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose attention matters: with the usual small random weights all scores are nearly 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(0.0, 1.0)
            elif any(part in name for part in ("q_proj", "k_proj", "qkv")):
                parameter.mul_(12.0)
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    return model.to(dtype).eval()


def make_runtime(
    model: Any,
    *,
    lanes: int = LANES,
    context: int = CONTEXT,
    samples: bool = False,
    tables: BlockTables | None = None,
) -> TorchRuntime:
    """A runtime over a model, which is the runtime's from then on; with tables its memory is paged."""
    dtype = next(model.parameters()).dtype
    device = torch.device("cpu")
    shapes, _ = look_at(model, "tiny", VOCABULARY)
    info = stoker.RuntimeInfo(
        name="tiny",
        vocab_size=VOCABULARY,
        context_length=context,
        num_lanes=lanes,
        kv_capacity_tokens=lanes * context,
        max_step_tokens=256,
        end_token_ids=frozenset({2}),
        capabilities=stoker.Capabilities(copy_prefix=True, snapshot=True, samples=samples),
    )
    loaded: Any = SimpleNamespace(model=model, tokenizer=None, device=device, dtype=dtype)
    memory: KvMemory = ContiguousKv(shapes, lanes, context, dtype, device)
    if tables is not None:
        memory = PagedKv(shapes, tables, GatheredAttention(device, dtype), dtype, device)
    return TorchRuntime(loaded, info, memory)


def build_step(*rows: tuple[int, list[int], int], every: bool = False) -> stoker.StepInput:
    """``build_step((lane, tokens, start), ...)``: the last row of each lane wants logits, or all do."""
    wants = [every or i == len(tokens) - 1 for _, tokens, _ in rows for i in range(len(tokens))]
    return stoker.StepInput(
        token_ids=np.array([token for _, tokens, _ in rows for token in tokens], np.int32),
        positions=np.array(
            [start + i for _, tokens, start in rows for i in range(len(tokens))], np.int32
        ),
        lanes=np.array([lane for lane, tokens, _ in rows for _ in tokens], np.int32),
        wants_logits=np.array(wants, np.bool_),
    )


def forward(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """What transformers' own forward pass says: ``float32[T, vocab]``. Before the model is a runtime's."""
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].float().numpy()
    return logits
