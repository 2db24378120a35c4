"""Run a pruned model of every timm family without its zeros, and check its outputs.

    python benchmarks/sparse_families.py                # all, resumes where it stopped
    python benchmarks/sparse_families.py --models resnet50 convnext_tiny
    python benchmarks/sparse_families.py --table docs/sparse-families-table.md

The models are the smallest of every timm module, as in ``steady_families.py``. FORCE
prunes them on scikit-learn's digits, in three steps to 90 and 99 %. Closed gates are
opened afterwards, and normalisations see a batch, because both hide differences. Each
model runs by its non-zeros in all layers (``plan="sparse"``), as it is and after
``compact``, in float32 and float64. Its outputs on other images are compared with the
model's in the same type. Each model at a sparsity is a line of JSON in ``--out``.
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
from compact_families import opened
from families import add_sweep, loss_fn, prepare, smallest_models
from harness.machine import made_with
from harness.options import parser_of, use_threads
from harness.storage import append_run, read_runs
from harness.tables import markdown, percent
from torch import Tensor, nn

from force_plugin import (
    CompactionError,
    compact,
    execution_report,
    force_prune,
    make_permanent,
    sparsify,
)
from force_plugin.data.containers import tensors
from force_plugin.files import write_whole
from force_plugin.structure.example_inputs import distance

SPARSITIES = (0.9, 0.99)
TYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Run:
    """The options that determine a result."""

    model: str
    family: str
    sparsity: float


def compared(model: nn.Module, images: Tensor, others: Tensor) -> dict[str, Any]:
    """Return how a model runs by its non-zeros, and how far its outputs are off."""
    found: dict[str, Any] = {}
    for name, dtype in TYPES.items():
        dense = deepcopy(model).to(dtype).eval()
        fast = sparsify(dense, images.to(dtype), plan="sparse", progress=False)
        with torch.no_grad():
            for given in (images, others):
                pairs = zip(
                    tensors(fast(given.to(dtype))),
                    tensors(dense(given.to(dtype))),
                    strict=True,
                )
                off = max(distance(a.double(), b.double()) for a, b in pairs)
                found[name] = max(found.get(name, 0.0), off)
        report = execution_report(fast)
        found["layers"] = len(report.layers)
        found["why_dense"] = report.why_dense
    return found


def execute(run: Run, dense: nn.Module, loader: Any) -> dict[str, Any]:
    """Prune a copy of a model, and compare it with itself without zeros."""
    model = deepcopy(dense)
    force_prune(
        model,
        loader,
        run.sparsity,
        steps=3,
        loss_fn=loss_fn,
        on_collapse="warn",
        progress=False,
    )
    make_permanent(model, hold_zeros=False)
    model = opened(model)
    batches = iter(loader)
    with torch.no_grad():
        images = next(batches)[0]
        model.train()(images)
        others = next(batches)[0]
    model.eval()
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    }
    result = {"wanted": len(wanted), "plain": compared(model, images, others)}
    try:
        small = compact(model, images, progress=False)
    except CompactionError as error:
        result["compact"] = {"error": str(error)}
    else:
        result["compact"] = compared(small, images, others)
    return result | made_with()


def table(done: dict[Run, dict[str, Any]]) -> str:
    """Return counts, then what falls back, in Markdown."""
    titles = ["", "models", "run by non-zeros", *TYPES]
    rows, notes = [], []
    for sparsity in SPARSITIES:
        for form in ("plain", "compact"):
            cell = {
                run: result[form]
                for run, result in done.items()
                if run.sparsity == sparsity and "error" not in result.get(form, result)
            }
            planned = [one for one in cell.values() if not one["why_dense"]]
            largest = [max(one[name] for one in planned) for name in TYPES]
            label = "as it is" if form == "plain" else "after `compact`"
            rows.append(
                [
                    f"{percent(sparsity)}, {label}",
                    str(len(cell)),
                    str(len(planned)),
                    *(f"{value:.1e}" for value in largest),
                ]
            )
            notes += [
                f"- `{run.model}` ({run.family}): {one['why_dense']}"
                for run, one in cell.items()
                if one["why_dense"]
            ]
    notes += [
        f"- `{run.model}` ({run.family}): {result['error']}"
        for run, result in done.items()
        if "error" in result
    ]
    lines = [*markdown(titles, rows), ""]
    lines += ["Dense, as a whole:", "", *dict.fromkeys(notes)] if notes else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    add_sweep(parser, Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    done = read_runs(args.out, Run)
    if args.table:
        write_whole(args.table, table(done).encode())
        return
    use_threads(args)
    warnings.simplefilter("ignore", UserWarning)
    for name, family in smallest_models(args):
        todo = [run for s in SPARSITIES if (run := Run(name, family, s)) not in done]
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
            print(run, result, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
