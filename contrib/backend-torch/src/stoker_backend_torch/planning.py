"""How many lanes of what length a model gets, and whether all of it fits into the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import stoker
from stoker.machine import format_bytes
from stoker_backend_torch.blocks import blocks_for
from stoker_backend_torch.devices import free_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stoker_backend_torch.options import TorchOptions

__all__ = ["Plan", "hidden_window", "make_plan", "max_context"]

_AUTO_LANES = 16
_AUTO_LANES_GPU = 64
_AUTO_CONTEXT = 4096
_MAX_LANES = 1024
# Of the memory that is free: the machine's is for others, too; a GPU's is for models.
_SHARE, _SHARE_GPU = 0.5, 0.85
# Rotary factors that depend on the length of what is computed, so that texts of different lengths in one
# step would change each other's (see transformers' modeling_rope_utils).
_LENGTH_DEPENDENT = frozenset({"longrope", "dynamic"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model will be loaded with.

    Attributes:
        num_lanes: How many sequences can hold KV at once.
        context_length: Most tokens of one lane.
        kv_capacity_tokens: Most tokens of all lanes.
        kv_bytes: Estimated size of the KV memory.
        warnings: What the user should know.
        block_size: Tokens of a block of paged memory; 0 if each lane has its own part.
    """

    num_lanes: int
    context_length: int
    kv_capacity_tokens: int
    kv_bytes: int
    warnings: tuple[str, ...] = ()
    block_size: int = 0


def make_plan(
    path: Path,
    config: Any,
    settings: stoker.LoadSettings,
    options: TorchOptions,
    *,
    weights_bytes: int,
    kv_bytes_per_token: int,
    device: torch.device,
    block_size: int = 0,
) -> Plan:
    """Choose lanes and context, and check that the memory holds them.

    Args:
        path: The model, for messages.
        config: The text model's configuration.
        settings: What the core asks for.
        options: The backend's options.
        weights_bytes: What the weights will take while they are loaded.
        kv_bytes_per_token: What the keys and values of one token take in all layers.
        device: Where the model will be.
        block_size: Tokens of a block, if the KV memory is paged; else 0.

    Raises:
        ConfigError: A setting makes no sense.
        OutOfMemoryError: It does not fit; with the numbers and what to do.
    """
    if settings.lanes is not None and not 1 <= settings.lanes <= _MAX_LANES:
        raise stoker.ConfigError(f"lanes = {settings.lanes} is not within 1 to {_MAX_LANES}")
    if settings.context_length is not None and settings.context_length < 1:
        raise stoker.ConfigError(f"context = {settings.context_length} is not positive")
    context, warnings = _choose_context(config, settings.context_length)
    on_gpu = device.type != "cpu"
    available = free_memory(device)
    share, most = (_SHARE_GPU, _AUTO_LANES_GPU) if on_gpu else (_SHARE, _AUTO_LANES)
    room = (int(available * share) - weights_bytes) // max(1, kv_bytes_per_token)
    if block_size:
        lanes, capacity = _choose_pool(settings, options, context, room, most, block_size)
        context = min(context, capacity)
        # One block more: where writes go that are nobody's.
        stored = (blocks_for(lanes, context, capacity, block_size) + 1) * block_size
    else:
        lanes, context, cut = _choose_parts(settings, options, context, room, most)
        warnings += cut
        capacity = stored = lanes * context
    kv_bytes = stored * kv_bytes_per_token
    if options.check_memory and weights_bytes + kv_bytes > available:
        cure = 'use a smaller model, or weights = "int8"'
        if weights_bytes < available:
            cure = "lower the context or the number of lanes"
            if block_size:
                cure = "lower kv_tokens, or the number of lanes"
        what = (
            f"{capacity} tokens in blocks" if block_size else f"{lanes} lanes with {context} tokens"
        )
        raise stoker.OutOfMemoryError(
            f"{path} does not fit: its weights take {format_bytes(weights_bytes)} and the KV memory of "
            f"{what} {format_bytes(kv_bytes)}, but only "
            f"{format_bytes(available)} of the memory of {device} are free; {cure}"
        )
    return Plan(lanes, context, capacity, kv_bytes, warnings, block_size)


