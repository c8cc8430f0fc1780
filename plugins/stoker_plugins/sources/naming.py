"""What GGUF files are called: quantisation suffixes, split files, choosing one of several."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stoker.errors import ModelError

__all__ = ["choose", "group_parts", "model_id"]

_QUANTISATION = re.compile(
    r"[-._](?:ud-)?(?:i?q\d(?:_[a-z0-9]+)*|tq\d_\d|mxfp4(?:_moe)?|bf16|fp?16|fp?32)$", re.IGNORECASE
)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE)
# What most people want of a repository: the usual compromises first.
_PREFERRED = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q4_1", "Q4_0")


def model_id(name: str) -> str:
    """A model's default id: its file's name without folder, extension, part and quantisation.

    >>> model_id("SmolLM2-135M-Instruct.Q4_1.gguf")
    'SmolLM2-135M-Instruct'
    """
    name = name.rpartition("/")[2]
    split = _SPLIT.fullmatch(name)
    stem = split["stem"] if split else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    return _QUANTISATION.sub("", stem) or stem


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among ``names``: first file -> all files, in order.

    A large model may be split into ``NAME-00001-of-00003.gguf`` and so on; the first file stands for
    it. Vision projectors (``mmproj``) are no models.

    Raises:
        ModelError: A part of a split model is missing.
    """
    models: dict[str, list[str]] = {}
    splits: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(names):
        base = name.rpartition("/")[2].lower()
        if not base.endswith(".gguf") or base.startswith("mmproj"):
            continue
        split = _SPLIT.fullmatch(name)
        if split is None:
            models[name] = [name]
        else:
            splits.setdefault((split["stem"], int(split["total"])), {})[int(split["part"])] = name
    for (stem, total), parts in splits.items():
        missing = [part for part in range(1, total + 1) if part not in parts]
        if missing:
            raise ModelError(f"{stem}: part {missing[0]} of {total} is missing")
        models[parts[1]] = [parts[part] for part in sorted(parts)]
    return models


def choose(models: Iterable[str], where: str) -> str:
    """One of several models: the only one, or the one in the quantisation most people want.

    Raises:
        ModelError: There is none, or it is not clear which; lists what there is.
    """
    names = sorted(models)
    if not names:
        raise ModelError(f"{where} holds no GGUF file")
    if len(names) == 1:
        return names[0]
    for quantisation in _PREFERRED:
        fitting = [
            name for name in names if re.search(rf"[-._]{quantisation}\b", name, re.IGNORECASE)
        ]
        if len(fitting) == 1:
            return fitting[0]
    raise ModelError(f"{where} holds several models; name one of them: {', '.join(names)}")
