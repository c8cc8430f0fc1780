"""stoker-backend-torch: transformers' models for stoker, under stoker's own batching loop.

This is the entry module: it registers the backend and imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import stoker

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["__version__", "stoker_register_backends"]

__version__ = "0.1.0"


def _make_backend() -> stoker.Backend:
    from stoker_backend_torch.backend import TorchBackend  # noqa: PLC0415 - heavy; only when it is used

    return TorchBackend()


@stoker.hookimpl
def stoker_register_backends() -> Sequence[stoker.BackendInfo]:
    """Register the backend ``torch``."""
    from stoker_backend_torch.options import TorchOptions  # noqa: PLC0415 - not at import time either

    return [
        stoker.BackendInfo(
            api_version=1,
            name="torch",
            summary="Hugging Face models: transformers' model code, one packed ragged batch per step",
            options=TorchOptions,
            factory=_make_backend,
            order=200,  # others first: of the formats they load, they do more with
        )
    ]
