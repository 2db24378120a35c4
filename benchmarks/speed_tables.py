"""Print and plot the results of ``speed.py``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from harness.machine import show_machines
from harness.tables import percent

Row = dict[str, Any]


def ratios(row: Row, side: str, what: str) -> list[float]:
    """Return the ratio of a side's time to the dense model's time in each round."""
    dense = row["sides"]["dense"][what]
    return [a / b for a, b in zip(row["sides"][side][what], dense, strict=True)]


def case_of(row: Row) -> tuple[str, int, bool]:
    return row["model"], row["size"], row["channels_last"]


def title(row: Row) -> str:
    name, size, channels_last = case_of(row)
    return f"{name} at {size}x{size}" + (", channels last" if channels_last else "")


def show(rows: Iterable[Row]) -> None:
    rows = sorted(rows, key=lambda row: (*case_of(row), row["sparsity"]))
    show_machines(rows)
    for _, block in groupby(rows, case_of):
        first, *others = block
        dense = first["sides"]["dense"]
        print(
            f"\n{title(first)}, batch {first['batch']}: "
            f"{dense['parameters']:,} parameters,\n{dense['multiplications']:,} "
            f"multiplications an image, {first['rounds']} rounds\n\n"
            f"{'':20}{'forward':>18}{'training step':>27}{'peak':>9}\n{'':15}{'mult.'}"
            + 2 * f"{'ms':>8}{'ratio':>6}{'min':>5}{'max':>5}"
            + f"{'MB':>6}{'ratio':>6}"
        )
        for row in (first, *others):
            told = [f"\n{percent(row['sparsity'])}, FORCE in {row['steps']} steps"]
            if row["emptied"]:
                told.append(f"{row['emptied']} layers emptied")
            if row["disconnected"]:
                told.append("disconnected")
            if "snap_sparsity" in row:
                told.append(f"snap: {row['snap_sparsity']:.1%} of channels")
            print(", ".join(told))
            base = row["sides"]["dense"]
            for side, seen in row["sides"].items():
                share = seen["multiplications"] / base["multiplications"]
                line = f"{side:13}{share:7.3f}"
                for what in ("forward", "step"):
                    all_of = ratios(row, side, what)
                    line += f"{1000 * median(seen[what]):8.1f}{median(all_of):6.3f}"
                    line += f"{min(all_of):5.2f}{max(all_of):5.2f}"
                over = seen["bytes"] / base["bytes"]
                print(f"{line}{seen['bytes'] / 2**20:6.0f}{over:6.3f}")


def plot(rows: list[Row], folder: Path) -> None:
    """Draw speed-ups against sparsity, for models with several sparsities.

    Disconnected networks are left out, because their outputs are constant. Dashed lines
    show the speed-up that the multiplications alone would give.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if not row["disconnected"]]
    rows.sort(key=lambda row: row["sparsity"])
    cases = sorted({case_of(row) for row in rows})
    some = [c for c in cases if [case_of(row) for row in rows].count(c) > 1]
    cases = some or cases
    width = max(3 * len(cases), 8)
    figure, axes = plt.subplots(
        2,
        len(cases),
        figsize=(width, 6),
        layout="constrained",
        squeeze=False,
        sharex="col",
        sharey=True,
    )
    drawn = {
        "masked": "masked",
        "compact 16": "compact, round_to=16",
        "snap": "snap_prune",
    }
    for column, case in zip(axes.T, cases, strict=True):
        found = [row for row in rows if case_of(row) == case]
        labels = [percent(row["sparsity"]) for row in found]
        promised = [
            row["sides"]["dense"]["multiplications"]
            / row["sides"]["compact"]["multiplications"]
            for row in found
        ]
        for axis, what in zip(column, ("forward", "step"), strict=True):
            for side, label in drawn.items():
                has = [row for row in found if side in row["sides"]]
                at = [percent(row["sparsity"]) for row in has]
                over = [1 / median(ratios(row, side, what)) for row in has]
                axis.plot(at, over, "o-", label=label, markersize=4)
            axis.plot(labels, promised, "k--", label="multiplications")
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        column[0].set_title(title(found[0]), fontsize="medium")
        column[1].set_xlabel("sparsity")
    axes[0, 0].set_ylabel("speed-up, forward")
    axes[1, 0].set_ylabel("speed-up, training step")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4)
    figure.savefig(folder / "speed.png", dpi=150)
