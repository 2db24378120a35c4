"""Train networks that were pruned with open and with closed gates, and compare them.

    python benchmarks/open_gates.py                    # all, resumes where it stopped
    python benchmarks/open_gates.py --models resnet50 --seeds 0
    python benchmarks/open_gates.py --table docs/open-gates-table.md
    python benchmarks/open_gates.py --models test_vit2 --epochs 8  # a table of its own

timm multiplies every residual branch by 0 at the start of a ResNet, and by 1e-6 at the
start of a ConvNeXt. FORCE prunes each network at timm's own initialisation, in two
ways. ``open_gates=True`` opens the gates while scoring. ``open_gates=False`` scores as
in the papers. One plain loop trains both pruned networks and the dense network. A seed
fixes the initial weights and the order of batches for all three.

The question is what the branches contribute. The shortcuts of a ``resnet18`` skip three
of four pixels at each stride. Without its branches, a ``resnet18`` sees one corner of a
32x32 image. The shortcuts of a ``resnet18d`` take the mean of all four pixels, and the
shortcuts of a ConvNeXt see all pixels.

The data are Fashion-MNIST: all 10,000 test images and the first ``--images`` of the
training images. Install them by ``apt-get install dataset-fashion-mnist`` on Debian, or
put the four idx files anywhere below ``--data`` (gzipped or not; torchvision's folders
work). Without these files, scikit-learn's digits are used.

A finished run is a line of JSON in ``--out`` and is not run again. Ctrl-C loses the
current run only. All runs take about two hours on one core. Processes with other
``--seeds`` or ``--models`` can share the work and the file.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from harness.fashion_mnist import Data, load
from harness.machine import in_words, made_with
from harness.options import add_threads, parser_of, use_threads
from harness.reports import gates_opened, is_disconnected
from harness.runs import Run, add_training, shared_run
from harness.storage import append_run, read_runs
from harness.tables import aligned, markdown, percent, spread
from harness.training import accuracy, adamw, train
from torch.utils.data import DataLoader

from force_plugin import SparsityReport, force_prune
from force_plugin.files import write_whole

# A ViT takes only the size that it is made for; 16 patches of these images.
OPTIONS = {"test_vit2": {"img_size": 32, "patch_size": 8}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Result = dict[str, Any]


def describe(report: SparsityReport) -> Result:
    """Return the stored facts of a pruning."""
    return {
        "layers": len(report.layers),
        "emptied": len(report.empty_layers),
        "gates_opened": gates_opened(report.warnings),
        "disconnected": is_disconnected(report.warnings),
        "warnings": list(report.warnings),
    }


def execute(run: Run, data: Data) -> Result:
    """Prune, train and test one network."""
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    options = OPTIONS.get(run.model, {})
    model = timm.create_model(run.model, num_classes=10, **options).to(DEVICE)
    result: Result = {}
    if run.sparsity:
        report = force_prune(
            model,
            run.loader(data[0]),
            run.sparsity,
            steps=run.steps,
            open_gates=run.gates == "open",
            on_collapse="warn",
            progress=sys.stderr.isatty(),
        )
        result |= describe(report)
    pruned = time.perf_counter()
    torch.manual_seed(run.seed)  # dropout
    optimizer = adamw(model, run.lr)
    train(model, run.loader(data[0]), optimizer, run.epochs, DEVICE, progress=True)
    trained = time.perf_counter()
    return result | {
        "accuracy": accuracy(model, DataLoader(data[1], 500), DEVICE),
        "seconds_pruning": round(pruned - start, 1),
        "seconds_training": round(trained - pruned, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": in_words(DEVICE, torch.get_num_threads()),
        **made_with(),
    }


def table(results: dict[Run, Result]) -> list[list[str]]:
    """Return the titles, and a row for each network and sparsity."""

    def accuracies(found: list[Result]) -> str:
        return spread([100 * result["accuracy"] for result in found], digits=1)

    def emptied(found: list[Result]) -> str:
        return f"{mean(r['emptied'] for r in found):.1f}" if found else "–"

    groups: dict[tuple[str, float, str], list[Result]] = {}
    for run, result in results.items():
        groups.setdefault((run.model, run.sparsity, run.gates), []).append(result)
    titles = "network,sparsity,dense,gates open,gates closed,emptied layers"
    rows = [titles.split(",")]
    for model, sparsity in dict.fromkeys((m, s) for m, s, _ in sorted(groups) if s):
        dense = groups.get((model, 0.0, "dense"), [])
        opened = groups.get((model, sparsity, "open"), [])
        closed = groups.get((model, sparsity, "closed"), [])
        counts = f"{emptied(opened)} / {emptied(closed)}"
        of = f" of {(opened + closed)[0]['layers']}"
        rows.append([model, percent(sparsity)])
        rows[-1] += map(accuracies, (dense, opened, closed))
        rows[-1].append(counts + of)
    return rows


def caption(results: dict[Run, Result], planned: int) -> str:
    """Return a caption that explains the table, with machine and date."""
    run = next(iter(results))
    seeds = ", ".join(map(str, sorted({run.seed for run in results})))
    steps = max(run.steps for run in results)
    last = max(result["date"] for result in results.values())
    machines = {f"{r['machine']}, torch {r['torch']}" for r in results.values()}
    return (
        "Test accuracy in % and layers without a weight (gates open / closed), mean ± "
        f"standard deviation over seeds {seeds}. {run.data}: {run.images:,} training "
        f"images, {run.epochs} epochs in batches of {run.batch}, AdamW, one cycle up "
        f"to {run.lr:g}; FORCE in {steps} steps. {len(results)} of {planned} runs, "
        f"{' and '.join(sorted(machines))}, {last}."
    )


def plan(args: argparse.Namespace) -> list[Run]:
    """Return all runs, seed by seed."""
    base = shared_run(args)
    runs = []
    for seed in args.seeds:
        for model in args.models:
            dense = replace(base, model=model, seed=seed)
            runs.append(dense)
            for sparsity in args.sparsity:
                pruned = replace(dense, sparsity=sparsity, steps=args.steps)
                runs += [replace(pruned, gates=gates) for gates in ("open", "closed")]
    return runs


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["resnet18", "resnet18d", "convnext_atto"]
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="steps of FORCE")
    add_training(parser, images=20_000)
    add_threads(parser)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".jsonl")
    )
    parser.add_argument("--table", type=Path, help="only write the table, as Markdown")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    use_threads(args)
    warnings.simplefilter("ignore", UserWarning)  # the reports have them
    runs, known = plan(args), read_runs(args.out, Run)
    results = {run: known[run] for run in runs if run in known}
    if args.table:
        if not results:
            raise SystemExit(f"--table: none of these runs is in {args.out} yet")
        titles, *rows = table(results)
        text = textwrap.fill(caption(results, len(runs)), 88)
        write_whole(
            args.table, "\n".join([*markdown(titles, rows), "", text, ""]).encode()
        )
        return

    todo = [run for run in runs if run not in results]
    print(f"{runs[0].data}: {len(todo)} of {len(runs)} runs to do", flush=True)
    try:
        data = load(runs[0].data, Path(args.data), runs[0].images)
        for number, run in enumerate(todo, start=1):
            result = results[run] = execute(run, data)
            append_run(args.out, run, result)
            print(
                f"[{number}/{len(todo)}] {run}: {result['accuracy']:.2%}, "
                f"{result.get('emptied', 0)} layers emptied, {result['seconds']} s",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; the same command does the rest", file=sys.stderr)
    if results:
        print(f"\n{aligned(table(results))}")
        print("\n" + textwrap.fill(caption(results, len(runs)), 80))


if __name__ == "__main__":
    main()
