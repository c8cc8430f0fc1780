"""A batch that is being run: what is left of it, what runs of it, and what is to be written."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from stoker_plugins.batches.archive import Store, now
from stoker_plugins.batches.database import BatchRecord, StoredFile
from stoker_plugins.batches.inputs import InputLine
from stoker_plugins.batches.results import Progress, Result, append
from stoker_plugins.batches.schemas import Batch, BatchError, BatchErrors, BatchStatus, FileObject

__all__ = ["ActiveBatch", "Outcome", "finish", "move_to", "write"]

Outcome = Literal["completed", "cancelled", "expired", "failed"]

_TIMES: dict[str, str] = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


def move_to(batch: Batch, status: BatchStatus) -> None:
    """Take on a status, at this time; a status that it has had already keeps its time."""
    batch.status = status
    name = _TIMES[status]
    if getattr(batch, name) is None:
        setattr(batch, name, now())


class ActiveBatch:
    """A batch that is not over.

    Args:
        record: What is known of it.
        path: Its input file.

    Attributes:
        pending: Requests that have no result and do not run.
        running: Requests that run, in the order in which they were started.
        attempts: How often a request has failed, if it has.
        results: Results that are not on disk yet.
        num_writing: How often such are being written now.
        progress: What is on disk.
        not_before_s: No request is started before.
        outcome: How it ends, once that is decided early.
        changed: Set when any of this may have changed.
    """

    def __init__(self, record: BatchRecord, path: Path) -> None:
        self.record = record
        self.path = path
        self.pending: deque[InputLine] = deque()
        self.running: dict[asyncio.Task[None], InputLine] = {}
        self.attempts: dict[InputLine, int] = {}
        self.results: list[Result] = []
        self.num_writing = 0
        self.progress = Progress()
        self.not_before_s = -math.inf
        self.outcome: Outcome | None = None
        self.changed = asyncio.Event()

    @property
    def batch(self) -> Batch:
        """What its owner is told."""
        return self.record.batch

    @property
    def is_done(self) -> bool:
        """Whether every request has its result on disk."""
        return not (self.pending or self.running or self.results or self.num_writing)

    def end_early(self, outcome: Outcome) -> None:
        """Start nothing more, and abort what runs."""
        if self.outcome is None:
            self.outcome = outcome
        for task in self.running:
            task.cancel()
        self.changed.set()

    def fail(self, errors: Iterable[BatchError]) -> None:
        """Say what is wrong with it."""
        self.batch.errors = BatchErrors(data=list(errors))
        self.end_early("failed")


def write(store: Store, active: ActiveBatch, results: list[Result]) -> None:
    """Append results to the batch's files.

    Raises:
        RequestTooLargeError: There is no room for them.
        OSError: The disk does not take them.
    """
    record = active.record
    for file_id, is_success in ((record.output_id, True), (record.error_id, False)):
        lines = [result.line for result in results if result.is_success == is_success]
        if lines:
            store.grow(file_id, sum(map(len, lines)))
            append(store.path(file_id), lines)
    for result in results:
        active.progress.add(result)


def finish(store: Store, record: BatchRecord, ttl_s: int) -> None:
    """Show the files that a batch wrote, and that it is over.

    Args:
        store: Where it all is.
        record: The batch as it ends; takes in the files' ids.
        ttl_s: How long it is remembered.
    """
    batch = record.batch
    files: list[StoredFile] = []
    created = now()
    for file_id, name in ((record.output_id, "output"), (record.error_id, "error")):
        path = store.path(file_id)
        if not path.exists():
            continue
        file = FileObject(
            id=file_id,
            bytes=path.stat().st_size,
            created_at=created,
            filename=f"{batch.id}_{name}.jsonl",
            purpose="batch_output",
            expires_at=created + record.output_ttl_s,
        )
        files.append(StoredFile(tenant=record.tenant, file=file))
        setattr(batch, f"{name}_file_id", file_id)
    store.add(*files, record=record, forget_at=created + ttl_s)
