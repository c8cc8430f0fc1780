"""The measurement for people: tables, and what to be careful about."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stoker_plugins.bench.document import known_figures
from stoker_plugins.bench.figures import Spread, ratios, spread
from stoker_plugins.bench.runner import Experiment
from stoker_plugins.bench.target import Target

__all__ = ["Table", "print_report", "remarks", "table_of"]

# Label, figure, decimals; a figure that is 0 or unknown everywhere is left out if the last says so.
_ROWS: tuple[tuple[str, str, int, bool], ...] = (
    ("output tokens/s", "output_tok_s", 1, False),
    ("requests/s", "requests_s", 2, False),
    ("TTFT p50, ms", "ttft_p50_ms", 1, False),
    ("TTFT p99, ms", "ttft_p99_ms", 1, False),
    ("ITL p50, ms", "itl_p50_ms", 1, False),
    ("ITL p99, ms", "itl_p99_ms", 1, False),
    ("worst gap, ms", "worst_gap_ms", 1, False),
    ("tokens/s of a request, p50", "request_tok_s_p50", 1, False),
    ("whole answer p99, ms", "e2e_p99_ms", 0, False),
    ("goodput, share", "good_share", 3, True),
    ("goodput, requests/s", "good_requests_s", 2, True),
    ("cached prompt tokens", "cached_tokens", 0, True),
    ("prompt tokens", "prompt_tokens", 0, True),
)
_LATE_MS = 20.0
_BUSY_CLIENT = 0.5


@dataclass(frozen=True, slots=True)
class Table:
    """A load's figures: one column for each target, one for the first's ratio to each other.

    Attributes:
        title: What it is of.
        columns: Headings; the first is empty.
        rows: Cells.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def table_of(experiment: Experiment, targets: Sequence[Target]) -> Table:
    """The figures: medians over the rounds, with their range."""
    names = [target.name for target in targets]
    rounds = {name: experiment.counted(name) for name in names}
    rows = []
    for label, figure, decimals, is_optional in _ROWS:
        values = {name: known_figures(rounds[name], figure) for name in names}
        spreads = [spread(values[name]) for name in names]
        is_goodput = figure.startswith("good_")
        if is_optional and not any(s and (s.high or is_goodput) for s in spreads):
            continue
        compared = [ratios(values[names[0]], values[name]) for name in names[1:]]
        cells = [_cell(found, decimals) for found in spreads]
        rows.append([label, *cells, *(_cell(found, 2, "x") for found in compared)])
    texts = [experiment.texts.get(name) for name in names]
    if any(texts):
        same = [f"{t.identical} of {t.compared}" if t else "" for t in texts]
        rows.append(["same text as the first", *same, *("" for _ in names[1:])])
    most = max((len(each) for each in rounds.values()), default=0)
    requests = max((r.total.requests for each in rounds.values() for r in each), default=0)
    title = f"{experiment.name}: {_count(most, 'round')} of {_count(requests, 'request')}"
    columns = ["", *names, *(f"{names[0]} / {name}" for name in names[1:])]
    return Table(title, columns, rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cell(found: Spread | None, decimals: int, unit: str = "") -> str:
    if found is None:
        return "-"
    text = f"{found.median:,.{decimals}f}{unit}"
    if found.low == found.high:
        return text
    return f"{text} ({found.low:,.{decimals}f}..{found.high:,.{decimals}f})"


def remarks(
    targets: Sequence[Target], experiments: Sequence[Experiment], *, is_interrupted: bool
) -> list[str]:
    """What the figures do not say by themselves."""
    found = [f"{target.name}: {note}" for target in targets for note in target.notes]
    for experiment in experiments:
        for target in targets:
            found += _remarks_of(experiment, target.name)
    shortest = min((len(e.counted(t.name)) for e in experiments for t in targets), default=0)
    if len(targets) > 1 and shortest < 3:
        found.append("fewer than 3 rounds: the ranges say little about the noise")
    if is_interrupted:
        found.append("interrupted: what was measured until then")
    return found


def _remarks_of(experiment: Experiment, target: str) -> Iterator[str]:
    where = f"{experiment.name}, {target}"
    totals = [each.total for each in experiment.rounds[target]]
    failures: Counter[str] = Counter()
    for total in totals:
        failures.update(total.failures)
    if failures:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in failures.most_common())
        sent = sum(total.requests for total in totals)
        yield f"{where}: {failures.total()} of {sent} requests failed ({kinds})"
    if early := sum(total.ended_early for total in totals):
        yield f"{where}: {early} answers ended before they had the tokens asked for"
    late = max((total.lag_p99_ms for total in totals), default=0.0)
    if late > _LATE_MS:
        yield (
            f"{where}: requests were sent up to {late:.0f} ms late (p99): the load generator could not "
            "keep its schedule; latencies count from when a request was due"
        )
    busy = max((total.client_cpu for total in totals), default=0.0)
    if busy > _BUSY_CLIENT:
        yield f"{where}: the load generator took {busy:.0%} of a core, which the server may have missed"
    if any(not each.is_whole for each in experiment.rounds[target]):
        yield f"{where}: the last round was cut short"


def print_report(tables: Sequence[Table], notes: Sequence[str], seed: int) -> None:
    """Print it on standard output; wide enough for whole words where nobody measures the width."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    for table in tables:
        shown = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(table.columns):
            shown.add_column(Text(column), justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(Text(table.title, style="bold"))
        console.print(shown)
    has_ranges = any("(" in cell for table in tables for row in table.rows for cell in row)
    about = "Medians of the rounds (lowest..highest). " if has_ranges else ""
    console.print(Text(f"{about}Seed {seed}."))
    for note in notes:
        console.print(Text(f"! {note}"))
