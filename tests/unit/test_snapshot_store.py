"""The second tier of the prefix cache, against a model of it, and on disks that go wrong."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from stoker import CacheEntry, EvictionStrategy
from stoker.engine.snapshot_disk import DiskUnavailableError, SnapshotDirectory
from stoker.engine.snapshot_files import Description, key_of, write_snapshot
from stoker.engine.snapshot_store import StoreLimits, TieredStore
from stoker.testing import FakeClock

WAIT_S = 30.0
PRINT = "0" * 32


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def payload(tokens: Sequence[int], size: int = 40) -> bytes:
    return random.Random(repr(list(tokens))).randbytes(size)


class Disk:
    """A directory for snapshots and the stores in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def files(self) -> list[Path]:
        return sorted((self.root / PRINT).glob("*.kv"))

    @contextlib.contextmanager
    def store(self, host: int = 1000, disk: int = 10_000, **options: Any) -> Iterator[TieredStore]:
        store = TieredStore(
            StoreLimits(host, disk, **options.pop("limits", {})),
            fingerprint=PRINT,
            directory=SnapshotDirectory(self.root, PRINT),
            **options,
        )
        try:
            yield store
        finally:
            store.close()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "snapshots")


def put(store: TieredStore, *tokens: int, salt: str = "", size: int = 40, **how: Any) -> bool:
    return store.put(ids(*tokens), salt, "t", payload(tokens, size), 1.0, **how)


def fetch(store: TieredStore, *tokens: int, salt: str = "") -> bytes | None:
    found = store.match(ids(*tokens), salt)
    if found is None or not store.is_ready(found.key, WAIT_S):
        return None
    return store.get(found.key)


def wait_until(condition: Callable[[], bool], store: TieredStore) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
        store.evict(0.0)  # takes up what the disk has done
    raise AssertionError("it did not happen")


# --------------------------------------------------------------------------- host memory


def test_the_longest_prefix_of_the_same_scope_is_found() -> None:
    store = TieredStore(StoreLimits(1000))
    assert put(store, 1, 2)
    assert put(store, 1, 2, 3, 4, 5, 6)
    assert put(store, 1, 2, 3, 9, salt="secret")
    found = store.match(ids(1, 2, 3, 9, 9), "")
    assert found is not None
    assert (found.num_shared, found.num_tokens, found.tier) == (3, 6, "host")
    assert store.get(found.key) == payload((1, 2, 3, 4, 5, 6))
    secret = store.match(ids(1, 2, 3, 9, 9), "secret")
    assert secret is not None
    assert secret.num_shared == 4
    assert store.match(ids(1, 2), "other") is None
    assert store.match(ids(7), "") is None
    assert store.get("nonsense") is None


def test_a_salt_is_not_kept_as_it_came(disk: Disk) -> None:
    with disk.store(host=0) as store:
        assert put(store, 1, 2, salt="my secret")
        assert all("secret" not in entry.salt for entry in store.entries())
    assert all(b"secret" not in file.read_bytes() for file in disk.files)


def test_of_equal_matches_the_one_with_more_whole_blocks_and_then_the_shorter_one_is_taken() -> (
    None
):
    store = TieredStore(StoreLimits(1000))
    put(store, 1, 2, 3, 4, 8, num_block_tokens=0)
    put(store, 1, 2, 3, 4, 9, 9, num_block_tokens=4)
    put(store, 1, 2, 3, 4, 7, 7, 7, num_block_tokens=4)
    found = store.match(ids(1, 2, 3, 4), "")
    assert found is not None
    assert (found.num_block_tokens, found.num_tokens) == (4, 6)


def test_a_runtime_that_cannot_truncate_gets_whole_prefixes_only() -> None:
    store = TieredStore(StoreLimits(1000, whole_only=True))
    put(store, 1, 2)
    put(store, 1, 2, 3, 4)
    found = store.match(ids(1, 2, 3), "")
    assert found is not None
    assert found.num_tokens == found.num_shared == 2


