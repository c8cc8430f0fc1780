"""Embeddings: padded batches of texts of similar length through a model's layers, then pooling.

A text's vector is made of its own tokens only: what fills a batch up is masked, and never pooled. Long texts
of decoders are computed in chunks, with a cache of their own; encoders, where each token sees those behind
it, too, need all of a text at once.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from stoker import EngineError
from stoker_backend_torch.compiling import plain_layers
from stoker_backend_torch.heads import load_heads
from stoker_backend_torch.openmp import keep_threads
from stoker_backend_torch.planning import max_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from stoker_backend_torch.pooling import EmbeddingPlan, Pooling

__all__ = ["TorchEmbedder", "group_by_length", "layers_of", "position_limit"]

_CALL_TOKENS = 32
"""What a pass through the layers costs beyond its tokens, in tokens: dispatch, and weights that are read."""
_AT_ONCE_TOKENS = 2048
_ATTENTION = "_attn_implementation"
_PROBE_TOKENS = 8
_SAME = 1e-5  # of the largest number: two passes of one shape differ by less


class TorchEmbedder:
    """Embeds with a model. The model may be busy with other things between two pieces.

    Args:
        model: transformers' model, with a head for words or without.
        plan: How it embeds.
        allow_pickle: Whether dense layers may be read from pickle files.

    Raises:
        ModelError: The dense layers cannot be loaded.
    """

    def __init__(self, model: Any, plan: EmbeddingPlan, *, allow_pickle: bool = False) -> None:
        self._info = plan.info
        self._pooling = plan.pooling
        self._layers: Any = layers_of(model)
        self._device: torch.device = self._layers.device
        self._threads = torch.get_num_threads()  # as set when the model was loaded
        self._heads = load_heads(plan.heads, self._device, allow_pickle=allow_pickle)
        config = self._layers.config.get_text_config()
        padding = getattr(config, "pad_token_id", None)
        self._pad = padding if isinstance(padding, int) else 0
        self._vocab_size = int(config.vocab_size)
        self._attention = _attention_of(self._layers)
        parameters = inspect.signature(self._layers.forward).parameters
        self._fixed = {"use_cache": False} if "use_cache" in parameters else {}
        self._has_cache = "past_key_values" in parameters
        self._sees_ahead: bool | None = None

    def pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """See ``Runtime.embed_in_pieces``.

        Raises:
            EngineError: There are too many inputs, or one is too long.
        """
        self._check(inputs)
        vectors = np.empty((len(inputs), self._info.width), np.float32)
        since_pause = 0
        for group in group_by_length([len(tokens) for tokens in inputs], max_tokens):
            for count in self._compute(inputs, group, max_tokens, vectors):
                if since_pause and since_pause + count > max_tokens:
                    yield None
                    since_pause = 0
                since_pause += count
        yield vectors

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """All vectors of some inputs, without a pause; in batches that do not outgrow the memory.

        Raises:
            EngineError: There are too many inputs, or one is too long.
        """
        longest = max(map(len, inputs), default=1)
        *_, vectors = self.pieces(inputs, max(longest, _AT_ONCE_TOKENS))
        if vectors is None:
            raise EngineError("the embedder came to no end")
        return vectors

    def close(self) -> None:
        """Let go of the model. May be called twice."""
        self._layers = None
        self._heads = None

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        if self._layers is None:
            raise EngineError("the model is closed")
        if len(inputs) > self._info.max_inputs:
            raise EngineError(f"{len(inputs)} inputs exceed {self._info.max_inputs}")
        most = self._info.max_input_tokens
        for tokens in inputs:
            if not 1 <= len(tokens) <= most:
                raise EngineError(f"an input has {len(tokens)} tokens, not 1 to {most}")

    # ------------------------------------------------------------------ computing

    def _compute(
        self,
        inputs: Sequence[Sequence[int]],
        group: list[int],
        max_tokens: int,
        vectors: NDArray[np.float32],
    ) -> Iterator[int]:
        """Compute a group of inputs into their rows of ``vectors``.

        Yields:
            The number of tokens, padding included, of a pass that is about to be computed.
        """
        longest = len(inputs[group[-1]])
        if longest > max_tokens and self._can_be_cut():
            for index in group:
                yield from self._compute_long(inputs[index], max_tokens, vectors[index])
            return
        yield len(group) * longest
        vectors[group] = self._embed([inputs[index] for index in group])

    @torch.inference_mode()
    def _embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        lengths = np.array([len(tokens) for tokens in inputs])
        padded = np.full((len(inputs), int(lengths.max())), self._pad, np.int64)
        is_text = np.arange(padded.shape[1]) < lengths[:, None]
        padded[is_text] = np.concatenate([np.asarray(tokens, np.int64) for tokens in inputs])
        hidden = self._forward(padded, is_text)
        mask = torch.from_numpy(is_text).to(self._device)
        return self._finish(_pool(self._pooling, hidden, mask))

    def _compute_long(
        self, tokens: Sequence[int], step: int, vector: NDArray[np.float32]
    ) -> Iterator[int]:
        """Compute one input of a decoder, chunk by chunk."""
        cache = transformers.DynamicCache(config=self._layers.config)
        pooled: torch.Tensor | None = None
        for start in range(0, len(tokens), step):
            chunk = np.asarray(tokens[start : start + step], np.int64)[None]
            yield chunk.shape[1]
            is_text = np.ones((1, start + chunk.shape[1]), np.bool_)
            pooled = self._add_chunk(pooled, chunk, is_text, cache)
        if pooled is not None:
            mean = self._pooling == "mean"
            vector[:] = self._finish(pooled / len(tokens) if mean else pooled)[0]

    @torch.inference_mode()
    def _add_chunk(
        self,
        before: torch.Tensor | None,
        chunk: NDArray[np.int64],
        is_text: NDArray[np.bool_],
        cache: Any,
    ) -> torch.Tensor:
        hidden = self._forward(chunk, is_text, past_key_values=cache, use_cache=True)
        if self._pooling == "last":
            return hidden[:, -1]
        if self._pooling == "cls":
            return hidden[:, 0] if before is None else before
        if self._pooling == "max":
            found = hidden.amax(1)
            return found if before is None else torch.maximum(before, found)
        found = hidden.sum(1)
        return found if before is None else before + found

    def _forward(
        self, tokens: NDArray[np.int64], is_text: NDArray[np.bool_], **cache: Any
    ) -> torch.Tensor:
        """What stands in each token's place after the last layer and its norm.

        Args:
            tokens: ``[n, T]``.
            is_text: ``[n, cached + T]``, false for padding.
            cache: What comes before them, where there is anything.

        Returns:
            ``float32[n, T, width]``.
        """
        keep_threads(self._threads)
        # Layers that are compiled are so for steps: for this they would be again, in a minute or more.
        with _attending(self._layers.config, self._attention), plain_layers(self._layers):
            output = self._layers(
                input_ids=torch.from_numpy(tokens).to(self._device),
                attention_mask=torch.from_numpy(is_text.astype(np.int64)).to(self._device),
                **(self._fixed | cache),
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.float()

    def _finish(self, pooled: torch.Tensor) -> NDArray[np.float32]:
        numbers: NDArray[np.float32] = self._heads(pooled).cpu().numpy()
        return numbers

    def _can_be_cut(self) -> bool:
        """Whether a token's numbers depend on nothing behind it, and can be computed without."""
        if self._sees_ahead is None:
            self._sees_ahead = self._look_ahead()
        return self._has_cache and not self._sees_ahead

    @torch.inference_mode()
    def _look_ahead(self) -> bool:
        # What a configuration says of that differs from model to model; so the model is asked.
        first = np.arange(_PROBE_TOKENS)[None] % self._vocab_size
        other = first.copy()
        other[0, -1] = 0
        is_text = np.ones(first.shape, np.bool_)
        one, two = (self._forward(tokens, is_text)[0, :-1] for tokens in (first, other))
        return bool((one - two).abs().max() > _SAME * one.abs().max())


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide inputs into batches that waste little: by length, and the cheapest way to cut that order.

    A batch costs its number of inputs times its longest, and what any pass costs.

    Args:
        lengths: The number of tokens of each input.
        max_tokens: Most tokens of a batch, padding included; a single input may have more.

    Returns:
        Indices of inputs, the longest of a batch last.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # of the first n: the cost, and where the last batch begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        most = max(1, max_tokens // longest)
        best.append(
            min(
                (best[start][0] + _CALL_TOKENS + (end - start) * longest, start)
                for start in range(max(0, end - most), end)
            )
        )
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def layers_of(model: Any) -> Any:
    """A model without its head."""
    layers = model.base_model
    if layers is model and model.get_output_embeddings() is not None:
        # Not under the name that its class says (Llama 4).
        parts = (
            part for part in model.children() if isinstance(part, transformers.PreTrainedModel)
        )
        layers = next(parts, model)
    return layers


