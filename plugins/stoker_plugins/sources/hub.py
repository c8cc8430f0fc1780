"""``hf:owner/repo[/file]``: models of the Hugging Face Hub, through huggingface_hub.

A repository with GGUF files means one of them; one without, or with its ``config.json`` named, means the
folder: configuration, tokenizer, chat templates and safetensors weights, no other files.

The library keeps its own cache (shared with other tools, ``HF_HOME``), goes on after a broken
connection, honours ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``, and compares sizes. It does not
compare checksums of plain downloads: that happens here, once per file.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from stoker.errors import ModelError, OutOfMemoryError
from stoker.interfaces import ModelSource
from stoker.types import LocalModel
from stoker_plugins.sources.cache import cache_folder, sha256_of
from stoker_plugins.sources.folders import folder_of, holds_model, is_part, select, select_small
from stoker_plugins.sources.naming import choose, group_parts, model_id

__all__ = ["HubSource"]

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>.+))?")
_API_TIMEOUT_S = 20.0


class _UnreachableError(Exception):
    """The hub does not answer; the message says how."""


class HubSource(ModelSource):
    """Fetches models from a hub."""

    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The file of a repository; without a file its only GGUF, or the usual quantisation, or the folder.

        Without a connection, what the cache holds of it is served.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ModelError(f"hf:{reference}: write hf:owner/repo or hf:owner/repo/file.gguf")
        repo, file = match["repo"], match["file"]
        hub = _import_hub()
        try:
            listing = _list_repository(hub, repo)
        except _UnreachableError as error:
            return self._from_cache(hub, repo, file, error)
        with _progress_bars(hub, shown=progress):
            if _means_folder(listing, file):
                return _fetch_folder(hub, repo, file, listing)
            names = _wanted(listing, repo, file)
            paths = [_download(hub, repo, name, listing[name]) for name in names]
        return _model(repo, names[0], paths)

    def available(self) -> Sequence[LocalModel]:
        """GGUF files and whole folders in the library's cache."""
        try:
            hub = _import_hub()
        except ModelError:
            return ()
        try:
            cache = hub.scan_cache_dir()
        except hub.CacheNotFound:
            return ()
        models: list[LocalModel] = []
        for repo in cache.repos:
            if repo.repo_type != "model" or not repo.revisions:
                continue
            latest = max(repo.revisions, key=lambda revision: float(revision.last_modified))
            files = {
                file.file_path.relative_to(latest.snapshot_path).as_posix(): file.file_path
                for file in latest.files
            }
            models += _cached_models(repo.repo_id, files)
        return sorted(models, key=lambda model: model.reference)

    def folders(self) -> Sequence[Path]:
        """The library's cache, if it is installed."""
        try:
            _import_hub()
            return [Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)]
        except ModelError:
            return ()

    def _from_cache(
        self, hub: ModuleType, repo: str, file: str | None, unreachable: Exception
    ) -> LocalModel:
        try:
            folder = Path(hub.snapshot_download(repo, local_files_only=True))
        except (OSError, ValueError):
            raise ModelError(
                f"hf:{repo}: {unreachable}, and the cache does not hold it"
            ) from unreachable
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        cached = dict.fromkeys(name for name, path in files.items() if path.is_file())
        try:
            if _means_folder(cached, file):
                reference = repo if file is None else f"{repo}/{file}"
                return _folder_model(reference, folder_of(file or ""), files)
            names = _wanted(cached, repo, file)
        except ModelError as error:
            raise ModelError(f"{unreachable}; in the cache, {error}") from unreachable
        return _model(repo, names[0], [folder / name for name in names])


def _import_hub() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelError(
            'hf: models need the package huggingface_hub: pip install "stoker[hub]"'
        ) from error


def _model(repo: str, name: str, paths: Sequence[Path]) -> LocalModel:
    return LocalModel(
        path=paths[0],
        model_id=model_id(name),
        reference=f"hf:{repo}/{name}",
        size_bytes=sum(path.stat().st_size for path in paths),
    )


def _cached_models(repo: str, files: Mapping[str, Path]) -> Iterator[LocalModel]:
    """The models of a repository that were fetched to the end."""
    groups: Mapping[str, Sequence[str]] = {}
    with suppress(ModelError):
        groups = group_parts(files)
    for first, names in groups.items():
        yield _model(repo, first, [files[name] for name in names])
    if holds_model(files):
        with suppress(ModelError):
            yield _folder_model(f"{repo}/config.json" if groups else repo, "", files)


