"""Prune a model of every timm family by SteadyFORCE and by others, and count losses.

    python benchmarks/steady_families.py                    # many hours, resumes
    python benchmarks/steady_families.py --methods steady_force --cells 0.9:60 0.99:10
    python benchmarks/steady_families.py --table docs/steady-families-table.md

The models are the smallest of every timm module, on scikit-learn's digits, as in
``families.py``. Each is pruned by FORCE, SteadyFORCE, Iter SNIP and SynFlow, at 90 and
99 % in 10 and 60 steps, with the guard of the library. Each mask is a line of JSON in
``--out``: layers without a weight, whether the network is disconnected, the share of
live weights on another batch, and the warnings.

Processes can share the run and its file: ``--share 0/2`` and ``--share 1/2``. Small
models come first.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import HERE, add_sweep, loss_fn, prepare, smallest_models
from families import sparsity_and_steps as cell_of
from harness.machine import made_with
from harness.options import parser_of, use_threads
from harness.reports import is_disconnected
from harness.storage import append_run, read_lines, read_runs
from harness.tables import markdown, percent

from force_plugin import force_prune, get_masks, saliency
from force_plugin.files import write_whole

METHODS = ("steady_force", "force", "iter_snip", "synflow")
CELLS = ((0.9, 60), (0.99, 10), (0.9, 10), (0.99, 60))


@dataclass(frozen=True)
class Run:
    """The options that determine a mask."""

    model: str
    family: str
    method: str
    sparsity: float
    steps: int


def execute(run: Run, model: Any, loader: Any) -> dict[str, Any]:
    """Prune a copy of a model, and measure its mask."""
    pruned = deepcopy(model)
    torch.manual_seed(1)
    report = force_prune(
        pruned,
        loader,
        run.sparsity,
        method=run.method,
        steps=run.steps,
        loss_fn=loss_fn,
        on_collapse="warn",
        progress=False,
    )
    torch.manual_seed(2)
    scores = saliency(pruned, loader, "force", loss_fn=loss_fn)
    kept = torch.cat([scores[name][mask] for name, mask in get_masks(pruned).items()])
    return {
        "layers": len(report.layers),
        "empty": [layer.name for layer in report.empty_layers],
        "live": int(kept.count_nonzero()) / len(kept),
        "warnings": list(report.warnings),
        **made_with(),
    }


def cause(result: dict[str, Any]) -> str:
    """Return what the report says of the emptied layers' cause."""
    told = [s for s in result["warnings"] if s.startswith("small initial weights")]
    told += [s for s in result["warnings"] if s.startswith("a single step would")]
    return "; ".join(told) or "no cause is known"


def as_published(sparsity: float, steps: int, models: set[str]) -> list[list[str]]:
    """Return the row of FORCE without the guard, from the sweep of ``families.py``."""
    found = [
        one
        for row in read_lines(HERE / "families.jsonl")
        if row["model"] in models
        and (one := row.get("force", {}).get(str(sparsity)))
        and one.get("steps") == steps
    ]
    if not found:
        return []
    counts = [
        len(found),
        sum(2 * len(one["empty"]) >= one["layers"] for one in found),
        sum(bool(one["empty"]) for one in found),
        sum(is_disconnected(one["warnings"]) for one in found),
    ]
    label = f"{percent(sparsity)}, {steps} steps, `force` as published"
    return [[label, *map(str, counts), "–"]]


def table(done: dict[Run, dict[str, Any]]) -> str:
    """Return the counts in Markdown, and each model that loses half of its layers."""
    titles = ["", "models", "lose half", "lose any layer", "disconnected", "live, mean"]
    rows, notes = [], []
    for sparsity, steps in CELLS:
        for method in METHODS:
            cell = {
                run: result
                for run, result in done.items()
                if (run.method, run.sparsity, run.steps) == (method, sparsity, steps)
                and "error" not in result
            }
            if not cell:
                continue
            half = [
                r for r, one in cell.items() if 2 * len(one["empty"]) >= one["layers"]
            ]
            rows.append(
                [
                    f"{percent(sparsity)}, {steps} steps, `{method}`",
                    str(len(cell)),
                    str(len(half)),
                    str(sum(bool(one["empty"]) for one in cell.values())),
                    str(sum(is_disconnected(one["warnings"]) for one in cell.values())),
                    f"{sum(one['live'] for one in cell.values()) / len(cell):.3f}",
                ]
            )
            if method == "steady_force":
                rows += as_published(sparsity, steps, {run.model for run in cell})
            notes += [
                f"- `{run.model}` ({run.family}), {percent(sparsity)}, {steps} steps: "
                f"{len(done[run]['empty'])} of {done[run]['layers']}; "
                f"{cause(done[run])}"
                for run in half
                if method == "steady_force"
            ]
    lines = [*markdown(titles, rows), ""]
    lines += ["SteadyFORCE empties half of the layers of:", "", *notes]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    add_sweep(parser, Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--cells", nargs="+", type=cell_of, default=CELLS)
    args = parser.parse_args()
    done = read_runs(args.out, Run)
    if args.table:
        write_whole(args.table, table(done).encode())
        return
    use_threads(args)
    warnings.simplefilter("ignore", UserWarning)
    for number, (name, family) in enumerate(smallest_models(args), start=1):
        runs = [
            Run(name, family, method, *cell)
            for cell in args.cells
            for method in args.methods
        ]
        todo = [run for run in runs if run not in done]
        if not todo:
            continue
        model, loader, _ = prepare(name, args)
        for run in todo:
            try:
                result = execute(run, model, loader)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            append_run(args.out, run, result)
            found = result.get("error") or (
                f"{len(result['empty'])} of {result['layers']} empty, "
                f"{result['live']:.3f} live"
            )
            print(f"[{number}] {run}: {found}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