def test_a_longer_snapshot_takes_the_place_of_what_it_begins_with() -> None:
    store = TieredStore(StoreLimits(1000))
    put(store, 1, 2, 3)
    put(store, 1, 2, 3, 4)
    put(store, 1, 2)
    assert sorted(entry.num_tokens for entry in store.entries()) == [4]
    assert store.stats().evictions == {"replaced": 1}
    put(store, *range(1, 10))  # more than twice as long: too dear to restore for the short one
    assert sorted(entry.num_tokens for entry in store.entries()) == [4, 9]


def test_what_is_too_large_or_empty_is_refused() -> None:
    store = TieredStore(StoreLimits(100))
    assert not put(store, 1, size=101)
    assert not put(store)
    assert store.entries() == []


def test_the_least_recently_used_goes_first_and_it_is_told_why() -> None:
    clock = FakeClock()
    store = TieredStore(StoreLimits(100), clock=clock)
    put(store, 1)
    clock.advance(1)
    put(store, 2)
    clock.advance(1)
    assert fetch(store, 1) == payload((1,))
    clock.advance(1)
    put(store, 3)
    assert fetch(store, 2) is None
    assert fetch(store, 1) is not None
    (gone,) = store.stats().recent
    assert (gone.reason, gone.tier, gone.tenant, gone.stored) == ("bytes", "host", "t", False)
    assert (gone.num_bytes, gone.age_s, gone.num_hits) == (40, 2.0, 0)


def test_time_to_live() -> None:
    clock = FakeClock()
    store = TieredStore(StoreLimits(1000, ttl_s=10), clock=clock)
    put(store, 1)
    clock.advance(6)
    put(store, 2)
    assert store.evict(clock()) == 0
    clock.advance(5)
    assert store.evict(clock()) == 1
    assert fetch(store, 1) is None
    assert fetch(store, 2) is not None
    assert store.stats().evictions == {"ttl": 1}


@pytest.mark.parametrize("failure", ["raise", "nothing", "twice", "endless"])
def test_a_strategy_that_fails_costs_a_counter(failure: str) -> None:
    class Broken(EvictionStrategy):
        def order(self, entries: Sequence[CacheEntry], now_s: float) -> Any:
            if failure == "raise":
                raise RuntimeError("no")
            if failure == "endless":
                return (entries[0] for _ in iter(int, 1))
            return [] if failure == "nothing" else [*entries, *entries]

    store = TieredStore(StoreLimits(100), Broken())
    for token in range(6):
        put(store, token)
    assert len(store.entries()) == 2
    assert store.stats().num_strategy_errors > 0
    assert fetch(store, 5) is not None


def test_the_strategy_decides() -> None:
    class NewestFirst(EvictionStrategy):
        def order(self, entries: Sequence[CacheEntry], now_s: float) -> Sequence[CacheEntry]:
            return sorted(entries, key=lambda entry: -entry.entry_id)

    store = TieredStore(StoreLimits(100), NewestFirst())
    for token in range(4):
        put(store, token)
    assert fetch(store, 0) is not None
    assert fetch(store, 2) is None


def test_clear_and_close() -> None:
    store = TieredStore(StoreLimits(1000))
    put(store, 1)
    put(store, 2)
    assert store.clear() == 2
    assert store.match(ids(1), "") is None
    assert store.stats().tiers["host"].num_bytes == 0
    store.close()
    store.close()


# --------------------------------------------------------------------------- disk


def test_what_does_not_fit_into_memory_goes_to_disk_and_comes_back(disk: Disk) -> None:
    with disk.store(host=100) as store:
        for token in range(10):
            assert put(store, token, token)
        for token in range(10):
            assert fetch(store, token, token) == payload((token, token))
        wait_until(lambda: store.stats().tiers["host"].num_entries <= 3, store)
        assert store.stats().tiers["disk"].num_entries >= 7
        stats = store.stats()
        assert stats.tiers["host"].num_bytes <= 100 + 40
        assert stats.num_hits == 10
        assert all(eviction.stored for eviction in stats.recent)


