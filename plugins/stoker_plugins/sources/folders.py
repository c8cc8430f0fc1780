"""What a model in Hugging Face's format consists of: which files of a folder or repository are needed.

Weights are taken as safetensors only. Pickle files, which can run code when they are loaded, other
frameworks' weights and a model's other variants stay where they are.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from stoker.errors import ModelError

__all__ = ["folder_of", "folder_size", "holds_model", "is_part", "select", "select_small"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_MODULES = "modules.json"  # sentence-transformers' list of what follows the model
# Configurations, tokenizers, chat templates, and code, which is not run unless the user says so.
_SMALL = re.compile(
    r"[^/]+\.(?:json|jinja|txt|model|spm|tiktoken|py)|additional_chat_templates/[^/]+\.jinja"
)
_PROSE = re.compile(r"(?:readme|licen[cs]e|notice|use_policy).*|[^/]+\.index\.json", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Read = Callable[[str], bytes]
"""Gives the content of a small file by its name."""


def is_part(name: str) -> bool:
    """Whether naming this file means the model in its folder."""
    return posixpath.basename(name) == _CONFIG or name.endswith(".safetensors")


def folder_of(name: str) -> str:
    """The folder of a file within its repository, with a slash at its end; empty for the repository's own."""
    head, slash, _ = name.rpartition("/")
    return head + slash


def holds_model(names: Collection[str], folder: str = "") -> bool:
    """Whether there are a configuration and safetensors weights in ``folder``."""
    return f"{folder}{_CONFIG}" in names and bool(
        {f"{folder}{_WEIGHTS}", f"{folder}{_INDEX}"} & set(names)
    )


def select_small(names: Iterable[str], folder: str = "") -> list[str]:
    """The files of a model but for its weights.

    Args:
        names: What there is; paths with forward slashes.
        folder: The model's folder, with a slash at its end.
    """
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    small = [name for name in inside if _SMALL.fullmatch(name) and not _PROSE.fullmatch(name)]
    if _WEIGHTS not in inside and _INDEX in inside:
        small.append(_INDEX)
    return sorted(folder + name for name in small)


def select(names: Collection[str], read: Read, where: str, folder: str = "") -> list[str]:
    """All files of a model.

    Args:
        names: What there is; paths with forward slashes.
        read: Reads those of them that ``select_small`` names.
        where: What to call the place in messages.
        folder: The model's folder, with a slash at its end.

    Raises:
        ModelError: Weights or the configuration are missing, or there are only weights that are not fetched.
    """
    have = set(names)
    if f"{folder}{_CONFIG}" not in have:
        raise ModelError(f"{where} holds neither GGUF files nor a model with a config.json")
    if f"{folder}{_WEIGHTS}" in have:
        weights = [_WEIGHTS]
    elif f"{folder}{_INDEX}" in have:
        weights = _shards(read(f"{folder}{_INDEX}"), f"{where}: {folder}{_INDEX}")
    else:
        raise ModelError(_no_weights(sorted(have), where))
    wanted = [*select_small(have, folder), *(folder + name for name in weights)]
    if f"{folder}{_MODULES}" in have:
        for part in _modules(read(f"{folder}{_MODULES}"), f"{where}: {folder}{_MODULES}"):
            inside = re.compile(re.escape(f"{folder}{part}/") + r"[^/]+\.(?:json|safetensors)")
            wanted += sorted(name for name in have if inside.fullmatch(name))
    missing = [name for name in wanted if name not in have]
    if missing:
        raise ModelError(f"{where}: {missing[0]} is missing ({len(missing)} of its files are)")
    return list(dict.fromkeys(wanted))


def folder_size(folder: Path) -> int:
    """Bytes of the model in a folder, as far as it is there."""
    paths = [entry for entry in folder.rglob("*") if entry.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    try:
        wanted = select(names, lambda name: names[name].read_bytes(), str(folder))
    except (ModelError, OSError):  # incomplete: whoever loads it says what is missing
        wanted = [name for name in names if "/" not in name]
    return sum(names[name].stat().st_size for name in wanted)


def _no_weights(names: list[str], where: str) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{where} has its weights in pickle files only ({pickles[0]}), which can run any code when "
            "they are loaded and are not fetched; look for a copy with *.safetensors, or, if you trust it, "
            "download it yourself and serve the folder with allow_pickle = true in its backend's options"
        )
    return f"{where} holds no weights: neither GGUF files nor {_WEIGHTS} nor {_INDEX}"


def _shards(index: bytes, where: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{where} is damaged: {error}") from error
    if not names or not all(_is_inside(name) for name in names):
        raise ModelError(f"{where} names no files of the folder")
    return names


def _modules(modules: bytes, where: str) -> list[str]:
    try:
        paths = [module.get("path", "") for module in json.loads(modules)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{where} is damaged: {error}") from error
    return [path for path in paths if path and _is_inside(path)]


def _is_inside(path: object) -> bool:
    return isinstance(path, str) and not path.startswith("/") and ".." not in path.split("/")
