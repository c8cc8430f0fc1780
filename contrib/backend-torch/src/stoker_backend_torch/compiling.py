"""``torch.compile`` for a model's layers, one compilation for all of them.

What is around attention and the big products - norms, rotary positions, activations - becomes a few fused
kernels. Attention over our KV memory and packed linear layers stay as they are: the compiler sees them as
operators of its own that it knows the shapes of (``stoker::attend``, ``stoker::packed_linear``). Layers are
compiled one by one, not the model as a whole; since nothing but their weights differs, and which memory and
packed weights they use is passed as a tensor, the first one's code serves all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stoker import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["compile_layers", "find_layers", "plain_layers"]

logger = logging.getLogger("stoker.backend.torch")


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers: the longest list of modules of one class in it."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    ]
    return max(lists, key=len, default=[])


def plain_layers(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Within it, layers compute as if they had not been compiled, and are not compiled anew."""
    layers = find_layers(model)
    is_compiled = bool(layers) and layers[0]._compiled_call_impl is not None  # noqa: SLF001 - nothing else tells
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()


def compile_layers(model: nn.Module, name: str, warm_up: Callable[[int], Any]) -> float:
    """Compile a model's layers and compute with them once, so that no request waits for the compiler.

    Args:
        model: The model, complete and attached to its memory.
        name: The model's name, for messages.
        warm_up: Computes a step of so many tokens.

    Returns:
        The seconds that it took.

    Raises:
        ModelError: It does not work: no C++ compiler, or code that cannot be compiled.
    """
    layers = find_layers(model)
    if not layers:
        raise ModelError(f"{name}: compile = true finds no layers in {type(model).__name__}")
    logger.info("compiling %s for %d layers; this takes a minute or more", name, len(layers))
    started_s = time.monotonic()
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        # A single row is a case of its own for the compiler; then any number.
        for count in (1, 7, 2):
            warm_up(count)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"{name} cannot be compiled ({first[0] if first else type(error).__name__}); "
            "set compile = false"
        ) from error
    return time.monotonic() - started_s
