"""Write tables and plots of the results of benchmarks/evidence.py.

    python benchmarks/evidence_plots.py                      # to docs/evidence
    python benchmarks/evidence_plots.py --preset gpu --to /tmp/gpu

Each question has a plot and a table of its numbers: mean and standard deviation over
seeds. Comparisons pair runs of equal network and seed, with a 95 % interval of the mean
difference by Student's t. Over several networks, the differences of each seed are
averaged first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from evidence import (
    BATCHES,
    CHECKED,
    METHODS,
    PRESETS,
    STEPS,
    Run,
)
from evidence_drawing import (
    COLORS,
    Results,
    accuracies,
    accuracy_axis,
    differences,
    finished,
    line,
    log_axis,
    panels,
)
from evidence_networks import channels_of, layers_of
from harness.intervals import interval
from harness.options import parser_of
from harness.storage import read_runs
from harness.tables import aligned, percent, spread


def where(results: Results, **wanted: Any) -> Results:
    """Return the runs that have these values in their options."""
    return {
        run: result
        for run, result in results.items()
        if all(getattr(run, key) == value for key, value in wanted.items())
    }


def of_methods(results: Results, *names: str) -> Results:
    """Return the runs of these methods."""
    return {run: result for run, result in results.items() if run.method in names}


def usual(results: Results) -> dict[str, Results]:
    """Return the runs of each method with the settings of METHODS, by its name."""
    return {
        name: where(
            results,
            **{"steps": 1, "batches": 1, "schedule": "exponential", "mask": "own"}
            | METHODS[name],
        )
        for name in METHODS
    }


def live_shares(results: Results) -> list[float]:
    """Return the share of kept weights that the outputs depend on, in %."""
    return [100 * r["live"] / sum(r["kept"]) for r in results.values()]


def methods(results: Results, networks: list[str], to: Path) -> str:
    """Accuracy against sparsity, by method, and who beats whom."""
    sparsities = sorted({run.sparsity for run in results} - {0})
    figure, axes = panels(networks)
    rows = [["network", "method", *map(percent, sparsities)]]
    for network, axis in zip(networks, axes, strict=True):
        ours = where(results, network=network)
        dense = where(ours, method="dense")
        found = []
        for sparsity in sparsities:  # the number of seeds may differ
            seeds = {run.seed for run in where(ours, sparsity=sparsity)}
            found.append({run: r for run, r in dense.items() if run.seed in seeds})
        line(axis, range(len(found)), found, label="dense", color="black", ls="--")
        rows.append([network, "dense", *(spread(accuracies(f)) for f in found)])
        for name, some in usual(ours).items():
            found = [where(some, sparsity=sparsity) for sparsity in sparsities]
            line(axis, range(len(found)), found, label=name, color=COLORS[name])
            rows.append([network, name, *(spread(accuracies(f)) for f in found)])
        axis.set_xticks(range(len(sparsities)), map(percent, sparsities))
        axis.set_xlabel("sparsity")
        accuracy_axis(axis)
    finished(figure, axes[0], to / "methods.png")
    return aligned(rows)


def pairs(one: Results, other: Results, key: Callable[[Run], Any]) -> list[float]:
    """Return differences of accuracy, in points, of runs with equal keys."""
    others = {key(run): result["accuracy"] for run, result in other.items()}
    return [
        100 * (result["accuracy"] - others[key(run)])
        for run, result in one.items()
        if key(run) in others
    ]


def same(run: Run) -> tuple[str, int]:
    """Return network and seed, the key to pair runs of different methods."""
    return run.network, run.seed


def by_seed(one: Results, other: Results) -> list[float]:
    """Return the difference of each seed, the mean over all networks."""
    seeds = sorted({run.seed for run in one})
    found = (pairs(where(one, seed=s), where(other, seed=s), same) for s in seeds)
    return [mean(values) for values in found if values]


def claims(results: Results, networks: list[str], to: Path) -> str:
    """At 99 % and above: FORCE and Iter SNIP minus each of the others (* is not 0)."""
    ours = ("force", "iter_snip")
    others = [name for name in METHODS if name != "force"]
    sparsities = sorted({run.sparsity for run in results if run.sparsity >= 0.99})
    groups = {name: where(results, network=name) for name in networks}
    groups["all"] = results
    rows = [["sparsity", "", "minus", *groups, "ahead in"]]
    if not sparsities:
        return aligned(rows)
    figure, axes = panels([percent(s) for s in sparsities], sharey=True)
    for sparsity, axis in zip(sparsities, axes, strict=True):
        found = {
            name: usual(where(some, sparsity=sparsity)) for name, some in groups.items()
        }
        drawn = {mine: dict[str, list[float]]() for mine in ours}
        for mine in ours:
            for other in others:
                if mine == other:
                    drawn[mine][other] = []
                    continue
                points = {
                    name: pairs(some[mine], some[other], same)
                    for name, some in found.items()
                }
                # Two networks are not two draws: each seed counts as a single draw.
                seeds = by_seed(found["all"][mine], found["all"][other])
                drawn[mine][other] = seeds
                intervals = map(interval, [*list(points.values())[:-1], seeds])
                ahead = sum(difference > 0 for difference in points["all"])
                rows.append([percent(sparsity), mine, other, *intervals])
                rows[-1].append(f"{ahead} of {len(points['all'])}")
        differences(axis, drawn, "points of accuracy more than this method (95 %)")
    finished(figure, axes[0], to / "claims.png")
    return aligned(rows)


def steps(results: Results, networks: list[str], to: Path) -> str:
    """FORCE and Iter SNIP by the number of steps: accuracy, and % of live weights."""
    own = where(results, network=networks[0], sparsity=0.99, mask="own", batches=1)
    figure, (axis,) = panels([f"{networks[0]}, 99 %"])
    rows = [["", "method", "schedule", *(f"T = {steps}" for steps in STEPS)]]
    lives = []
    for method in ("force", "iter_snip"):
        for kind, style in (("exponential", "-"), ("linear", ":")):
            some = where(own, method=method, schedule=kind)
            found = [where(some, steps=steps) for steps in STEPS]
            label = f"{method}, {kind}"
            line(axis, STEPS, found, label=label, color=COLORS[method], ls=style)
            rows.append(["accuracy", method, kind])
            rows[-1] += [spread(accuracies(some)) for some in found]
            lives.append(["live", method, kind])
            lives[-1] += [spread(live_shares(some), digits=0) for some in found]
    log_axis(axis, STEPS, "steps T")
    accuracy_axis(axis)
    finished(figure, axis, to / "steps.png")
    return aligned(rows + lives)


def batches(results: Results, networks: list[str], to: Path) -> str:
    """One-shot methods by the number of batches."""
    own = where(results, network=networks[0], sparsity=0.99, mask="own")
    figure, (axis,) = panels([f"{networks[0]}, 99 %"])
    rows = [["method", *(f"B = {batches}" for batches in BATCHES)]]
    for method in ("snip", "grasp"):
        found = [where(own, method=method, batches=batches) for batches in BATCHES]
        line(axis, BATCHES, found, label=method, color=COLORS[method])
        rows.append([method, *(spread(accuracies(f)) for f in found)])
    log_axis(axis, BATCHES, "batches of 128")
    accuracy_axis(axis)
    finished(figure, axis, to / "batches.png")
    return aligned(rows)


def live(results: Results, networks: list[str], to: Path) -> str:
    """Live weights, in % of those that stay: the outputs depend on them."""
    sparsities = sorted({run.sparsity for run in results} - {0})
    rows = [["network", "method", *map(percent, sparsities)]]
    for network in networks:
        for name, some in usual(where(results, network=network)).items():
            found = [where(some, sparsity=sparsity) for sparsity in sparsities]
            rows.append(
                [network, name, *(spread(live_shares(f), digits=1) for f in found)]
            )
    return aligned(rows)


def layers(results: Results, networks: list[str], to: Path) -> str:
    """Which layers are pruned: the density of each at 99 %."""
    figure, axes = panels(networks)
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
        names = [name.removesuffix(".weight") for name in weights]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_ylabel("weights kept (%)")
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
    rows = [["network", "method", "sparsity", "sensitivity", "accuracy"]]
    if not networks:
        return aligned(rows)
    figure, axes = panels(networks)
    for network, axis in zip(networks, axes, strict=True):
        for name, some in usual(where(results, network=network)).items():
            chosen = {run: r for run, r in some.items() if run.sparsity >= 0.99}
            axis.scatter(
                [r["sensitivity"] for r in chosen.values()],
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
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(left=-0.002)
        axis.set_xlabel("foresight connection sensitivity, 99 % and above")
        accuracy_axis(axis)
    finished(figure, axes[0], to / "objective.png")
    return aligned(rows)


def sanity(results: Results, networks: list[str], to: Path) -> str:
    """The same masks shuffled within layers, and with new initial values."""
    kinds = ("shuffled", "reinitialised")
    sparsities = (0.95, 0.99)
    figure, axes = panels(
        [f"{networks[0]}, {percent(s)}" for s in sparsities], sharey=True
    )
    rows = [
        ["sparsity", "method", "own", *kinds, *(f"{k} - own (95 %)" for k in kinds)]
    ]
    for sparsity, axis in zip(sparsities, axes, strict=True):
        drawn = {kind: dict[str, list[float]]() for kind in kinds}
        for name in CHECKED:
            options = {"steps": 1, "batches": 1, "schedule": "exponential"}
            options |= {"network": networks[0], "sparsity": sparsity} | METHODS[name]
            own, *found = (
                where(results, mask=mask, **options) for mask in ("own", *kinds)
            )
            for kind, some in zip(kinds, found, strict=True):
                drawn[kind][name] = pairs(some, own, same)
            rows.append(
                [percent(sparsity), name]
                + [spread(accuracies(some)) for some in (own, *found)]
                + [interval(drawn[kind][name]) for kind in kinds]
            )
        differences(axis, drawn, "points of accuracy more than its own mask (95 %)")
    finished(figure, axes[0], to / "sanity.png")
    return aligned(rows)


def longer(results: Results, networks: list[str], to: Path) -> str:
    """At 99 %, by epochs of training; differences are of the longer training."""
    some = {p: where(results, preset=p, network=networks[0]) for p in ("cpu", "long")}
    epochs = [f"epochs: {PRESETS[preset].epochs}" for preset in some]
    ours = ("force", "iter_snip")
    rows = [["method", *epochs, *(f"{mine} - this (95 %)" for mine in ours)]]
    dense = [where(these, method="dense") for these in some.values()]
    rows.append(["dense", *(spread(accuracies(these)) for these in dense), "", ""])
    found = [usual(where(these, sparsity=0.99)) for these in some.values()]
    for name in PRESETS["long"].methods:
        rows.append([name, *(spread(accuracies(these[name])) for these in found)])
        last = found[-1]
        rows[-1] += [
            "" if name == mine else interval(pairs(last[mine], last[name], same))
            for mine in ours
        ]
    return aligned(rows)


def advice(results: Results, networks: list[str], to: Path) -> str:
    """Points of accuracy behind the best method, by the weights left for a channel."""
    shown = ("snip", "grasp", "iter_snip", "force", "steady_force", "synflow")
    rows = [["network", "sparsity", "a channel", "best", *shown]]
    for network in networks:
        ours = where(results, network=network)
        weights, channels = layers_of(network), channels_of(network)
        for sparsity in sorted({run.sparsity for run in ours} - {0}):
            found = {
                name: mean(accuracies(where(some, sparsity=sparsity)))
                for name, some in usual(ours).items()
                if where(some, sparsity=sparsity)
            }
            best = max(found, key=found.__getitem__)
            left = (1 - sparsity) * sum(weights.values()) / channels
            row = [network, percent(sparsity), f"{left:.1f}", best]
            behind = (
                f"{found[best] - found[name]:.1f}" if name in found else "–"
                for name in shown
            )
            rows.append([*row, *behind])
    return aligned(rows)


QUESTIONS = (methods, claims, steps, batches, live, layers, objective, sanity, advice)


def made(results: Results) -> str:
    """Return lines on the runs that were asked, their machines, versions and dates."""
    dates: dict[str, list[str]] = {}
    for result in results.values():
        machine = "{device}, torch {torch}, timm {timm}".format(**result)
        dates.setdefault(machine, []).append(result["date"])
    lines = [f"From {len(results)} runs, seeds {sorted({run.seed for run in results})}"]
    for machine, days in dates.items():
        when = " to ".join(sorted({min(days), max(days)}))
        lines.append(f"{len(days)} on {machine}, {when}")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    folder = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=folder / "evidence.jsonl")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--to", type=Path, default=folder.parent / "docs" / "evidence")
    args = parser.parse_args()
    stored = read_runs(args.results, Run)
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
    # Seeds that were added for one question would give incomplete rows of another.
    seeds = PRESETS[args.preset].seeds
    usual_seeds = {run: result for run, result in stored.items() if run.seed in seeds}
    planned = where(usual_seeds, preset=args.preset)
    asked[steps] = of_methods(planned, "force", "iter_snip")
    asked[batches] = of_methods(planned, "snip", "grasp")
    asked[sanity] = of_methods(planned, *CHECKED)
    if args.preset == "cpu" and where(stored, preset="long"):
        some = where(usual_seeds, network=networks[0])
        asked[longer] = of_methods(some, "dense", *PRESETS["long"].methods)
    for question, some in asked.items():
        text = question(some, networks, args.to)
        path = args.to / f"{question.__name__}.txt"
        path.write_text(f"{question.__doc__}\n{made(some)}\n\n{text}\n")
        print(path)


if __name__ == "__main__":
    main()
