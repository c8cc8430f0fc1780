"""Attention of a packed ragged batch, as transformers' models call it.

``transformers`` lets a model call any function for its attention (its attention interface). Ours finds the KV
memory that the model was given by ``attach`` and leaves the rest to that. A memory is told once per step what
the step is; then every layer gives it queries, keys and values of all rows at once.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from stoker import EngineError

if TYPE_CHECKING:
    from stoker_backend_torch.ragged import RaggedBatch

__all__ = [
    "NAME",
    "KvMemory",
    "LayerAttention",
    "LayerCall",
    "attach",
    "attend",
    "plain_attention",
    "scores_attention",
]

NAME = "stoker"
_MEMORY = "stoker_kv_memory"
_PLACE = "stoker_kv_place"
# Biases, and what sparse attention looks at. Layers that pass on one of them always do.
_UNSUPPORTED = ("position_bias", "head_mask", "indices", "block_indices")
_memories: weakref.WeakValueDictionary[int, LayerAttention] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How one layer wants its attention.

    Attributes:
        scaling: What scores are multiplied with.
        window: Tokens that a token sees, itself included; 0 for all before it.
        softcap: Scores are bent to within plus and minus this (Gemma 2); 0 for no bend.
        sinks: ``[heads]``, a score that takes its share and gives nothing (attention sinks); or ``None``.
    """

    scaling: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scaled dot-product attention is all of it."""
        return not self.softcap and self.sinks is None


class LayerAttention(ABC):
    """What layers attend with."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """Remember a step's keys and values in one layer, and attend with its queries.

        Args:
            layer: The layer's number.
            query: ``[T, heads, key_dim]``.
            key: ``[T, kv_heads, key_dim]``.
            value: ``[T, kv_heads, value_dim]``.
            call: How.

        Returns:
            ``[T, heads, value_dim]``.
        """


class KvMemory(LayerAttention):
    """The keys and values of all lanes; how long each lane is, the runtime knows, too."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Its size."""

    @abstractmethod
    def reserve(self, batch: RaggedBatch) -> bool:
        """Make room for a step's tokens; false, and nothing has changed, if there is none.

        The lanes are within the context. A step that then fails is taken back by ``truncate``.
        """

    @abstractmethod
    def begin(self, batch: RaggedBatch) -> None:
        """Prepare for a step for which there is room."""

    @abstractmethod
    def truncate(self, lane: int, num_tokens: int) -> None:
        """Keep a lane's first tokens and free the rest; a lane of no more tokens stays as it is."""

    @abstractmethod
    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first tokens of one lane, which has as many, all that another one holds."""

    @abstractmethod
    def read(self, lane: int, num_tokens: int) -> bytes:
        """The first tokens of a lane; the same bytes whatever the kind of memory (``snapshots.py``)."""

    @abstractmethod
    def write(self, lane: int, num_tokens: int, data: bytes) -> bool:
        """Make what ``read`` gave all that a lane holds.

        Returns:
            Whether there was room; without, the lane is empty.

        Raises:
            ValueError: The data have another size; the lane is empty.
        """


def attach(model: torch.nn.Module, memory: LayerAttention | None) -> None:
    """Let a model's attention layers use a memory; ``None`` takes it away."""
    if memory is not None:
        _memories[id(memory)] = memory
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            setattr(module, _MEMORY, memory)
            # A tensor, because numbers would be constants for the compiler, and each layer another program.
            place = torch.tensor([id(memory), layer])
            module.register_buffer(_PLACE, place, persistent=False)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls: transformers' attention interface.

    Args:
        module: The layer's attention.
        query: ``[1, heads, T, key_dim]``.
        key: ``[1, kv_heads, T, key_dim]``.
        value: ``[1, kv_heads, T, value_dim]``.
        attention_mask: ``None``, as transformers makes none for an interface that it knows no masks for;
            a model that makes one by itself cannot be served.
        scaling: What scores are multiplied with.
        sliding_window: Tokens that a token sees.
        softcap: See ``LayerCall``.
        s_aux: The sinks.
        unused: What other kinds of attention take.

    Returns:
        ``[1, T, heads, value_dim]``, and no weights.

    Raises:
        EngineError: The layer has no memory, or asks for something unknown.
    """
    memory: LayerAttention | None = getattr(module, _MEMORY, None)
    if memory is None:
        raise EngineError(f"{type(module).__name__} has no KV memory")
    if torch.compiler.is_compiling():
        place = getattr(module, _PLACE)
        out = _attend_compiled(
            query,
            key,
            value,
            place,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window or 0,
            softcap or 0.0,
            s_aux,
        )
        return out, None
    if attention_mask is not None:
        raise EngineError(f"{type(module).__name__} makes masks of its own, which is not supported")
    for name in _UNSUPPORTED:
        if unused.get(name) is not None:
            raise EngineError(f"{type(module).__name__} wants {name}, which is not supported")
    call = LayerCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    out = memory.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        call,
    )
    return out.unsqueeze(0), None


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention over given keys; of scores that need it, with what scaled dot-product attention lacks.

    Args:
        query: ``[..., L, key_dim]``.
        key: ``[..., S, key_dim]``.
        value: ``[..., S, value_dim]``.
        mask: ``[..., L, S]``, added to the scores; or ``None``.
        call: How.
        is_causal: Row i sees keys 0 to i; then there is no mask.

    Returns:
        ``[..., L, value_dim]``.
    """
    if call.is_plain:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=call.scaling
        )
    return scores_attention(query, key, value, mask, call, is_causal=is_causal)


def scores_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """The same, step by step: scores, soft cap, mask, sinks, softmax in float32.

    The queries' heads must be ``[kv_heads, heads / kv_heads]`` in their third and fourth last dimensions if
    there are sinks; see ``plain_attention`` for the rest.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * call.scaling
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if is_causal:
        size = scores.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if call.sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
    else:
        kv_heads, group = query.shape[-4], query.shape[-3]
        sinks = call.sinks.view(kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks.to(scores.dtype)), -1).softmax(-1, dtype=torch.float32)
        weights = weights[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


@torch.library.custom_op("stoker::attend", mutates_args=())
def _attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    place: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same for ``torch.compile``, which does not look into it."""
    handle, layer = place.tolist()
    call = LayerCall(scaling, window, softcap, sinks)
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    # An operator's result must be its own memory.
    return _memories[handle].attend(layer, queries, keys, values, call).unsqueeze(0).contiguous()


@_attend_compiled.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    place: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


AttentionInterface.register(NAME, attend)
