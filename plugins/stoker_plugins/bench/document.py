"""The measurement as data: what ``--json`` writes."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

import stoker
from stoker_plugins.bench.figures import Figures, Spread, ratios, spread
from stoker_plugins.bench.runner import Experiment, Round
from stoker_plugins.bench.target import Target

__all__ = ["SCHEMA", "Document", "document", "known_figures", "machine"]

SCHEMA = "stoker-bench/1"
"""Names the document's form; the number changes when fields change their meaning or go."""


class RoundData(msgspec.Struct, kw_only=True):
    """One round: see ``runner.Round`` and ``figures.Figures``."""

    round: int
    whole: bool
    figures: Figures
    groups: dict[str, Figures]
    ttft_ms: list[float]


class TargetLoadData(msgspec.Struct, kw_only=True):
    """One load on one target."""

    rounds: list[RoundData]
    over_rounds: dict[str, Spread]
    ratios_of_first: dict[str, Spread]
    texts_compared: int | None = None
    texts_identical: int | None = None


class LoadData(msgspec.Struct, kw_only=True):
    """One load."""

    name: str
    targets: dict[str, TargetLoadData]


class TargetData(msgspec.Struct, kw_only=True):
    """What was measured."""

    name: str
    url: str
    model: str
    server: str
    notes: list[str]


class Document(msgspec.Struct, kw_only=True):
    """All of it. Ratios are the first target's figure over the other's, round by round."""

    schema: str
    started: str
    stoker_version: str
    machine: dict[str, Any]
    options: dict[str, Any]
    targets: list[TargetData]
    loads: list[LoadData]
    interrupted: bool


def known_figures(rounds: Sequence[Round], name: str) -> list[float | None]:
    """A figure by round; ``None`` where there is none."""
    values = [getattr(each.total, name) for each in rounds]
    return [None if v is None or math.isnan(v) else float(v) for v in values]


def machine() -> dict[str, Any]:
    """What it ran on. No names of machines or users."""
    import psutil

    from stoker.machine import cpu_name, usable_cores

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def document(
    targets: Sequence[Target],
    experiments: Sequence[Experiment],
    *,
    started: datetime.datetime,
    options: Mapping[str, Any],
    is_interrupted: bool,
) -> Document:
    """Put the document together.

    Args:
        targets: In the order in which they were given.
        experiments: What was measured.
        started: When, in UTC.
        options: The command's options, without secrets.
        is_interrupted: Whether it was broken off.
    """
    return Document(
        schema=SCHEMA,
        started=started.isoformat(timespec="seconds"),
        stoker_version=stoker.__version__,
        machine=machine(),
        options=dict(options),
        targets=[
            TargetData(name=t.name, url=t.url, model=t.model, server=t.server, notes=t.notes)
            for t in targets
        ],
        loads=[
            LoadData(
                name=each.name,
                targets={target.name: _target_load(each, target.name) for target in targets},
            )
            for each in experiments
        ],
        interrupted=is_interrupted,
    )


_NUMBERS = [
    name for name in Figures.__struct_fields__ if name not in ("failures", "requests", "duration_s")
]


def _target_load(experiment: Experiment, target: str) -> TargetLoadData:
    first = next(iter(experiment.rounds))
    rounds = experiment.counted(target)
    over_rounds, of_first = {}, {}
    for name in _NUMBERS:
        values = known_figures(rounds, name)
        if found := spread(values):
            over_rounds[name] = found
        if target != first and (
            found := ratios(known_figures(experiment.counted(first), name), values)
        ):
            of_first[name] = found
    texts = experiment.texts.get(target)
    return TargetLoadData(
        rounds=[
            RoundData(
                round=each.number,
                whole=each.is_whole,
                figures=each.total,
                groups=each.groups,
                ttft_ms=[round(value, 3) for value in each.ttft_ms],
            )
            for each in experiment.rounds[target]
        ],
        over_rounds=over_rounds,
        ratios_of_first=of_first,
        texts_compared=None if texts is None else texts.compared,
        texts_identical=None if texts is None else texts.identical,
    )
