"""stoker-backend-ctransformers: legacy GGML files for stoker, through ctransformers.

This is the entry module: it registers the backend and imports neither ctransformers nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import stoker

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["__version__", "stoker_register_backends"]

__version__ = "0.1.0"


def _make_backend() -> stoker.Backend:
    from stoker_backend_ctransformers.backend import (  # noqa: PLC0415 - heavy; only when it is used
        CTransformersBackend,
    )

    return CTransformersBackend()


@stoker.hookimpl
def stoker_register_backends() -> Sequence[stoker.BackendInfo]:
    """Register the backend ``ctransformers``."""
    from stoker_backend_ctransformers.options import (  # noqa: PLC0415 - not at import time either
        CTransformersOptions,
    )

    return [
        stoker.BackendInfo(
            api_version=1,
            name="ctransformers",
            summary="Legacy GGML files (gpt2, gptj, gpt_neox, mpt, starcoder, falcon, old llama)",
            options=CTransformersOptions,
            factory=_make_backend,
        )
    ]
