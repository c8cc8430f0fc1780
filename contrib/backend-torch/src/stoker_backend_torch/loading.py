"""From a checkpoint that looks complete to a runtime; imports torch and transformers."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec
import torch

import stoker
from stoker.machine import usable_cores
from stoker_backend_torch.architectures import ModelCode, find_code
from stoker_backend_torch.choosing import AttentionShape, choose_block_size
from stoker_backend_torch.devices import choose_dtype, kv_bytes_per_token
from stoker_backend_torch.embedding_loading import load_embedding_runtime, make_embedder
from stoker_backend_torch.memory import make_memory
from stoker_backend_torch.openmp import set_threads
from stoker_backend_torch.packing import pack_linear_layers
from stoker_backend_torch.planning import Plan, hidden_window, make_plan
from stoker_backend_torch.probe import look_at
from stoker_backend_torch.runtime import TorchRuntime
from stoker_backend_torch.sampler import can_sample_on
from stoker_backend_torch.weights import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stoker_backend_torch.checkpoint import Checkpoint
    from stoker_backend_torch.options import TorchOptions

__all__ = ["load_runtime"]


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be loaded, and how."""

    model: stoker.LocalModel
    checkpoint: Checkpoint
    settings: stoker.LoadSettings
    options: TorchOptions


def load_runtime(
    model: stoker.LocalModel,
    checkpoint: Checkpoint,
    settings: stoker.LoadSettings,
    options: TorchOptions,
    *,
    device: torch.device,
    extra_settings: Mapping[str, str],
    warnings: Sequence[str],
) -> stoker.Runtime:
    """Choose type, lanes and context, load the model, and give it KV memory.

    Args:
        model: What the core asked for.
        checkpoint: What was found on disk.
        settings: The core's settings.
        options: The backend's options.
        device: Where to compute.
        extra_settings: More to show among the effective settings.
        warnings: More that the user should know.

    Raises:
        ConfigError: A setting cannot be.
        ModelError: The model cannot be served.
        OutOfMemoryError: It does not fit.
    """
    request = _Request(model, checkpoint, settings, options)
    code = find_code(checkpoint, options)
    if not code.generates:
        return load_embedding_runtime(
            model,
            checkpoint,
            code,
            settings,
            options,
            device=device,
            extra_settings=extra_settings,
            warnings=warnings,
        )
    dtype = choose_dtype(options.dtype, device)
    plan = _plan(request, code.text_config, _weights_bytes(checkpoint, code, dtype), device, dtype)
    set_threads(settings.threads or usable_cores())
    loaded = load_model(checkpoint, code, options, device=device, dtype=dtype)
    num_packed = 0

    def pack() -> None:
        nonlocal num_packed
        if device.type == "cpu":
            num_packed = pack_linear_layers(
                loaded.model,
                share=not options.compile,
                trial=lambda: loaded.model(input_ids=torch.zeros(1, 2, dtype=torch.int64)),
            )

    name = str(checkpoint.path)
    shapes, windows = look_at(loaded.model, name, _vocab_size(loaded), prepare=pack)
    window = hidden_window(loaded.config, windows)
    is_bound = window is not None and window < plan.context_length
    if is_bound:
        request = replace(
            request, settings=msgspec.structs.replace(settings, context_length=window)
        )
        beyond = (
            f"The context is {window} tokens instead of {plan.context_length}: beyond it the model hides "
            "tokens by a sliding window that it does not tell attention of."
        )
        warnings = [*warnings, beyond]
    # Now it is known what a token takes; the configuration may have told it wrongly.
    per_token = sum(shape.width for shape in shapes) * dtype.itemsize
    if is_bound or per_token != kv_bytes_per_token(loaded.config, dtype):
        # The weights are there already: what is free need not hold them once more.
        plan = _plan(request, loaded.config, 0, device, dtype, per_token)
    shape = AttentionShape(
        layers=shapes,
        num_heads=int(loaded.config.num_attention_heads),
        has_sinks=any(name.endswith("sinks") for name, _ in loaded.model.named_parameters()),
    )
    kv = make_memory(options, plan, shape, dtype, device)
    how = {**extra_settings, **kv.settings, "linear_layers": "packed" if num_packed else "plain"}
    info = _describe(request, loaded, plan, how, [*warnings, *plan.warnings, *kv.warnings])
    embedder, embedding = make_embedder(loaded, checkpoint, options, plan.context_length)
    if embedding is not None:
        can = msgspec.structs.replace(info.capabilities, embed=True)
        info = msgspec.structs.replace(info, capabilities=can, embedding=embedding)
    gc.collect()  # what loading left behind goes now, not within a step
    runtime = TorchRuntime(loaded, info, kv.memory, embedder)
    if options.compile:
        seconds = runtime.compile()
        settings_now = {**runtime.info.settings, "compiled": f"in {seconds:.0f} s"}
        runtime.info = msgspec.structs.replace(runtime.info, settings=settings_now)
    if options.cuda_graphs and device.type == "cuda" and (sizes := runtime.record()):
        settings_now = {**runtime.info.settings, "cuda_graphs": f"for 1 to {sizes[-1]} lanes"}
        runtime.info = msgspec.structs.replace(runtime.info, settings=settings_now)
    return runtime