def test_reading_is_begun_by_asking_and_never_waited_for_unless_told(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1, 2)
    with disk.store(host=0) as store:
        found = store.match(ids(1, 2, 3), "")
        assert found is not None
        assert found.tier == "disk"
        # Either not there yet, or it came meanwhile; in the end it is there.
        assert store.get(found.key) in (None, payload((1, 2)))
        assert store.is_ready(found.key, WAIT_S)
        assert store.get(found.key) == payload((1, 2))


def test_it_survives_a_restart_also_what_was_only_in_memory(disk: Disk) -> None:
    with disk.store(host=100) as store:
        for token in range(5):
            put(store, token, 7, salt="s")
    with disk.store(host=100) as store:
        assert len(store.entries()) == 5
        assert {entry.tenant for entry in store.entries()} == {"t"}
        assert fetch(store, 3, 7) is None
        for token in range(5):
            assert fetch(store, token, 7, salt="s") == payload((token, 7))


def test_what_was_used_last_is_remembered_across_restarts(disk: Disk) -> None:
    clock = FakeClock()
    with disk.store(host=0, clock=clock) as store:
        put(store, 1)
        put(store, 2)
    old, new = (disk.root / PRINT / f"{key_of('', ids(token))}.kv" for token in (1, 2))
    os.utime(old, (1, 1))
    limits = {"ttl_s": 1000.0}
    with disk.store(host=0, clock=clock, limits=limits) as store:
        assert store.evict(clock()) == 1
        assert store.match(ids(1), "") is None
        assert store.match(ids(2), "") is not None
    assert not old.exists()
    assert new.exists()


def test_the_disk_is_bounded(disk: Disk) -> None:
    with disk.store(host=0, disk=3000) as store:
        for token in range(40):
            put(store, token, size=200)
            store.is_ready(key_of("", ids(token)), 0)
    assert 0 < sum(file.stat().st_size for file in disk.files) <= 3000
    with disk.store(host=0, disk=1900) as store:
        assert store.stats().tiers["disk"].num_entries > 0
    assert sum(file.stat().st_size for file in disk.files) <= 1900


def test_what_is_computed_quicker_than_read_does_not_go_to_disk(disk: Disk) -> None:
    with disk.store(host=0) as store:
        assert not store.put(ids(1), "", "t", payload((1,)), 1e-12)
        assert store.put(ids(2), "", "t", payload((2,)), 1.0)


def test_dropped_while_it_is_written_and_put_again(disk: Disk) -> None:
    with disk.store(host=0, disk=1_000_000) as store:
        for _ in range(20):
            assert put(store, 1, 2)
            store.clear()
        assert put(store, 1, 2)
        assert fetch(store, 1, 2) == payload((1, 2))
    assert len(disk.files) == 1
    with disk.store() as store:
        store.clear()
    assert disk.files == []


def test_files_belong_to_this_user_alone(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1)
    if sys.platform != "win32":
        assert stat.S_IMODE(disk.files[0].stat().st_mode) == 0o600
        assert stat.S_IMODE((disk.root / PRINT).stat().st_mode) == 0o700
        (disk.root / PRINT).chmod(0o777)
        with pytest.raises(DiskUnavailableError, match="others may write into it"):
            SnapshotDirectory(disk.root, PRINT)


def test_a_second_server_keeps_out_and_later_gets_in(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1)
        with pytest.raises(DiskUnavailableError, match="used by another server"):
            SnapshotDirectory(disk.root, PRINT)
        SnapshotDirectory(disk.root, "1" * 32).close()  # another model has its own
        assert fetch(store, 1) is not None
    with disk.store() as store:
        assert fetch(store, 1) is not None


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskUnavailableError, match="cannot be used"):
        SnapshotDirectory(tmp_path / "file", PRINT)


