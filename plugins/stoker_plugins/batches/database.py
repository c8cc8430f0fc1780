"""What files and batches there are, in SQLite. Whoever opens it first has it until it is closed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stoker import UnavailableError
from stoker_plugins.batches.schemas import Batch, FileObject

__all__ = ["BatchRecord", "Database", "StoredFile"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, seq);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    is_open INTEGER NOT NULL,
    forget_at INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, seq);
CREATE INDEX IF NOT EXISTS open_batches ON batches (is_open);
"""
_NEWEST_FILES = """
SELECT body FROM files WHERE tenant = ? AND expires_at > ? AND (? IS NULL OR seq < ?)
AND (? IS NULL OR purpose = ?) ORDER BY seq DESC LIMIT ?
"""
_OLDEST_FILES = """
SELECT body FROM files WHERE tenant = ? AND expires_at > ? AND (? IS NULL OR seq > ?)
AND (? IS NULL OR purpose = ?) ORDER BY seq ASC LIMIT ?
"""
_MAX_KEPT = 10_000  # batches of one tenant; the oldest that are over are forgotten
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_MIN_BYTES = 4096  # what a file costs at least: else there could be any number of empty ones


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch, and what its owner is not told.

    Attributes:
        tenant: Whose it is.
        batch: What its owner is told.
        output_id: The id that its file of answers will have.
        error_id: The id that its file of errors will have.
        output_ttl_s: How long those are kept.
        num_stalls: How often a server took it up since it last got on.
    """

    tenant: str
    batch: Batch
    output_id: str
    error_id: str
    output_ttl_s: int
    num_stalls: int = 0

    @property
    def is_open(self) -> bool:
        """Whether there is anything left to do."""
        return self.batch.status not in _ENDED


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file and whose it is."""

    tenant: str
    file: FileObject


class Database:
    """The tables; for one thread at a time.

    Args:
        path: The database's file; made if there is none.

    Raises:
        UnavailableError: Another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(
            path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            # Exclusive from the first statement on: two servers must not run the same batches.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} COMMIT;")
        except sqlite3.OperationalError as error:
            self._connection.close()
            if "locked" not in str(error):
                raise
            raise UnavailableError(
                f"another server uses {path.parent}, and batches are run by one only; give this one "
                "another `directory` in [plugins.batches]"
            ) from None
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Let others have it."""
        self._connection.close()

    # ------------------------------------------------------------------ files

    def add_files(
        self, files: Sequence[StoredFile], record: BatchRecord | None = None, forget_at: int = 0
    ) -> None:
        """Add files, and save the batch that wrote them (see ``save_batch``): both or neither."""
        with self._connection as connection:
            connection.execute("BEGIN")
            for stored in files:
                file = stored.file
                connection.execute(
                    "INSERT OR REPLACE INTO files (id, tenant, purpose, bytes, expires_at, body)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        file.id,
                        stored.tenant,
                        file.purpose,
                        max(file.bytes, _MIN_BYTES),
                        file.expires_at,
                        msgspec.json.encode(file),
                    ),
                )
            if record is not None:
                self.save_batch(record, forget_at)

    def find_file(self, tenant: str, file_id: str, now: int) -> FileObject | None:
        """A tenant's file, if it has not expired."""
        row = self._connection.execute(
            "SELECT body FROM files WHERE id = ? AND tenant = ? AND expires_at > ?",
            (file_id, tenant, now),
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=FileObject)

    def delete_file(self, file_id: str) -> None:
        """Forget a file."""
        self._connection.execute("DELETE FROM files WHERE id = ?", (file_id,))

    def list_files(
        self,
        tenant: str,
        now: int,
        *,
        limit: int,
        after: int | None,
        purpose: str | None,
        newest_first: bool,
    ) -> list[FileObject]:
        """A tenant's files after a place (``place_of``)."""
        rows = self._connection.execute(
            _NEWEST_FILES if newest_first else _OLDEST_FILES,
            (tenant, now, after, after, purpose, purpose, limit),
        ).fetchall()
        return [msgspec.json.decode(row[0], type=FileObject) for row in rows]

    def place_of_file(self, tenant: str, file_id: str) -> int | None:
        """Where a tenant's file stands in the list of all."""
        row = self._connection.execute(
            "SELECT seq FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)
        ).fetchone()
        return None if row is None else int(row[0])

    def used_bytes(self) -> int:
        """What all files count as."""
        (total,) = self._connection.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()
        return int(total)

    def expired_files(self, now: int) -> list[str]:
        """Ids of files whose time is over."""
        rows = self._connection.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))
        return [row[0] for row in rows]

    def file_ids(self) -> set[str]:
        """Ids of all files."""
        return {row[0] for row in self._connection.execute("SELECT id FROM files")}

    # ------------------------------------------------------------------ batches

    def add_batch(self, record: BatchRecord) -> None:
        """Add a batch."""
        self._connection.execute(
            "INSERT INTO batches (id, tenant, is_open, forget_at, body) VALUES (?, ?, 1, 0, ?)",
            (record.batch.id, record.tenant, msgspec.json.encode(record)),
        )
        self._connection.execute(
            "DELETE FROM batches WHERE tenant = ? AND NOT is_open AND seq <="
            " (SELECT seq FROM batches WHERE tenant = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
            (record.tenant, record.tenant, _MAX_KEPT),
        )

    def save_batch(self, record: BatchRecord, forget_at: int = 0) -> None:
        """Write down what has become of a batch.

        Args:
            record: The batch.
            forget_at: When it may be forgotten, if it is over.
        """
        self._connection.execute(
            "UPDATE batches SET is_open = ?, forget_at = MAX(forget_at, ?), body = ? WHERE id = ?",
            (record.is_open, forget_at, msgspec.json.encode(record), record.batch.id),
        )

    def find_batch(self, tenant: str, batch_id: str) -> Batch | None:
        """A tenant's batch."""
        row = self._connection.execute(
            "SELECT body FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=BatchRecord).batch

    def list_batches(self, tenant: str, *, limit: int, after: int | None) -> list[Batch]:
        """A tenant's batches, the newest first, after a place (``place_of_batch``)."""
        rows = self._connection.execute(
            "SELECT body FROM batches WHERE tenant = ? AND (? IS NULL OR seq < ?)"
            " ORDER BY seq DESC LIMIT ?",
            (tenant, after, after, limit),
        ).fetchall()
        return [msgspec.json.decode(row[0], type=BatchRecord).batch for row in rows]

    def place_of_batch(self, tenant: str, batch_id: str) -> int | None:
        """Where a tenant's batch stands in the list of all."""
        row = self._connection.execute(
            "SELECT seq FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
        ).fetchone()
        return None if row is None else int(row[0])

    def open_batches(self) -> list[BatchRecord]:
        """All batches that are not over, the oldest first."""
        rows = self._connection.execute("SELECT body FROM batches WHERE is_open ORDER BY seq")
        return [msgspec.json.decode(row[0], type=BatchRecord) for row in rows]

    def forget_batches(self, now: int) -> None:
        """Forget the batches whose time is over."""
        self._connection.execute(
            "DELETE FROM batches WHERE NOT is_open AND forget_at > 0 AND forget_at <= ?", (now,)
        )
