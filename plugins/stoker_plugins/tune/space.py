"""What can be tuned: the backend's tunables and the core's own, as one list of dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from stoker.config import SchedulerConfig
from stoker.profiles import ProfileSetting

if TYPE_CHECKING:
    from stoker import Tunable

__all__ = ["WEIGHTS", "Assignment", "Dimension", "Space", "Value", "from_backend", "from_core"]

WEIGHTS = "weights"
"""The dimension of files with the same model's weights in other types."""

Assignment = Mapping[str, str]
"""Dimension -> the label of its value; those that are missing have their default."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a dimension, and what brings it about."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, float] = field(default_factory=dict)
    requires: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing to tune.

    Attributes:
        name: What ``--only`` takes.
        summary: One line for people.
        values: By label, in the order in which they are tried.
        default: The label of what is in force without a profile.
        changes_quality: Whether logits may differ by more than rounding.
        depends_on_company: Whether it is also measured beside a busy process.
    """

    name: str
    summary: str
    values: Mapping[str, Value]
    default: str
    changes_quality: bool = False
    depends_on_company: bool = False

    @property
    def keys(self) -> set[str]:
        """The options, and the settings as ``scheduler.<field>``, that its values set."""
        found = {key for value in self.values.values() for key in value.options}
        return found | {
            f"scheduler.{key}" for value in self.values.values() for key in value.scheduler
        }


class Space:
    """All dimensions of a tuning.

    Args:
        dimensions: In the order in which they are tuned.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.dimensions = {dimension.name: dimension for dimension in dimensions}

    def values(self, assignment: Assignment) -> list[tuple[Dimension, Value]]:
        """What an assignment sets beyond the defaults, in order."""
        return [
            (dimension, dimension.values[assignment[name]])
            for name, dimension in self.dimensions.items()
            if assignment.get(name, dimension.default) != dimension.default
        ]

    def options(self, assignment: Assignment) -> dict[str, Any]:
        """The backend's options of an assignment; later dimensions win."""
        merged: dict[str, Any] = {}
        for _, value in self.values(assignment):
            merged |= value.options
        return merged

    def scheduler(self, assignment: Assignment, base: SchedulerConfig) -> SchedulerConfig:
        """``[scheduler]`` under an assignment."""
        changes: dict[str, Any] = {}
        for _, value in self.values(assignment):
            for key, number in value.scheduler.items():
                changes[key] = type(getattr(base, key))(number)
        return msgspec.structs.replace(base, **changes)

    def works(self, assignment: Assignment) -> bool:
        """Whether every value finds what it requires."""
        options = self.options(assignment)
        return all(
            key not in options or options[key] in allowed
            for _, value in self.values(assignment)
            for key, allowed in value.requires.items()
        )

    def settings(self, assignment: Assignment) -> list[ProfileSetting]:
        """An assignment as it stands in a profile."""
        return [
            ProfileSetting(
                name=dimension.name,
                value=value.label,
                options=dict(value.options),
                scheduler=dict(value.scheduler),
                requires={key: list(allowed) for key, allowed in value.requires.items()},
            )
            for dimension, value in self.values(assignment)
            if dimension.name != WEIGHTS
        ]


def from_backend(tunables: Sequence[Tunable]) -> list[Dimension]:
    """A backend's tunables; those with one value only offer no choice."""
    return [
        Dimension(
            name=tunable.name,
            summary=tunable.summary,
            values={
                value.label: Value(value.label, options=value.options, requires=value.requires)
                for value in tunable.values
            },
            default=tunable.default,
            changes_quality=tunable.changes_quality,
            depends_on_company=tunable.depends_on_company,
        )
        for tunable in tunables
        if len(tunable.values) > 1 and tunable.default in {value.label for value in tunable.values}
    ]


def from_core() -> list[Dimension]:
    """The step's token budget and its limits."""
    base = SchedulerConfig()
    return [
        _numbers(
            "step_tokens",
            "max_num_batched_tokens",
            "Most tokens of one step",
            (1024, 256, 2048),
            base.max_num_batched_tokens,
        ),
        _numbers(
            "prefill_while_decoding",
            "max_prefill_tokens_while_decoding",
            "Most prompt tokens of a step that also decodes",
            (256, 64, 512),
            base.max_prefill_tokens_while_decoding,
        ),
        _numbers(
            "step_time",
            "target_step_s",
            "How long a step with prompt tokens should take, in seconds",
            (0.4, 0.1),
            base.target_step_s,
        ),
    ]


def _numbers(
    name: str, key: str, summary: str, others: Sequence[float], default: float
) -> Dimension:
    values = {
        f"{number:g}": Value(f"{number:g}", scheduler={key: number})
        for number in (default, *others)
    }
    return Dimension(name=name, summary=summary, values=values, default=f"{default:g}")
