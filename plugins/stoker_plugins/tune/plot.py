"""The report as a picture, with matplotlib (the extra ``plots``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stoker import ConfigError

if TYPE_CHECKING:
    from stoker_plugins.tune.report import Report

__all__ = ["check", "draw"]


def check() -> None:
    """Refuse early what could not be drawn after minutes of measuring.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'stoker[plots]'")


def draw(report: Report, path: Path) -> None:
    """Draw every comparison's pairs and medians.

    Args:
        report: What was found.
        path: Where to; the ending decides the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    check()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [*report.rows, *([report.final] if report.final else [])]
    rows = [row for row in rows if row.speed is not None]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * max(len(rows), 1)))
    try:
        for at, row in enumerate(rows):
            color = "tab:green" if row.accepted else "tab:gray"
            axes.barh(at, row.speed or 0.0, color=color, alpha=0.5)
            axes.plot(row.ratios, [at] * len(row.ratios), ".", color="black", markersize=4)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{row.setting} {row.value}" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("speed against the best so far (dots: single pairs)")
        axes.set_title(f"{report.model}: {report.load}, {report.date[:10]}")
        figure.tight_layout()
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