def position_limit(model: Any) -> int | None:
    """Most tokens of a text for which a model has positions; ``None`` if it does not say."""
    layers = layers_of(model)
    most, _ = max_context(layers.config.get_text_config())
    if most is None:
        return None
    table = getattr(getattr(layers, "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin count from behind the position that padding has.
    padding = getattr(table, "padding_idx", None)
    return most if padding is None else most - padding - 1


# --------------------------------------------------------------------------- parts


def _pool(pooling: Pooling, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector for each text.

    Args:
        pooling: How.
        hidden: ``float32[n, T, width]``.
        mask: ``bool[n, T]``, true at the beginning of each row: where its text is.

    Returns:
        ``float32[n, width]``.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if pooling == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    # What is behind a text may be anything, not numbers even: times nought would not do.
    return hidden.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


def _attention_of(layers: Any) -> str:
    """The attention that texts are embedded with: SDPA, where that computes all that the model asks for."""
    config = layers.config
    bends = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(layers, "_supports_sdpa", False) and not bends else "eager"


@contextmanager
def _attending(config: Any, attention: str) -> Iterator[None]:
    """Let a model compute attention in this way, and then again as it did before."""
    # The public way, ``set_attn_implementation``, reads the model's source code each time.
    before = getattr(config, _ATTENTION)
    setattr(config, _ATTENTION, attention)
    try:
        yield
    finally:
        setattr(config, _ATTENTION, before)
