"""Builds a model's store of snapshots from the configuration, and tells models apart on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.config import CacheConfig
from stoker.engine.snapshot_disk import DiskUnavailableError, SnapshotDirectory
from stoker.engine.snapshot_store import StoreLimits, TieredStore

if TYPE_CHECKING:
    from stoker.interfaces import EvictionStrategy, RuntimeInfo
    from stoker.types import LocalModel

__all__ = ["build_store", "model_fingerprint"]

logger = logging.getLogger("stoker.cache")

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


def build_store(
    config: CacheConfig,
    info: RuntimeInfo,
    model: LocalModel,
    backend: str,
    strategy: EvictionStrategy | None,
    clock: Callable[[], float] = time.monotonic,
) -> TieredStore | None:
    """The store that ``[cache]`` asks for; ``None`` if it asks for none, or the runtime has none to keep.

    A disk that cannot be used costs the disk tier, not the start: the store says why there is none.

    Args:
        config: How much is kept, and where.
        info: The runtime's facts.
        model: The model on disk.
        backend: Which backend loaded it.
        strategy: Which snapshot goes first; the least recently used if ``None``.
        clock: Monotonic seconds.
    """
    if not (config.prefix_reuse and (config.host_bytes or config.disk_bytes)):
        return None
    if not info.capabilities.generates:
        return None
    if not info.capabilities.snapshot:
        # Host memory is used by default: nobody may have asked for it.
        if config.disk_bytes or config.host_bytes != CacheConfig().host_bytes:
            logger.warning(
                "%s cannot make snapshots of its KV here: cache.host_bytes and cache.disk_bytes have no "
                "effect",
                model.model_id,
            )
        return None
    fingerprint, directory, problem = "", None, ""
    if config.disk_bytes:
        fingerprint = model_fingerprint(info, model, backend)
        root = Path(config.disk_path).expanduser() if config.disk_path else _default_root()
        try:
            directory = SnapshotDirectory(root, fingerprint)
            directory.sweep_others(config.disk_bytes)
        except DiskUnavailableError as error:
            problem = str(error)
            logger.warning("%s runs without snapshots on disk: %s", model.model_id, problem)
    limits = StoreLimits(
        host_bytes=config.host_bytes,
        disk_bytes=config.disk_bytes if directory is not None else 0,
        ttl_s=config.ttl_s,
        whole_only=info.capabilities.truncation == "reset",
    )
    return TieredStore(
        limits,
        strategy,
        fingerprint=fingerprint,
        directory=directory,
        disk_problem=problem,
        clock=clock,
    )


def model_fingerprint(info: RuntimeInfo, model: LocalModel, backend: str) -> str:
    """What a snapshot's KV depends on, as 32 hexadecimal digits.

    The weights count by size, time of change and samples of their content: two fine-tunings of one model
    agree in everything else, and with the KV of the other one a model writes nonsense. All settings count,
    also those that only change how results are rounded.
    """
    state = hashlib.blake2b(digest_size=16)
    facts = (
        *(backend, info.name, info.vocab_size, info.weights_bytes, info.fingerprint),
        sorted(info.settings.items()),
    )
    state.update(repr(facts).encode())
    for path in _files(model.path):
        status = path.stat()
        state.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        for sample in _samples(path, status.st_size):
            state.update(sample)
    return state.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _samples(path: Path, size: int) -> Iterator[bytes]:
    """Pieces of a file, evenly spread; all of it if it is small."""
    step = max(_SAMPLE_BYTES, size // _NUM_SAMPLES)
    with path.open("rb") as file:
        for at in range(0, size, step):
            file.seek(at)
            yield file.read(_SAMPLE_BYTES)


def _default_root() -> Path:
    named = os.environ.get("STOKER_CACHE")
    if named:
        return Path(named).expanduser() / "snapshots"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoker" / "snapshots"
