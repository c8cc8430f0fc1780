"""Pictures of a measurement: PNG, or an HTML page that needs nothing else."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.errors import ConfigError
from stoker_plugins.bench.document import known_figures
from stoker_plugins.bench.figures import spread
from stoker_plugins.bench.report import Table

if TYPE_CHECKING:
    from stoker_plugins.bench.runner import Experiment

__all__ = ["check_plot", "write_plot"]

_LATENCIES = (
    ("TTFT p50", "ttft_p50_ms"),
    ("TTFT p99", "ttft_p99_ms"),
    ("ITL p50", "itl_p50_ms"),
    ("ITL p99", "itl_p99_ms"),
    ("worst gap", "worst_gap_ms"),
)
# Okabe and Ito's colours, which people with colour blindness can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>stoker bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 0 0 2rem; }}
caption {{ font-weight: 600; text-align: left; padding: .3rem 0; }}
th, td {{ padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; background: #fff; }}
.scroll {{ overflow-x: auto; }}
</style></head><body>
<h1>stoker bench</h1>
<p>{about}</p>
<div class="scroll">{picture}</div>
{tables}
{notes}
</body></html>
"""


def check_plot(path: Path) -> None:
    """See to it, before anything is measured, that a plot can be written.

    Raises:
        ConfigError: Its name has the wrong ending, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"--plot: {path}: the name must end in .png or .html")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed: pip install 'stoker[plots]'")


def write_plot(
    path: Path,
    experiments: Sequence[Experiment],
    tables: Sequence[Table],
    notes: Sequence[str],
    about: str,
) -> None:
    """Write the picture, or the page with the picture and the tables.

    Args:
        path: Ends in ``.png`` or ``.html``.
        experiments: What was measured.
        tables: The figures, for a page.
        notes: What to be careful about, for a page.
        about: One line on the machine and the time.
    """
    figure = _draw(experiments)
    if path.suffix == ".png":
        figure.savefig(path, format="png", dpi=120)
        return
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    svg = picture.getvalue()
    path.write_text(
        _PAGE.format(
            about=html.escape(about),
            picture=svg[svg.index("<svg") :],
            tables="\n".join(_table(table) for table in tables),
            notes=_list(notes),
        ),
        encoding="utf-8",
    )


def _draw(experiments: Sequence[Experiment]) -> Any:
    # The figure itself, without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    rows = max(1, len(experiments))
    figure = Figure(figsize=(12, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    for experiment, (speed, first, latency) in zip(experiments, axes, strict=False):
        _bars(speed, experiment, (("output tokens/s", "output_tok_s"),))
        speed.set_title(f"{experiment.name}: output tokens/s", fontsize=10)
        _distribution(first, experiment)
        _bars(latency, experiment, _LATENCIES)
        latency.set_yscale("symlog", linthresh=1.0)
        latency.yaxis.set_major_formatter("{x:g}")
        latency.set_title("latencies, ms", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=6, fontsize=9)
    return figure


def _bars(axis: Any, experiment: Experiment, measures: Sequence[tuple[str, str]]) -> None:
    """Medians over the rounds, and whiskers to the lowest and highest."""
    width = 0.8 / len(experiment.rounds)
    for number, target in enumerate(experiment.rounds):
        rounds = experiment.counted(target)
        found = [spread(known_figures(rounds, figure)) for _, figure in measures]
        axis.bar(
            [place + number * width for place in range(len(measures))],
            [s.median if s else 0.0 for s in found],
            width,
            yerr=[
                [s.median - s.low if s else 0.0 for s in found],
                [s.high - s.median if s else 0.0 for s in found],
            ],
            capsize=3,
            label=target,
            color=_COLOURS[number % len(_COLOURS)],
        )
    middle = 0.4 - width / 2
    axis.set_xticks(
        [place + middle for place in range(len(measures))],
        [label for label, _ in measures] if len(measures) > 1 else [""],
        fontsize=8,
    )


def _distribution(axis: Any, experiment: Experiment) -> None:
    """What share of the answers began within what time, all rounds together."""
    for number, target in enumerate(experiment.rounds):
        times = [ms for each in experiment.counted(target) for ms in each.ttft_ms]
        if times:
            axis.ecdf(times, label=target, color=_COLOURS[number % len(_COLOURS)])
    axis.set_title("time to first token, ms: share of answers", fontsize=10)
    axis.set_xlim(left=0)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    caption = html.escape(table.title)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<tr>{head}</tr>{rows}</table></div>"
    )


def _list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""
