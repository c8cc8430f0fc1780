"""Options of the plugin ``limits``, in a module that is light to import."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["LimitsOptions"]


class LimitsOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the plugin ``limits``.

    Attributes:
        storage: Where counts are kept: ``async+memory://`` in this process, or a storage of the library
            ``limits`` such as ``async+redis://host:6379``, which several servers can share.
        on_storage_error: What happens to requests while a shared storage does not answer: ``allow`` or
            ``refuse`` (with 503).
        storage_timeout_s: How long a shared storage may take to answer.
        default_output_tokens: Tokens charged at admission for each answer of a request that does not name
            ``max_tokens``; what it really took is charged when it is over.
    """

    storage: str = "async+memory://"
    on_storage_error: Literal["allow", "refuse"] = "allow"
    storage_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    default_output_tokens: Annotated[int, msgspec.Meta(ge=1)] = 256
