"""The second tier of the prefix cache: snapshots of evicted lanes in host memory and, if wanted, on disk.

What does not fit into host memory any more goes to disk, and comes back when a request can use it. Which goes
first says the same strategy as for lanes. All state belongs to the engine's thread; the disk has a thread of
its own, which is told what to do and whose answers are taken up at the next call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stoker.engine.eviction import EvictionLedger, GuardedStrategy
from stoker.engine.snapshot_disk import DiskWorker, Outcome, SnapshotDirectory
from stoker.engine.snapshot_files import Description, key_of
from stoker.engine.snapshot_index import SnapshotIndex, StoredSnapshot, scope_of, usage
from stoker.interfaces import (
    CacheEntry,
    SnapshotStore,
    StoredPrefix,
    StoreStats,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.interfaces import EvictionStrategy

__all__ = ["StoreLimits", "TieredStore"]

logger = logging.getLogger("stoker.cache")

_DISK_BYTES_PER_S = 500e6  # until a read was timed
_RATE = 0.3  # how far one read moves the mean
_DESCRIPTION_BYTES = 512  # at most, of a file, beside its tokens and the snapshot
_MIN_UNWRITTEN = 64 * 2**20
_CLOSE_S = 10.0  # how long writing may take at the end


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much is kept, and for how long.

    Attributes:
        host_bytes: Most bytes in host memory. A quarter more may wait to be written to disk (64 MiB if that
            is more), and one snapshot that was just read may lie beside them until it is restored.
        disk_bytes: Most bytes on disk.
        ttl_s: Snapshots that nobody used for so long are dropped; 0 for never.
        whole_only: A snapshot is of use only to prompts that begin with all of it: the runtime cannot
            truncate what it restored.
    """

    host_bytes: int
    disk_bytes: int = 0
    ttl_s: float = 0.0
    whole_only: bool = False


