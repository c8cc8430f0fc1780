"""The directory of snapshots of one model, and the thread that reads and writes it.

Each model and setting has a directory of its own, below the configured one, that one process at a time may
use: it holds a lock there, which the operating system gives up with the process. The engine's thread never
waits for the disk: it leaves jobs and collects what became of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from stoker.engine.snapshot_files import (
    DamagedFileError,
    Description,
    read_description,
    read_snapshot,
    write_snapshot,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DiskUnavailableError", "DiskWorker", "Found", "Outcome", "SnapshotDirectory"]

_LOCK = "lock"
_SUFFIX = ".kv"
_NAME = re.compile(r"[0-9a-f]{32}\.kv")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.kv\.\d+\.partial")
_MAX_READS = 8  # snapshots that are read ahead of the requests that wait for them


class DiskUnavailableError(OSError):
    """The directory cannot be used; the message says why."""


class Found(NamedTuple):
    """A file that was there at the start.

    Attributes:
        key: Its snapshot's.
        description: What it says.
        tokens: Its token ids.
        num_bytes: Its size.
        age_s: Since it was last used.
    """

    key: str
    description: Description
    tokens: NDArray[np.int32]
    num_bytes: int
    age_s: float


class SnapshotDirectory:
    """The files of one model, locked for this process.

    Args:
        root: Below which every model has its directory.
        fingerprint: The model and its settings.

    Raises:
        DiskUnavailableError: It cannot be made, another process uses it, or others may write into it.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self._root = root
        self._fingerprint = fingerprint
        self.path = root / fingerprint
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(self.path)
            lock = _lock(self.path / _LOCK)
        except DiskUnavailableError:
            raise
        except OSError as error:
            raise DiskUnavailableError(f"{self.path} cannot be used: {error}") from error
        if lock is None:
            raise DiskUnavailableError(f"{self.path} is used by another server")
        self._lock: IO[bytes] | None = lock

    def scan(self, on_damaged: Callable[[str], None]) -> Iterator[Found]:
        """Yield the snapshots that are there; what is damaged or was left half-written is removed.

        Args:
            on_damaged: Told why a file was removed.
        """
        # The time as the file system has it, also if that is another machine's.
        os.utime(self.path / _LOCK)
        now_s = (self.path / _LOCK).stat().st_mtime
        for path in sorted(self.path.iterdir()):
            if _PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)
            if not _NAME.fullmatch(path.name):
                continue
            try:
                description, tokens, size = read_description(path, self._fingerprint)
                age_s = max(0.0, now_s - path.stat().st_mtime)
            except (DamagedFileError, OSError) as error:
                on_damaged(f"{path.name}: {error}")
                self.remove(path.stem)
                continue
            yield Found(path.stem, description, tokens, size, age_s)

    def write(
        self, key: str, description: Description, tokens: NDArray[np.int32], snapshot: bytes
    ) -> int:
        """Write a snapshot's file; returns its size.

        Raises:
            OSError: It cannot be written.
        """
        return write_snapshot(self._file(key), description, tokens, snapshot)

    def read(self, key: str) -> bytes:
        """A snapshot.

        Raises:
            DamagedFileError: Its file is damaged.
            OSError: It cannot be read.
        """
        return read_snapshot(self._file(key), self._fingerprint)

    def remove(self, key: str) -> None:
        """Remove a snapshot's file, if it can be."""
        with contextlib.suppress(OSError):
            self._file(key).unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """Remember beyond this process that a snapshot was used now."""
        with contextlib.suppress(OSError):
            os.utime(self._file(key))

    def sweep_others(self, num_bytes: int) -> None:
        """Remove what models that are not served any more left behind, oldest first, if it is too much.

        Args:
            num_bytes: How much they may keep, all together.
        """
        files: list[tuple[float, int, Path]] = []
        for other in self._root.iterdir():
            if other != self.path and re.fullmatch("[0-9a-f]{32}", other.name) and other.is_dir():
                with contextlib.suppress(OSError):
                    if lock := _lock(other / _LOCK):
                        lock.close()
                        facts = [(path.stat(), path) for path in other.glob(f"*{_SUFFIX}")]
                        files += [(fact.st_mtime, fact.st_size, path) for fact, path in facts]
        excess = sum(size for _, size, _ in files) - num_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                excess -= size

    def close(self) -> None:
        """Let others use it. May be called twice."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{_SUFFIX}"


def _check_owner(path: Path) -> None:
    """Refuse a directory that others may write into: what they put there would reach native code."""
    if sys.platform == "win32":
        return
    facts = path.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DiskUnavailableError(
            f"{path} belongs to another user or others may write into it; "
            "give [cache] disk_path a directory of this user's own"
        )


def _lock(path: Path) -> IO[bytes] | None:
    """The open, locked file; ``None`` if another process, or part of this one, holds the lock."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        ticket: What the job was given.
        key: The snapshot.
        kind: ``read`` or ``write``.
        snapshot: What was read; ``None`` if that failed, and after writing.
        num_bytes: Size of the file that was written; 0 if that failed.
        seconds: How long it took.
        error: What went wrong; empty if nothing did.
    """

    ticket: int
    key: str
    kind: str
    snapshot: bytes | None = None
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""


class _Job(NamedTuple):
    run: Callable[[], Outcome | None]
    num_bytes: int = 0  # that wait to be written


class DiskWorker:
    """A thread that does jobs in a directory, reading before writing. It sleeps while there are none.

    Args:
        directory: Where. It is closed with the worker.
        max_unwritten_bytes: Most bytes that may wait to be written; a single snapshot may always.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        directory: SnapshotDirectory,
        max_unwritten_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._max_unwritten_bytes = max_unwritten_bytes
        self._clock = clock
        self._reads: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._num_open_reads = 0
        self._unwritten_bytes = 0
        self._outcomes: deque[Outcome] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="stoker-snapshots", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether anything waits to be written."""
        return self._unwritten_bytes > 0

    def write(
        self,
        ticket: int,
        key: str,
        description: Description,
        tokens: NDArray[np.int32],
        snapshot: bytes,
    ) -> bool:
        """Have a snapshot written; returns whether there is room in the queue."""

        def run() -> Outcome:
            started_s = self._clock()
            try:
                size = self._directory.write(key, description, tokens, snapshot)
            except Exception as error:  # noqa: BLE001 - whatever it is: somebody waits to be told
                return Outcome(ticket, key, "write", error=str(error) or repr(error))
            return Outcome(ticket, key, "write", num_bytes=size, seconds=self._clock() - started_s)

        with self._condition:
            waiting = self._unwritten_bytes
            if self._closing or (waiting and waiting + len(snapshot) > self._max_unwritten_bytes):
                return False
            self._unwritten_bytes += len(snapshot)
            self._others.append(_Job(run, len(snapshot)))
            self._condition.notify_all()
        return True

    def read(self, ticket: int, key: str) -> bool:
        """Have a snapshot read; returns whether there is room in the queue."""

        def run() -> Outcome:
            started_s = self._clock()
            try:
                snapshot = self._directory.read(key)
            except Exception as error:  # noqa: BLE001 - as above
                self._directory.remove(key)
                return Outcome(ticket, key, "read", error=str(error) or repr(error))
            return Outcome(
                ticket, key, "read", snapshot=snapshot, seconds=self._clock() - started_s
            )

        with self._condition:
            if self._closing or self._num_open_reads >= _MAX_READS:
                return False
            self._num_open_reads += 1
            self._reads.append(_Job(run))
            self._condition.notify_all()
        return True

    def remove(self, key: str) -> None:
        """Have a snapshot's file removed, after what was asked for before."""
        self._later(lambda: self._directory.remove(key))

    def touch(self, key: str) -> None:
        """Have it remembered that a snapshot was used."""
        self._later(lambda: self._directory.touch(key))

    def _later(self, action: Callable[[], None]) -> None:
        with self._condition:
            self._others.append(_Job(action))
            self._condition.notify_all()

    def outcomes(self) -> list[Outcome]:
        """What became of jobs since the last call."""
        if not self._outcomes:
            return []
        with self._condition:
            outcomes = list(self._outcomes)
            self._outcomes.clear()
            self._num_open_reads -= sum(outcome.kind == "read" for outcome in outcomes)
        return outcomes

    def wait(self, timeout_s: float) -> None:
        """Wait until there is an outcome."""
        with self._condition:
            self._condition.wait_for(lambda: bool(self._outcomes), timeout_s)

    def close(self, timeout_s: float) -> None:
        """Finish what waits, for so long at most, and close the directory. May be called twice."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        with self._condition:
            self._reads.clear()
            self._others.clear()
        self._thread.join(timeout_s)
        self._directory.close()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._reads or self._others or self._closing)
                if not (self._reads or self._others):
                    return
                job = (self._reads or self._others).popleft()
            outcome = job.run()
            with self._condition:
                self._unwritten_bytes -= job.num_bytes
                if outcome is not None:
                    self._outcomes.append(outcome)
                self._condition.notify_all()
