"""A model's code, weights and tokenizer, through transformers, from files on this machine only."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

import stoker
from stoker_backend_torch.manners import progress, quiet
from stoker_backend_torch.pooling import is_embedding_only, makes_embeddings
from stoker_backend_torch.tokenizer import TorchTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from stoker_backend_torch.checkpoint import Checkpoint
    from stoker_backend_torch.options import TorchOptions

__all__ = ["LoadedModel", "ModelCode", "find_code", "load_model"]


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

    @property
    def is_encoder(self) -> bool:
        """Whether a token's numbers depend on those behind it, too."""
        config = self.text_config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return True
        return _looks_both_ways(config) or bool(
            getattr(config, "use_bidirectional_attention", False)
        )


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to compute.

    Attributes:
        model: transformers' model: in evaluation mode, on its device, in its type, with SDPA attention.
        config: The configuration of the text model.
        tokenizer: Its tokenizer.
        device: Where it is.
        dtype: The type it computes in.
        weights_bytes: Size of its weights in memory.
        chat_template: Its Jinja chat template.
        bos_token: Text of the beginning-of-sequence token; may be empty.
        eos_token: Text of the end-of-sequence token; may be empty.
        end_token_ids: Tokens that end a generation.
        warnings: What the user should know, in full sentences.
        folder: Where its files are.
        generates: Whether it generates text; if not, it only embeds.
    """

    model: Any
    config: Any
    tokenizer: TorchTokenizer
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    chat_template: str | None
    bos_token: str
    eos_token: str
    end_token_ids: frozenset[int]
    warnings: tuple[str, ...]
    folder: Path
    generates: bool = True


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
    return code


def load_model(
    checkpoint: Checkpoint,
    code: ModelCode,
    options: TorchOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedModel:
    """Load weights and tokenizer.

    safetensors files are mapped into memory: what is computed on the CPU in the type that the file has
    is not copied.

    Args:
        checkpoint: The files.
        code: What ``find_code`` found for it.
        options: The backend's options.
        device: Where to put it.
        dtype: What to compute in.

    Raises:
        ModelError: transformers cannot load it.
        OutOfMemoryError: The device's memory does not hold it.
    """
    tokenizer, fast = _load_tokenizer(checkpoint, options)
    model = _load_weights(checkpoint, code, options, device=device, dtype=dtype)
    if options.weights == "int8":
        _quantize(model)
    return LoadedModel(
        model=model,
        config=model.config.get_text_config(decoder=True),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        weights_bytes=_memory_of(model),
        chat_template=_chat_template(fast),
        bos_token=fast.bos_token or "",
        eos_token=fast.eos_token or "",
        end_token_ids=_end_tokens(model, fast),
        warnings=(),
        folder=checkpoint.folder,
        generates=code.generates,
    )


# --------------------------------------------------------------------------- code


def _read_config(checkpoint: Checkpoint, options: TorchOptions) -> Any:
    path = checkpoint.path
    model_type = checkpoint.config.get("model_type")
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                checkpoint.folder, **_local(checkpoint, options)
            )
    except ImportError as error:
        raise _missing_package(path, error) from error
    except Exception as error:  # transformers raises many types, and none of its own
        known = transformers.CONFIG_MAPPING
        if model_type is not None and model_type not in known and not options.trust_remote_code:
            raise stoker.ModelError(
                f"{path}: transformers {version('transformers')} does not know the model type "
                f"{model_type!r}; a newer one may: pip install --upgrade transformers"
            ) from error
        raise stoker.ModelError(
            f"{path}: transformers cannot read the configuration: {_one_line(error)}"
        ) from error


def _looks_both_ways(config: Any) -> bool:
    """Whether it is an encoder's configuration, whose class for generation is for its decoder variant."""
    return not getattr(config, "is_decoder", True) and config.model_type != "bert-generation"


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


# --------------------------------------------------------------------------- weights


