"""What ``serve`` takes of a profile: only one that holds good here, and only below what the user has set.

A profile holds good as long as machine, model and versions are those it was measured with; one that does not
is left alone, and the log says so in one line. What a file, a variable or a flag sets is never overridden,
and settings that were measured together are taken together or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stoker.config import SchedulerConfig
from stoker.errors import ConfigError
from stoker.profiles import (
    Machine,
    ModelFingerprint,
    Profile,
    fingerprint,
    other_profiles,
    profile_path,
    read_profile,
    this_machine,
)
from stoker.types import LocalModel

__all__ = ["Tuned", "apply_profile", "choose_profile"]

logger = logging.getLogger("stoker.profiles")


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What to load a model with.

    Attributes:
        local: The model, or the profile's other weights of it.
        options: Options of the backend, below what the user has set.
        scheduler: When requests run.
        label: The profile's, empty without one.
    """

    local: LocalModel
    scheduler: SchedulerConfig
    options: Mapping[str, Any] = {}
    label: str = ""


def choose_profile(
    wanted: str, local: LocalModel, backend: str, versions: Mapping[str, str]
) -> Profile | None:
    """The profile to serve a model with, if one holds good here.

    Args:
        wanted: ``auto``, ``off``, or a file.
        local: The model.
        backend: The backend that loads it.
        versions: What ``stoker tune`` would write into a profile now.

    Returns:
        ``None`` if there is none; one that does not hold good any more is named in the log.

    Raises:
        ConfigError: ``wanted`` names a file that is no profile.
    """
    if wanted == "off":
        return None
    try:
        model = fingerprint(local)
    except OSError:
        return None  # whoever loads it says why
    machine = this_machine()
    path = profile_path(machine, model) if wanted == "auto" else Path(wanted).expanduser()
    if wanted == "auto":
        if not path.exists():
            _tell_of_others(path, model)
            return None
        try:
            profile = read_profile(path)
        except ConfigError as error:
            logger.warning("profile ignored: %s; `stoker tune` makes a new one", error)
            return None
    else:
        profile = read_profile(path)
    differs = _difference(profile, machine, model, backend, versions)
    if differs:
        logger.warning("profile %s ignored: %s; `stoker tune` makes a new one", path, differs)
        return None
    return profile


def _tell_of_others(path: Path, model: ModelFingerprint) -> None:
    others = other_profiles(path, model)
    if others:
        logger.info(
            "profile %s ignored: it was made on another machine; `stoker tune` makes one for this",
            others[0],
        )


def _difference(
    profile: Profile,
    machine: Machine,
    model: ModelFingerprint,
    backend: str,
    versions: Mapping[str, str],
) -> str:
    """Why a profile does not hold good here, in words; empty if it does."""
    if profile.model.digest != model.digest:
        return f"it was made for another model ({profile.model.name})"
    if profile.machine != machine:
        return (
            f"it was made on another machine ({profile.machine.cpu}, {profile.machine.cores} cores)"
        )
    if profile.backend != backend:
        return f"it was made with the backend {profile.backend}"
    for name in sorted({*profile.versions, *versions}):
        was, now = profile.versions.get(name, "none"), versions.get(name, "none")
        if was != now:
            return f"it was made with {name} {was}, and this is {now}"
    return ""


def apply_profile(
    profile: Profile | None,
    local: LocalModel,
    scheduler: SchedulerConfig,
    *,
    set_options: Mapping[str, Any],
    set_keys: Container[str] = (),
) -> Tuned:
    """Put a profile below what the user has set.

    A setting of the profile is dropped as a whole if the user has set any part of it, or set something
    that it cannot work with.

    Args:
        profile: As ``choose_profile`` returned it.
        local: The model.
        scheduler: The configured ``[scheduler]``.
        set_options: The backend's options that the user has set.
        set_keys: Dotted settings that the user has set, ``scheduler.target_step_s``. What differs from
            its default counts as set in any case.
    """
    if profile is None:
        return Tuned(local=local, scheduler=scheduler)
    defaults = SchedulerConfig()
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for setting in profile.settings:
        taken = any(key in set_options for key in setting.options) or any(
            f"scheduler.{key}" in set_keys or getattr(scheduler, key) != getattr(defaults, key)
            for key in setting.scheduler
        )
        works = all(
            key not in set_options or set_options[key] in values
            for key, values in setting.requires.items()
        )
        if taken or not works:
            logger.info("profile: %s is set otherwise, so it stays so", setting.name)
            continue
        options.update(setting.options)
        for key, value in setting.scheduler.items():
            changes[key] = type(getattr(defaults, key))(value)
    weights = _with_weights(profile, local)
    label = profile.label
    if profile.weights is not None and weights is not local:
        label += f", weights requantised to {profile.weights.type}"
    return Tuned(
        local=weights,
        options=options,
        scheduler=msgspec.structs.replace(scheduler, **changes),
        label=label,
    )


def _with_weights(profile: Profile, local: LocalModel) -> LocalModel:
    """The model, or the profile's other weights of it while they are what they were."""
    weights = profile.weights
    if weights is None:
        return local
    path = Path(weights.path)
    try:
        other = LocalModel(
            path=path,
            model_id=local.model_id,
            reference=local.reference,
            size_bytes=path.stat().st_size,
        )
        if fingerprint(other).digest == weights.digest:
            return other
        problem = "it has changed"
    except OSError as error:
        problem = error.strerror or str(error)
    logger.warning("profile: %s is not used: %s; the model's own weights are", path, problem)
    return local
