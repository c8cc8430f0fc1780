"""Which of transformers' classes computes a model, and whether it can be served."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

import stoker
from stoker_backend_torch.manners import quiet
from stoker_backend_torch.pooling import is_embedding_only, makes_embeddings

if TYPE_CHECKING:
    from pathlib import Path

    from stoker_backend_torch.checkpoint import Checkpoint
    from stoker_backend_torch.options import TorchOptions

__all__ = ["ModelCode", "find_code", "from_files", "missing_package", "one_line"]

# Their configurations say is_decoder = false, and their attention is causal all the same.
_ALWAYS_DECODERS = frozenset({"bert-generation", "gpt_neox", "gpt_neox_japanese"})

# How many times the parameters in its files a model may have: tied weights are stored once, or twice.
_MOST_TIMES = 2


@dataclass(frozen=True, slots=True)
class ModelCode:
    """Which of transformers' classes computes a model.

    Attributes:
        config: The whole configuration.
        model_class: The class; of several parts, the one that generates text.
        generates: Whether it generates text; if not, it only embeds.
    """

    config: Any
    model_class: Any
    generates: bool

    @property
    def text_config(self) -> Any:
        """The configuration of the text model."""
        return self.config.get_text_config(decoder=True)

    def count_parameters(self) -> int:
        """Numbers of the model, without making it."""
        with torch.device("meta"):
            model = self.model_class(self.config)
        return sum(part.numel() for part in model.parameters())

    @property
    def is_encoder(self) -> bool:
        """Whether a token's numbers depend on those behind it, too."""
        config = self.text_config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return True
        return _looks_both_ways(config) or bool(
            getattr(config, "use_bidirectional_attention", False)
        )


def find_code(checkpoint: Checkpoint, options: TorchOptions) -> ModelCode:
    """Find transformers' code for a model, and check that it can be served.

    Raises:
        ModelError: transformers does not know it, or its kind cannot be served here.
    """
    path = checkpoint.path
    _check_extras(checkpoint, options)
    config = _read_config(checkpoint, options)
    names = list(getattr(config, "architectures", None) or ())
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    remote = getattr(config, "auto_map", None) or {}
    generates = bool(causal.intersection(names)) or "AutoModelForCausalLM" in remote
    if not names and not remote:
        generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if generates and not remote and _looks_both_ways(config):
        generates = False
    if checkpoint.kind != "gguf" and is_embedding_only(checkpoint.folder, names):
        generates = False
    try:
        with quiet():
            model_class = (MODEL_FOR_CAUSAL_LM_MAPPING if generates else MODEL_MAPPING)[
                type(config)
            ]
    except KeyError:
        if not remote:
            raise stoker.ModelError(
                f"{path}: {', '.join(names) or config.model_type} is no language model that transformers "
                f"{version('transformers')} can generate text or embeddings with"
            ) from None
        model_class = None  # its own code, found when it is loaded
    code = ModelCode(config, model_class, generates)
    _check_code(path, code)
    if checkpoint.kind == "safetensors":
        _check_size(checkpoint, code)
    return code


def from_files(checkpoint: Checkpoint, options: TorchOptions) -> dict[str, Any]:
    """Arguments for all of transformers' loaders: read a model from its files, and ask nobody else."""
    arguments: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": options.trust_remote_code,
    }
    if checkpoint.kind == "gguf":
        arguments["gguf_file"] = checkpoint.files[0].name
    return arguments


def missing_package(path: Path, error: ImportError) -> stoker.ModelError:
    """What transformers says if it lacks a package, as our error."""
    return stoker.ModelError(f"{path} needs a package that is missing: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """An error's message, without line breaks and not too long."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _check_extras(checkpoint: Checkpoint, options: TorchOptions) -> None:
    """What only some models and options need must be installed."""
    wanted: dict[str, tuple[str, ...]] = {}
    if checkpoint.kind == "gguf":
        wanted["gguf"] = ("gguf", "accelerate")
    if options.weights == "int8":
        wanted["int8"] = ("torchao",)
    for extra, packages in wanted.items():
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise stoker.ModelError(
                f"{checkpoint.path} needs {' and '.join(missing)}: "
                f'pip install "stoker-backend-torch[{extra}]"'
            )


def _read_config(checkpoint: Checkpoint, options: TorchOptions) -> Any:
    path = checkpoint.path
    model_type = checkpoint.config.get("model_type")
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                checkpoint.folder, **from_files(checkpoint, options)
            )
    except ImportError as error:
        raise missing_package(path, error) from error
    except Exception as error:  # transformers raises many types, and none of its own
        known = transformers.CONFIG_MAPPING
        if model_type is not None and model_type not in known and not options.trust_remote_code:
            raise stoker.ModelError(
                f"{path}: transformers {version('transformers')} does not know the model type "
                f"{model_type!r}; a newer one may: pip install --upgrade transformers"
            ) from error
        raise stoker.ModelError(
            f"{path}: transformers cannot read the configuration: {one_line(error)}"
        ) from error


def _looks_both_ways(config: Any) -> bool:
    """Whether it is an encoder's configuration, whose class for generation is for its decoder variant."""
    return not getattr(config, "is_decoder", True) and config.model_type not in _ALWAYS_DECODERS


def _check_code(path: Path, code: ModelCode) -> None:
    model_class, config = code.model_class, code.config
    if model_class is None:
        return
    name = getattr(model_class, "__name__", str(model_class))
    if config.is_encoder_decoder:
        raise stoker.ModelError(
            f"{path}: {name} is an encoder-decoder model; only decoders and embedding models can be served"
        )
    if not code.generates:
        if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
            raise stoker.ModelError(
                f"{path}: {name} reads more than text, and transformers {version('transformers')} has no "
                "class for its text model alone; it cannot be served"
            )
        if not makes_embeddings(config.architectures or ()):
            raise stoker.ModelError(
                f"{path}: {', '.join(config.architectures)} neither writes text nor makes embeddings: it is "
                "made for another task, such as classification, which cannot be served"
            )
        return
    if getattr(model_class, "_is_stateful", False):
        raise stoker.ModelError(
            f"{path}: {name} is recurrent, or partly so: it has no KV memory for all of its layers, and "
            "only models with attention in each can be served"
        )
    if not getattr(model_class, "_supports_attention_backend", False):
        raise stoker.ModelError(
            f"{path}: {name} computes attention in its own way, outside transformers' attention interface, "
            "and cannot be served; try a GGUF file of it with stoker-backend-gguf"
        )


def _check_size(checkpoint: Checkpoint, code: ModelCode) -> None:
    """Refuse a configuration of a larger model than the files hold: transformers would fill in the rest."""
    path = checkpoint.path
    if not inspect.isclass(code.model_class):
        return
    try:
        with quiet():
            wanted = code.count_parameters()
    except Exception as error:  # transformers raises many types, and none of its own
        raise stoker.ModelError(
            f"{path}: transformers cannot make a model by its configuration: {one_line(error)}"
        ) from error
    held = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if wanted > _MOST_TIMES * held:
        raise stoker.ModelError(
            f"{path}: its configuration is that of a model of {wanted:,} parameters, but its files hold "
            f"{held:,}; they do not belong together"
        )