def _means_folder(listing: Mapping[str, Any], file: str | None) -> bool:
    if file is not None:
        return is_part(file) and f"{folder_of(file)}config.json" in listing
    return not any(name.lower().endswith(".gguf") for name in listing)


def _fetch_folder(
    hub: ModuleType, repo: str, file: str | None, listing: Mapping[str, str | None]
) -> LocalModel:
    """Fetch a model in Hugging Face's format, its small files first: they say what else it needs."""
    where, folder = f"hf:{repo}", folder_of(file or "")
    if not holds_model(listing, folder):
        select(listing, lambda _: b"", where, folder)  # says what is missing
    paths = {
        name: _download(hub, repo, name, listing[name]) for name in select_small(listing, folder)
    }
    for name in select(listing, lambda name: paths[name].read_bytes(), where, folder):
        if name not in paths:
            paths[name] = _download(hub, repo, name, listing[name])
    # Each file came from what was the newest revision then, and lies in that revision's folder.
    if len({str(path).removesuffix(name) for name, path in paths.items()}) > 1:
        raise ModelError(f"{where} changed while it was fetched; try again")
    return _folder_model(repo if file is None else f"{repo}/{file}", folder, paths)


def _folder_model(reference: str, folder: str, files: Mapping[str, Path]) -> LocalModel:
    """The model in a folder of a repository, all of whose files are on this machine.

    Raises:
        ModelError: One is missing.
    """
    names = select(files, lambda name: files[name].read_bytes(), f"hf:{reference}", folder)
    path = files[f"{folder}config.json"].parent
    name = folder.rstrip("/").rpartition("/")[2] or reference.split("/")[1]
    return LocalModel(
        path=path,
        model_id=name,
        reference=f"hf:{reference}",
        size_bytes=sum(files[name].stat().st_size for name in names),
    )


def _wanted(listing: dict[str, Any], repo: str, file: str | None) -> list[str]:
    """The files to fetch, in order."""
    if file is None:
        groups = group_parts(listing)
        return groups[choose(groups, f"hf:{repo}")]
    if file not in listing:
        files = ", ".join(sorted(name for name in listing if name.endswith(".gguf"))) or "none"
        raise ModelError(f"hf:{repo}: there is no file {file!r}; its GGUF files: {files}")
    for names in group_parts(listing).values():
        if file in names:
            return names
    return [file]


def _list_repository(hub: ModuleType, repo: str) -> dict[str, str | None]:
    """File -> its SHA-256, if the hub states one."""
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True, timeout=_API_TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"hf:{repo}: the repository is gated: accept its terms on the hub, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"hf:{repo}: there is no such repository, or it is private: "
            "check the name, or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"hf:{repo}: {error}") from error
    except (errors.HTTPError, OSError) as error:  # no connection, offline mode, or the hub is down
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            raise ModelError(f"hf:{repo}: access denied: set HF_TOKEN to a valid token") from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise _UnreachableError(f"the hub cannot be reached ({said})") from error
    return {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else None for sibling in info.siblings
    }


def _download(hub: ModuleType, repo: str, name: str, sha256: str | None) -> Path:
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        path = Path(hub.hf_hub_download(repo, name))
    except (errors.HTTPError, OSError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OutOfMemoryError(f"hf:{repo}/{name}: the disk is full") from error
        raise ModelError(f"hf:{repo}/{name}: the download failed: {text}") from error
    if sha256 is not None:
        _verify(path, sha256, f"hf:{repo}/{name}")
    return path


def _verify(path: Path, sha256: str, where: str) -> None:
    """Compare a file with the hub's checksum, once: a marker remembers that it was right."""
    marker = cache_folder() / "verified" / sha256
    if marker.exists():
        return
    if sha256_of(path) != sha256:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise ModelError(f"{where}: the checksum is wrong, so the file was deleted; fetch it again")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:  # a read-only cache folder costs a check each time, nothing else
        return


@contextmanager
def _progress_bars(hub: ModuleType, *, shown: bool) -> Iterator[None]:
    utils: Any = hub.utils
    change: Callable[[], None] | None = None
    if not shown and not utils.are_progress_bars_disabled():
        utils.disable_progress_bars()
        change = utils.enable_progress_bars
    try:
        yield
    finally:
        if change is not None:
            change()
