"""Dense layers behind the pooling, as sentence-transformers writes them."""

from __future__ import annotations

import inspect
import pickle
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stoker import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker_backend_torch.pooling import DenseLayer

__all__ = ["load_heads"]


class _Normalize(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)


def load_heads(
    heads: Sequence[DenseLayer | None], device: torch.device, *, allow_pickle: bool
) -> torch.nn.Sequential:
    """What pooled vectors go through, in float32.

    Args:
        heads: See ``Recipe.heads``.
        device: Where to put it.
        allow_pickle: Whether to read pickle files.

    Raises:
        ModelError: A layer cannot be loaded; names its file.
    """
    modules: list[torch.nn.Module] = []
    for layer in heads:
        modules += (
            [_Normalize()] if layer is None else _load_dense(layer, allow_pickle=allow_pickle)
        )
    made = torch.nn.Sequential(*modules).eval().requires_grad_(requires_grad=False)
    return made.to(device=device, dtype=torch.float32)


def _load_dense(layer: DenseLayer, *, allow_pickle: bool) -> list[torch.nn.Module]:
    make = getattr(torch.nn, layer.activation, None)
    if not (inspect.isclass(make) and issubclass(make, torch.nn.Module)):
        raise ModelError(
            f"{layer.folder / 'config.json'}: torch has no activation {layer.activation}"
        )
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
    file = layer.folder / "model.safetensors"
    try:
        if file.is_file():
            weights = load_file(file)
        else:
            file = layer.folder / "pytorch_model.bin"
            if not allow_pickle:
                raise ModelError(
                    f"{file.parent}: it holds no model.safetensors, and pickle files are only read with "
                    "allow_pickle = true"
                )
            weights = torch.load(file, map_location="cpu", weights_only=True)
        linear.load_state_dict({name.removeprefix("linear."): weights[name] for name in weights})
        return [linear, make()]
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        AttributeError,
        TypeError,
    ) as error:
        raise ModelError(f"{file}: cannot be loaded: {error}") from error
