"""The backend's options: ``[plugins.torch]``, or ``options`` of one model in ``[[models]]``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["TorchOptions"]

_Count = Annotated[int, msgspec.Meta(ge=1)]


class TorchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How transformers loads a model and how steps are computed.

    Attributes:
        device: ``auto`` takes CUDA, then MPS, then the CPU; or a device's name, such as ``cuda:1``.
        dtype: ``auto`` is bfloat16 where the device computes with it natively (on CPUs: AMX or
            AVX512-BF16), else float32 (on MPS: float16).
        weights: ``int8`` quantises the linear layers' weights when loading (weight-only, torchao).
        compile: Compile the model with ``torch.compile``: quicker steps after a start of minutes.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load checkpoints in pickle files, which can run any code.
        embeddings: Offer embeddings with this model.
        pooling: How a text's vector is made from those of its tokens; by default as the model's
            sentence-transformers configuration says, else ``mean``.
        matryoshka: The model was trained so that the first numbers of its vectors are embeddings, too.
        kv: Where keys and values live: a contiguous part for each lane, or blocks that lanes share
            (``paged``); ``auto`` pages on CUDA.
        kv_tokens: Most tokens of all lanes together; by default measured from the memory that is free.
            Without paging each lane has an equal part of them.
        block_size: Tokens of a block of paged memory, a multiple of 16; by default what the attention
            wants: 256 with flash, 128 with flex, else 16.
        attention: How attention reads blocks: ``flash`` (the package flash-attn), ``flex`` (compiled by
            torch), or ``gathered``, which copies them side by side and works everywhere; ``auto`` takes the
            first of these that works on CUDA, else ``gathered``.
        cuda_graphs: Record steps of one token a lane on CUDA once, and replay them.
        sampling: Where tokens are drawn: on the ``device``, or on the ``host`` by the core; ``auto`` is
            the device unless that is the CPU.
        omp_wait_policy: What OpenMP's threads do while they wait; ``passive`` survives busy neighbours.
            ``OMP_WAIT_POLICY`` in the environment wins.
        check_memory: Refuse a model whose weights and KV memory exceed the memory that is free.
    """

    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    weights: Literal["as_is", "int8"] = "as_is"
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    embeddings: bool = True
    pooling: Literal["mean", "cls", "last", "max"] | None = None
    matryoshka: bool = False
    kv: Literal["auto", "contiguous", "paged"] = "auto"
    kv_tokens: _Count | None = None
    block_size: Annotated[int, msgspec.Meta(ge=16, multiple_of=16)] | None = None
    attention: Literal["auto", "flash", "flex", "gathered"] = "auto"
    cuda_graphs: bool = True
    sampling: Literal["auto", "device", "host"] = "auto"
    omp_wait_policy: Literal["passive", "active", "default"] = "passive"
    check_memory: bool = True
