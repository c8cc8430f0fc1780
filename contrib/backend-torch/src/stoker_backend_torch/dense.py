"""Attention of decodes and of runs over keys that lie side by side, and the masks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stoker_backend_torch.attention import LayerCall, plain_attention

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "additive_mask",
    "decode_attention",
    "hidden_of_decodes",
    "hidden_of_run",
    "run_attention",
]


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
) -> torch.Tensor:
    """One token each of several lanes.

    Queries that share a KV head are treated as rows of one query, so that no key is repeated.

    Args:
        query: ``[n, heads, key_dim]``.
        key: ``[n, S, kv_heads, key_dim]``.
        value: ``[n, S, kv_heads, value_dim]``.
        mask: ``[n, 1, 1, S]``, added to the scores; or ``None``.
        call: How.

    Returns:
        ``[n, heads, value_dim]``.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    folded = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    if call.is_plain:
        out = plain_attention(folded, key, value, mask, call)
    else:
        mask = None if mask is None else mask.unsqueeze(2)
        out = plain_attention(
            folded.unsqueeze(3), key.unsqueeze(2), value.unsqueeze(2), mask, call
        ).squeeze(3)
    return out.reshape(len(query), query.shape[1], -1)


def run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
) -> torch.Tensor:
    """Several tokens of one lane.

    Args:
        query: ``[n, heads, key_dim]``.
        key: ``[S, kv_heads, key_dim]``.
        value: ``[S, kv_heads, value_dim]``.
        mask: ``[n, S]``, added to the scores; ``None`` if there are n keys, and each row sees those up to
            its own.
        call: How.

    Returns:
        ``[n, heads, value_dim]``.
    """
    key = key.transpose(0, 1).unsqueeze(1)
    value = value.transpose(0, 1).unsqueeze(1)
    count, heads, width = query.shape
    folded = query.reshape(count, len(key), -1, width).permute(1, 2, 0, 3)
    group = folded.shape[1]
    # Views: nothing is repeated in memory.
    key = key.expand(-1, group, -1, -1)
    value = value.expand(-1, group, -1, -1)
    out = plain_attention(folded, key, value, mask, call, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(count, heads, -1)


def hidden_of_decodes(
    lengths: NDArray[np.int64], places: NDArray[np.int64], window: int
) -> NDArray[np.bool_]:
    """What single tokens do not see, ``bool[n, S]``.

    Args:
        lengths: ``int64[n]``, tokens in each lane with the new one.
        places: ``int64[S]``, positions of the keys.
        window: See ``LayerCall``.
    """
    hidden: NDArray[np.bool_] = places >= lengths[:, None]
    if window:
        hidden |= places < lengths[:, None] - window
    return hidden


def hidden_of_run(
    own: NDArray[np.int64], places: NDArray[np.int64], window: int
) -> NDArray[np.bool_]:
    """What the tokens of a run do not see, ``bool[n, S]``.

    Args:
        own: ``int64[n]``, their positions.
        places: ``int64[S]``, positions of the keys.
        window: See ``LayerCall``.
    """
    hidden: NDArray[np.bool_] = places > own[:, None]
    if window:
        hidden |= places <= own[:, None] - window
    return hidden


def additive_mask(
    hidden: NDArray[np.bool_], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Minus infinity where something is hidden, added to scores."""
    mask = torch.zeros(hidden.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return mask.to(device)
