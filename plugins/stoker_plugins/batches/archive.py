"""The directory of files: bounded, durable, and used by one thread, which is never the event loop's."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from stoker import InvalidRequestError, RequestNotFoundError, RequestTooLargeError, UnavailableError
from stoker.profiles import data_folder
from stoker_plugins.batches.database import BatchRecord, Database, StoredFile
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.schemas import FileObject

__all__ = ["Archive", "Store", "no_such_file", "now", "sync_directory"]

logger = logging.getLogger("stoker.batches")

P = ParamSpec("P")
T = TypeVar("T")


def now() -> int:
    """Seconds since 1970: what API bodies and expiry dates count in."""
    return int(time.time())  # noqa: TID251 - timestamps that outlive the process


def no_such_file(file_id: str, param: str | None = None) -> RequestNotFoundError:
    """The error for a file that is not there, or not the tenant's.

    Args:
        file_id: How it was called.
        param: The parameter that called it so, unless the path did.
    """
    return RequestNotFoundError(
        f"there is no file {file_id[:100]!r}; GET /v1/files lists yours",
        param=param,
        code="file_not_found",
    )


def sync_directory(path: Path) -> None:
    """Make sure that the names in a directory survive a power cut, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """Files and batches on disk; for one thread at a time.

    Args:
        directory: Where; made if it is not there.
        options: Bounds.

    Attributes:
        database: What there is.
        files: The folder of the files, each under its id.

    Raises:
        UnavailableError: The directory cannot be used; the message says why.
    """

    def __init__(self, directory: Path, options: BatchesOptions) -> None:
        self._options = options
        self._growing: dict[str, int] = {}  # bytes of files that are not in the database yet
        self.files = directory / "files"
        try:
            self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.database = Database(directory / "batches.sqlite")
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                f"the directory of files and batches, {directory}, cannot be used: {error}"
            ) from error
        self._used_bytes = self.database.used_bytes()

    def close(self) -> None:
        """Let another process have it."""
        self.database.close()

    def path(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self.files / file_id

    # ------------------------------------------------------------------ room

    def grow(self, file_id: str, size: int) -> None:
        """Account for bytes of a file that is being written, before they are.

        Raises:
            RequestTooLargeError: There is no room for them.
        """
        used = self._used_bytes + sum(self._growing.values())
        if used + size > self._options.max_total_bytes:
            raise RequestTooLargeError(
                f"all files together may take {self._options.max_total_bytes} bytes, and {used} are "
                "taken; delete files that are no longer needed",
                code="storage_full",
            )
        self._growing[file_id] = self._growing.get(file_id, 0) + size

    def discard(self, file_id: str) -> None:
        """Give up a file that is not in the database yet."""
        self._growing.pop(file_id, None)
        self.path(file_id).unlink(missing_ok=True)

    def add(
        self, *files: StoredFile, record: BatchRecord | None = None, forget_at: int = 0
    ) -> None:
        """Take in files whose content is complete and on disk, and save the batch that wrote them."""
        sync_directory(self.files)
        self.database.add_files(files, record, forget_at)
        for stored in files:
            self._growing.pop(stored.file.id, None)
        self._used_bytes = self.database.used_bytes()

    # ------------------------------------------------------------------ files

    def find(self, tenant: str, file_id: str) -> FileObject:
        """A tenant's file.

        Raises:
            RequestNotFoundError: There is none.
        """
        found = self.database.find_file(tenant, file_id, now())
        if found is None:
            raise no_such_file(file_id)
        return found

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a tenant's file.

        Raises:
            RequestNotFoundError: There is none.
            InvalidRequestError: A batch still reads it.
        """
        self.find(tenant, file_id)
        for record in self.database.open_batches():
            if record.batch.input_file_id == file_id:
                raise InvalidRequestError(
                    f"the file {file_id!r} is read by the batch {record.batch.id!r}; cancel that first, "
                    "or wait for its end",
                    code="file_in_use",
                )
        self._drop(file_id)

    def _drop(self, file_id: str) -> None:
        self.database.delete_file(file_id)
        self.path(file_id).unlink(missing_ok=True)
        self._used_bytes = self.database.used_bytes()

    # ------------------------------------------------------------------ batches

    def sweep(self) -> None:
        """Delete files and forget batches whose time is over."""
        used = {record.batch.input_file_id for record in self.database.open_batches()}
        for file_id in self.database.expired_files(now()):
            if file_id not in used:
                self._drop(file_id)
        self.database.forget_batches(now())

    def take_up(self) -> list[BatchRecord]:
        """The batches that an earlier process left open; what else it left half done is removed."""
        records = self.database.open_batches()
        wanted = self.database.file_ids() | set(self._growing)
        for record in records:
            wanted |= {record.output_id, record.error_id}
        for path in self.files.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)
        for record in records:
            for file_id in (record.output_id, record.error_id):
                if self.path(file_id).exists():
                    self._growing[file_id] = self.path(file_id).stat().st_size
        self.sweep()
        return records


class Archive:
    """The store, from the event loop: opened when it is first needed, used in a thread of its own.

    Args:
        options: Where it is, and its bounds.

    Attributes:
        directory: Where it is.
        files: The folder of the files in it, each under its id.
    """

    def __init__(self, options: BatchesOptions) -> None:
        self.directory = (
            Path(options.directory).expanduser()
            if options.directory is not None
            else data_folder() / "batches"
        )
        self.files = self.directory / "files"
        self._options = options
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stoker-batches")
        self._store: Store | None = None
        self._is_closed = False

    def is_used(self) -> bool:
        """Whether there is anything, here or from an earlier process."""
        return self._store is not None or (self.directory / "batches.sqlite").exists()

    async def run(
        self, work: Callable[Concatenate[Store, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What ``work`` returns for the store; opens the store if need be.

        Raises:
            UnavailableError: The store cannot be used, or is closed.
        """

        def run() -> T:
            try:
                return work(self._open(), *args, **kwargs)
            except sqlite3.Error as error:
                logger.exception("the database of files and batches failed")
                raise UnavailableError(
                    f"the database of files and batches cannot be used now: {error}"
                ) from error

        if self._is_closed:
            raise _closed()
        return await asyncio.get_running_loop().run_in_executor(self._executor, run)

    def _open(self) -> Store:
        if self._is_closed:
            raise _closed()
        if self._store is None:
            self._store = Store(self.directory, self._options)
        return self._store

    async def close(self) -> None:
        """Finish what was begun, and let another process have it."""

        def close() -> None:
            self._is_closed = True
            if self._store is not None:
                self._store.close()
                self._store = None

        if not self._is_closed:
            await asyncio.get_running_loop().run_in_executor(self._executor, close)
            self._executor.shutdown(wait=False)


def _closed() -> UnavailableError:
    return UnavailableError("the server is shutting down; send the request again later")
