"""The machine: Python, CPU, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil

from stoker import __version__
from stoker.interfaces import Finding
from stoker.machine import Limits, available_memory, format_bytes, read_limits, usable_cores
from stoker.profiles import data_folder, this_machine

__all__ = ["check_cpu", "check_disk", "check_memory", "check_python"]

_SCANT_MEMORY = 2**30
_SCANT_DISK, _NO_DISK = 5 * 10**9, 2 * 10**8


# --------------------------------------------------------------------------- Python


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    bits = struct.calcsize("P") * 8
    name = f"{platform.python_implementation()} {platform.python_version()}"
    text = f"{name}, {bits} bits, {platform.system()} {platform.machine()}; stoker {__version__}"
    if bits < 64:
        yield Finding(
            level="warning",
            topic="python",
            message=f"{text}: a process of 32 bits holds models of at most two or three gigabytes.",
            cure="Use a 64-bit Python.",
        )
        return
    yield Finding(level="ok", topic="python", message=f"{text}.")
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        yield Finding(
            level="note",
            topic="python",
            message=f"File names are {sys.getfilesystemencoding()}, not UTF-8.",
            cure="Set PYTHONUTF8=1 if models with other letters in their names are not found.",
        )


# --------------------------------------------------------------------------- CPU


def check_cpu(
    flags: Iterable[str] | None = None, limits: Limits | None = None
) -> Iterator[Finding]:
    """Cores, and the instructions that kernels live on.

    Args:
        flags: The CPU's features, as Linux names them; by default this one's.
        limits: Of the control groups; by default those in force.
    """
    machine = this_machine()
    limits = read_limits() if limits is None else limits
    usable, logical = usable_cores(limits), psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False)
    text = f"{machine.cpu}: {usable} of {logical} cores can be used"
    text += f" ({physical} physical)." if physical and physical != logical else "."
    yield Finding(level="ok", topic="cpu", message=text)
    if limits.cores is not None and limits.cores < machine.cores:
        yield Finding(
            level="note",
            topic="cpu",
            message=f"This process has a quota of {limits.cores:g} cores: threads beyond it are "
            "paused in turn.",
            cure="Give the container a whole number of cores of its own.",
        )
    if physical and physical < logical and usable > physical:
        yield Finding(
            level="note",
            topic="cpu",
            message=f"Pairs of cores share their arithmetic units: {physical} threads may be "
            f"as fast as {usable}.",
            cure="Try `stoker tune`, or [performance] threads.",
        )
    yield from _features(set(machine.flags if flags is None else flags))


def _features(flags: set[str]) -> Iterator[Finding]:
    """What the CPU's instructions mean for serving."""
    if not flags:
        yield Finding(
            level="note",
            topic="cpu features",
            message="The system does not tell the CPU's features.",
        )
        return
    arm = flags & {"asimd", "asimddp", "i8mm", "sve", "sve2", "sme"}
    if arm:
        has = ", ".join(sorted(flags))
        fast = "i8mm" in flags or "asimddp" in flags
        meaning = "quantised weights have fast kernels" if fast else "without dot products: slow"
        yield Finding(
            level="ok" if fast else "warning", topic="cpu features", message=f"{has}: {meaning}."
        )
        return
    known = [(name, means) for names, name, means in _X86 if flags & names]
    if "avx2" not in flags:
        yield Finding(
            level="warning",
            topic="cpu features",
            message="The CPU has no AVX2: everything takes several times as long, and packages that "
            "were built for newer CPUs crash with SIGILL.",
            cure="Build the backend's library on this machine, from source.",
        )
        return
    has = "; ".join(f"{name} ({means})" for name, means in known)
    yield Finding(level="ok", topic="cpu features", message=f"{has}.")
    if "amx_tile" in flags:
        yield Finding(
            level="note",
            topic="amx",
            message="AMX makes prompts several times faster, where a backend's library was compiled rightly: "
            "gcc 12 drops stores before AMX's configuration, and kernels that it compiled so crash. The "
            "backends' self-tests below try it.",
        )


_X86 = (
    ({"avx2"}, "AVX2", "the least that fast kernels need"),
    ({"avx512f"}, "AVX-512", "twice as wide"),
    ({"avx512_vnni", "avx_vnni"}, "VNNI", "quick 8-bit integers: quantised weights"),
    ({"avx512_bf16"}, "BF16", "bfloat16 at full speed: bf16 weights and KV"),
    ({"amx_tile"}, "AMX", "matrix units: fast prompts and batches"),
)


# --------------------------------------------------------------------------- memory and disk


def check_memory(limits: Limits | None = None) -> Iterator[Finding]:
    """How much there is, and how much of it is free.

    Args:
        limits: Of the control groups; by default those in force.
    """
    limits = read_limits() if limits is None else limits
    total = int(psutil.virtual_memory().total)
    if limits.memory is not None and limits.memory < total:
        whose = f"{format_bytes(limits.memory)} by the container's limit, "
        whose += f"of the machine's {format_bytes(total)}"
    else:
        whose = format_bytes(total)
    available = available_memory(limits)
    scant = available < _SCANT_MEMORY
    yield Finding(
        level="warning" if scant else "ok",
        topic="memory",
        message=f"{whose}; {format_bytes(available)} are free.",
        cure="Only very small models fit: end other programs." if scant else "",
    )
    swapped = psutil.swap_memory().used
    if scant and swapped > _SCANT_MEMORY:
        yield Finding(
            level="warning",
            topic="memory",
            message=f"{format_bytes(swapped)} are swapped out: a model that is swapped is unusably slow.",
        )


def check_disk(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """The free space where models and stored things go.

    Args:
        folders: What for, and where; folders that do not exist yet count for those they will be in.
    """
    seen: dict[tuple[int, int], list[str]] = {}
    for what, folder in {**folders, "stoker's data": data_folder()}.items():
        try:
            place = _existing(folder)
            usage, device = shutil.disk_usage(place), place.stat().st_dev
            writable = os.access(place, os.W_OK)
        except OSError as error:
            yield Finding(
                level="warning",
                topic="disk",
                message=f"{folder} ({what}) cannot be looked at: {error}.",
            )
            continue
        if not writable:
            yield Finding(
                level="warning",
                topic="disk",
                message=f"{place} may not be written: {what} cannot be kept.",
                cure="Change its owner, or set XDG_CACHE_HOME, XDG_DATA_HOME or HF_HOME to another folder.",
            )
        seen.setdefault((device, usage.free), []).append(f"{what} in {folder}")
    for (_, free), what_in in seen.items():
        level: Literal["ok", "warning", "problem"] = "ok"
        if free < _SCANT_DISK:
            level = "warning" if free >= _NO_DISK else "problem"
        yield Finding(
            level=level,
            topic="disk",
            message=f"{format_bytes(free)} are free for {', '.join(what_in)}.",
            cure=""
            if level == "ok"
            else "Make room, or point HF_HOME and XDG_CACHE_HOME elsewhere.",
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
