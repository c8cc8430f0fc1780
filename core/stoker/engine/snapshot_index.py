"""The snapshots of a store, by what they hold: which of them helps a prompt, which makes another needless."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stoker.engine.prefix_tree import PrefixTree
from stoker.engine.snapshot_files import digest
from stoker.interfaces import CacheEntry, TierUsage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SnapshotIndex", "StoredSnapshot", "scope_of", "usage"]

# A longer snapshot stands in for a shorter one of the same beginning, up to so many times its length: to
# restore it costs as many times more.
_MAX_STAND_IN = 2.0
_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class StoredSnapshot:
    """A snapshot, wherever it is.

    Attributes:
        key: Its identity: scope and tokens.
        number: The same for the tree and for strategies.
        scope: Digest of its salt.
        tenant: Whose request computed it.
        tokens: The tokens whose KV it holds, ``int32[n]``.
        num_block_tokens: See ``SnapshotStore.put``.
        seconds_to_make: See ``SnapshotStore.put``.
        num_bytes: Its size.
        created_s: When it was put.
        last_used_s: When it was last put or handed out.
        num_hits: How often it was handed out.
        payload: What was put, if it is in memory.
        in_host: Whether it counts as kept there; else ``payload`` is only there until it is written.
        file_bytes: Size of its file; 0 if there is none.
        is_writing: Whether it waits to be written.
        is_reading: Whether it waits to be read.
    """

    key: str
    scope: str
    tenant: str
    tokens: NDArray[np.int32]
    num_block_tokens: int
    seconds_to_make: float
    num_bytes: int
    created_s: float
    last_used_s: float
    num_hits: int = 0
    payload: bytes | None = None
    in_host: bool = False
    file_bytes: int = 0
    is_writing: bool = False
    is_reading: bool = False
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def tier(self) -> Literal["host", "disk"]:
        """Where it would come from."""
        return "disk" if self.payload is None else "host"

    def entry(self, tier: Literal["host", "disk"]) -> CacheEntry:
        """What strategies and people see of it."""
        return CacheEntry(
            entry_id=self.number,
            tier=tier,
            tenant=self.tenant,
            salt=self.scope,
            num_tokens=len(self.tokens),
            num_bytes=self.num_bytes,
            created_s=self.created_s,
            last_used_s=self.last_used_s,
            num_hits=self.num_hits,
        )


class SnapshotIndex:
    """Snapshots by key, by number and by prefix.

    Args:
        whole_only: A snapshot is of use only to prompts that begin with all of it.
    """

    def __init__(self, *, whole_only: bool) -> None:
        self._whole_only = whole_only
        self._by_key: dict[str, StoredSnapshot] = {}
        self._by_number: dict[int, StoredSnapshot] = {}
        self._tree = PrefixTree()

    def add(self, snapshot: StoredSnapshot) -> None:
        """Add one whose key is not there."""
        self._by_key[snapshot.key] = snapshot
        self._by_number[snapshot.number] = snapshot
        self._tree.insert(snapshot.number, snapshot.scope, snapshot.tokens)

    def remove(self, snapshot: StoredSnapshot) -> None:
        """Take one out."""
        del self._by_key[snapshot.key]
        del self._by_number[snapshot.number]
        self._tree.remove(snapshot.number)

    def all(self) -> list[StoredSnapshot]:
        """All of them; from any thread."""
        return list(self._by_key.values())

    def of_key(self, key: str) -> StoredSnapshot | None:
        """The one with a key."""
        return self._by_key.get(key)

    def of_number(self, number: int) -> StoredSnapshot | None:
        """The one with a number."""
        return self._by_number.get(number)

    def best(
        self,
        tokens: NDArray[np.int32],
        scope: str,
        cost: Callable[[StoredSnapshot], float],
    ) -> tuple[StoredSnapshot, int] | None:
        """The snapshot that saves a prompt the most, and how many tokens they share.

        Args:
            tokens: The prompt.
            scope: Its scope.
            cost: What getting at a snapshot costs, in tokens.
        """
        found: tuple[StoredSnapshot, int] | None = None
        found_rank: tuple[float, ...] = ()
        for number, shared in self._tree.match(scope, tokens).items():
            snapshot = self._by_number[number]
            if self._whole_only and shared < len(snapshot.tokens):
                continue
            saved = shared - cost(snapshot)
            blocks = min(shared, snapshot.num_block_tokens)
            rank = (saved, blocks, -len(snapshot.tokens), -number)
            if saved > 0 and (found is None or rank > found_rank):
                found, found_rank = (snapshot, shared), rank
        return found

    def stand_in(
        self, tokens: NDArray[np.int32], scope: str, num_block_tokens: int
    ) -> StoredSnapshot | None:
        """A snapshot in memory that serves whoever could use one of these tokens."""
        if self._whole_only:
            return None
        for number, shared in self._tree.match(scope, tokens).items():
            snapshot = self._by_number[number]
            if (
                shared == len(tokens)
                and snapshot.payload is not None
                and len(snapshot.tokens) <= _MAX_STAND_IN * len(tokens)
                and snapshot.num_block_tokens >= num_block_tokens
            ):
                return snapshot
        return None

    def made_needless_by(self, new: StoredSnapshot) -> list[StoredSnapshot]:
        """Snapshots that ``new``, which is not added yet, stands in for."""
        if self._whole_only:
            return []
        shared_with = self._tree.match(new.scope, new.tokens)
        return [
            old
            for old, shared in ((self._by_number[n], shared) for n, shared in shared_with.items())
            if shared == len(old.tokens)
            and len(new.tokens) <= _MAX_STAND_IN * shared
            and new.num_block_tokens >= old.num_block_tokens
        ]


def scope_of(salt: str) -> str:
    """A salt's digest: what clients keep secret belongs neither on disk nor into anybody's sight."""
    return digest(salt.encode()).hex() if salt else ""


def usage(snapshots: list[StoredSnapshot], capacity_bytes: int) -> TierUsage:
    """What snapshots take of a tier."""
    return TierUsage(
        num_entries=len(snapshots),
        num_tokens=sum(len(snapshot.tokens) for snapshot in snapshots),
        num_bytes=sum(snapshot.num_bytes for snapshot in snapshots),
        capacity_bytes=capacity_bytes,
    )
