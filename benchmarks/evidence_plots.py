"""Tables and plots of what benchmarks/evidence.py has measured.

    python benchmarks/evidence_plots.py                      # to docs/evidence
    python benchmarks/evidence_plots.py --preset gpu --to /tmp/gpu

Each question has a plot and a table of the same numbers: mean and standard deviation
over seeds. Comparisons are of the same network and seed, pair by pair, with a 95 %
interval of the mean difference by Student's t.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from evidence import (
    BATCHES,
    CHECKED,
    METHODS,
    PRESETS,
    STEPS,
    Result,
    Run,
    layers_of,
    read,
)
from scipy.stats import t

Results = dict[Run, Result]

COLORS = dict(zip(METHODS, plt.get_cmap("tab20").colors[::2], strict=False))
COLORS |= {"random": (0.5, 0.5, 0.5), "snip_it": (0.9, 0.8, 0.1)}


def where(results: Results, **wanted: Any) -> Results:
    """Runs that have these values, and all others as METHODS and Run have them."""
    return {
        run: result
        for run, result in results.items()
        if all(getattr(run, key) == value for key, value in wanted.items())
    }


def usual(results: Results) -> dict[str, Results]:
    """Runs of each method as the papers have it, by its name here."""
    return {
        name: where(
            results,
            **{"steps": 1, "batches": 1, "schedule": "exponential", "mask": "own"}
            | options,
        )
        for name, options in METHODS.items()
    }


def accuracies(results: Results) -> list[float]:
    return [100 * result["accuracy"] for result in results.values()]


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if values[1:] else "")


def deviation(values: list[float]) -> float:
    return stdev(values) if values[1:] else 0.0


def interval(differences: list[float]) -> str:
    """Mean of paired differences, its 95 % interval, and what can be said of it."""
    if not differences[1:]:
        return "–"
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences)
    half /= len(differences) ** 0.5
    low, high = mean(differences) - half, mean(differences) + half
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return f"{mean(differences):+.2f} ({low:+.2f} to {high:+.2f}), {verdict}"


def aligned(rows: Iterable[Iterable[str]]) -> str:
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"


def panels(names: list[str], ylabel: str, **options: Any) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False, **options
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(ylabel)
    return figure, list(axes[0])


def finished(figure: Any, axis: Any, path: Path) -> None:
    """One legend for all panels, beside them, and the file."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def log_axis(axis: Any, values: tuple[int, ...], label: str) -> None:
    axis.set_xscale("log")
    axis.set_xticks(values, values)
    axis.minorticks_off()
    axis.set_xlabel(label)


def line(axis: Any, xs: list[Any], found: list[Results], **options: Any) -> None:
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


def methods(results: Results, networks: list[str], to: Path) -> str:
    """Accuracy against sparsity, by method, and who beats whom."""
    sparsities = sorted({run.sparsity for run in results} - {0})
    figure, axes = panels(networks, "test accuracy (%)")
    rows = [["network", "method", *map(percent, sparsities)]]
    for network, axis in zip(networks, axes, strict=True):
        ours = where(results, network=network)
        dense = accuracies(where(ours, method="dense"))
        if dense:
            axis.axhline(mean(dense), color="black", ls="--", lw=1, label="dense")
            rows.append(
                [network, "dense", spread(dense), *[""] * (len(sparsities) - 1)]
            )
        for name, some in usual(ours).items():
            found = [where(some, sparsity=sparsity) for sparsity in sparsities]
            line(axis, range(len(found)), found, label=name, color=COLORS[name])
            rows.append([network, name, *(spread(accuracies(f)) for f in found)])
        axis.set_xticks(range(len(sparsities)), map(percent, sparsities))
        axis.set_xlabel("sparsity")
    finished(figure, axes[0], to / "methods.png")
    return aligned(rows)


def pairs(one: Results, other: Results, key: Callable[[Run], Any]) -> list[float]:
    """Differences of accuracy, in points, of runs that only differ in one thing."""
    others = {key(run): result["accuracy"] for run, result in other.items()}
    return [
        100 * (result["accuracy"] - others[key(run)])
        for run, result in one.items()
        if key(run) in others
    ]


def same(run: Run) -> tuple[str, int]:
    """What runs of different methods have in common."""
    return run.network, run.seed