def _choose_parts(
    settings: stoker.LoadSettings, options: TorchOptions, context: int, room: int, most: int
) -> tuple[int, int, tuple[str, ...]]:
    """Lanes with memory of their own, their length, and a warning if that is not what was asked for.

    Args:
        settings: What the core asks for.
        options: The backend's options.
        context: Most tokens of a lane.
        room: Tokens that there is memory for.
        most: Most lanes if nobody says how many.

    Raises:
        ConfigError: There are more lanes than tokens.
    """
    lanes, limit = settings.lanes, options.kv_tokens
    if lanes is None:
        lanes = max(1, min(most, (room if limit is None else limit) // context))
    if limit is None or lanes * context <= limit:
        return lanes, context, ()
    if limit < lanes:
        raise stoker.ConfigError(
            f"kv_tokens = {limit} is less than a token for each of {lanes} lanes"
        )
    shorter = limit // lanes
    if settings.context_length is None:
        return lanes, shorter, ()
    warning = (
        f"The context is {shorter} tokens instead of {context}: kv_tokens = {limit}, and each of {lanes} "
        'lanes has its own part of them; with kv = "paged" they would share them.'
    )
    return lanes, shorter, (warning,)


def _choose_pool(
    settings: stoker.LoadSettings,
    options: TorchOptions,
    context: int,
    room: int,
    most: int,
    block_size: int,
) -> tuple[int, int]:
    """Lanes of paged memory, and how many tokens they share; the arguments are those of ``_choose_parts``."""
    limit = options.kv_tokens
    lanes = settings.lanes
    if lanes is None:
        # Of short texts, too, there should be some for each; its last block may be all but empty.
        lanes = max(1, min(most, (room if limit is None else limit) // (2 * block_size)))
    if limit is None:
        limit = max(context, room - lanes * block_size)
    return lanes, min(limit, lanes * context)


def max_context(config: Any) -> tuple[int | None, str]:
    """The most tokens that a model's positions allow, and why, if more would be wrong.

    Returns:
        The length, or ``None`` if the configuration names none, and a reason, or nothing if a longer context
        is merely untrained.
    """
    trained = getattr(config, "max_position_embeddings", None)
    length = int(trained) if trained else None
    rope = _rope_parameters(config)
    if any(part.get("rope_type", part.get("type")) in _LENGTH_DEPENDENT for part in rope):
        original = min(
            int(part.get("original_max_position_embeddings") or length or _AUTO_CONTEXT)
            for part in rope
        )
        original = int(getattr(config, "original_max_position_embeddings", None) or original)
        return original, (
            "beyond it the model's rotary factors depend on the length, so that texts of different lengths "
            "in one step would change each other"
        )
    if length is not None and not rope:
        return length, "the model has no positions beyond it"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # Llama 4
        most = int(config.attention_chunk_size)
        if getattr(config, "attn_temperature_tuning", False):  # by rows, not by their positions
            most = min(most, int(config.floor_scale) - 1)
        if length is None or most < length:
            return (
                most,
                "beyond it the model's attention is cut into chunks, which is not supported",
            )
    return length, ""


def hidden_window(config: Any, windows: Sequence[int]) -> int | None:
    """The sliding window of layers that do not pass it on to attention, but only to masks.

    Args:
        config: The text model's configuration.
        windows: The window that each layer passes on; 0 for none.

    Returns:
        The length up to which such layers see everything all the same; ``None`` if there are none.
    """
    kinds = getattr(config, "layer_types", None)
    found = []
    for at, window in enumerate(windows):
        is_own = getattr(config, "is_heterogeneous", False)
        wanted = getattr(config.per_layer_config[at] if is_own else config, "sliding_window", None)
        slides = kinds[at] == "sliding_attention" if kinds else not any(windows)
        if slides and not window and wanted and getattr(config, "use_sliding_window", True):
            found.append(int(wanted))
    return min(found, default=None)


def _choose_context(config: Any, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    most, reason = max_context(config)
    trained = getattr(config, "max_position_embeddings", None) or _AUTO_CONTEXT
    context = wanted or min(int(trained), _AUTO_CONTEXT)
    if most is None or context <= most:
        return context, ()
    if reason:
        return most, (f"The context is {most} tokens instead of {context}: {reason}.",)
    return context, (
        f"The context of {context} tokens exceeds the {most} that the model was trained with.",
    )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary positions, of each kind of layer; none if the model has no such positions."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, dict) or not found:
        return []
    nested = [part for part in found.values() if isinstance(part, dict)]
    return nested or [found]
