"""Write tables of the trainings after SteadyFORCE, which evidence.py has done.

    python benchmarks/evidence.py --preset steady --out benchmarks/evidence_steady.jsonl
    python benchmarks/evidence.py --preset larger --out benchmarks/evidence_steady.jsonl
    python benchmarks/evidence_steady.py docs/steady-accuracy-table.md

Differences of accuracy are between runs of the same network, steps and seed, in points.
A cell beside Iter SNIP has the mean difference over the seeds, and the objectives of
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from evidence import (
    EXTREME,
    METHODS,
    PRESETS,
    STEADY_SPARSITIES,
    STEADY_STEPS,
    Run,
)
from harness.intervals import interval
from harness.options import parser_of
from harness.storage import read_runs
from harness.tables import markdown, percent

from force_plugin.files import write_whole

USUAL_STEPS = 60
Results = Mapping[Run, Mapping[str, Any]]


def filled(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table of the rows that have a result, or nothing."""
    some = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return ["", *markdown(titles, some)] if some else []


def of_seeds(done: Results, **wanted: Any) -> dict[int, Mapping[str, Any]]:
    """Return the results of the runs with these options, by seed."""
    return {
        run.seed: result
        for run, result in done.items()
        if all(getattr(run, key) == value for key, value in wanted.items())
    }


def extreme(done: Results) -> list[str]:
    """Return the accuracies at 99.9 %: the mean over the seeds, and the worst seed."""
    titles = ["99.9 %", *(f"`{method}`, {steps} steps" for method, steps in EXTREME)]
    rows = []
    for network in PRESETS["steady"].networks:
        cells = [f"`{network}`"]
        for method, steps in EXTREME:
            found = of_seeds(
                done, network=network, method=method, steps=steps, sparsity=0.999
            )
            values = [100 * one["accuracy"] for one in found.values()]
            cells.append(
                f"{mean(values):.1f} (worst of {len(values)}: {min(values):.1f})"
                if values
                else "–"
            )
        rows.append(cells)
    return filled(titles, rows)


def beside_iter_snip(done: Results, network: str) -> list[str]:
    """Return the differences to Iter SNIP, and the objectives of both."""
    titles = [f"`{network}`", *(f"{steps} steps" for steps in STEADY_STEPS)]
    rows = []
    for sparsity in STEADY_SPARSITIES:
        for schedule in ("exponential", "linear"):
            cells = [f"{percent(sparsity)}, {schedule}"]
            for steps in STEADY_STEPS:
                found = pairs(done, network, sparsity, schedule, steps)
                if not found:
                    cells.append("–")
                    continue
                ours, theirs = (
                    {
                        key: mean(pair[side][key] for pair in found)
                        for key in ("accuracy", "sensitivity")
                    }
                    for side in (0, 1)
                )
                difference = 100 * (ours["accuracy"] - theirs["accuracy"])
                objectives = f"{ours['sensitivity']:.3g} : {theirs['sensitivity']:.3g}"
                cells.append(f"{difference:+.2f}, {objectives}")
            rows.append(cells)
    return filled(titles, rows)


def pairs(
    done: Results, network: str, sparsity: float, schedule: str, steps: int
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the results of SteadyFORCE and of Iter SNIP with the same seed."""
    ours, theirs = (
        of_seeds(
            done,
            network=network,
            method=method,
            steps=steps,
            sparsity=sparsity,
            schedule=schedule,
        )
        for method in ("steady_force", "iter_snip")
    )
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def together(done: Results) -> list[str]:
    """Return the differences to Iter SNIP over both networks and all steps."""
    titles = ["SteadyFORCE − Iter SNIP", "pairs", "median", "mean (95 %)", "ahead in"]
    titles.append("larger objective in")
    rows = []
    for schedule in ("exponential", "linear"):
        for sparsity in STEADY_SPARSITIES:
            found = [
                pair
                for network in PRESETS["steady"].networks
                for steps in STEADY_STEPS
                for pair in pairs(done, network, sparsity, schedule, steps)
            ]
            values = [100 * (a["accuracy"] - b["accuracy"]) for a, b in found]
            if not values:
                continue
            objectives = sum(a["sensitivity"] > b["sensitivity"] for a, b in found)
            row = [f"{percent(sparsity)}, {schedule}", str(len(values))]
            row += [f"{median(values):+.2f}", interval(values)]
            row += [str(sum(value > 0 for value in values)), str(objectives)]
            rows.append(row)
    return filled(titles, rows)


def fewer_steps(done: Results) -> list[str]:
    """Return what SteadyFORCE gains over 60 steps by other numbers of steps."""
    others = [steps for steps in STEADY_STEPS if steps != USUAL_STEPS]
    titles = [f"SteadyFORCE, minus {USUAL_STEPS} steps"]
    titles += [f"{steps} steps" for steps in others]
    rows = []
    for schedule in ("exponential", "linear"):
        for sparsity in STEADY_SPARSITIES:
            cells = [f"{percent(sparsity)}, {schedule}"]
            for steps in others:
                values = []
                for network in PRESETS["steady"].networks:
                    some, usual = (
                        of_seeds(
                            done,
                            network=network,
                            method="steady_force",
                            steps=number,
                            sparsity=sparsity,
                            schedule=schedule,
                        )
                        for number in (steps, USUAL_STEPS)
                    )
                    values += [
                        100 * (some[seed]["accuracy"] - usual[seed]["accuracy"])
                        for seed in some.keys() & usual.keys()
                    ]
                cells.append(interval(values))
            rows.append(cells)
    return filled(titles, rows)


def larger(done: Results) -> list[str]:
    """Return the accuracies of the larger models, means over the seeds."""
    preset = PRESETS["larger"]
    titles = ["", "dense", *(f"`{method}`" for method in preset.methods)]
    rows = []
    for network in preset.networks:
        for sparsity in preset.sparsities:
            cells = [f"`{network}`, {percent(sparsity)}"]
            wanted = [{"method": "dense", "sparsity": 0.0}]
            wanted += [
                {"sparsity": sparsity} | METHODS[method] for method in preset.methods
            ]
            for options in wanted:
                found = of_seeds(done, network=network, preset="larger", **options)
                values = [100 * one["accuracy"] for one in found.values()]
                cells.append(f"{mean(values):.2f}" if values else "–")
            rows.append(cells)
    return filled(titles, rows)


def tables(done: Results) -> str:
    """Return all tables in Markdown."""
    lines = extreme(done) + together(done) + fewer_steps(done)
    for network in PRESETS["steady"].networks:
        lines += beside_iter_snip(done, network)
    lines += larger(done)
    last = [*done.values()][-1]
    versions = f"torch {last['torch']}, timm {last['timm']}, {last['date']}"
    return "\n".join([*lines[1:], "", f"Two cores of an AMD EPYC, {versions}."]) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("table", type=Path, help="the file to write")
    here = Path(__file__).with_suffix(".jsonl")
    parser.add_argument("--results", type=Path, default=here)
    args = parser.parse_args()
    write_whole(args.table, tables(read_runs(args.results, Run)).encode())


if __name__ == "__main__":
    main()
