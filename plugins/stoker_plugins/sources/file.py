"""``file:`` and plain paths: models on this machine, in GGUF files or in folders of Hugging Face's format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from stoker.errors import ModelError
from stoker.interfaces import ModelSource
from stoker.types import LocalModel
from stoker_plugins.sources.folders import folder_size, holds_model, is_part
from stoker_plugins.sources.naming import choose, group_parts, model_id

__all__ = ["FileSource"]


class FileSource(ModelSource):
    """Finds a model file, or the one model in a folder. Paths are relative to the current folder.

    A folder with both GGUF files and a ``config.json`` means the GGUF; to name its ``config.json`` means
    the folder.
    """

    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The model at a path; ``~`` is the home folder, a ``file://`` URL's slashes are dropped."""
        reference = reference.removeprefix("//")
        if not reference:
            raise ModelError("the path is empty")
        try:
            path = Path(reference).expanduser()
            if path.is_dir():
                return self._from_folder(path)
            if not path.exists():
                raise ModelError(f"{reference}: there is no such file or folder{_hint(reference)}")
        except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name too long, no home
            raise ModelError(f"{reference!r}: no usable path: {error}") from error
        if not path.is_file():
            raise ModelError(f"{reference}: is neither a file nor a folder")
        return self._from_file(path)

    def available(self) -> Sequence[LocalModel]:
        """The GGUF files of the current folder, and its folders that hold a model."""
        entries = sorted(Path().iterdir())
        names = [entry.name for entry in entries if entry.is_file()]
        folders = [_folder_model(entry) for entry in entries if _holds_model(entry)]
        try:
            return [*(self._from_file(Path(name)) for name in group_parts(names)), *folders]
        except ModelError:  # a half-copied split model hides nothing but itself
            return [*(self._from_file(Path(name)) for name in names if _is_whole(name)), *folders]

    def _from_folder(self, folder: Path) -> LocalModel:
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        models = group_parts(names)
        if not models and "config.json" in names:  # the whole folder is the model
            return _folder_model(folder)
        if len(models) > 1:
            raise ModelError(
                f"{folder} holds several models; name one of them: {', '.join(sorted(models))}"
            )
        return self._from_file(folder / choose(models, str(folder)))

    def _from_file(self, path: Path) -> LocalModel:
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path}: may not be read: check its permissions")
        if is_part(path.name) and (path.parent / "config.json").is_file():
            return _folder_model(path.parent)
        siblings = [path]
        if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
            groups = group_parts(entry.name for entry in path.parent.iterdir())
            first, parts = next(
                (first, parts) for first, parts in groups.items() if path.name in parts
            )
            path, siblings = path.with_name(first), [path.with_name(part) for part in parts]
        return LocalModel(
            path=path,
            model_id=model_id(path.name),
            reference=str(path),
            size_bytes=sum(sibling.stat().st_size for sibling in siblings),
        )


def _folder_model(folder: Path) -> LocalModel:
    return LocalModel(
        path=folder,
        model_id=folder.resolve().name,
        reference=str(folder),
        size_bytes=folder_size(folder),
    )


def _holds_model(folder: Path) -> bool:
    try:
        return folder.is_dir() and holds_model([entry.name for entry in folder.iterdir()])
    except OSError:  # it may not be read
        return False


def _is_whole(name: str) -> bool:
    """Whether ``name`` is a model by itself."""
    try:
        return bool(group_parts([name]))
    except ModelError:
        return False


def _hint(reference: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        return f"; for a repository on the Hugging Face Hub write hf:{reference}"
    return ""
