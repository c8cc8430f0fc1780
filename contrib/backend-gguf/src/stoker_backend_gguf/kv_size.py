"""How much memory a token takes, from a model's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker_backend_gguf.gguf_header import GgufHeader
    from stoker_backend_gguf.options import KvType

__all__ = ["kv_bytes_per_token"]

_KV_ELEMENT_BYTES: dict[KvType, float] = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "f32": 4.0}


def kv_bytes_per_token(header: GgufHeader, type_k: KvType, type_v: KvType) -> int:
    """Bytes of KV that one token takes in all attention layers, from the model's metadata.

    Exact for plain attention and for sliding windows kept whole; too much for compressed (MLA) KV and
    windows that are not kept whole; without the states of recurrent layers.
    """
    layers = int(header.get("block_count", 0))
    heads = _per_layer(header.get("attention.head_count", 0), layers)
    kv_heads = _per_layer(header.get("attention.head_count_kv", heads), layers)
    width = int(header.get("embedding_length", 0))
    most = max((0, *heads))
    default = width // most if most else 0
    keys = int(header.get("attention.key_length", default)) * _KV_ELEMENT_BYTES[type_k]
    values = int(header.get("attention.value_length", default)) * _KV_ELEMENT_BYTES[type_v]
    return int(sum(kv_heads) * (keys + values))


def _per_layer(value: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),) * layers
