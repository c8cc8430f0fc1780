"""What a model's folder holds, read without torch: enough to refuse what cannot be served, in one line."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

import stoker

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Checkpoint", "TensorInfo", "is_checkpoint", "open_checkpoint", "read_json"]

_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_GGUF_MAGIC = b"GGUF"
# Any of them is enough for transformers to build a tokenizer; its settings alone are not.
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tekken.json", "vocab.json", "vocab.txt"})
_TOKENIZER_SUFFIXES = frozenset({".model", ".spm", ".tiktoken"})
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MOST_LAYERS = 2_000
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, as a safetensors header describes it.

    Attributes:
        dtype: safetensors' name of its type, e.g. ``BF16``.
        shape: Its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * _BITS[self.dtype] // 8

    def bytes_as(self, float_bytes: int) -> int:
        """Its size in memory if floats take ``float_bytes`` each."""
        return prod(self.shape) * float_bytes if self.dtype in _FLOATS else self.num_bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk that looks complete.

    Attributes:
        folder: Where its files are.
        kind: How its weights are stored.
        config: What ``config.json`` says; empty for GGUF files, whose configuration is inside.
        files: The files with weights.
        tensors: Their tensors, by name, where the headers say so: for safetensors only.
    """

    folder: Path
    kind: Literal["safetensors", "pickle", "gguf"]
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        """What to name in messages: the folder, or the GGUF file."""
        return self.files[0] if self.kind == "gguf" else self.folder

    @property
    def size_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.files)


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a model in Hugging Face's format, or like a GGUF file."""
    if path.is_dir():
        return (path / _CONFIG).is_file()
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return (path.parent / _CONFIG).is_file()
    return suffix == ".gguf" or _starts_with(path, _GGUF_MAGIC)


def open_checkpoint(path: Path, *, trust_remote_code: bool, allow_pickle: bool) -> Checkpoint:
    """Look at a model without loading it.

    Args:
        path: A folder with ``config.json``, a ``.safetensors`` file in one, or a GGUF file.
        trust_remote_code: Accept a model that brings its own Python code.
        allow_pickle: Accept weights in pickle files, where there are no others.

    Raises:
        ModelError: Something is missing, damaged, or not supported; names the file and what to do.
    """
    if not path.exists():
        raise stoker.ModelError(f"{path}: there is no such file or folder")
    if path.is_file() and path.suffix.lower() != ".safetensors":
        if not _starts_with(path, _GGUF_MAGIC):
            raise stoker.ModelError(
                f"{path} is neither a folder in Hugging Face's format nor a GGUF file"
            )
        return Checkpoint(path.parent, "gguf", {}, (path,), {})
    folder = path if path.is_dir() else path.parent
    config_file = folder / _CONFIG
    if not config_file.is_file():
        raise stoker.ModelError(
            f"{folder} holds no {_CONFIG}: name a folder in Hugging Face's format (config.json, tokenizer "
            "files, *.safetensors)"
        )
    config = read_json(config_file)
    _check_config(config_file, config, trust_remote_code=trust_remote_code)
    _check_layers(config_file, config)
    if path.is_file() and path.name != _SAFETENSORS:
        raise stoker.ModelError(
            f"{path}: transformers reads model.safetensors, or the shards that "
            f"model.safetensors.index.json names; rename the file, or name the folder {folder}"
        )
    if (
        folder / _ADAPTER
    ).is_file():  # which transformers would load instead, with a model from elsewhere
        raise stoker.ModelError(
            f"{folder} holds an adapter ({_ADAPTER}), which cannot be served: merge it into its model "
            "(merge_and_unload), or remove that file if the weights here are whole"
        )
    kind, files = _find_weights(folder, allow_pickle=allow_pickle)
    if not any(
        entry.name in _TOKENIZER_FILES or entry.suffix in _TOKENIZER_SUFFIXES
        for entry in folder.iterdir()
    ):
        raise stoker.ModelError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...): fetch it from "
            "where the model came from"
        )
    tensors: dict[str, TensorInfo] = {}
    if kind == "safetensors":
        for file in files:
            tensors |= _read_header(file)
    return Checkpoint(folder, kind, config, files, tensors)


