"""Draw the density of every layer along the depth of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from itertools import cycle, groupby
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from force_plugin.report.text import numbered_names, percent, stage_of

if TYPE_CHECKING:
    from force_plugin.report.sparsity import SparsityReport

# Okabe and Ito's colours, which colour-blind people can distinguish, without the yellow
# that is invisible on white. 7 colours and 8 markers make 56 different pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(figure: Figure, curves: Sequence[tuple[str, SparsityReport]]) -> None:
    """Draw a curve for each report, and a strip of empty layers if there are any."""
    any_empty = any(report.empty_layers for _, report in curves)
    heights = [26, 1.5 + len(curves)] if any_empty else [26]
    axes: list[Axes] = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0].tolist()
    main = axes[0]

    for row, ((label, report), colour, marker) in enumerate(
        zip(curves, cycle(COLOURS), cycle(MARKERS), strict=False)
    ):
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 4,
            "linewidth": 1,
            # The first report is the most important, and is drawn on top.
            "zorder": 3 - row / len(curves),
        }
        densities = [100 * layer.density or math.nan for layer in report.layers]
        main.plot(densities, label=f"{label} ({percent(report)} sparse)", **style)
        if any_empty:
            empty = [i for i, layer in enumerate(report.layers) if layer.empty]
            axes[1].plot(empty, [row] * len(empty), **style | {"linestyle": "none"})

    _scale_density(main, [report for _, report in curves])
    _label_depth(axes, [layer.name for layer in curves[0][1].layers])
    if any_empty:
        strip = axes[1]
        strip.set_ylim(len(curves) - 0.25, -0.75)
        strip.set_yticks([(len(curves) - 1) / 2], ["empty"])
        strip.set_facecolor("0.95")
        strip.tick_params(axis="y", length=0)
        main.tick_params(axis="x", bottom=False, labelbottom=False)


def _scale_density(axes: Axes, reports: Sequence[SparsityReport]) -> None:
    """Set a log axis up to 100 %, and draw a line at the density that all share."""
    densities = [100 * report.density for report in reports]
    densities += [100 * layer.density for report in reports for layer in report.layers]
    # The axis starts at 10 % or less: a log axis needs more than a single label.
    lowest = min([10.0, *(density for density in densities if density)])
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.5, 130)
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:g} %")
    axes.set_ylabel("weights kept")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if any(densities) and len({percent(report) for report in reports}) == 1:
        axes.axhline(
            100 * reports[0].density,
            color="0.3",
            linestyle="--",
            linewidth=0.8,
            zorder=1,
            label="whole network",
        )


def _label_depth(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Label up to 20 layers by name. Number more layers, and mark their stages."""
    from matplotlib.ticker import MaxNLocator

    main, bottom = axes[0], axes[-1]
    main.set_xlim(-0.8, len(names) - 0.2)
    if len(names) <= 20:
        plain = [name.removesuffix(".weight") for name in names]
        # Without ".weight", two names may be equal.
        labels = numbered_names(plain if len({*plain}) == len({*names}) else names, 20)
        bottom.set_xticks(range(len(names)), labels, rotation=45, ha="right")
        bottom.tick_params(axis="x", labelsize=8)
        return
    bottom.set_xlabel("layer, by depth")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    stages = [(stage, len(list(run))) for stage, run in groupby(names, stage_of)]
    # More than 10 stages (a transformer's blocks) say no more than the indices.
    if len(stages) > 10:
        return
    start = 0
    for stage, length in stages:
        if start:
            for one in axes:
                one.axvline(start - 0.5, color="0.85", linewidth=0.6, zorder=0)
        # A name that is wider than its stage would overlap the next name.
        if 80 * length / len(names) > len(stage):
            middle = start + (length - 1) / 2
            main.text(
                middle,
                1.01,
                stage,
                transform=main.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color="0.4",
            )
        start += length


class ShownFigure(Figure):
    """A figure that a notebook shows as a cell's value, without an import of pyplot."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=110, bbox_inches="tight")
        return file.getvalue()
