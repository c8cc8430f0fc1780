"""stoker's own folder of fetched things, and checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["cache_folder", "sha256_of"]


def cache_folder() -> Path:
    """``STOKER_CACHE``, or ``stoker`` in the user's cache folder. It may not exist yet."""
    named = os.environ.get("STOKER_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoker"


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
