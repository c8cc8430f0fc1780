"""Options of the plugin ``batches``, in a module that is light to import."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["BatchesOptions"]

Positive = Annotated[int, msgspec.Meta(ge=1)]


class BatchesOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the plugin ``batches``.

    Attributes:
        directory: Where files and the state of batches are kept; by default ``stoker/batches`` in the
            user's data folder (``XDG_DATA_HOME``). One server at a time uses it.
        max_file_bytes: Largest file that may be uploaded.
        max_total_bytes: Most bytes of all files together, of all tenants, uploaded and written; a file
            counts as 4 KiB at least.
        max_requests: Most requests of one batch.
        max_open_batches: Most batches of a tenant that are not over.
        concurrency: Most requests of batches that run at once, of all models together.
        reserve_lanes: Lanes of a model that batches leave free.
        give_way_s: Requests of batches are put off, and run again later, when another request has waited
            this long for their model.
        ttl_s: Files are deleted, and batches that are over forgotten, after so many seconds, unless the
            client asks for less.
    """

    directory: str | None = None
    max_file_bytes: Positive = 200 * 2**20
    max_total_bytes: Positive = 4 * 2**30
    max_requests: Positive = 50_000
    max_open_batches: Positive = 100
    concurrency: Positive = 8
    reserve_lanes: Annotated[int, msgspec.Meta(ge=0)] = 1
    give_way_s: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    ttl_s: Positive = 30 * 24 * 3600
