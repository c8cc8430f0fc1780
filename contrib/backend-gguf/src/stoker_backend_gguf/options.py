"""The backend's options: ``[plugins.gguf]``, or ``options`` of one model in ``[[models]]``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["GgufOptions", "KvType"]

KvType = Literal["f16", "bf16", "q8_0", "f32"]
"""How a key or a value is stored in KV memory."""

_Count = Annotated[int, msgspec.Meta(ge=1)]


class GgufOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How llama.cpp loads and runs a model.

    Attributes:
        threads: Threads of a step in which every lane has one token; by default the usable cores.
        batch_threads: Threads of all other steps; by default as ``threads``.
        kv_type_k: How keys are stored. ``bf16`` and ``q8_0`` make decoding at long context faster on
            CPUs with the instructions for it, and prefill slower.
        kv_type_v: How values are stored. ``q8_0`` needs flash attention.
        n_ubatch: Most tokens llama.cpp computes at once; compute buffers grow with it.
        kv_unified: One KV memory that all lanes share, instead of one part for each lane: copies of a
            prefix cost nothing, but every token looks past the cells of all lanes.
        kv_tokens: With ``kv_unified``, how many tokens the shared KV memory holds; by default lanes
            times context. Fewer means that a step may find no room.
        swa_full: Keep the whole context of sliding-window layers, so that any truncation is exact.
            Without it they keep their window only: less memory, but a truncated lane mostly starts over.
        flash_attention: ``auto`` lets llama.cpp decide.
        use_mmap: Map the file instead of reading it.
        use_mlock: Lock the weights into memory.
        gpu_layers: Layers on a GPU, -1 for all; by default all if this build of llama.cpp has a GPU.
        use_extra_buffers: Repack weights for the CPU's matrix instructions (AMX and the like).
        exact_kernels: Only kernels that give a row the same bits however many rows they compute at once, so
            that no text depends on what else runs: no repacked weights, and K-quants row by row, which
            is slower. Matters for K-quants and IQ types only.
        self_test: Let a child process compute two steps before this process loads the model, because
            a miscompiled kernel kills the process that runs it.
        omp_wait_policy: What OpenMP's threads do while they wait. ``adaptive`` spins while they are alone on
            their cores and sleeps while they are not; ``passive`` sleeps after a few microseconds, and
            survives company as well; ``active`` spins, and does not; ``default`` leaves it to the
            library. ``OMP_WAIT_POLICY`` in the environment wins.
        omp_spin_count: Rounds that libgomp's threads spin before they sleep; by default 10,000 if adaptive,
            which is while they are alone, and 300 if passive, a few microseconds. ``GOMP_SPINCOUNT`` in
            the environment wins.
        check_memory: Refuse a model whose weights and KV memory exceed the memory that is free.
        embeddings: Offer embeddings. Their memory is taken when the first one is asked for.
        pooling: How a text's vector is made from those of its tokens: their ``mean``, the first one's
            (``cls``) or the ``last`` one's; by default as the model file says, else ``mean``.
        embedding_tokens: Most tokens of a text to embed; by default the context of a lane.
        matryoshka: Whether the model was trained so that the first numbers of a vector are an embedding, too:
            then requests may ask for fewer ``dimensions``.
    """

    threads: _Count | None = None
    batch_threads: _Count | None = None
    kv_type_k: KvType = "f16"
    kv_type_v: KvType = "f16"
    n_ubatch: _Count = 512
    kv_unified: bool = False
    kv_tokens: _Count | None = None
    swa_full: bool = True
    flash_attention: Literal["auto", "on", "off"] = "auto"
    use_mmap: bool = True
    use_mlock: bool = False
    gpu_layers: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    use_extra_buffers: bool = True
    exact_kernels: bool = False
    self_test: bool = True
    omp_wait_policy: Literal["adaptive", "passive", "active", "default"] = "adaptive"
    omp_spin_count: Annotated[int, msgspec.Meta(ge=0)] | None = None
    check_memory: bool = True
    embeddings: bool = True
    pooling: Literal["mean", "cls", "last"] | None = None
    embedding_tokens: _Count | None = None
    matryoshka: bool = False
