"""From a checkpoint to what embeds: a runtime of its own, or beside a model that writes."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

import stoker
from stoker.machine import format_bytes, usable_cores
from stoker_backend_torch.devices import choose_dtype, free_memory
from stoker_backend_torch.embedder import TorchEmbedder, position_limit
from stoker_backend_torch.embedding_runtime import EmbeddingRuntime
from stoker_backend_torch.openmp import set_threads
from stoker_backend_torch.packing import pack_linear_layers
from stoker_backend_torch.pooling import EmbeddingPlan, Recipe, plan_embedding, read_recipe
from stoker_backend_torch.weights import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stoker_backend_torch.architectures import ModelCode
    from stoker_backend_torch.checkpoint import Checkpoint
    from stoker_backend_torch.options import TorchOptions
    from stoker_backend_torch.weights import LoadedModel

__all__ = ["load_embedding_runtime", "make_embedder"]


def make_embedder(
    loaded: LoadedModel, checkpoint: Checkpoint, options: TorchOptions, context_length: int
) -> tuple[TorchEmbedder, stoker.EmbeddingInfo] | tuple[None, None]:
    """What embeds with a model that writes, and how; nothing if it is not to.

    Args:
        loaded: The model.
        checkpoint: Its files.
        options: The backend's options.
        context_length: Most tokens of a lane, and of a text.

    Raises:
        ModelError: What its folder says about embedding cannot be done.
    """
    plan = _plan(loaded, _recipe(checkpoint), options, context_length)
    if plan is None:
        return None, None
    return TorchEmbedder(loaded.model, plan, allow_pickle=options.allow_pickle), plan.info


def load_embedding_runtime(
    model: stoker.LocalModel,
    checkpoint: Checkpoint,
    code: ModelCode,
    settings: stoker.LoadSettings,
    options: TorchOptions,
    *,
    device: torch.device,
    extra_settings: Mapping[str, str],
    warnings: Sequence[str],
) -> EmbeddingRuntime:
    """Load a model that only embeds.

    Encoders compute in float32 unless an option says otherwise: they are small, and what is stored of them
    today is compared with what others compute of them tomorrow.

    Args:
        model: What the core asked for.
        checkpoint: What was found on disk.
        code: transformers' code for it.
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
    if not options.embeddings:
        raise stoker.ConfigError(
            f"{checkpoint.path} only embeds: embeddings = false leaves it nothing to do"
        )
    recipe = _recipe(checkpoint)
    is_exact = options.dtype == "auto" and code.is_encoder
    dtype = choose_dtype("float32" if is_exact else options.dtype, device)
    _check_memory(checkpoint, options, device, dtype)
    set_threads(settings.threads or usable_cores())
    loaded = load_model(checkpoint, code, options, device=device, dtype=dtype)
    if recipe.lower_case:
        _check_lower_case(checkpoint, loaded)
    num_packed = 0
    if device.type == "cpu":
        num_packed = pack_linear_layers(
            loaded.model,
            trial=lambda: loaded.model(input_ids=torch.zeros(1, 2, dtype=torch.int64)),
        )
    plan = _plan(loaded, recipe, options, settings.context_length)
    if plan is None:
        raise stoker.ModelError(f"{checkpoint.path} cannot embed")
    unheeded = []
    if settings.lanes is not None:
        unheeded.append(f"lanes = {settings.lanes} has no effect: {model.model_id} only embeds")
    if options.compile:
        unheeded.append(f"compile = true has no effect: {model.model_id} only embeds")
    info = stoker.RuntimeInfo(
        name=model.model_id,
        vocab_size=int(loaded.config.vocab_size),
        context_length=plan.info.max_input_tokens,
        num_lanes=0,
        kv_capacity_tokens=0,
        max_step_tokens=settings.max_step_tokens,
        end_token_ids=frozenset(),
        device=str(device),
        weights_bytes=loaded.weights_bytes,
        capabilities=stoker.Capabilities(generates=False, embed=True),
        embedding=plan.info,
        settings={
            "architecture": type(loaded.model).__name__,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "weights": options.weights,
            "pooling": plan.pooling,
            "linear_layers": "packed" if num_packed else "plain",
            "threads": str(torch.get_num_threads()),
            **extra_settings,
        },
        warnings=[*warnings, *loaded.warnings, *plan.warnings, *unheeded],
        fingerprint=f"torch {version('torch')}, transformers {version('transformers')}",
    )
    embedder = TorchEmbedder(loaded.model, plan, allow_pickle=options.allow_pickle)
    return EmbeddingRuntime(info, loaded.tokenizer, embedder)


def _recipe(checkpoint: Checkpoint) -> Recipe:
    # What lies beside a GGUF file need not be about it.
    return Recipe() if checkpoint.kind == "gguf" else read_recipe(checkpoint.folder)


def _plan(
    loaded: LoadedModel, recipe: Recipe, options: TorchOptions, context_length: int | None
) -> EmbeddingPlan | None:
    return plan_embedding(
        recipe,
        options,
        width=int(loaded.config.hidden_size),
        limit=position_limit(loaded.model),
        context_length=context_length,
    )


def _check_memory(
    checkpoint: Checkpoint, options: TorchOptions, device: torch.device, dtype: torch.dtype
) -> None:
    size = sum(tensor.bytes_as(dtype.itemsize) for tensor in checkpoint.tensors.values())
    needed, available = size or checkpoint.size_bytes, free_memory(device)
    if options.check_memory and needed > available:
        raise stoker.OutOfMemoryError(
            f"{checkpoint.path} does not fit: its weights take {format_bytes(needed)}, but only "
            f"{format_bytes(available)} of the memory of {device} are free; use a smaller model, or "
            'dtype = "bfloat16"'
        )


def _check_lower_case(checkpoint: Checkpoint, loaded: LoadedModel) -> None:
    """Texts are to be lower-cased, and that is only done by tokenizers here."""
    upper, lower = (
        loaded.tokenizer.encode(text, add_special=False, parse_special=False)
        for text in ("Hello World", "hello world")
    )
    if upper != lower:
        raise stoker.ModelError(
            f"{checkpoint.folder}: it wants texts in lower case (do_lower_case in "
            "sentence_bert_config.json), and its tokenizer does not see to that; put a Lowercase normalizer "
            "into tokenizer.json and remove do_lower_case"
        )
