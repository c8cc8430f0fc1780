"""A model's weights and tokenizer, through transformers, from files on this machine only."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import transformers

import stoker
from stoker_backend_torch.architectures import from_files, missing_package, one_line
from stoker_backend_torch.manners import progress, quiet
from stoker_backend_torch.tokenizer import TorchTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from stoker_backend_torch.architectures import ModelCode
    from stoker_backend_torch.checkpoint import Checkpoint
    from stoker_backend_torch.options import TorchOptions

__all__ = ["LoadedModel", "load_model"]


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
        chat_template=_chat_template(checkpoint.path, fast),
        bos_token=fast.bos_token or "",
        eos_token=fast.eos_token or "",
        end_token_ids=_end_tokens(checkpoint.path, model, fast),
        warnings=(),
        folder=checkpoint.folder,
        generates=code.generates,
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
    arguments: dict[str, Any] = from_files(checkpoint, options) | {"dtype": dtype}
    if code.generates:  # what is compared with ours; some models have no SDPA (Gemma 2, gpt-oss)
        has_sdpa = getattr(code.model_class, "_supports_sdpa", True)
        arguments["attn_implementation"] = "sdpa" if has_sdpa else "eager"
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
        raise missing_package(path, error) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise stoker.OutOfMemoryError(
            f"{path} does not fit into the memory of {device}: use a smaller model, or another device"
        ) from error
    except Exception as error:  # transformers raises many types, and none of its own
        raise stoker.ModelError(
            f"{path}: transformers cannot load it: {one_line(error)}"
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
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415 - heavy

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
                checkpoint.folder, **from_files(checkpoint, options)
            )
    except ImportError as error:
        raise missing_package(path, error) from error
    except Exception as error:  # transformers raises many types, and none of its own
        if "trust_remote_code" in str(error):
            raise stoker.ModelError(
                f"{path}: its tokenizer brings Python code of its own (auto_map in tokenizer_config.json); "
                "if you trust it, set trust_remote_code = true in the options of the torch backend"
            ) from error
        raise stoker.ModelError(
            f"{path}: transformers cannot load the tokenizer: {one_line(error)}"
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


def _chat_template(path: Path, fast: Any) -> str | None:
    template = fast.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not isinstance(template, str | None):
        raise stoker.ModelError(f"{path}: its chat template is no text")
    return template or None


def _end_tokens(path: Path, model: Any, fast: Any) -> frozenset[int]:
    """What ends a generation: by the generation's settings, the model's and the tokenizer's."""
    found: set[int] = set()
    for holder in (
        getattr(model, "generation_config", None),
        model.config.get_text_config(decoder=True),
        fast,
    ):
        ids = getattr(holder, "eos_token_id", None)
        for token in ids if isinstance(ids, (list, tuple)) else [ids]:
            if not isinstance(token, int | None) or isinstance(token, bool):
                raise stoker.ModelError(
                    f"{path}: its eos_token_id is {token!r}, which is no number of a token; see "
                    "generation_config.json and config.json"
                )
            if token is not None:
                found.add(token)
    return frozenset(token for token in found if token >= 0)
