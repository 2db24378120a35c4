"""Draw the plots of benchmarks/evidence_plots.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from evidence import METHODS, Result, Run
from harness.intervals import half_width

Results = dict[Run, Result]

# Dark colors but for grey, and a light one.
_PALETTE = [c for n, c in enumerate(mpl.color_sequences["tab20"][::2]) if n != 7]
_PALETTE += mpl.color_sequences["tab20"][1:2]
COLORS: dict[str, Any] = {"synflow": "black", "random": "grey"}
COLORS |= zip((m for m in METHODS if m not in COLORS), _PALETTE, strict=True)


def accuracies(results: Results) -> list[float]:
    return [100 * result["accuracy"] for result in results.values()]


def deviation(values: list[float]) -> float:
    return stdev(values) if values[1:] else 0.0


def panels(names: list[str], **options: Any) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False, **options
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def accuracy_axis(axis: Any) -> None:
    """Set the axis of accuracies, with the error's logarithm for a wide range."""
    axis.set_ylabel("test accuracy (%)")
    low, high = axis.dataLim.intervaly
    if high - low < 20:
        return
    scales = (lambda y: -np.log(100.01 - y), lambda z: 100.01 - np.exp(-z))
    axis.set_yscale("function", functions=scales)
    axis.set_ylim(low - 4, high + 0.5)
    axis.set_yticks([tick for tick in (10, 30, *range(50, 81, 10)) if tick > low - 4])
    axis.set_yticks([*axis.get_yticks(), *range(84, int(high) + 1, 2)])


def finished(figure: Any, axis: Any, path: Path) -> None:
    """Add a legend beside the panels, and write the file."""
    figure.tight_layout()
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def log_axis(axis: Any, values: tuple[int, ...], label: str) -> None:
    axis.set_xscale("log")
    axis.set_xticks(values, values)
    axis.minorticks_off()
    axis.set_xlabel(label)


def line(axis: Any, xs: Iterable[Any], found: list[Results], **options: Any) -> None:
    points = [(x, accuracies(some)) for x, some in zip(xs, found, strict=True) if some]
    if points:
        axis.errorbar(
            [x for x, _ in points],
            [mean(values) for _, values in points],
            [deviation(values) for _, values in points],
            capsize=2,
            marker="o",
            markersize=3.5,
            **options,
        )


def differences(
    axis: Any, drawn: dict[str, dict[str, list[float]]], label: str
) -> None:
    """Draw means and 95 % intervals, a row for each name, the kinds side by side."""
    axis.set_xscale("symlog", linthresh=2)
    axis.axvline(0, color="black", lw=1)
    for number, (kind, rows) in enumerate(drawn.items()):
        found = [(place, v) for place, v in enumerate(rows.values()) if v]
        axis.errorbar(
            [mean(values) for _, values in found],
            [place + (number - 0.5) * 0.3 for place, _ in found],
            xerr=[half_width(values) for _, values in found],
            fmt="os"[number],
            color=COLORS.get(kind, f"C{4 + number}"),
            capsize=2,
            label=kind,
        )
        axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    low, high = axis.get_xlim()
    ticks = [tick for tick in (-50, -10, -2, -1, 0, 1, 2, 10, 50) if low < tick < high]
    axis.set_xticks(ticks, ticks)
    axis.set_xlabel(label)
