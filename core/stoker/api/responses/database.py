"""Stored responses in SQLite: what is kept, for whom, and what makes room. For one thread at a time."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from stoker.api.responses.owners import is_alive

__all__ = ["Database", "StoredResponse"]

logger = logging.getLogger("stoker.responses")

_VERSION = 1
_SCHEMA = f"""
PRAGMA auto_vacuum = INCREMENTAL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    previous TEXT,
    owner TEXT,
    expires_at REAL NOT NULL,
    size INTEGER NOT NULL,
    head BLOB NOT NULL,
    input BLOB NOT NULL,
    output BLOB NOT NULL,
    events BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_expiry ON responses (expires_at);
CREATE INDEX IF NOT EXISTS of_tenants ON responses (tenant, expires_at, size);
CREATE INDEX IF NOT EXISTS running ON responses (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS items (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    response TEXT NOT NULL,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_response ON items (response);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_COLUMNS = "id, tenant, previous, owner, head, input, output, events"
_CHAIN = f"""
WITH RECURSIVE chain (id, previous, size, depth) AS (
    SELECT id, previous, length(input) + length(output), 0 FROM responses WHERE id = :id AND tenant = :tenant
    UNION ALL
    SELECT r.id, r.previous, length(r.input) + length(r.output) + chain.size, depth + 1
    FROM chain JOIN responses r ON r.id = chain.previous
    WHERE r.tenant = :tenant AND depth < :most AND chain.size < :bytes
)
SELECT {", ".join("r." + name for name in _COLUMNS.split(", "))} FROM chain
JOIN responses r ON r.id = chain.id ORDER BY depth DESC
"""  # noqa: S608 - put together from names that stand here
_BUSY_S = 5.0
_ROW_BYTES = 512  # what a response costs beside its texts


class StoredResponse(msgspec.Struct, kw_only=True):
    """A response as it is kept; texts are JSON.

    Attributes:
        id: Its id.
        tenant: Whose it is.
        previous: The response that it follows.
        owner: The process that still works on it.
        head: The response without its output.
        input: Its own input's items.
        output: Its output's items.
        events: Its events, if they can be asked for.
    """

    id: str
    tenant: str
    previous: str | None = None
    owner: str | None = None
    head: bytes
    input: bytes
    output: bytes
    events: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        texts = len(self.head) + len(self.input) + len(self.output) + len(self.events or b"")
        return texts + _ROW_BYTES


class Database:
    """The tables.

    Args:
        path: The database's file, made if there is none; ``:memory:`` keeps nothing beyond this object.
        max_responses: Most responses that are kept.
        max_bytes: Most bytes that they take.
        ttl_s: How long they are kept after they were made or last followed.

    Raises:
        sqlite3.Error: It cannot be opened.
        OSError: Its file cannot be made.
    """

    def __init__(self, path: str, *, max_responses: int, max_bytes: int, ttl_s: float) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        if path != ":memory:":
            _make_private(Path(path))
        self.connection = sqlite3.connect(
            path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            if version not in {0, _VERSION}:
                raise sqlite3.DatabaseError(f"made by another version of stoker ({version})")
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute("PRAGMA secure_delete = ON")  # who deletes means it
            if not version:
                self.connection.executescript(_SCHEMA)
            self.connection.execute("SELECT * FROM responses, items LIMIT 1").fetchone()
        except BaseException:
            self.connection.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        with suppress(sqlite3.Error):
            self.connection.execute("PRAGMA optimize")
        self.connection.close()

    def put(self, stored: StoredResponse, item_ids: Sequence[str]) -> None:
        """Keep a response, in place of one of the same id; others make room for it.

        Args:
            stored: The response.
            item_ids: The ids of the items that can be referred to by it.

        Raises:
            ValueError: It is larger than all that may be kept.
            sqlite3.Error: It could not be written.
        """
        if stored.size > self._max_bytes:
            raise ValueError(
                f"it takes {stored.size} bytes, and {self._max_bytes} are all there are"
            )
        with self._transaction():
            self.connection.execute("DELETE FROM items WHERE response = ?", (stored.id,))
            self.connection.execute(
                "INSERT OR REPLACE INTO responses"
                " (id, tenant, previous, owner, head, input, output, events, expires_at, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(stored.id, stored.tenant, stored.previous, stored.owner, stored.head),
                    *(stored.input, stored.output, stored.events, self._expiry(), stored.size),
                ),
            )
            self.connection.executemany(
                "INSERT OR IGNORE INTO items (tenant, id, response) VALUES (?, ?, ?)",
                [(stored.tenant, item_id, stored.id) for item_id in item_ids],
            )
            self._make_room(stored.id)
        self.connection.execute("PRAGMA incremental_vacuum(64)").fetchall()

    def get(self, response_id: str, tenant: str) -> StoredResponse | None:
        """A tenant's response."""
        row = self.connection.execute(
            f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND tenant = ? AND expires_at > ?",  # noqa: S608 - a constant of this file
            (response_id, tenant, _now()),
        ).fetchone()
        return _stored(row) if row else None

    def chain(
        self, response_id: str, tenant: str, most: int, max_bytes: int
    ) -> list[StoredResponse]:
        """A tenant's response and those that it follows, the first one first; they live on for that.

        It is not whole if the first one follows another, which is not kept any more or is beyond the limits.

        Args:
            response_id: The last one.
            tenant: Whose they are.
            most: How many at most.
            max_bytes: Bytes of items after which no more are looked for.
        """
        if self.get(response_id, tenant) is None:
            return []
        names = {"id": response_id, "tenant": tenant, "most": most - 1, "bytes": max_bytes}
        rows = self.connection.execute(_CHAIN, names).fetchall()
        self.connection.executemany(
            "UPDATE responses SET expires_at = ? WHERE id = ?",
            [(self._expiry(), row[0]) for row in rows],
        )
        return [_stored(row) for row in rows]

    def holder(self, item_id: str, tenant: str) -> StoredResponse | None:
        """The tenant's response that has an item."""
        row = self.connection.execute(
            "SELECT response FROM items WHERE tenant = ? AND id = ?", (tenant, item_id)
        ).fetchone()
        return self.get(row[0], tenant) if row else None

    def delete(self, response_id: str, tenant: str) -> bool:
        """Forget a tenant's response; returns whether there was one."""
        if self.get(response_id, tenant) is None:
            return False
        with self._transaction():
            self._forget([response_id])
        return True

    def abandoned(self) -> list[StoredResponse]:
        """Responses that processes worked on which are not there any more."""
        rows = self.connection.execute(
            f"SELECT {_COLUMNS} FROM responses WHERE owner IS NOT NULL"  # noqa: S608 - the same
        ).fetchall()
        alive = {owner: is_alive(owner) for owner in {row[3] for row in rows}}
        return [_stored(row) for row in rows if not alive[row[3]]]

    # ------------------------------------------------------------------ room

    def _make_room(self, newest: str) -> None:
        """Forget what has expired, and then the oldest of whoever has most, until the limits are kept."""
        expired = self.connection.execute(
            "SELECT id FROM responses WHERE expires_at <= ?", (_now(),)
        ).fetchall()
        self._forget([row[0] for row in expired])
        while True:
            shares = self.connection.execute(
                "SELECT sum(size) AS bytes, count(*), tenant FROM responses GROUP BY tenant"
                " ORDER BY bytes DESC"
            ).fetchall()
            num_bytes = sum(share[0] for share in shares) - self._max_bytes
            number = sum(share[1] for share in shares) - self._max_responses
            if num_bytes <= 0 and number <= 0:
                return
            oldest = self.connection.execute(
                "SELECT id FROM responses WHERE tenant = ? AND id != ? ORDER BY expires_at LIMIT ?",
                (shares[0][2], newest, max(1, min(number, shares[0][1] // 8))),
            ).fetchall()
            if not oldest:  # the newest is all that this tenant has
                oldest = self.connection.execute(
                    "SELECT id FROM responses WHERE id != ? ORDER BY expires_at LIMIT 1", (newest,)
                ).fetchall()
            if not oldest:
                return
            self._forget([row[0] for row in oldest])

    def _forget(self, response_ids: Sequence[str]) -> None:
        gone = [(response_id,) for response_id in response_ids]
        self.connection.executemany("DELETE FROM items WHERE response = ?", gone)
        self.connection.executemany("DELETE FROM responses WHERE id = ?", gone)

    def _expiry(self) -> float:
        return _now() + self._ttl_s

    def _transaction(self) -> _Transaction:
        return _Transaction(self.connection)


class _Transaction:
    """All of it, or none."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:  # a full disk ends it by itself
            self._connection.execute("ROLLBACK")


def _stored(row: Sequence[Any]) -> StoredResponse:
    return StoredResponse(**dict(zip(_COLUMNS.split(", "), row, strict=True)))


def _now() -> float:
    return time.time()  # noqa: TID251 - it is compared across restarts


def _make_private(path: Path) -> None:
    """Make the file, for its owner's eyes only: conversations are in it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
