"""``hf:owner/repo[/file]``: models of the Hugging Face Hub, through huggingface_hub.

The library keeps its own cache (shared with other tools, ``HF_HOME``), goes on after a broken
connection, honours ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``, and compares sizes. It does not
compare checksums of plain downloads: that happens here, once per file.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from stoker.errors import ModelError, OutOfMemoryError
from stoker.interfaces import ModelSource
from stoker.types import LocalModel
from stoker_plugins.sources.cache import cache_folder, sha256_of
from stoker_plugins.sources.naming import choose, group_parts, model_id

__all__ = ["HubSource"]

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>.+))?")
_API_TIMEOUT_S = 20.0


class _UnreachableError(Exception):
    """The hub does not answer; the message says how."""


class HubSource(ModelSource):
    """Fetches GGUF files from a hub."""

    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The file of a repository; without a file its only GGUF, or the usual quantisation.

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
        names = _wanted(listing, repo, file)
        with _progress_bars(hub, shown=progress):
            paths = [_download(hub, repo, name, listing[name]) for name in names]
        return _model(repo, names[0], paths)

    def available(self) -> Sequence[LocalModel]:
        """GGUF files in the library's cache."""
        try:
            hub = _import_hub()
        except ModelError:
            return ()
        try:
            cache = hub.scan_cache_dir()
        except hub.CacheNotFound:
            return ()
        models = []
        for repo in cache.repos:
            if repo.repo_type != "model" or not repo.revisions:
                continue
            latest = max(repo.revisions, key=lambda revision: float(revision.last_modified))
            files = {
                file.file_path.relative_to(latest.snapshot_path).as_posix(): file.file_path
                for file in latest.files
            }
            try:
                groups = group_parts(files)
            except ModelError:  # a split model that was not fetched to the end
                continue
            models += [
                _model(repo.repo_id, first, [files[name] for name in names])
                for first, names in groups.items()
            ]
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
        cached = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        try:
            names = _wanted(dict.fromkeys(cached), repo, file)
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