class TieredStore(SnapshotStore):
    """Snapshots in host memory, and on disk if a directory is given.

    Args:
        limits: How much is kept.
        strategy: Which snapshot goes first; the least recently used if ``None``.
        fingerprint: The model and its settings.
        directory: The disk tier's; closed with the store.
        disk_problem: Why there is none, if one was asked for.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        limits: StoreLimits,
        strategy: EvictionStrategy | None = None,
        *,
        fingerprint: str = "",
        directory: SnapshotDirectory | None = None,
        disk_problem: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._strategy = GuardedStrategy(strategy)
        self._fingerprint = fingerprint
        self._clock = clock
        self._index = SnapshotIndex(whole_only=limits.whole_only)
        self._host_bytes = 0
        self._disk_bytes = 0  # including what waits to be written:
        self._reserved: dict[int, int] = {}  # bytes, by number
        self._disk_bytes_per_s = _DISK_BYTES_PER_S
        self._disk_problem = disk_problem
        self._num_hits = 0
        self._num_damaged = 0
        self._num_write_errors = 0
        self._ledger = EvictionLedger(clock)
        self._disk: DiskWorker | None = None
        if directory is not None:
            self._take_stock(directory)
            unwritten = max(limits.host_bytes // 4, _MIN_UNWRITTEN)
            self._disk = DiskWorker(directory, unwritten, clock)
            self._shrink_disk(0)

    def _take_stock(self, directory: SnapshotDirectory) -> None:
        """Find again what was on disk."""
        now_s = self._clock()
        for found in directory.scan(self._count_damaged):
            about = found.description
            snapshot = StoredSnapshot(
                key=found.key,
                scope=about.scope,
                tenant=about.tenant,
                tokens=found.tokens,
                num_block_tokens=about.num_block_tokens,
                seconds_to_make=about.seconds_to_make,
                num_bytes=about.num_bytes,
                created_s=now_s - found.age_s,
                last_used_s=now_s - found.age_s,
                file_bytes=found.num_bytes,
            )
            self._index.add(snapshot)
            self._disk_bytes += found.num_bytes

    # ------------------------------------------------------------------ in and out

    def put(
        self,
        tokens: NDArray[np.int32],
        salt: str,
        tenant: str,
        snapshot: bytes,
        seconds_to_make: float,
        num_block_tokens: int = 0,
    ) -> bool:
        """Keep a snapshot in host memory, or on disk if it is too large for that."""
        self._settle()
        scope = scope_of(salt)
        tokens = np.array(tokens, np.int32)
        now_s = self._clock()
        if not len(tokens):
            return False
        key = key_of(scope, tokens)
        held = self._index.of_key(key)
        if held is None and (stand_in := self._index.stand_in(tokens, scope, num_block_tokens)):
            stand_in.last_used_s = now_s
            return True
        if held is not None:
            held.last_used_s = now_s
            if held.payload is None and len(snapshot) == held.num_bytes <= self._limits.host_bytes:
                self._take_into_host(held, snapshot)
            return True
        new = StoredSnapshot(
            key=key,
            scope=scope,
            tenant=tenant,
            tokens=tokens,
            num_block_tokens=num_block_tokens,
            seconds_to_make=seconds_to_make,
            num_bytes=len(snapshot),
            created_s=now_s,
            last_used_s=now_s,
            payload=snapshot,
        )
        if len(snapshot) > self._limits.host_bytes and not self._write(new):
            return False
        replaced = self._index.made_needless_by(new)
        self._index.add(new)
        for old in replaced:
            self._drop(old, "replaced")
        if not new.is_writing:
            self._take_into_host(new, snapshot)
        return True

    def match(self, tokens: NDArray[np.int32], salt: str) -> StoredPrefix | None:
        """The snapshot that saves a prompt the most: by the tokens they share, less what reading costs."""
        self._settle()
        found = self._index.best(tokens, scope_of(salt), self._reading_in_tokens)
        if found is None:
            return None
        best, shared = found
        return StoredPrefix(
            key=best.key,
            num_tokens=len(best.tokens),
            num_shared=shared,
            num_block_tokens=best.num_block_tokens,
            num_bytes=best.num_bytes,
            tier=best.tier,
        )

    def get(self, key: str) -> bytes | None:
        """A snapshot's bytes; if it is on disk, reading begins and the answer is ``None``."""
        snapshot = self._index.of_key(key) if self.is_ready(key) else None
        if snapshot is None:
            return None
        snapshot.num_hits += 1
        snapshot.last_used_s = self._clock()
        self._num_hits += 1
        if snapshot.file_bytes and self._disk is not None:
            self._disk.touch(key)
        return snapshot.payload

    def is_ready(self, key: str, timeout_s: float = 0.0) -> bool:
        """Whether a snapshot is in memory; if not, reading begins."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._settle()
            snapshot = self._index.of_key(key)
            if snapshot is None:
                return False
            if snapshot.payload is not None:
                # Also if it is there only until it is written: who asks will want it.
                self._take_into_host(snapshot, snapshot.payload)
                return True
            if self._disk is not None and not snapshot.is_reading:
                snapshot.is_reading = self._disk.read(snapshot.number, key)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._disk is None or not snapshot.is_reading:
                return False
            self._disk.wait(left_s)

    # ------------------------------------------------------------------ upkeep

    def evict(self, now_s: float) -> int:
        """Drop what is too old."""
        self._settle()
        if not self._limits.ttl_s:
            return 0
        limit_s = now_s - self._limits.ttl_s
        old = [s for s in self._index.all() if s.last_used_s <= limit_s]
        for snapshot in old:
            self._drop(snapshot, "ttl")
        return len(old)

    def clear(self) -> int:
        """Drop everything."""
        self._settle()
        everything = self._index.all()
        for snapshot in everything:
            self._drop(snapshot, "cleared")
        return len(everything)

    def entries(self) -> list[CacheEntry]:
        """What is kept, each in the tier that it would come from; from any thread."""
        return [snapshot.entry(snapshot.tier) for snapshot in self._index.all()]

    def stats(self) -> StoreStats:
        """Counters, from any thread."""
        snapshots = self._index.all()
        limits = self._limits
        tiers = {"host": usage([s for s in snapshots if s.payload is not None], limits.host_bytes)}
        if self._disk is not None:
            on_disk = [s for s in snapshots if s.file_bytes]
            tiers["disk"] = usage(on_disk, limits.disk_bytes)
        return StoreStats(
            tiers=tiers,
            num_hits=self._num_hits,
            evictions=self._ledger.counts,
            evicted_tokens=self._ledger.tokens,
            num_damaged=self._num_damaged,
            num_strategy_errors=self._strategy.num_errors,
            disk_problem=self._disk_problem,
            recent=self._ledger.recent,
        )

    def close(self) -> None:
        """Write to disk what is only in memory, the best first and for a while, and free everything."""
        if self._disk is not None:
            self._write_all(self._disk)
            self._disk.close(_CLOSE_S)
        self._disk = None
        self._index = SnapshotIndex(whole_only=self._limits.whole_only)
        self._host_bytes = self._disk_bytes = 0

    def _write_all(self, disk: DiskWorker) -> None:
        deadline_s = time.monotonic() + _CLOSE_S
        for snapshot in reversed(self._ordered(self._in_host(), "host")):
            while not (snapshot.file_bytes or snapshot.is_writing or self._write(snapshot)):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not disk.is_writing:
                    break
                disk.wait(left_s)
                self._settle()

    # ------------------------------------------------------------------ one snapshot

    def _drop(self, snapshot: StoredSnapshot, reason: str) -> None:
        """Forget a snapshot altogether."""
        self._ledger.count(snapshot.entry(snapshot.tier), reason, stored=False)
        self._index.remove(snapshot)
        self._free_host(snapshot)
        self._free_disk(snapshot)
        snapshot.payload = None

    def _take_into_host(self, snapshot: StoredSnapshot, payload: bytes) -> None:
        snapshot.payload = payload
        if not snapshot.in_host:
            snapshot.in_host = True
            self._host_bytes += snapshot.num_bytes
        self._shrink_host(keep=snapshot)

    def _free_host(self, snapshot: StoredSnapshot) -> None:
        if snapshot.in_host:
            snapshot.in_host = False
            self._host_bytes -= snapshot.num_bytes

    def _free_disk(self, snapshot: StoredSnapshot) -> None:
        if snapshot.file_bytes and self._disk is not None:
            self._disk.remove(snapshot.key)
            self._disk_bytes -= snapshot.file_bytes
            snapshot.file_bytes = 0

    def _write(self, snapshot: StoredSnapshot) -> bool:
        """Have a snapshot written to disk, if there is one and that is worth while."""
        payload = snapshot.payload
        if self._disk is None or payload is None or not self._pays_on_disk(snapshot):
            return False
        file_bytes = snapshot.num_bytes + snapshot.tokens.nbytes + _DESCRIPTION_BYTES
        self._shrink_disk(file_bytes)
        if self._disk_bytes + file_bytes > self._limits.disk_bytes:
            return False  # what waits to be written needs all of the room
        description = Description(
            fingerprint=self._fingerprint,
            scope=snapshot.scope,
            tenant=snapshot.tenant,
            num_tokens=len(snapshot.tokens),
            num_block_tokens=snapshot.num_block_tokens,
            seconds_to_make=snapshot.seconds_to_make,
            num_bytes=snapshot.num_bytes,
        )
        number, key = snapshot.number, snapshot.key
        snapshot.is_writing = self._disk.write(number, key, description, snapshot.tokens, payload)
        if snapshot.is_writing:
            self._reserved[number] = file_bytes
            self._disk_bytes += file_bytes
        return snapshot.is_writing

    def _pays_on_disk(self, snapshot: StoredSnapshot) -> bool:
        if snapshot.num_bytes > self._limits.disk_bytes:
            return False
        return (
            not snapshot.seconds_to_make
            or snapshot.num_bytes / self._disk_bytes_per_s < snapshot.seconds_to_make
        )

    def _reading_in_tokens(self, snapshot: StoredSnapshot) -> float:
        """What reading a snapshot costs, in tokens that could be computed meanwhile."""
        if snapshot.payload is not None or not snapshot.seconds_to_make:
            return 0.0
        reading_s = snapshot.num_bytes / self._disk_bytes_per_s
        return reading_s / snapshot.seconds_to_make * len(snapshot.tokens)

    # ------------------------------------------------------------------ room

    def _in_host(self) -> list[StoredSnapshot]:
        return [snapshot for snapshot in self._index.all() if snapshot.in_host]

    def _ordered(
        self, snapshots: list[StoredSnapshot], tier: Literal["host", "disk"]
    ) -> list[StoredSnapshot]:
        """The first to go first."""
        entries = [snapshot.entry(tier) for snapshot in snapshots]
        by_number = {snapshot.number: snapshot for snapshot in snapshots}
        return [by_number[number] for number in self._strategy.order(entries, self._clock())]

    def _shrink_host(self, keep: StoredSnapshot) -> None:
        """Keep to the limit; ``keep`` stays even if it alone is above it."""
        if self._host_bytes <= self._limits.host_bytes:
            return
        others = [snapshot for snapshot in self._in_host() if snapshot is not keep]
        for snapshot in self._ordered(others, "host"):
            if self._host_bytes <= self._limits.host_bytes:
                return
            if snapshot.file_bytes or snapshot.is_writing or self._write(snapshot):
                self._ledger.count(snapshot.entry("host"), "bytes", stored=True)
                self._free_host(snapshot)
                if not snapshot.is_writing:
                    snapshot.payload = None
            else:
                is_full = self._disk is not None and self._pays_on_disk(snapshot)
                self._drop(snapshot, "unwritten" if is_full else "bytes")

    def _shrink_disk(self, num_bytes: int) -> None:
        """Make room for so many bytes on disk."""
        limit = self._limits.disk_bytes - num_bytes
        if self._disk_bytes <= limit:
            return
        for snapshot in self._ordered([s for s in self._index.all() if s.file_bytes], "disk"):
            if self._disk_bytes <= limit:
                return
            if snapshot.in_host:
                self._ledger.count(snapshot.entry("disk"), "bytes", stored=True)
                self._free_disk(snapshot)
            else:
                self._drop(snapshot, "bytes")

    # ------------------------------------------------------------------ what the disk says

    def _settle(self) -> None:
        """Take up what has become of reads and writes."""
        for outcome in () if self._disk is None else self._disk.outcomes():
            if outcome.kind == "write":
                self._take_written(outcome)
            else:
                self._take_read(outcome)

    def _take_written(self, outcome: Outcome) -> None:
        self._disk_bytes -= self._reserved.pop(outcome.ticket)
        snapshot = self._index.of_number(outcome.ticket)
        if outcome.error:
            self._num_write_errors += 1
            if self._num_write_errors == 1 or self._num_write_errors % 1000 == 0:
                logger.warning(
                    "a snapshot could not be written (%d failures so far): %s",
                    self._num_write_errors,
                    outcome.error,
                )
        if snapshot is None:
            # Dropped meanwhile; but its tokens may have been put again, and belong to that file now.
            twin = self._index.of_key(outcome.key)
            if self._disk is not None and not (twin and (twin.file_bytes or twin.is_writing)):
                self._disk.remove(outcome.key)
            return
        snapshot.is_writing = False
        snapshot.file_bytes = outcome.num_bytes
        self._disk_bytes += outcome.num_bytes
        if not snapshot.in_host:
            if outcome.error:
                self._drop(snapshot, "unwritten")
            snapshot.payload = None

    def _take_read(self, outcome: Outcome) -> None:
        snapshot = self._index.of_number(outcome.ticket)
        if snapshot is None:
            return
        snapshot.is_reading = False
        if outcome.snapshot is None:
            self._count_damaged(f"{outcome.key}: {outcome.error}")
            self._disk_bytes -= snapshot.file_bytes
            snapshot.file_bytes = 0
            if snapshot.payload is None:
                self._drop(snapshot, "damaged")
            return
        self._disk_bytes_per_s += _RATE * (
            len(outcome.snapshot) / max(outcome.seconds, 1e-6) - self._disk_bytes_per_s
        )
        if snapshot.payload is None:
            snapshot.last_used_s = self._clock()  # somebody waits for it: it is not to go at once
            self._take_into_host(snapshot, outcome.snapshot)

    def _count_damaged(self, what: str) -> None:
        self._num_damaged += 1
        logger.warning("a snapshot on disk cannot be used and was removed: %s", what)
