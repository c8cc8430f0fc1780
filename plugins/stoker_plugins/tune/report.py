"""What a tuning found, for people and for programs: a table, bars, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stoker_plugins.tune.messages import Figures, Quality

if TYPE_CHECKING:
    from rich.console import Console

    from stoker_plugins.tune.search import Comparison

__all__ = ["Report", "Row", "print_report", "row_of"]

_BAR_WIDTH = 40


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison.

    Attributes:
        setting: What was changed.
        value: To what.
        speed: Median ratio to what it was compared with; ``None`` if it was not measured.
        ratios: That of each pair.
        beside: Median ratio beside a busy process, where that was measured.
        noise: Standard deviation of a ratio's logarithm at that time.
        quality: Against the reference setting, where that was looked at.
        verdict: In words.
        accepted: Whether it was taken.
    """

    setting: str
    value: str
    speed: float | None
    ratios: list[float]
    beside: float | None
    noise: float
    quality: Quality | None
    verdict: str
    accepted: bool


class Report(msgspec.Struct, kw_only=True):
    """A whole tuning.

    Attributes:
        model: The model's id.
        reference: How it was named.
        backend: Who ran it.
        load: What was measured.
        scale: The load's size.
        machine: Where.
        versions: Of what.
        date: When.
        rows: Comparisons in order; each against the best at that time.
        settings: What is best, label by name.
        final: That against the defaults; ``None`` if it was not compared.
        defaults: Figures of the defaults, by where the load ran.
        tuned: Figures of what is best.
        others: Figures of other weights.
        noise: Standard deviation of a ratio's logarithm, at the end.
        weights: Files in other types that were made: type, bytes.
        skipped: What was not tuned, and why.
        notes: Other things to know.
        seconds: How long it took.
        complete: Whether it ended by itself.
        profile: The file that was written; empty if none.
    """

    model: str
    reference: str
    backend: str
    load: str
    machine: Any
    versions: Mapping[str, str]
    date: str
    scale: float = 1.0
    rows: list[Row] = []
    settings: Mapping[str, str] = {}
    final: Row | None = None
    defaults: Mapping[str, Figures] = {}
    tuned: Mapping[str, Figures] = {}
    others: Mapping[str, Mapping[str, Figures]] = {}
    noise: float = 0.0
    weights: Mapping[str, int] = {}
    skipped: Mapping[str, str] = {}
    notes: list[str] = []
    seconds: float = 0.0
    complete: bool = False
    profile: str = ""


def row_of(comparison: Comparison) -> Row:
    """A comparison as it is reported."""
    beside = sorted(comparison.beside)
    return Row(
        setting=comparison.name,
        value=comparison.label,
        speed=comparison.speed,
        ratios=list(comparison.ratios),
        beside=beside[len(beside) // 2] if beside else None,
        noise=comparison.noise,
        quality=comparison.quality,
        verdict=comparison.verdict,
        accepted=comparison.accepted,
    )


def print_report(report: Report, console: Console) -> None:
    """The table, the bars and what is to be known besides."""
    _print_table(report, console)
    _print_figures(report, console)
    _print_bars([*report.rows, *([report.final] if report.final else [])], console)
    if report.noise:
        console.print(
            f"Noise: a setting differs by {report.noise:.1%} from one measurement to the next."
        )
    for name, why in report.skipped.items():
        console.print(f"{name}: not tuned: {why}")
    for note in report.notes:
        console.print(note)


def _print_table(report: Report, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "setting", "value", "speed", "pairs", "beside", "KL mean", "KL max", "same top", "verdict",
        box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for row in [*report.rows, *([report.final] if report.final else [])]:
        quality = row.quality
        table.add_row(
            *(Text(cell) for cell in (
                row.setting,
                row.value,
                _ratio(row.speed),
                str(len(row.ratios)),
                _ratio(row.beside),
                f"{quality.kl_mean:.2g}" if quality else "-",
                f"{quality.kl_max:.2g}" if quality else "-",
                f"{quality.top1:.1%}" if quality else "-",
                row.verdict,
            )),
            style="bold green" if row.accepted else None,
        )  # fmt: skip
    console.print(table)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _print_figures(report: Report, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        report.load, "first token", "next token", "tokens/s", "prefill tokens/s", "decode tokens/s",
        box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    shown = {"defaults": report.defaults, "tuned": report.tuned, **report.others}
    for name, runs in shown.items():
        for where, figures in runs.items():
            table.add_row(
                f"{name}, {'alone' if where == 'alone' else 'beside a busy process'}",
                f"{figures.ttft_s * 1000:.0f} ms",
                f"{figures.itl_s * 1000:.1f} ms",
                f"{figures.tokens_per_s:.0f}",
                f"{figures.prefill_tokens_per_s:.0f}" if figures.prefill_tokens_per_s else "-",
                f"{figures.decode_tokens_per_s:.0f}" if figures.decode_tokens_per_s else "-",
            )
    if table.row_count:
        console.print(table)


def _print_bars(rows: Sequence[Row], console: Console) -> None:
    """Speeds as bars; the mark is the speed that each was compared with."""
    shown = [row for row in rows if row.speed is not None]
    if not shown:
        return
    most = max(1.0, *(row.speed or 0.0 for row in shown))
    width = max(len(f"{row.setting} {row.value}") for row in shown)
    mark = round(_BAR_WIDTH / most)
    for row in shown:
        length = round(_BAR_WIDTH * (row.speed or 0.0) / most)
        bar = "".join(
            "|" if at == mark and at >= length else "█" if at < length else " "
            for at in range(_BAR_WIDTH + 1)
        )
        name = f"{row.setting} {row.value}".ljust(width)
        style = "green" if row.accepted else "default"
        console.print(f"{name}  [{style}]{bar}[/{style}] {row.speed:.2f}x", highlight=False)
