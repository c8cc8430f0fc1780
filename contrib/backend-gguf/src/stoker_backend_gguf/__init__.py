"""stoker-backend-gguf: GGUF models for stoker, on llama.cpp's ragged multi-sequence decode.

This is the entry module: it registers the backend and imports neither llama.cpp nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import stoker

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["__version__", "stoker_register_backends"]

__version__ = "0.1.0"


def _make_backend() -> stoker.Backend:
    from stoker_backend_gguf.backend import GgufBackend  # noqa: PLC0415 - heavy; only when it is used

    return GgufBackend()


@stoker.hookimpl
def stoker_register_backends() -> Sequence[stoker.BackendInfo]:
    """Register the backend ``gguf``."""
    from stoker_backend_gguf.options import GgufOptions  # noqa: PLC0415 - not at import time either

    return [
        stoker.BackendInfo(
            api_version=1,
            name="gguf",
            summary="GGUF files on llama.cpp: one ragged multi-sequence decode per step",
            options=GgufOptions,
            factory=_make_backend,
        )
    ]
