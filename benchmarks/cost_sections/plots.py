"""Draw the plots of all sections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from cost_sections.rows import Row

mpl.use("Agg")


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw ratios, times of selection and the authors' code, if measured."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_ratios(rows, folder / "ratios.png")
    draw_selection(rows, folder / "selection.png")
    draw_authors(rows, folder / "authors.png")


def draw_ratios(rows: Sequence[Row], file: Path) -> None:
    """Draw ratios with their bounds, a panel for each section."""
    bounded = [
        [row for row in rows if row["section"] == section and row.get("bound")]
        for section in ("step", "large", "synflow", "grasp", "memory")
    ]
    panels = [panel for panel in bounded if panel]
    if not panels:
        return
    figure, axes = plt.subplots(
        len(panels),
        figsize=(7, 1.2 * len(panels) + 0.3 * sum(map(len, panels))),
        gridspec_kw={"height_ratios": [len(panel) + 1 for panel in panels]},
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        nothing = 0 if panel[0]["difference"] else 1
        names = [f"{row['setting'].split(',')[0]}: {row['case']}" for row in panel]
        over = [row["ratio"]["median"] - nothing for row in panel]
        ends = [[row["ratio"][end] for row in panel] for end in ("min", "max")]
        axis.barh(names, over, left=nothing, height=0.6)
        axis.hlines(names, *ends, color="black", linewidth=1)
        axis.axvline(panel[0]["bound"], color="tab:red", label="bound")
        axis.invert_yaxis()
        what = "bytes a weight more than" if nothing == 0 else "times"
        axis.set_title(f"{panel[0]['section']}: {what} bare", fontsize="medium")
        axis.locator_params(axis="x", nbins=6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right")
    figure.savefig(file, dpi=150)


def draw_selection(rows: Sequence[Row], file: Path) -> None:
    """Draw times of selection over sizes, for ours and each other method."""
    chosen = [
        row
        for row in rows
        if row["section"] == "selection" and row["case"] == "normal, 10 %"
    ]
    if not chosen:
        return
    figure, axis = plt.subplots(layout="constrained")
    sizes = [row["size"] for row in chosen]
    axis.loglog(sizes, [row["ours"]["median"] for row in chosen], "o-", label="ours")
    for name in chosen[0]["medians"]:
        able = [row for row in chosen if name in row["medians"]]
        times = [row["medians"][name] for row in able]
        axis.loglog([row["size"] for row in able], times, "o--", label=name)
    axis.set(xlabel="scores", ylabel="ms, the largest 10 %")
    axis.legend()
    figure.savefig(file, dpi=150)


def draw_authors(rows: Sequence[Row], file: Path) -> None:
    """Draw the times of the authors' code and ours over the bare gradients."""
    theirs = [row["measured"] for row in rows if row["section"] == "authors"]
    if not theirs:
        return
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for side, shift in (("theirs", -0.2), ("ours", 0.2)):
        at = np.arange(len(theirs)) + shift
        axis.bar(at, [row["ratio"][side] for row in theirs], 0.4, label=side)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(theirs)), [row["method"] for row in theirs])
    axis.set(ylabel="time over that of the bare gradients")
    axis.legend()
    figure.savefig(file, dpi=150)