def test_what_models_of_old_left_goes_when_there_is_too_much_of_it(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1)
        put(store, 2)
    size = disk.files[0].stat().st_size
    os.utime(disk.files[0], (1, 1))
    kept = disk.files[1]
    (disk.root / "readme").write_text("not ours")
    other = SnapshotDirectory(disk.root, "1" * 32)
    other.sweep_others(2 * size)
    assert len(disk.files) == 2
    with disk.store() as busy:
        assert busy.entries()
        other.sweep_others(0)  # somebody is using it
        assert len(disk.files) == 2
        os.utime(kept)
    other.sweep_others(size)
    assert disk.files == [kept]
    assert (disk.root / "readme").exists()
    other.close()


def test_a_disk_that_is_full_costs_the_snapshot_only(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with disk.store(host=100) as store:
        monkeypatch.setattr("stoker.engine.snapshot_disk.write_snapshot", full)
        for token in range(6):
            put(store, token)
        for token in range(6):
            store.is_ready(key_of("", ids(token)), 0.01)
        assert fetch(store, 5) is not None
        store.close()
    assert disk.files == []


def test_half_written_files_are_removed_and_files_of_others_left_alone(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1)
    folder = disk.root / PRINT
    partial = folder / f".{disk.files[0].name}.123.partial"
    partial.write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (folder / "other.kv").write_text("mine, too")
    with disk.store() as store:
        assert len(store.entries()) == 1
        assert store.stats().num_damaged == 0
    assert not partial.exists()
    assert (folder / "notes.txt").exists()
    assert (folder / "other.kv").exists()


# --------------------------------------------------------------------------- damage

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "empty": lambda _: b"",
    "head cut": lambda data: data[:20],
    "description cut": lambda data: data[:60],
    "payload cut": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "other magic": lambda data: b"GGUF" + data[4:],
    "other version": lambda data: data[:8] + b"\x02\x00\x00\x00" + data[12:],
    "huge description": lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:],
    "noise": lambda data: random.Random(1).randbytes(len(data)),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_counted_and_removed_at_the_start(disk: Disk, how: str) -> None:
    with disk.store(host=0) as store:
        put(store, 1, 2, 3)
        put(store, 4, 5, 6)
    file, other = disk.files
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    with disk.store() as store:
        assert len(store.entries()) == 1
        assert store.stats().num_damaged == 1
        assert store.stats().tiers["disk"].num_entries == 1
    assert disk.files == [other]


