"""Looks at a model by running it: what its layers keep, and whether our attention is right for it.

transformers has hundreds of decoders, and nothing in a configuration says surely what a layer's keys look
like or whether a model needs more than the attention interface passes on (a bias by position, keys shared
between layers, memory of another kind), or computes with the places of rows instead of their positions. So
a loaded model computes two texts twice, one by one with transformers' own attention, and side by side in one
row with ours; it is served only if both say the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stoker import EngineError, ModelError
from stoker_backend_torch.attention import (
    NAME,
    LayerAttention,
    LayerCall,
    attach,
    plain_attention,
)
from stoker_backend_torch.kv import LayerShape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["look_at"]

_LENGTHS = (16, 8)  # of the two texts
_NUM_TOKENS = sum(_LENGTHS)
# How far logits of the same tokens may be apart, relative to how far they spread. Kernels differ in their
# last bits, which layers amplify; something left out shows as a difference of the spread's own size.
_TOLERANCE = {torch.float32: 0.002, torch.float16: 0.05, torch.bfloat16: 0.15}


class _Recorder(LayerAttention):
    """No memory: two texts that attend to themselves, and a note of what each layer keeps."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """See ``LayerAttention.attend``."""
        if layer in self.shapes:
            raise EngineError(f"layer {layer} attends twice")
        count, kv_heads, key_dim = key.shape
        self.shapes[layer] = LayerShape(kv_heads, key_dim, value.shape[2])
        self.windows[layer] = call.window
        folded = query.reshape(count, kv_heads, -1, key_dim).permute(1, 2, 0, 3)
        places = torch.arange(count, device=query.device)
        is_second = places >= _LENGTHS[0]
        hidden = (places > places[:, None]) | (is_second != is_second[:, None])
        if call.window:
            hidden |= places <= places[:, None] - call.window
        mask = torch.zeros(count, count, dtype=query.dtype, device=query.device)
        mask.masked_fill_(hidden, float("-inf"))
        group = folded.shape[1]
        out = plain_attention(
            folded,
            key.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1),
            value.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1),
            mask,
            call,
        )
        return out.permute(2, 0, 1, 3).reshape(count, query.shape[1], -1)


def look_at(
    model: Any, name: str, vocab_size: int, *, prepare: Callable[[], object] | None = None
) -> tuple[list[LayerShape], list[int]]:
    """What a model's layers keep of a token; leaves the model with our attention.

    Args:
        model: A decoder with transformers' own attention.
        name: The model's name, for messages.
        vocab_size: Tokens to choose the test's from.
        prepare: Changes the model between the two passes, which must not change what it says.

    Returns:
        For each layer what it keeps, and its sliding window (0 for none).

    Raises:
        ModelError: Our attention gives something else than transformers' does, or does not work.
    """
    device = next(model.parameters()).device
    tokens = (torch.arange(_NUM_TOKENS, device=device) * 7919 + 11) % vocab_size
    wanted = torch.arange(1, _NUM_TOKENS, device=device)
    recorder = _Recorder()
    with torch.inference_mode():
        try:
            alone = [
                model(input_ids=text[None], use_cache=False).logits[0]
                for text in tokens.split(_LENGTHS)
            ]
            if prepare is not None:
                prepare()
            model.set_attn_implementation(NAME)
            attach(model, recorder)
            positions = torch.cat([torch.arange(count, device=device) for count in _LENGTHS])
            together = model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=wanted,
            ).logits[0]
        except Exception as error:  # models raise anything
            raise ModelError(
                f"{name}: this architecture ({type(model).__name__}) cannot be batched: {error}"
            ) from error
        finally:
            attach(model, None)
        shapes = recorder.shapes
        if not shapes or sorted(shapes) != list(range(len(shapes))):
            raise ModelError(
                f"{name}: this architecture ({type(model).__name__}) does not keep keys and values in every "
                "layer through transformers' attention interface; it cannot be batched"
            )
        expected, got = torch.cat(alone)[wanted].float(), together.float()
        if got.shape != expected.shape:
            raise ModelError(
                f"{name}: this architecture ({type(model).__name__}) gives logits of shape "
                f"{list(got.shape)} where {list(expected.shape)} are wanted; it cannot be batched"
            )
        difference = float((got - expected).abs().max())
        spread = float(expected.std())
    dtype = next(model.parameters()).dtype
    if not difference <= _TOLERANCE.get(dtype, 0.15) * max(spread, 1e-6) * 4:
        raise ModelError(
            f"{name}: with our attention this architecture ({type(model).__name__}) gives other logits than "
            f"transformers' own (by {difference:.3g} at a spread of {spread:.3g}); it cannot be served"
        )
    layers = range(len(shapes))
    return [shapes[layer] for layer in layers], [recorder.windows[layer] for layer in layers]
