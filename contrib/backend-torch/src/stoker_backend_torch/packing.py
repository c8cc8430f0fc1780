"""Linear layers whose weights lie as the CPU's matrix kernels want them.

torch's CPU kernels (oneDNN) compute with weights in blocks. A plain linear layer brings its weights into that
order again in every call, which for a step of few tokens takes longer than the product itself: on two CPUs a
135M model's layers are 1.6 to 2.2 times quicker with one token and 1.3 to 2 times with 16 if it is done once.
They are the operators that ``torch.compile`` uses for the same purpose, and no public interface of torch:
each layer is tried against the plain one when it is packed, and stays plain where anything is odd.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PackedLinear", "pack_linear_layers"]

logger = logging.getLogger("stoker.backend.torch")

_layers: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_DTYPES = (torch.bfloat16, torch.float32)
# Of the greatest output; sums of bfloat16 products in another order differ by a last bit or two.
_TOLERANCE = {torch.bfloat16: 2**-6, torch.float32: 1e-4}


class PackedLinear(nn.Module):
    """A linear layer with packed weights; for inference only.

    Args:
        linear: The layer to replace.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        _layers[id(self)] = self
        # A tensor: see stoker_backend_torch.compiling.
        self.register_buffer("_handle", torch.tensor(id(self)), persistent=False)
        self._compute = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - see the module
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # noqa: SLF001

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if torch.compiler.is_compiling():
            found: torch.Tensor = _packed_linear(rows, self._handle, self.out_features)
            return found
        return self.compute(rows)

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """The product itself."""
        out: torch.Tensor = self._compute(rows, self._packed, self.bias, "none", [], "")
        return out

    @property
    def num_bytes(self) -> int:
        """Size of its weights, without the padding of blocks."""
        size: int = self.in_features * self.out_features * self._packed.element_size()
        return size


def pack_linear_layers(model: nn.Module, trial: Callable[[], Any] | None = None) -> int:
    """Replace a model's linear layers by packed ones, where that works; a CPU's only.

    Args:
        model: The model, with its final weights.
        trial: Computes with the model. If that fails now, since its code looks at the weights of a layer,
            say, all of them stay as they were.

    Returns:
        How many were replaced.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return 0
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    with torch.inference_mode():
        _replace(model, replaced)
        if replaced and trial is not None:
            try:
                trial()
            except Exception as error:  # noqa: BLE001 - models raise anything
                logger.info("linear layers stay as they are: the model needs them (%s)", error)
                for parent, name, child in replaced:
                    setattr(parent, name, child)
                return 0
    return len(replaced)


def _replace(model: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Replace layers, and note which, by their parents and names."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or not _is_suitable(child):
                continue
            packed = _try_to_pack(child)
            if packed is None:
                return  # what fails once fails for all
            setattr(parent, name, packed)
            replaced.append((parent, name, child))


def _is_suitable(linear: nn.Linear) -> bool:
    weight = linear.weight
    # Hooks and parametrizations of a layer would be lost with it.
    hooks = (*linear._forward_hooks, *linear._forward_pre_hooks)  # noqa: SLF001 - nothing else tells
    is_plain = type(weight) is nn.Parameter and not hooks
    return is_plain and weight.device.type == "cpu" and weight.dtype in _DTYPES


def _try_to_pack(linear: nn.Linear) -> PackedLinear | None:
    """The packed layer, if it computes what the plain one does."""
    try:
        packed = PackedLinear(linear)
        rows: Any = torch.linspace(-1, 1, 3 * linear.in_features, dtype=linear.weight.dtype)
        rows = rows.view(1, 3, -1)
        expected = functional.linear(rows, linear.weight, linear.bias).float()
        difference = (packed(rows).float() - expected).abs().max()
        if float(difference) > _TOLERANCE[linear.weight.dtype] * max(
            1e-3, float(expected.abs().max())
        ):
            raise RuntimeError(f"results differ by {float(difference):.3g}")
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        logger.info("linear layers stay as they are: packed ones do not work here (%s)", error)
        return None
    return packed


@torch.library.custom_op("stoker::packed_linear", mutates_args=())
def _packed_linear(rows: torch.Tensor, handle: torch.Tensor, width: int) -> torch.Tensor:
    return _layers[int(handle)].compute(rows)


@_packed_linear.register_fake
def _(rows: torch.Tensor, handle: torch.Tensor, width: int) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], width)
