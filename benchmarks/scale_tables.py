"""Print and plot the results of ``scale.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scale_model import Fit, Row, call, value_of


def show(record: Row, fitted: Fit) -> None:
    """Print the measurements, the model and its residuals."""
    beyond, once = fitted["beyond"], fitted["once"]
    print("\nseconds, FORCE; beyond: a step less its bare gradients\n")
    print(
        f"{'':30}{'weights':>12}{'bare':>8}{'beyond':>9}{'fit':>8}{'once':>7}{'fit':>6}"
    )
    for row in record["times"]:
        m = row["weights"]
        print(
            f"{row['model']:30}{m:12,}{row['bare']:8.3f}{row['beyond']:9.4f}"
            f"{value_of(beyond, m):8.4f}{row['once']:7.2f}{value_of(once, m):6.2f}"
        )
    moved = beyond["b"] * record["bandwidth"]
    print()
    for name, found in (("beyond", beyond), ("once", once)):
        ends = f"{1e3 * found['a']:.2f} ms + {1e9 * found['b']:.2f} ns x weights"
        print(f"{name:6} = {ends}")
    print(
        f"beyond moves {moved:.0f} bytes a weight and step, at the "
        f"{record['bandwidth'] / 1e9:.1f} GB/s of a copy here"
    )

    print(f"\n{'':30}{'batches':>12}{'bare':>8}{'a batch':>9}{'beyond':>8}")
    for row in record["batches"]:
        print(
            f"{row['model']:30}{row['batches']:12}{row['bare']:8.3f}"
            f"{row['bare'] / row['batches']:9.4f}{row['beyond']:8.4f}"
        )

    print(
        f"\n{'held out':30}{'steps x batches':>17}{'call':>10}{'fit':>10}{'error':>9}"
    )
    for row in record["held out"]:
        predicted = call(fitted, row)
        print(
            f"{row['model']:30}{row['steps']:>13} x {row['batches']}{row['call']:10.3f}"
            f"{predicted:10.3f}{100 * (predicted / row['call'] - 1):8.1f}%"
        )

    print(f"\n{'MiB':30}{'weights':>12}{'bare':>8}{'ours':>9}{'more':>8}{'fit':>8}")
    for row in record["memory"]:
        ours, bare = row["ours"] / 2**20, row["bare"] / 2**20
        guess = fitted["bytes"] * row["weights"] / 2**20
        print(
            f"{row['model']:30}{row['weights']:12,}{bare:8.0f}{ours:9.0f}"
            f"{ours - bare:8.0f}{guess:8.0f}"
        )
    print(f"\nmore = {fitted['bytes']:.1f} bytes x weights")

    print(f"\n{'MiB, ' + record['microbatch'][0]['model']:30}")
    for row in record["microbatch"]:
        print(f"{row['case']:42}{row['bytes'] / 2**20:8.0f}")

    print(f"\n{'ranks':30}{'':12}{'bytes a weight':>17}{'fit':>8}{'s a step':>10}")
    sharded = fitted["sharded"]
    for row in record["ranks"]:
        split = row["form"] == "sharded"
        guess = f"{value_of(sharded, 1 / row['ranks']):8.1f}" if split else f"{'':8}"
        name = f"{row['model']}, {row['form']}"
        print(
            f"{name:36}{row['ranks']:6}{row['bytes']:17.1f}{guess}{row['seconds']:10.3f}"
        )
    print(f"\nsharded = {sharded['a']:.1f} + {sharded['b']:.1f} / ranks bytes a weight")
    for size, rate in fitted["exchange"].items():
        print(
            f"whole: {size} ranks average 4 bytes a weight at {rate / 1e9:.2f} GB/s, "
            "sharing the cores"
        )


def show_prediction(rows: Sequence[Row], given: dict[str, float], name: str) -> None:
    wanted = ", ".join(f"{key} {value:g}" for key, value in given.items())
    print(f"\npredicted on {name}: {wanted}\n")
    for row in rows:
        value = f"{row['value']:.4g} {row['unit']}"
        print(f"{row['what']:25}{value:23}{row['origin']}")


def plot(record: Row, fitted: Fit, folder: Path) -> None:
    """Draw time and memory beyond the bare step, against the number of weights."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    times, memory = record["times"], record["memory"]
    m = np.geomspace(*(f(row["weights"] for row in times) for f in (min, max)))
    weights = [row["weights"] for row in times]
    left.loglog(weights, [row["bare"] for row in times], "s", label="bare step")
    left.loglog(weights, [row["beyond"] for row in times], "o", label="beyond it")
    left.loglog(m, [value_of(fitted["beyond"], x) for x in m], label="fit")
    left.set(xlabel="prunable weights", ylabel="seconds a step")
    held = [row["weights"] for row in memory]
    right.loglog(held, [row["bare"] for row in memory], "s", label="bare step")
    more = [row["ours"] - row["bare"] for row in memory]
    right.loglog(held, more, "o", label="beyond it")
    right.loglog(m, fitted["bytes"] * m, label="fit")
    right.set(xlabel="prunable weights", ylabel="bytes")
    left.legend()
    right.legend()
    figure.savefig(folder / "scale.png", dpi=150)