def claims(results: Results, networks: list[str], to: Path) -> str:
    """At 99 % and above: do FORCE and Iter SNIP beat the others?"""
    rows = [["sparsity", "", "over", "points of accuracy (95 % interval)"]]
    for sparsity in sorted({run.sparsity for run in results if run.sparsity >= 0.99}):
        found = usual(where(results, sparsity=sparsity))
        for ours in ("force", "iter_snip"):
            rows += [
                [
                    percent(sparsity),
                    ours,
                    other,
                    interval(pairs(found[ours], found[other], same)),
                ]
                for other in METHODS
                if other not in ("force", "iter_snip")
            ]
    return aligned(rows)


def steps(results: Results, networks: list[str], to: Path) -> str:
    """FORCE and Iter SNIP by the number of steps, on both schedules."""
    own = where(results, network=networks[0], sparsity=0.99, mask="own", batches=1)
    figure, (axis,) = panels([f"{networks[0]}, 99 %"], "test accuracy (%)")
    rows = [["method", "schedule", *(f"T = {steps}" for steps in STEPS)]]
    for method in ("force", "iter_snip"):
        for kind, style in (("exponential", "-"), ("linear", ":")):
            some = where(own, method=method, schedule=kind)
            found = [where(some, steps=steps) for steps in STEPS]
            label = f"{method}, {kind}"
            line(axis, STEPS, found, label=label, color=COLORS[method], ls=style)
            rows.append([method, kind, *(spread(accuracies(f)) for f in found)])
    log_axis(axis, STEPS, "steps T")
    finished(figure, axis, to / "steps.png")
    return aligned(rows)


def batches(results: Results, networks: list[str], to: Path) -> str:
    """One-shot methods by the number of batches."""
    own = where(results, network=networks[0], sparsity=0.99, mask="own")
    figure, (axis,) = panels([f"{networks[0]}, 99 %"], "test accuracy (%)")
    rows = [["method", *(f"B = {batches}" for batches in BATCHES)]]
    for method in ("snip", "grasp"):
        found = [where(own, method=method, batches=batches) for batches in BATCHES]
        line(axis, BATCHES, found, label=method, color=COLORS[method])
        rows.append([method, *(spread(accuracies(f)) for f in found)])
    log_axis(axis, BATCHES, "batches of 128")
    finished(figure, axis, to / "batches.png")
    return aligned(rows)


def layers(results: Results, networks: list[str], to: Path) -> str:
    """Which layers are pruned: the density of each at 99 %."""
    figure, axes = panels(networks, "weights kept (%)")
    rows = [["network", "layer", "weights", *METHODS]]
    for network, axis in zip(networks, axes, strict=True):
        found = usual(where(results, network=network, sparsity=0.99))
        weights = layers_of(network)
        profiles: dict[str, dict[str, float]] = {}
        for name, some in found.items():
            columns = zip(*(result["kept"] for result in some.values()), strict=True)
            profiles[name] = {
                layer: 100 * mean(kept) / total
                for (layer, total), kept in zip(weights.items(), columns, strict=False)
            }
            values = [max(v, 1e-3) for v in profiles[name].values()]
            axis.plot(values, label=name, color=COLORS[name], marker="o", markersize=3)
        axis.set_yscale("log")
        axis.set_xlabel("layer, from the images to the classes")
        rows += [
            [network, layer, f"{total:,}"]
            + [f"{profiles[m][layer]:.2f}" if profiles[m] else "–" for m in METHODS]
            for layer, total in weights.items()
        ]
    finished(figure, axes[0], to / "layers.png")
    return aligned(rows)


def objective(results: Results, networks: list[str], to: Path) -> str:
    """What FORCE maximises, against accuracy."""
    high = {run.network for run in results if run.sparsity >= 0.99}
    networks = [network for network in networks if network in high]
    figure, axes = panels(networks, "test accuracy (%)")
    rows = [["network", "method", "sparsity", "sensitivity", "accuracy"]]
    for network, axis in zip(networks, axes, strict=True):
        for name, some in usual(where(results, network=network)).items():
            chosen = {run: r for run, r in some.items() if run.sparsity >= 0.99}
            axis.scatter(
                [max(r["sensitivity"], 1e-6) for r in chosen.values()],
                accuracies(chosen),
                label=name,
                color=COLORS[name],
                s=14,
            )
            for sparsity in sorted({run.sparsity for run in chosen}):
                these = where(chosen, sparsity=sparsity)
                reached = f"{mean(r['sensitivity'] for r in these.values()):.3g}"
                row = [network, name, percent(sparsity), reached]
                rows.append([*row, spread(accuracies(these))])
        axis.set_xscale("log")
        axis.set_xlabel("foresight connection sensitivity, 99 % and above")
    finished(figure, axes[0], to / "objective.png")
    return aligned(rows)


