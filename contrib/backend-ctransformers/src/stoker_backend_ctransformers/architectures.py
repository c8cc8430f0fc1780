"""The architectures: how their files are laid out, which tensors they have, what their KV takes.

Legacy GGML files do not name their architecture. Each has header fields and tensor names of its own,
though, so a file can be told by trying. The layouts are those of the loaders in ctransformers 0.2.27
(``models/llms``, after the examples of ggml and llama.cpp of 2023).
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of_name"]


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of one architecture look like.

    Attributes:
        name: As ctransformers calls it.
        fields: The header's numbers, ``uint32`` each, in order.
        float_fields: Those of them that are ``float32``.
        renamed: Names of fields that other architectures call otherwise: ours -> the usual one.
        repeats_vocab_size: Whether the vocabulary begins with its size once more.
        spm: Whether it is a file of llama.cpp's kind: tokens have scores, newer versions are aligned and
            mapped into memory, and the context can be chosen. Else it is one of ggml's examples.
        utf8_tokens: Whether tokens are stored as text whose characters stand for bytes.
        tensors: Tensors outside of layers.
        optional: Further ones that may be absent.
        layer: What the names of a layer's tensors begin with; ``{}`` is its number.
        layer_tensors: How they go on.
        kv_element_bytes: Bytes of a key's or value's element.
        rewinds: Whether computing may go on at an earlier position than it ended; else only at the first.
        tokenizer: ``words`` (longest token first, within words) or ``native``.
    """

    name: str
    fields: tuple[str, ...]
    float_fields: frozenset[str] = frozenset()
    renamed: dict[str, str] = {}
    repeats_vocab_size: bool = False
    spm: bool = False
    utf8_tokens: bool = False
    tensors: frozenset[str]
    optional: frozenset[str] = frozenset()
    layer: str
    layer_tensors: frozenset[str] | None = None
    kv_element_bytes: int = 2
    rewinds: bool = True
    tokenizer: Literal["words", "native"] = "words"

    def expected(self, num_layers: int) -> frozenset[str]:
        """The names of all tensors that a file must have."""
        suffixes = self.layer_tensors or frozenset()
        layers = {self.layer.format(i) + suffix for i in range(num_layers) for suffix in suffixes}
        return self.tensors | layers


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_USUAL = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_GPT2 = Architecture(
    name="gpt2",
    fields=(*_USUAL, "ftype"),
    repeats_vocab_size=True,
    tensors=_names("model/ln_f/g model/ln_f/b model/wte model/wpe"),
    optional=_names("model/lm_head"),
    layer="model/h{}/",
    layer_tensors=_names(
        "ln_1/g ln_1/b ln_2/g ln_2/b attn/c_attn/w attn/c_attn/b attn/c_proj/w attn/c_proj/b "
        "mlp/c_fc/w mlp/c_fc/b mlp/c_proj/w mlp/c_proj/b"
    ),
    kv_element_bytes=4,
)
_GPT_NEOX = Architecture(
    name="gpt_neox",
    fields=(*_USUAL, "n_rot", "par_res", "ftype"),
    tensors=_names(
        "gpt_neox.embed_in.weight gpt_neox.final_layer_norm.weight gpt_neox.final_layer_norm.bias "
        "embed_out.weight"
    ),
    layer="gpt_neox.layers.{}.",
    layer_tensors=_names(
        "input_layernorm.weight input_layernorm.bias attention.query_key_value.weight "
        "attention.query_key_value.bias attention.dense.weight attention.dense.bias "
        "post_attention_layernorm.weight post_attention_layernorm.bias mlp.dense_h_to_4h.weight "
        "mlp.dense_h_to_4h.bias mlp.dense_4h_to_h.weight mlp.dense_4h_to_h.bias"
    ),
)
_GPTJ = Architecture(
    name="gptj",
    fields=(*_USUAL, "n_rot", "ftype"),
    repeats_vocab_size=True,
    tensors=_names(
        "transformer.wte.weight transformer.ln_f.weight transformer.ln_f.bias lm_head.weight lm_head.bias"
    ),
    layer="transformer.h.{}.",
    layer_tensors=_names(
        "ln_1.weight ln_1.bias attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight "
        "attn.out_proj.weight mlp.fc_in.weight mlp.fc_in.bias mlp.fc_out.weight mlp.fc_out.bias"
    ),
)
_MPT = Architecture(
    name="mpt",
    fields=(
        *("d_model", "max_seq_len", "n_heads", "n_layers", "n_vocab"),
        *("alibi_bias_max", "clip_qkv", "ftype"),
    ),
    float_fields=_names("alibi_bias_max clip_qkv"),
    renamed={
        "d_model": "n_embd",
        "max_seq_len": "n_ctx",
        "n_heads": "n_head",
        "n_layers": "n_layer",
    },
    utf8_tokens=True,
    tensors=_names("transformer.wte.weight transformer.norm_f.weight"),
    layer="transformer.blocks.{}.",
    layer_tensors=_names(
        "norm_1.weight attn.Wqkv.weight attn.out_proj.weight norm_2.weight ffn.up_proj.weight "
        "ffn.down_proj.weight"
    ),
)
_LLAMA = Architecture(
    name="llama",
    fields=("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype"),
    spm=True,
    tensors=_names("tok_embeddings.weight norm.weight output.weight"),
    layer="layers.{}.",
    layer_tensors=_names(
        "attention_norm.weight attention.wq.weight attention.wk.weight attention.wv.weight "
        "attention.wo.weight ffn_norm.weight feed_forward.w1.weight feed_forward.w2.weight "
        "feed_forward.w3.weight"
    ),
    tokenizer="native",
)
_FALCON = Architecture(
    name="falcon",
    fields=("n_vocab", "n_embd", "n_head", "n_head_kv", "n_layer", "falcon_type", "ftype"),
    spm=True,
    tensors=_names(
        "transformer.word_embeddings.weight transformer.ln_f.weight transformer.ln_f.bias lm_head.weight"
    ),
    layer="transformer.h.{}.",
    rewinds=False,  # measured: other logits, and ggllm.cpp does not say why
    tokenizer="native",
)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _GPT2,
        _GPTJ,
        _GPT_NEOX,
        _MPT,
        _LLAMA,
        _FALCON,
        msgspec.structs.replace(_GPT2, name="starcoder"),
        msgspec.structs.replace(_GPT_NEOX, name="dolly-v2"),
    )
}
"""By name. Where two have the same files (gpt2 and starcoder), the commoner comes first."""

_SPELLINGS = {
    "gptbigcode": "starcoder",
    "refinedweb": "falcon",
    "refinedwebmodel": "falcon",
    **{re.sub(r"\W|_", "", name): name for name in ARCHITECTURES},
}
# What models of an architecture are called; the first that occurs in a name decides.
_NAMES = (
    ("starcoder", r"starcoder|starchat|santacoder|bigcode"),
    ("dolly-v2", r"dolly"),
    ("gpt_neox", r"gpt-?neox|pythia|redpajama|stablelm|open-?assistant"),
    ("gptj", r"gpt-?j|gpt4all-j"),
    ("gpt2", r"gpt-?2|cerebras"),
    ("mpt", r"mpt"),
    ("falcon", r"falcon"),
    ("llama", r"llama|alpaca|vicuna|guanaco|orca|wizard"),
)


def architecture_of_name(name: str) -> str | None:
    """The architecture that ``GPTBigCode``, ``gpt-neox`` or ``pythia-410m-q4_0.bin`` means, if any."""
    known = _SPELLINGS.get(re.sub(r"\W|_", "", name.lower()))
    if known is not None:
        return known
    text = name.lower().replace("_", "-")
    return next((found for found, pattern in _NAMES if re.search(pattern, text)), None)