def read_json(file: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        ModelError: It cannot be read, or is no JSON object.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise stoker.ModelError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise stoker.ModelError(f"{file} is no JSON object: {error}; fetch it again") from error


# --------------------------------------------------------------------------- the configuration


def _check_config(file: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    kind, names = config.get("model_type"), config.get("architectures")
    if kind is None and not names:
        raise stoker.ModelError(
            f"{file} names neither a model_type nor architectures: it is no model's configuration"
        )
    if not isinstance(kind, str | None):
        raise stoker.ModelError(f"{file}: its model_type is no text; fetch it again")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise stoker.ModelError(f"{file}: its architectures are no list of names; fetch it again")
    if config.get("auto_map") and not trust_remote_code:
        raise stoker.ModelError(
            f"{file}: the model brings Python code of its own (auto_map); if you trust it, set "
            "trust_remote_code = true in the options of the torch backend"
        )
    if config.get("is_encoder_decoder"):
        raise stoker.ModelError(
            f"{file}: {config.get('model_type', 'it')} is an encoder-decoder model; only decoders and "
            "embedding models can be served"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise stoker.ModelError(
            f"{file}: the weights are quantized ({method}), which the torch backend does not serve; use the "
            'unquantized model (with weights = "int8" if memory is short), or a GGUF file of it'
        )


def _check_layers(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse more layers than there can be, before anybody makes lists of them."""
    for part in (config, *config.values()):
        for name in _LAYERS if isinstance(part, dict) else ():
            count = part.get(name, 0)
            if isinstance(count, int) and not 0 <= count <= _MOST_LAYERS:
                raise stoker.ModelError(f"{file}: {name} is {count}, which cannot be")


# --------------------------------------------------------------------------- weights


def _find_weights(
    folder: Path, *, allow_pickle: bool
) -> tuple[Literal["safetensors", "pickle"], tuple[Path, ...]]:
    for index_name, name in (
        (f"{_SAFETENSORS}.index.json", _SAFETENSORS),
        (f"{_PICKLE}.index.json", _PICKLE),
    ):
        pickled = name == _PICKLE
        # transformers' order: the one file before the shards.
        if (folder / name).is_file():
            files: tuple[Path, ...] = (folder / name,)
        elif (folder / index_name).is_file():
            files = _shards(folder / index_name)
        else:
            continue
        if pickled and not allow_pickle:
            raise stoker.ModelError(
                f"{files[0]} is a pickle file, which can run any code when it is loaded, and there is no "
                "*.safetensors: fetch the model in that format, or, if you trust the file, set "
                "allow_pickle = true in the options of the torch backend"
            )
        return "pickle" if pickled else "safetensors", files
    raise stoker.ModelError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    parts = sorted(entry.name for entry in folder.glob("*.safetensors"))
    if parts:
        return (
            f"{folder} holds {parts[0]} but neither {_SAFETENSORS} nor {_SAFETENSORS}.index.json, which "
            "says where each tensor is: fetch the index, too"
        )
    return f"{folder} holds no weights (*.safetensors): fetch them from where config.json came from"


def _shards(index_file: Path) -> tuple[Path, ...]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise stoker.ModelError(f"{index_file} has no weight_map; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise stoker.ModelError(
            f"{index_file} names {outside[0]!r}, which is no file of the folder"
        )
    missing = [name for name in names if not (index_file.parent / name).is_file()]
    if missing:
        raise stoker.ModelError(
            f"{index_file.parent}: {len(missing)} of {len(names)} shards are missing: "
            f"{_some(missing)}; fetch the model again"
        )
    return tuple(index_file.parent / name for name in names)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, whose size must be what its header says.

    The format is 8 bytes of header length, the header in JSON, and the tensors without gaps
    (https://github.com/huggingface/safetensors).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = opened.read(length) if 0 < length <= min(size, _MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise stoker.ModelError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not raw or len(raw) != length:
        raise stoker.ModelError(f"{file} is truncated or no safetensors file; fetch it again")
    try:
        header = msgspec.json.decode(raw, type=dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        unknown = {tensor.dtype for tensor in tensors.values()} - _BITS.keys()
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        raise stoker.ModelError(f"{file} has a damaged header ({error}); fetch it again") from error
    if unknown:
        raise stoker.ModelError(f"{file} has tensors of an unknown type: {_some(sorted(unknown))}")
    if 8 + length + end != size:
        raise stoker.ModelError(
            f"{file} is truncated or damaged: it has {size:,} bytes instead of {8 + length + end:,}; "
            "fetch it again"
        )
    return tensors


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