def test_a_snapshot_of_another_model_or_name_is_not_taken(disk: Disk) -> None:
    with disk.store(host=0):
        pass
    for fingerprint, key in (("f" * 32, key_of("", ids(1))), (PRINT, "a" * 32)):
        about = Description(
            fingerprint=fingerprint,
            scope="",
            tenant="t",
            num_tokens=1,
            num_block_tokens=0,
            seconds_to_make=1.0,
            num_bytes=5,
        )
        write_snapshot(disk.root / PRINT / f"{key}.kv", about, ids(1), b"hello")
    with disk.store() as store:
        assert store.entries() == []
        assert store.stats().num_damaged == 2
    assert disk.files == []


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_out(data: st.DataObject) -> None:
    """Before the start or while it runs: what is not as it was written never comes back."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder))
        with disk.store(host=0) as store:
            put(store, 1, 2, 3)
        (file,) = disk.files
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        if data.draw(st.booleans(), label="while it runs"):
            with disk.store(host=0) as store:
                file.write_bytes(content)
                assert fetch(store, 1, 2, 3) is None
                assert store.stats().num_damaged == 1
                assert store.match(ids(1, 2, 3), "") is None
                assert store.stats().evictions == {"damaged": 1}
                assert put(store, 1, 2, 3)
                assert fetch(store, 1, 2, 3) == payload((1, 2, 3))
        else:
            file.write_bytes(content)
            with disk.store(host=0) as store:
                assert fetch(store, 1, 2, 3) is None
                assert store.stats().num_damaged == 1
        assert len(disk.files) <= 1


def test_a_file_that_vanished_is_a_miss(disk: Disk) -> None:
    with disk.store(host=0) as store:
        put(store, 1)
    with disk.store(host=0) as store:
        disk.files[0].unlink()
        assert fetch(store, 1) is None
        assert store.match(ids(1), "") is None


# --------------------------------------------------------------------------- any order of events


class StoreMachine(RuleBasedStateMachine):
    """Random puts, matches, gets, ends of life and restarts, against the truth about each payload."""

    prompts = Bundle("prompts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        self.known: set[tuple[str, tuple[int, ...]]] = set()
        self.store: TieredStore | None = None

    @initialize(
        host=st.sampled_from([0, 100, 350]),
        disk=st.sampled_from([0, 1200, 100_000]),
        whole_only=st.booleans(),
    )
    def open(self, host: int, disk: int, whole_only: bool) -> None:
        self.limits = StoreLimits(host, disk, ttl_s=50.0, whole_only=whole_only)
        self._start()

    def _start(self) -> None:
        directory = SnapshotDirectory(self.folder, PRINT) if self.limits.disk_bytes else None
        self.store = TieredStore(
            self.limits, fingerprint=PRINT, directory=directory, clock=self.clock
        )

    @rule(target=prompts, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=7))
    def prompt(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(tokens)

    @rule(tokens=prompts, salt=st.sampled_from(["", "a"]), size=st.integers(1, 120))
    def put(self, tokens: tuple[int, ...], salt: str, size: int) -> None:
        assert self.store is not None
        size = min(size, 20 * len(tokens))
        self.store.put(ids(*tokens), salt, "t", payload((*tokens, len(salt)), size), 1.0)
        self.known.add((salt, tokens))

    @rule(tokens=prompts, salt=st.sampled_from(["", "a"]), wait=st.booleans())
    def look_up(self, tokens: tuple[int, ...], salt: str, wait: bool) -> None:
        assert self.store is not None
        found = self.store.match(ids(*tokens), salt)
        if found is None:
            return
        shared = found.num_shared
        sources = [
            t
            for s, t in self.known
            if s == salt and len(t) == found.num_tokens and t[:shared] == tokens[:shared]
        ]
        assert sources
        assert shared <= min(found.num_tokens, len(tokens))
        if self.limits.whole_only:
            assert shared == found.num_tokens
        if wait:
            self.store.is_ready(found.key, WAIT_S)
        got = self.store.get(found.key)
        if wait:
            assert got is not None
        if got is not None:
            wanted = [payload((*t, len(salt)), len(got)) for t in sources]
            assert got in wanted

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        assert self.store is not None
        self.clock.advance(seconds)
        self.store.evict(self.clock())
        assert all(entry.last_used_s > self.clock() - 50.0 for entry in self.store.entries())

    @rule()
    def clear(self) -> None:
        assert self.store is not None
        self.store.clear()
        assert self.store.entries() == []

    @precondition(lambda self: self.limits.disk_bytes)
    @rule()
    def restart(self) -> None:
        assert self.store is not None
        self.store.close()
        files = list((self.folder / PRINT).glob("*.kv"))
        assert sum(file.stat().st_size for file in files) <= self.limits.disk_bytes + 300
        self._start()
        assert len(self.store.entries()) == len(files)
        assert self.store.stats().num_damaged == 0

    @invariant()
    def limits_hold(self) -> None:
        if self.store is None:
            return
        tiers = self.store.stats().tiers
        # One snapshot that was just read may lie beside them; what is being written counts as memory, too.
        assert self.store._host_bytes <= self.limits.host_bytes + 120
        assert self.store._host_bytes <= tiers["host"].num_bytes
        keys = [entry.entry_id for entry in self.store.entries()]
        assert len(keys) == len(set(keys))

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = pytest.mark.slow(StoreMachine.TestCase)
