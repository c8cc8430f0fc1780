"""Options of the plugin ``response-cache``, in a module that is light to import."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["ResponseCacheOptions"]


class ResponseCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the plugin ``response-cache``.

    Attributes:
        max_bytes: Most bytes of memory that stored answers may take, of all models together; an answer
            that is larger by itself is not stored.
        ttl_s: An answer is stored for so many seconds.
        eviction: Which answer goes when there is no room: ``lru`` (not asked for the longest), ``lfu`` (asked
            for the least often) or ``fifo`` (stored first).
        isolation: Who may share answers: requests of one ``tenant``, or all (``none``).
    """

    max_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 * 2**20
    ttl_s: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    eviction: Literal["lru", "lfu", "fifo"] = "lru"
    isolation: Literal["tenant", "none"] = "tenant"