def _plan(
    request: _Request,
    config: Any,
    weights_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_bytes: int | None = None,
) -> Plan:
    try:
        return make_plan(
            request.checkpoint.path,
            config,
            request.settings,
            request.options,
            weights_bytes=weights_bytes,
            kv_bytes_per_token=kv_bytes_per_token(config, dtype) if kv_bytes is None else kv_bytes,
            device=device,
            block_size=choose_block_size(request.options, device, dtype),
        )
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise stoker.ModelError(
            f"{request.checkpoint.path} has a configuration that makes no sense: {error}"
        ) from error


def _weights_bytes(checkpoint: Checkpoint, code: ModelCode, dtype: torch.dtype) -> int:
    """What the weights take while they are loaded."""
    if checkpoint.kind == "safetensors":
        size = int(dtype.itemsize)
        return sum(tensor.bytes_as(size) for tensor in checkpoint.tensors.values())
    if checkpoint.kind == "gguf":  # packed: the model's code knows what it becomes
        return code.count_parameters() * int(dtype.itemsize)
    return checkpoint.size_bytes


def _vocab_size(loaded: LoadedModel) -> int:
    """The tokens of the tokenizer and the end tokens, as far as there are logits for them.

    Padded vocabularies have more columns of logits: those stand for nothing, and nobody may draw them.
    """
    head = loaded.model.get_output_embeddings()
    columns = getattr(head, "out_features", None) if head is not None else None
    columns = int(columns or loaded.config.vocab_size)
    ends = [token + 1 for token in loaded.end_token_ids if token < columns]
    return max(1, min(columns, loaded.tokenizer.vocab_size), *ends)


def _samples(wanted: str, device: torch.device) -> bool:
    """Whether tokens are drawn on the device: where it is none of the host's, unless asked otherwise."""
    if wanted == "device" and not can_sample_on(device):
        raise stoker.ConfigError(
            f"sampling = 'device' is not possible on {device}; use 'host' or 'auto'"
        )
    return wanted == "device" or (
        wanted == "auto" and device.type != "cpu" and can_sample_on(device)
    )


def _describe(
    request: _Request,
    loaded: LoadedModel,
    plan: Plan,
    extra_settings: Mapping[str, str],
    warnings: Sequence[str],
) -> stoker.RuntimeInfo:
    """The facts of the loaded model."""
    options, vocab_size = request.options, _vocab_size(loaded)
    return stoker.RuntimeInfo(
        name=request.model.model_id,
        vocab_size=vocab_size,
        context_length=plan.context_length,
        num_lanes=plan.num_lanes,
        kv_capacity_tokens=plan.kv_capacity_tokens,
        max_step_tokens=request.settings.max_step_tokens,
        end_token_ids=frozenset(token for token in loaded.end_token_ids if token < vocab_size),
        chat_template=loaded.chat_template,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        device=str(loaded.device),
        weights_bytes=loaded.weights_bytes,
        kv_bytes=plan.kv_bytes,
        capabilities=stoker.Capabilities(
            truncation="any",
            copy_prefix=True,
            snapshot=True,
            lane_locality=not plan.block_size,
            shares_kv=plan.block_size > 0,
            exact_block=0,  # matrix kernels are chosen by the number of rows
            samples=_samples(options.sampling, loaded.device),
        ),
        settings={
            "architecture": type(loaded.model).__name__,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "weights": options.weights,
            "threads": str(torch.get_num_threads()),
            **extra_settings,
        },
        warnings=[*warnings, *loaded.warnings],
        fingerprint=f"torch {version('torch')}, transformers {version('transformers')}",
    )
