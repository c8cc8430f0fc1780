"""Profiles: what ``stoker tune`` found best for a model on a machine, as files.

A profile is a JSON file in the user's data folder (``XDG_DATA_HOME``, else ``~/.local/share``; in it
``stoker/profiles``), named after the model and the machine it was measured on. ``stoker.tuned`` says when it
holds good and what is taken of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import psutil

from stoker.errors import ConfigError
from stoker.machine import Limits, cpu_flags, cpu_name, usable_cores
from stoker.types import LocalModel

__all__ = [
    "Machine",
    "ModelFingerprint",
    "Profile",
    "ProfileSetting",
    "Weights",
    "data_folder",
    "fingerprint",
    "other_profiles",
    "profile_path",
    "read_profile",
    "this_machine",
    "write_profile",
]

_FORMAT = 1
_SAMPLE_BYTES = 1 << 20  # of a model's start and end: its header, and enough of its weights
# Instructions that decide which kernels a library picks.
_FLAGS = frozenset(
    "avx avx2 avx512f avx512bw avx512vl avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 f16c fma asimd asimddp asimdhp i8mm bf16 sve sve2 sme".split()
)
_SCHEDULER_FIELDS = ("max_num_batched_tokens", "max_prefill_tokens_while_decoding", "target_step_s")


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what stands in the file."""


class Machine(_Record, frozen=True, kw_only=True):
    """What of a machine decides how fast settings are.

    Attributes:
        cpu: The CPU's name.
        flags: Its features that matter to kernels, sorted.
        cores: Cores that this process may use.
        memory_gib: Memory, in whole GiB.
    """

    cpu: str
    flags: list[str]
    cores: int
    memory_gib: int


class ModelFingerprint(_Record, frozen=True, kw_only=True):
    """Which weights they were.

    Attributes:
        name: The model's id, for people.
        size_bytes: Size on disk.
        digest: SHA-256 over the size and the first and last MiB.
    """

    name: str
    size_bytes: int
    digest: str


class ProfileSetting(_Record, frozen=True, kw_only=True):
    """One thing that was found better than the default.

    Attributes:
        name: The tunable.
        value: Its value's label.
        options: The backend's options that make it so.
        scheduler: Settings of ``[scheduler]`` that make it so.
        requires: Values that other options must have for it to work.
    """

    name: str
    value: str
    options: dict[str, Any] = {}
    scheduler: dict[str, float] = {}
    requires: dict[str, list[Any]] = {}


class Weights(_Record, frozen=True, kw_only=True):
    """A file with the same model's weights in another type, made with the user's consent.

    Attributes:
        type: The type, e.g. ``"q8_0"``.
        path: Where it lies.
        digest: As in ``ModelFingerprint``.
    """

    type: str
    path: str
    digest: str


class Profile(_Record, frozen=True, kw_only=True):
    """What was found, for which machine and model, and by how much it was better.

    Attributes:
        machine: Where it was measured.
        model: What was measured.
        backend: The backend that ran it.
        versions: Versions of stoker, the backend and its libraries.
        load: The load it was chosen for.
        date: When, as an ISO date and time with its zone.
        settings: What to set.
        weights: Other weights to load; ``None`` for the model's own.
        figures: What was measured, as numbers: ``speed`` against the defaults, ``kl_mean``, ...
        complete: Whether the search ended by itself and its result was checked against the defaults.
        format: Layout of this file.
    """

    machine: Machine
    model: ModelFingerprint
    backend: str
    versions: dict[str, str]
    load: str
    date: str
    settings: list[ProfileSetting] = []
    weights: Weights | None = None
    figures: dict[str, float] = {}
    complete: bool = True
    format: int = _FORMAT

    @property
    def label(self) -> str:
        """How the start-up block names it."""
        return f"{self.load}, tuned {self.date[:10]}"


# --------------------------------------------------------------------------- fingerprints


def data_folder() -> Path:
    """Where stoker keeps what should last; it may not exist yet."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "stoker"


def this_machine() -> Machine:
    """The machine this process runs on, as far as this process may use it; without a container's quota."""
    return Machine(
        cpu=cpu_name(),
        flags=sorted(_FLAGS & cpu_flags()),
        cores=usable_cores(Limits()),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
    )


def fingerprint(local: LocalModel) -> ModelFingerprint:
    """Which weights a model has; quick, whatever its size.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256(f"{local.size_bytes} ".encode())
    if local.path.is_dir():
        for file in sorted(local.path.iterdir()):
            if file.is_file():
                digest.update(f"{file.name} {file.stat().st_size} ".encode())
                _sample(file, digest)
    elif local.path.exists():
        _sample(local.path, digest)
    else:  # a source without files, such as the scripted one
        digest.update(local.reference.encode())
    return ModelFingerprint(
        name=local.model_id, size_bytes=local.size_bytes, digest=digest.hexdigest()
    )


def _sample(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(file.tell(), path.stat().st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))


# --------------------------------------------------------------------------- files


def profile_path(machine: Machine, model: ModelFingerprint) -> Path:
    """Where the profile of a model on a machine lies, if there is one."""
    return data_folder() / "profiles" / f"{_stem(model)}-{_digest(machine)[:12]}.json"


def other_profiles(path: Path, model: ModelFingerprint) -> list[Path]:
    """The profiles of a model for other machines, beside ``path``."""
    return [found for found in sorted(path.parent.glob(f"{_stem(model)}-*.json")) if found != path]


def _stem(model: ModelFingerprint) -> str:
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in model.name)
    return f"{name[:80]}-{model.digest[:16]}"


def _digest(machine: Machine) -> str:
    return hashlib.sha256(msgspec.json.encode(machine)).hexdigest()


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ConfigError: It cannot be read or is no profile; the message names it.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no profile: {error}") from error
    if profile.format != _FORMAT:
        raise ConfigError(f"{path}: has format {profile.format}; this stoker reads {_FORMAT}")
    for setting in profile.settings:
        for key, value in setting.scheduler.items():
            if key not in _SCHEDULER_FIELDS or not value > 0:
                raise ConfigError(f"{path}: scheduler.{key} = {value} is no setting of a profile")
    return profile


def write_profile(profile: Profile) -> Path:
    """Put a profile where ``serve`` finds it, whole or not at all, in place of an older one.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = profile_path(profile.machine, profile.model)
    text = msgspec.json.format(msgspec.json.encode(profile), indent=2)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = Path(file.name)
            file.write(text + b"\n")
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
