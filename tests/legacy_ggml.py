"""Tiny models in legacy GGML files, as ggml's and llama.cpp's converters of 2023 wrote them.

    path.write_bytes(make_model("gpt2").to_bytes())

The weights are random but always the same; their names are those of the files, their shapes those of numpy
(rows first). A file has dimensions in the other order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "ARCHITECTURES",
    "CONTEXT",
    "HEADS",
    "LAYERS",
    "TOKENS",
    "WIDTH",
    "LegacyModel",
    "make_model",
]

WIDTH, HEADS, LAYERS, CONTEXT = 32, 4, 2, 128
END = b"<|endoftext|>"
_WORDS = [
    b" the",
    b"the",
    b" of",
    b" and",
    b"ing",
    b"er",
    b" hello",
    b"hello",
    b" world",
    b"ld",
    b"  ",
]
TOKENS = [*(bytes([byte]) for byte in range(256)), *_WORDS, END]
ARCHITECTURES = ("gpt2", "starcoder", "gptj", "gpt_neox", "mpt", "llama", "falcon")
_F32, _F16 = 0, 1


@dataclass
class LegacyModel:
    """A model that can be written.

    Attributes:
        architecture: As ctransformers calls it.
        header: The numbers after the magic, but for the last one, which is the type of the weights.
        tensors: ``float32`` weights by the names in the file.
        tokens: Bytes of each token.
        scores: Scores of the tokens, for llama.
        merges: Pairs of tokens that become one, as ``a+b``, for falcon.
        ftype: The header's last number; by default that of the weights.
        llama_format: The first bytes and the version of the file, for llama; 0 for none.
    """

    architecture: str
    header: list[int | float]
    tensors: dict[str, np.ndarray[Any, Any]]
    tokens: list[bytes] = field(default_factory=lambda: list(TOKENS))
    scores: list[float] = field(default_factory=list)
    merges: tuple[bytes, ...] = ()
    ftype: int | None = None
    llama_format: tuple[bytes, int] = (b"tjgg", 3)

    def to_bytes(self, *, half: bool = False) -> bytes:
        """The file; ``half`` stores matrices as float16."""
        llama, falcon = self.architecture == "llama", self.architecture == "falcon"
        ftype = (_F16 if half else _F32) if self.ftype is None else self.ftype
        magic, version = self.llama_format if llama else (b"ccgg", 10) if falcon else (b"lmgg", 0)
        aligned = magic in {b"tjgg", b"ccgg"}
        data = bytearray(magic + (struct.pack("<I", version) if version else b""))
        for number in [*self.header, ftype]:
            data += struct.pack("<f" if isinstance(number, float) else "<i", number)
        if self.architecture in {"gpt2", "starcoder", "gptj"}:
            data += struct.pack("<i", len(self.tokens))
        merges = [pair.split(b"+") for pair in self.merges]
        data += struct.pack("<i", len(merges)) if falcon else b""
        for index, token in enumerate(self.tokens):
            if self.architecture == "mpt":
                token = "".join(map(chr, token)).encode()
            data += struct.pack("<I", len(token)) + token
            if version:
                data += struct.pack("<f", self.scores[index] if llama else 0.0)
        data += struct.pack("<i", len(merges)) if falcon else b""
        for part in (part for pair in merges for part in pair):
            data += struct.pack("<I", len(part)) + part
        for name, values in self.tensors.items():
            is_half = half and values.ndim == 2 and name != "model/wpe"
            encoded = name.encode()
            data += struct.pack("<3i", values.ndim, len(encoded), _F16 if is_half else _F32)
            data += struct.pack(f"<{values.ndim}i", *reversed(values.shape)) + encoded
            if aligned:
                data += bytes(-len(data) % 32)
            data += values.astype(np.float16 if is_half else np.float32).tobytes()
        return bytes(data)


def make_model(architecture: str, *, seed: int = 0, context: int = CONTEXT) -> LegacyModel:
    """A random model of 2 layers, 4 heads and a width of 32."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int = WIDTH) -> np.ndarray[Any, Any]:
        values = random.normal(0, 1.5 / np.sqrt(columns), (rows, columns))
        return values.astype(np.float16).astype(np.float32)  # the same in files of both types

    def bias(count: int = WIDTH) -> np.ndarray[Any, Any]:
        return random.normal(0, 0.1, count).astype(np.float32)

    def scale() -> np.ndarray[Any, Any]:
        return (1 + random.normal(0, 0.1, WIDTH)).astype(np.float32)

    size = len(TOKENS)
    usual: list[int | float] = [size, context, WIDTH, HEADS, LAYERS]
    rotated = WIDTH // HEADS // 2
    shapes = _Shapes(matrix, bias, scale, size, context)
    if architecture in {"gpt2", "starcoder"}:
        return LegacyModel(architecture, usual, shapes.gpt2())
    if architecture == "gptj":
        return LegacyModel(architecture, [*usual, rotated], shapes.gptj())
    if architecture == "gpt_neox":
        return LegacyModel(architecture, [*usual, rotated, 1], shapes.gpt_neox())
    if architecture == "mpt":
        header: list[int | float] = [WIDTH, context, HEADS, LAYERS, size, 8.0, 0.0]
        return LegacyModel(architecture, header, shapes.mpt())
    if architecture == "llama":
        tokens = [b"", b"", b"", *TOKENS[:-1]]
        shapes.size = len(tokens)
        header = [len(tokens), WIDTH, 32, HEADS, LAYERS, WIDTH // HEADS]
        scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
        return LegacyModel(architecture, header, shapes.llama(), tokens, scores)
    if architecture == "falcon":
        header = [size, WIDTH, HEADS, 1, LAYERS, 7]
        return LegacyModel(architecture, header, shapes.falcon(), merges=(b"l+d",))
    raise ValueError(architecture)


class _Shapes:
    """The tensors of each architecture."""

    def __init__(self, matrix: Any, bias: Any, scale: Any, size: int, context: int) -> None:
        self.matrix, self.bias, self.scale = matrix, bias, scale
        self.size, self.context = size, context

    def gpt2(self) -> dict[str, Any]:
        m, b, s = self.matrix, self.bias, self.scale
        tensors = {"model/ln_f/g": s(), "model/ln_f/b": b()}
        tensors |= {"model/wte": m(self.size), "model/wpe": m(self.context)}
        for i in range(LAYERS):
            layer = {"ln_1/g": s(), "ln_1/b": b(), "ln_2/g": s(), "ln_2/b": b()}
            layer |= {"attn/c_attn/w": m(3 * WIDTH), "attn/c_attn/b": b(3 * WIDTH)}
            layer |= {"attn/c_proj/w": m(WIDTH), "attn/c_proj/b": b()}
            layer |= {"mlp/c_fc/w": m(4 * WIDTH), "mlp/c_fc/b": b(4 * WIDTH)}
            layer |= {"mlp/c_proj/w": m(WIDTH, 4 * WIDTH), "mlp/c_proj/b": b()}
            tensors |= {f"model/h{i}/{name}": values for name, values in layer.items()}
        return tensors

    def gptj(self) -> dict[str, Any]:
        m, b, s = self.matrix, self.bias, self.scale
        tensors = {"transformer.wte.weight": m(self.size), "transformer.ln_f.weight": s()}
        tensors |= {"transformer.ln_f.bias": b(), "lm_head.weight": m(self.size)}
        tensors["lm_head.bias"] = b(self.size)
        for i in range(LAYERS):
            layer = {"ln_1.weight": s(), "ln_1.bias": b()}
            layer |= {f"attn.{name}_proj.weight": m(WIDTH) for name in ("q", "k", "v", "out")}
            layer |= {"mlp.fc_in.weight": m(4 * WIDTH), "mlp.fc_in.bias": b(4 * WIDTH)}
            layer |= {"mlp.fc_out.weight": m(WIDTH, 4 * WIDTH), "mlp.fc_out.bias": b()}
            tensors |= {f"transformer.h.{i}.{name}": values for name, values in layer.items()}
        return tensors

    def gpt_neox(self) -> dict[str, Any]:
        m, b, s = self.matrix, self.bias, self.scale
        tensors = {"gpt_neox.embed_in.weight": m(self.size), "embed_out.weight": m(self.size)}
        tensors |= {f"gpt_neox.final_layer_norm.{n}": f() for n, f in (("weight", s), ("bias", b))}
        for i in range(LAYERS):
            layer = {"input_layernorm.weight": s(), "input_layernorm.bias": b()}
            layer |= {"post_attention_layernorm.weight": s(), "post_attention_layernorm.bias": b()}
            layer |= {"attention.query_key_value.weight": m(3 * WIDTH)}
            layer |= {"attention.query_key_value.bias": b(3 * WIDTH)}
            layer |= {"attention.dense.weight": m(WIDTH), "attention.dense.bias": b()}
            layer |= {"mlp.dense_h_to_4h.weight": m(4 * WIDTH)}
            layer |= {"mlp.dense_h_to_4h.bias": b(4 * WIDTH)}
            layer |= {
                "mlp.dense_4h_to_h.weight": m(WIDTH, 4 * WIDTH),
                "mlp.dense_4h_to_h.bias": b(),
            }
            tensors |= {f"gpt_neox.layers.{i}.{name}": values for name, values in layer.items()}
        return tensors

    def mpt(self) -> dict[str, Any]:
        m, s = self.matrix, self.scale
        tensors = {"transformer.wte.weight": m(self.size), "transformer.norm_f.weight": s()}
        for i in range(LAYERS):
            layer = {"norm_1.weight": s(), "norm_2.weight": s()}
            layer |= {"attn.Wqkv.weight": m(3 * WIDTH), "attn.out_proj.weight": m(WIDTH)}
            layer |= {
                "ffn.up_proj.weight": m(4 * WIDTH),
                "ffn.down_proj.weight": m(WIDTH, 4 * WIDTH),
            }
            tensors |= {f"transformer.blocks.{i}.{name}": values for name, values in layer.items()}
        return tensors

    def llama(self) -> dict[str, Any]:
        m, s = self.matrix, self.scale
        hidden = 96  # llama.cpp computes it: two thirds of 4 widths, rounded up to a multiple of 32
        tensors = {"tok_embeddings.weight": m(self.size), "norm.weight": s()}
        tensors["output.weight"] = m(self.size)
        for i in range(LAYERS):
            layer = {f"attention.w{name}.weight": m(WIDTH) for name in "qkvo"}
            layer |= {"attention_norm.weight": s(), "ffn_norm.weight": s()}
            layer |= {"feed_forward.w1.weight": m(hidden), "feed_forward.w3.weight": m(hidden)}
            layer["feed_forward.w2.weight"] = m(WIDTH, hidden)
            tensors |= {f"layers.{i}.{name}": values for name, values in layer.items()}
        return tensors

    def falcon(self) -> dict[str, Any]:
        m, b, s = self.matrix, self.bias, self.scale
        tensors = {
            "transformer.word_embeddings.weight": m(self.size),
            "lm_head.weight": m(self.size),
        }
        tensors |= {"transformer.ln_f.weight": s(), "transformer.ln_f.bias": b()}
        for i in range(LAYERS):
            layer = {"input_layernorm.weight": s(), "input_layernorm.bias": b()}
            layer["self_attention.query_key_value.weight"] = m((HEADS + 2) * WIDTH // HEADS)
            layer["self_attention.dense.weight"] = m(WIDTH)
            layer["mlp.dense_h_to_4h.weight"] = m(4 * WIDTH)
            layer["mlp.dense_4h_to_h.weight"] = m(WIDTH, 4 * WIDTH)
            tensors |= {f"transformer.h.{i}.{name}": values for name, values in layer.items()}
        return tensors
