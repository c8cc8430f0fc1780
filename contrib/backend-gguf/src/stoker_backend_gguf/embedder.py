"""Embeddings: a context of their own, made when it is first used, and pooling.

llama.cpp pools each sequence within one ubatch, so an input would have to fit into one. Here it hands out
what stands in every token's place after the last layer and its norm, and the pooling is done over as many
pieces as an input takes: a long one can be computed a piece at a time, with other work in between.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from stoker import EmbeddingInfo, EngineError, OutOfMemoryError, machine
from stoker_backend_gguf.batch import Batch
from stoker_backend_gguf.native import NativeContext, NativeModel, NativeSettings, take_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stoker_backend_gguf.gguf_header import GgufHeader
    from stoker_backend_gguf.options import GgufOptions

__all__ = ["GgufEmbedder", "Pooling", "plan_embedding"]

Pooling = Literal["mean", "cls", "last"]

_BY_NUMBER: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}  # enum llama_pooling_type
_UNSPECIFIED = (-1, 0)
_MAX_INPUTS = 64
_CELL_PADDING = 256
# llama.cpp computes and keeps logits for every row of an embedding, wanted or not, twice over.
_LOGITS_BYTES = 32 * 2**20
_LEAST_ROWS = 32


def plan_embedding(
    header: GgufHeader, options: GgufOptions, width: int, context_length: int
) -> EmbeddingInfo | None:
    """How a model embeds; ``None`` if it does not.

    The pooling is the option's, else the model file's, else ``mean``: a model that was made to write has no
    place of its own for a text's meaning, and the mean over all of its tokens tells texts apart better than
    the last token does, which is about what comes next.

    Args:
        header: The model file's.
        options: The user's.
        width: Numbers of a vector.
        context_length: Most tokens of a lane.
    """
    number = int(header.get("pooling_type", _UNSPECIFIED[0]))
    pooling = options.pooling or _BY_NUMBER.get(number)
    if pooling is None and number in _UNSPECIFIED:
        pooling = "mean"
    # Models that look ahead need all of an input at once; other numbers are heads for other things.
    if not options.embeddings or pooling is None or header.get("attention.causal", True) is False:
        return None
    return EmbeddingInfo(
        width=width,
        max_input_tokens=min(context_length, options.embedding_tokens or context_length),
        pooling=pooling,
        max_inputs=_MAX_INPUTS,
        truncatable=options.matryoshka,
    )


class GgufEmbedder:
    """Embeds with a model. Costs nothing until it is used.

    Args:
        path: The model file, for messages.
        model: The weights; the embedder must be closed before them.
        native: What the model's other context was made with.
        info: How it embeds.
        vocab_size: Tokens of the vocabulary.
        kv_bytes_per_token: What one token takes in KV memory of type f16.
        check_memory: Whether to refuse what exceeds the free memory.
    """

    def __init__(
        self,
        path: Path,
        model: NativeModel,
        native: NativeSettings,
        info: EmbeddingInfo,
        *,
        vocab_size: int,
        kv_bytes_per_token: int,
        check_memory: bool,
    ) -> None:
        self._path = path
        self._model = model
        self._lib = model.lib
        self._info = info
        rows = _LOGITS_BYTES // (4 * max(1, vocab_size)) // _LEAST_ROWS * _LEAST_ROWS
        rows = min(max(rows, _LEAST_ROWS), native.n_ubatch)
        cells = -(-max(info.max_input_tokens, rows) // _CELL_PADDING) * _CELL_PADDING
        # On CPUs flash attention sums up in half precision: a vector would depend on its company, by up to
        # 1e-3 of cosine distance, where without it llama.cpp gives the same one to about 1e-6.
        self._settings = msgspec.structs.replace(
            native,
            lanes=info.max_inputs,
            cells=cells,
            n_batch=rows,
            n_ubatch=rows,
            kv_unified=True,
            kv_type_k="f16",
            kv_type_v="f16",
            flash_attention="off",
        )
        self._needed_bytes = cells * kv_bytes_per_token + 2 * 4 * rows * vocab_size
        self._check_memory = check_memory
        self._context: NativeContext | None = None
        self._batch: Batch | None = None

    def pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """See ``Runtime.embed_in_pieces``.

        Raises:
            EngineError: There are too many inputs, or one is too long, or llama.cpp failed.
            OutOfMemoryError: There is no memory for the context.
        """
        self._check(inputs)
        vectors = np.zeros((len(inputs), self._info.width), np.float64)
        group: list[int] = []
        since_pause = 0
        for index in range(len(inputs) + 1):
            is_end = index == len(inputs)
            size = sum(len(inputs[i]) for i in group)
            if group and (is_end or size + len(inputs[index]) > self._settings.cells):
                step = max(1, min(self._settings.n_batch, max_tokens))
                for count in self._compute([inputs[i] for i in group], group, step, vectors):
                    if since_pause and since_pause + count > max_tokens:
                        yield None
                        since_pause = 0
                    since_pause += count
                group = []
            group.append(index)
        yield vectors.astype(np.float32)

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        if self._context is not None:
            self._lib.llama_set_n_threads(self._context.pointer, threads, threads)

    def close(self) -> None:
        """Free the context. May be called twice."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        if len(inputs) > self._info.max_inputs:
            raise EngineError(f"{len(inputs)} inputs exceed {self._info.max_inputs}")
        for tokens in inputs:
            if not 1 <= len(tokens) <= self._info.max_input_tokens:
                raise EngineError(
                    f"an input has {len(tokens)} tokens, not 1 to {self._info.max_input_tokens}"
                )

    def _compute(
        self,
        inputs: Sequence[Sequence[int]],
        rows: Sequence[int],
        step: int,
        vectors: NDArray[np.float64],
    ) -> Iterator[int]:
        """Compute inputs that fit into the memory together, a chunk at a time.

        Args:
            inputs: Token sequences.
            rows: The row of ``vectors`` for each.
            step: Most tokens of a chunk.
            vectors: Where they go.

        Yields:
            The number of tokens of a chunk that is about to be computed.
        """
        lengths = np.array([len(tokens) for tokens in inputs])
        tokens = np.concatenate([np.asarray(part, np.int32) for part in inputs])
        lanes = np.repeat(np.arange(len(inputs), dtype=np.int32), lengths)
        starts = np.array([0, *accumulate(lengths.tolist())][:-1])
        positions = (np.arange(len(tokens)) - np.repeat(starts, lengths)).astype(np.int32)
        is_new = True
        for start in range(0, len(tokens), step):
            chunk = slice(start, start + step)
            yield len(tokens[chunk])
            hidden = self._decode(tokens[chunk], positions[chunk], lanes[chunk], is_new=is_new)
            is_new = False
            at = np.asarray(rows)[lanes[chunk]]
            if self._info.pooling == "mean":
                np.add.at(vectors, at, hidden / lengths[lanes[chunk], None])
                continue
            wanted = 0 if self._info.pooling == "cls" else lengths[lanes[chunk]] - 1
            is_wanted = positions[chunk] == wanted
            vectors[at[is_wanted]] = hidden[is_wanted]

    def _decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        lanes: NDArray[np.int32],
        *,
        is_new: bool,
    ) -> NDArray[np.float32]:
        """What stands in each token's place in the end, ``float32[T, width]``; a view until the next call."""
        context, batch = self._open()
        if is_new:
            self._lib.llama_memory_clear(context.memory, False)
        batch.fill(tokens, positions, lanes, np.ones(len(tokens), np.bool_))
        code = self._lib.llama_decode(context.pointer, batch.struct)
        if code:
            raise EngineError(f"llama.cpp could not embed (code {code}): {take_errors()}")
        pointer = self._lib.llama_get_embeddings(context.pointer)
        if not pointer:
            raise EngineError(f"llama.cpp has no embeddings of this model: {take_errors()}")
        return np.ctypeslib.as_array(pointer, (len(tokens), self._info.width))

    def _open(self) -> tuple[NativeContext, Batch]:
        """The context, made when it is first asked for."""
        if self._context is None or self._batch is None:
            available = machine.available_memory()
            if self._check_memory and not self._model.on_gpu and self._needed_bytes > available:
                raise OutOfMemoryError(
                    f"embeddings need {machine.format_bytes(self._needed_bytes)} of memory, but only "
                    f"{machine.format_bytes(available)} are free; lower embedding_tokens in [plugins.gguf]"
                )
            self._context = NativeContext(self._path, self._model, self._settings, embeddings=True)
            capacity = int(self._lib.llama_n_batch(self._context.pointer))
            self._batch = Batch(self._lib, capacity, self._settings.lanes)
        return self._context, self._batch
