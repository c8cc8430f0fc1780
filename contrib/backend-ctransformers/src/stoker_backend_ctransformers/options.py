"""The backend's options: ``[plugins.ctransformers]``, or ``options`` of one model in ``[[models]]``."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["CTransformersOptions"]


class CTransformersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ctransformers loads a model.

    Attributes:
        model_type: The architecture, where neither the file nor its name tells: ``gpt2``, ``gptj``,
            ``gpt_neox``, ``mpt``, ``starcoder``, ``falcon``, ``llama``, ...
        batch_size: Most tokens that it computes at once.
    """

    model_type: str | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 64