def sanity(results: Results, networks: list[str], to: Path) -> str:
    """The same masks shuffled within layers, and with new initial values."""
    kinds = {"own": 0.9, "shuffled": 0.6, "reinitialised": 0.3}
    sparsities = (0.95, 0.99)
    figure, axes = panels(
        [f"{networks[0]}, {percent(s)}" for s in sparsities], "test accuracy (%)"
    )
    rows = [["sparsity", "method", *kinds, "shuffled - own (95 %)", "new - own (95 %)"]]
    for sparsity, axis in zip(sparsities, axes, strict=True):
        for place, name in enumerate(CHECKED):
            options = {"steps": 1, "batches": 1, "schedule": "exponential"}
            some = where(
                results,
                network=networks[0],
                sparsity=sparsity,
                **options | METHODS[name],
            )
            found = {kind: where(some, mask=kind) for kind in kinds}
            for number, (kind, shade) in enumerate(kinds.items()):
                values = accuracies(found[kind]) or [0.0]
                axis.errorbar(
                    place + (number - 1) * 0.2,
                    mean(values),
                    deviation(values),
                    fmt="os^"[number],
                    color=f"C{number}",
                    capsize=2,
                    label=kind if place == 0 else None,
                    alpha=max(shade, 0.8),
                )
            rows.append(
                [percent(sparsity), name]
                + [spread(accuracies(found[kind])) for kind in kinds]
                + [
                    interval(pairs(found[kind], found["own"], same))
                    for kind in ("shuffled", "reinitialised")
                ]
            )
        axis.set_xticks(range(len(CHECKED)), CHECKED, rotation=30)
    finished(figure, axes[0], to / "sanity.png")
    return aligned(rows)


def longer(results: Results, networks: list[str], to: Path) -> str:
    """Whether longer training tells another story: the same network at 99 %."""
    rows = [["method", "epochs", "accuracy", "FORCE - this (95 %)"]]
    for preset in ("cpu", "long"):
        some = where(results, preset=preset, network=networks[0])
        epochs = str(PRESETS[preset].epochs)
        dense = accuracies(where(some, method="dense"))
        rows.append(["dense", epochs, spread(dense), ""])
        found = usual(where(some, sparsity=0.99))
        for name, these in found.items():
            against = (
                "" if name == "force" else interval(pairs(found["force"], these, same))
            )
            rows.append([name, epochs, spread(accuracies(these)), against])
    return aligned(rows)


QUESTIONS = (methods, claims, steps, batches, layers, objective, sanity)


def made(results: Results) -> str:
    """Of what, where and when."""
    last = max(results.values(), key=lambda result: result["date"])
    return (
        f"{len(results)} runs, seeds {sorted({run.seed for run in results})}, "
        f"{last['device']}, torch {last['torch']}, timm {last['timm']}, {last['date']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=folder / "evidence.jsonl")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--to", type=Path, default=folder.parent / "docs" / "evidence")
    args = parser.parse_args()
    stored = read(args.results)
    results = where(stored, preset=args.preset)
    if not results:
        raise SystemExit(
            f"--results: expected runs of the preset {args.preset}, {args.results} has "
            f"none; python benchmarks/evidence.py --preset {args.preset} makes them"
        )
    args.to.mkdir(parents=True, exist_ok=True)
    networks = [
        name for name in PRESETS[args.preset].networks if where(results, network=name)
    ]
    asked = dict.fromkeys(QUESTIONS, results)
    if args.preset == "cpu" and where(stored, preset="long"):
        asked[longer] = where(stored, network=networks[0])
    for question, some in asked.items():
        text = question(some, networks, args.to)
        path = args.to / f"{question.__name__}.txt"
        path.write_text(f"{question.__doc__}\n{made(some)}\n\n{text}\n")
        print(path)


if __name__ == "__main__":
    main()
