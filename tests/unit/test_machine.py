"""What a machine offers: a container's limits, cores, memory, features of the CPU; sizes for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker import machine
from stoker.machine import Limits

# ------------------------------------------------------------------ the container's limits


def group(root: Path, folder: str, **files: str) -> None:
    place = root / "sys" / "fs" / "cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)


def belongs_to(root: Path, text: str) -> None:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(text)


def test_the_least_limit_between_a_process_and_the_root_counts(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/group/job\n")
    group(tmp_path, "group/job", cpu__max="max 100000", memory__max="max", memory__current="5")
    group(tmp_path, "group", cpu__max="150000 100000", memory__max="9000", memory__current="4000")
    group(tmp_path, "group", memory__stat="anon 1\ninactive_file 1000\n")
    group(tmp_path, ".", memory__max="20000", memory__current="19000")
    assert machine.read_limits(tmp_path) == Limits(cores=1.5, memory=9000, memory_left=1000)


def test_version_1_and_a_path_that_is_the_hosts(tmp_path: Path) -> None:
    belongs_to(tmp_path, "7:memory:/on/the/host\n3:cpu,cpuacct:/\n0::/\n")
    group(tmp_path, "cpu,cpuacct", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    group(tmp_path, "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="1000")
    assert machine.read_limits(tmp_path) == Limits(cores=2.0, memory=5000, memory_left=4000)


def test_no_limits(tmp_path: Path) -> None:
    assert machine.read_limits(tmp_path) == Limits()
    belongs_to(tmp_path, "4:memory:/\n3:cpu:/\n")
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(
        tmp_path, "memory", memory__limit_in_bytes=str((1 << 63) - 4096), memory__usage_in_bytes="1"
    )
    assert machine.read_limits(tmp_path) == Limits()


def test_a_quota_of_less_than_a_core_leaves_one() -> None:
    assert machine.usable_cores(Limits(cores=0.5)) == 1
    assert machine.usable_cores(Limits(cores=1e6)) == machine.usable_cores(Limits()) >= 1


def test_a_containers_memory_is_what_is_available() -> None:
    free = machine.available_memory(Limits())
    assert machine.available_memory(Limits(memory=3_000_000, memory_left=1_500_000)) == 1_500_000
    assert machine.available_memory(Limits(memory_left=1 << 60)) > free // 4


def test_the_limits_in_force_count_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_limits", lambda: Limits(cores=0.5, memory_left=1000))
    assert (machine.usable_cores(), machine.available_memory()) == (1, 1000)


# ------------------------------------------------------------------ the CPU


@pytest.mark.parametrize("title", ["flags", "Features"])
def test_name_and_features_of_a_cpu(tmp_path: Path, title: str) -> None:
    (tmp_path / "proc").mkdir()
    core = "processor\t: {}\nmodel name\t: Some  CPU\n{}\t: {}\n\n"
    text = core.format(0, title, "one two") + core.format(1, title, "others")
    (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert machine.cpu_flags(tmp_path) == {"one", "two"}
    assert machine.cpu_name(tmp_path) == "Some CPU"


def test_a_system_that_tells_nothing_of_its_cpu(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path) == frozenset()
    assert isinstance(machine.cpu_name(tmp_path), str)


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.0 MB"),
        (96_576_768, "96.6 MB"),
        (1_509_949_440, "1.5 GB"),
        (2 * 10**12, "2.0 TB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert machine.format_bytes(count) == text