def _load_weights(
    checkpoint: Checkpoint,
    code: ModelCode,
    options: TorchOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    path = checkpoint.path
    arguments: dict[str, Any] = _local(checkpoint, options) | {"dtype": dtype}
    if code.generates:  # encoders that have no SDPA do without
        arguments["attn_implementation"] = "sdpa"
    if checkpoint.kind == "gguf":
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = checkpoint.kind == "safetensors"
    arguments["config"] = code.config  # read already
    if device.type != "cpu" and find_spec("accelerate") is not None:
        arguments["device_map"] = {
            "": device
        }  # straight to the device, without a copy of all on the way
    auto = transformers.AutoModelForCausalLM if code.generates else transformers.AutoModel
    try:
        with quiet(), progress(path.name):
            model, report = auto.from_pretrained(
                checkpoint.folder, output_loading_info=True, **arguments
            )
            model.to(device)
    except ImportError as error:
        raise _missing_package(path, error) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise stoker.OutOfMemoryError(
            f"{path} does not fit into the memory of {device}: use a smaller model, or another device"
        ) from error
    except Exception as error:  # transformers raises many types, and none of its own
        raise stoker.ModelError(
            f"{path}: transformers cannot load it: {_one_line(error)}"
        ) from error
    # What encoders put their pooler on, a task of their training, is no part of an embedding.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise stoker.ModelError(
            f"{path}: the checkpoint has no weights for {', '.join(missing[:3])}{more}; it is incomplete, or "
            f"not of the architecture {type(model).__name__}"
        )
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def _quantize(model: Any) -> None:
    """Turn the linear layers' weights into int8 with a scale for each output (symmetric, weight-only)."""
    with quiet():
        # An optional dependency, whose import says much.
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

        quantize_(model, Int8WeightOnlyConfig())


def _memory_of(model: Any) -> int:
    """Bytes of the parameters and buffers, each counted once where several names share one."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        inner = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight consists of several
            inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        seen |= {part.data_ptr(): part.numel() * part.element_size() for part in inner}
    return sum(seen.values())


# --------------------------------------------------------------------------- tokenizer


def _load_tokenizer(
    checkpoint: Checkpoint, options: TorchOptions
) -> tuple[TorchTokenizer, transformers.PreTrainedTokenizerBase]:
    path = checkpoint.path
    try:
        with quiet():
            fast = transformers.AutoTokenizer.from_pretrained(
                checkpoint.folder, **_local(checkpoint, options)
            )
    except ImportError as error:
        raise _missing_package(path, error) from error
    except Exception as error:  # transformers raises many types, and none of its own
        raise stoker.ModelError(
            f"{path}: transformers cannot load the tokenizer: {_one_line(error)}"
        ) from error
    native = getattr(fast, "backend_tokenizer", None)
    if native is None:
        raise stoker.ModelError(
            f"{path}: its tokenizer ({type(fast).__name__}) is no fast one and cannot be turned into one; "
            "a tokenizer.json is needed"
        )
    try:
        return TorchTokenizer(native.to_str()), fast
    except stoker.ModelError as error:
        raise stoker.ModelError(f"{path}: {error}") from error


def _chat_template(fast: Any) -> str | None:
    template = fast.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template or None


def _end_tokens(model: Any, fast: Any) -> frozenset[int]:
    """What ends a generation: by the generation's settings, the model's and the tokenizer's."""
    found: set[int] = set()
    for holder in (
        getattr(model, "generation_config", None),
        model.config.get_text_config(decoder=True),
        fast,
    ):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update(map(int, ids if isinstance(ids, (list, tuple)) else [ids]))
    return frozenset(token for token in found if token >= 0)


# --------------------------------------------------------------------------- transformers' manners


def _local(checkpoint: Checkpoint, options: TorchOptions) -> dict[str, Any]:
    """Arguments for all of its loaders: from these files only."""
    arguments: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": options.trust_remote_code,
    }
    if checkpoint.kind == "gguf":
        arguments["gguf_file"] = checkpoint.files[0].name
    return arguments


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


def _missing_package(path: Path, error: ImportError) -> stoker.ModelError:
    return stoker.ModelError(f"{path} needs a package that is missing: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
