"""A lane's keys and values as bytes: each layer's keys, then its values, whatever memory they were in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stoker_backend_torch.kv import LayerShape

__all__ = ["pack_tokens", "unpack_tokens"]


def pack_tokens(parts: Iterable[torch.Tensor]) -> bytes:
    """Tensors one after the other, as bytes."""
    return b"".join(part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in parts)


def unpack_tokens(
    data: bytes, shapes: Sequence[LayerShape], num_tokens: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Each layer's keys, ``[num_tokens, kv_heads, key_dim]``, and values, likewise, on the host.

    Args:
        data: What ``pack_tokens`` gave for all layers.
        shapes: What each layer keeps.
        num_tokens: Tokens.
        dtype: Their type.

    Raises:
        ValueError: It has another size.
    """
    size = dtype.itemsize * num_tokens * sum(shape.width for shape in shapes)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes are not the {size} of {num_tokens} tokens")
    whole = torch.empty(len(data) // dtype.itemsize, dtype=dtype)
    whole.view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return _cut(whole, shapes, num_tokens)


def _cut(
    whole: torch.Tensor, shapes: Sequence[LayerShape], num_tokens: int
) -> Iterator[torch.Tensor]:
    start = 0
    for shape in shapes:
        for width in (shape.key_dim, shape.value_dim):
            end = start + num_tokens * shape.kv_heads * width
            yield whole[start:end].view(num_tokens, shape.kv_heads, width)
            start = end
