"""Linear layers whose weights lie as the CPU's matrix kernels want them.

torch's CPU kernels (oneDNN) compute with weights in blocks. A plain linear layer brings its weights into that
order again in every call, which for a step of few tokens takes longer than the product itself: a
135M model's layers are 1.6 to 2.2 times quicker with one token and one thread if it is done once.
They are the operators that ``torch.compile`` uses for the same purpose, and no public interface of torch:
each layer is tried against the plain one when it is packed, and stays plain where anything is odd.

Layers that a module applies to the same input (queries, keys and values; gate and up) become one product,
whose result the first of them computes and the others share.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Container

__all__ = ["PackedLinear", "pack_linear_layers"]

logger = logging.getLogger("stoker.backend.torch")

_layers: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
# Names under which transformers' models have layers with the same input, in the order in which they use them.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_DTYPES = (torch.bfloat16, torch.float32)
# Of the greatest output; sums of bfloat16 products in another order differ by a last bit or two.
_TOLERANCE = {torch.bfloat16: 2**-6, torch.float32: 1e-4}


class PackedLinear(nn.Module):
    """A linear layer with packed weights; for inference only.

    Args:
        linears: The layer to replace; or several with the same input, whose outputs stand side by side.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight = linears[0].weight.detach()
        self.bias = linears[0].bias
        if len(linears) > 1:
            weight = torch.cat([linear.weight.detach() for linear in linears])
            if self.bias is not None:
                self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), False)
        _layers[id(self)] = self
        # A tensor: see stoker_backend_torch.compiling.
        self.register_buffer("_handle", torch.tensor(id(self)), persistent=False)
        self._compute = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - see the module
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001 - see the module

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


class _Shared(nn.Module):
    """One of several layers whose outputs come from one product.

    Args:
        product: All of them; the same object for each.
        last: What the product computed last, the same list for each: its input and its output.
        start: First column of this layer's part.
        stop: End of its part.
    """

    def __init__(
        self, product: PackedLinear, last: list[torch.Tensor], start: int, stop: int
    ) -> None:
        super().__init__()
        self.in_features = product.in_features
        self.out_features = stop - start
        self.bias = None if product.bias is None else product.bias[start:stop]
        self._product = product
        self._last = last
        self._start, self._stop = start, stop

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, a view."""
        last = self._last
        # The same object, which the list keeps alive: what it holds cannot have changed hands.
        if not last or last[0] is not rows:
            last[:] = rows, self._product.compute(rows)
        out = last[1][..., self._start : self._stop]
        if self._stop == self._product.out_features:
            last.clear()  # the last of them: nothing may outlive the layer
        return out


class _Watched(nn.Linear):
    """A linear layer that notes whether anybody looks at its weights."""

    is_looked_at = False

    @property
    def weight(self) -> torch.Tensor:
        self.__dict__["is_looked_at"] = True
        return self._parameters["weight"]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The product."""
        return functional.linear(rows, self._parameters["weight"], self.bias)


def pack_linear_layers(
    model: nn.Module, *, share: bool = True, trial: Callable[[], Any] | None = None
) -> int:
    """Replace a model's linear layers by packed ones, where that works; a CPU's only.

    Args:
        model: The model, with its final weights.
        share: Whether layers with the same input become one product; not for ``torch.compile``, which cannot
            tell whether two inputs are one.
        trial: Computes with the model. Layers whose weights the model's code looks at, their type perhaps,
            stay as they are.

    Returns:
        How many were replaced.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return 0
    with torch.inference_mode():
        kept = set() if trial is None else _looked_at(model, trial)
        return _replace(model, kept, share=share)


def _looked_at(model: nn.Module, trial: Callable[[], Any]) -> set[nn.Module]:
    """The linear layers whose weights the model's own code uses."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = _Watched
    try:
        trial()
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear
    return {linear for linear in linears if linear.__dict__.pop("is_looked_at", False)}


def _replace(model: nn.Module, kept: Container[nn.Module], *, share: bool) -> int:
    """Replace all suitable layers but some; returns how many."""
    count = 0
    for parent in list(model.modules()):
        if share:
            shared = _share(parent, kept)
            if shared is None:
                return count
            count += shared
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child in kept or not _is_suitable(child):
                continue
            packed = _try_to_pack(child)
            if packed is None:
                return count  # what fails once fails for all
            setattr(parent, name, packed)
            count += 1
    return count


def _share(parent: nn.Module, kept: Container[nn.Module]) -> int | None:
    """Make one product of layers with the same input; ``None`` if packing does not work."""
    count = 0
    for names in _SAME_INPUT:
        linears: list[Any] = [
            child
            for child in (getattr(parent, name, None) for name in names)
            if type(child) is nn.Linear and child not in kept and _is_suitable(child)
        ]
        if len(linears) < len(names):
            continue
        if len({(one.in_features, one.weight.dtype, one.bias is None) for one in linears}) > 1:
            continue
        product = _try_to_pack(*linears)
        if product is None:
            return None
        last: list[torch.Tensor] = []
        start = 0
        for name, linear in zip(names, linears, strict=True):
            setattr(parent, name, _Shared(product, last, start, start + linear.out_features))
            start += linear.out_features
        count += len(names)
    return count


def _is_suitable(linear: nn.Linear) -> bool:
    weight = linear.weight
    # Hooks and parametrizations of a layer would be lost with it.
    hooks = (*linear._forward_hooks, *linear._forward_pre_hooks)  # noqa: SLF001 - nothing else tells
    is_plain = type(weight) is nn.Parameter and not hooks
    return is_plain and weight.device.type == "cpu" and weight.dtype in _DTYPES


def _try_to_pack(*linears: nn.Linear) -> PackedLinear | None:
    """The packed layer, if it computes what the plain ones do."""
    weight = linears[0].weight
    try:
        packed = PackedLinear(*linears)
        rows: Any = torch.linspace(-1, 1, 3 * linears[0].in_features, dtype=weight.dtype)
        rows = rows.view(1, 3, -1)
        parts = [functional.linear(rows, linear.weight, linear.bias) for linear in linears]
        expected = torch.cat(parts, -1).float()
        difference = float((packed(rows).float() - expected).abs().max())
        if difference > _TOLERANCE[weight.dtype] * max(1e-3, float(expected.abs().max())):
            raise RuntimeError(f"results differ by {difference:.3g}")
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
