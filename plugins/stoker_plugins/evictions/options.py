"""Options of the bundled eviction strategies, in a module that is light to import."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["LfuOptions"]


class LfuOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of ``lfu``.

    Attributes:
        half_life_s: After so many seconds without a hit, what a prefix was found before counts half; 0
            counts every hit for ever.
    """

    half_life_s: Annotated[float, Meta(ge=0)] = 600.0
