"""Train networks after SNAP-it or a random choice removed channels, and compare them.

    python benchmarks/snap.py                     # resumes where it stopped
    python benchmarks/snap.py --data digits --seeds 0 --sparsities 0.93
    python benchmarks/snap.py --from benchmarks/snap.json --plot docs

timm's VGG-16 with batch normalisation loses a share of its channels before training,
once by ``snap_prune`` and once at random. The loop of ``benchmarks/open_gates.py``
trains both networks on equal batches. The data are the first ``--images`` training
images and all test images of Fashion-MNIST. Test accuracy is measured after each epoch.

Network and sparsity are the paper's (Verdenius et al. 2020, arXiv 2006.00896: VGG-16,
93 % of the channels). The data differ, and the training is shorter.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import timm
import torch
from harness.fashion_mnist import Data, load
from harness.machine import machine, show_machines
from harness.options import add_files, add_threads, parser_of, use_threads
from harness.runs import Run, add_training, shared_run
from harness.storage import read_rows, write_json
from harness.tables import spread
from harness.timing import timed
from harness.training import accuracy, adamw, train
from torch.utils.data import DataLoader

from force_plugin import compact_report, snap_prune

Row = dict[str, Any]
Method = Literal["snap", "random"]
METHODS: tuple[Method, ...] = ("snap", "random")


def execute(run: Run, method: Method, data: Data) -> Row:
    """Remove channels from a network, and train it."""
    torch.manual_seed(run.seed)
    dense = timm.create_model(run.model, num_classes=10)
    example = data[0][0][0][None]
    seconds, model = timed(
        partial(
            snap_prune,
            dense,
            run.loader(data[0]),
            example,
            run.sparsity,
            method=method,
            progress=False,
        )
    )
    sizes = compact_report(dense, model, example)
    del dense
    test = DataLoader(data[1], 500)
    accuracies: list[float] = []
    train(
        model,
        run.loader(data[0]),
        adamw(model, run.lr),
        run.epochs,
        progress=True,
        after_epoch=lambda: accuracies.append(accuracy(model, test)),
    )
    return {
        "seconds_of_pruning": seconds,
        "channels": sizes.channels,
        "parameters": sizes.parameters,
        "multiplications": sizes.multiplications,
        "layers": [layer.outputs[1] for layer in sizes.layers],
        "accuracies": accuracies,
    }


def groups(rows: list[Row]) -> dict[tuple[float, str], list[Row]]:
    """Return the rows of all seeds, grouped by sparsity and method."""
    found: dict[tuple[float, str], list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (row["run"]["sparsity"], row["run"]["seed"])
    ):
        found.setdefault((row["run"]["sparsity"], row["method"]), []).append(row)
    return found


def show(rows: list[Row]) -> None:
    """Print machine and commands, then a row for each sparsity and method."""
    show_machines(rows)
    run = Run(**rows[0]["run"])
    print(
        f"\n{run.model}, {run.data}: {run.images:,} images, {run.epochs} epochs in "
        f"batches of {run.batch},\nAdamW, one cycle up to {run.lr:g}; test accuracy in "
        "%, mean ± standard deviation\n\n"
        f"{'channels out':14}{'by':8}{'parameters':>12}{'mult.':>9}"
        f"{'first epoch':>15}{'last epoch':>15}{'seeds':>7}"
    )
    for (sparsity, method), some in groups(rows).items():
        shares = [
            mean(row[key][1] / row[key][0] for row in some)
            for key in ("parameters", "multiplications")
        ]
        cells = [
            spread([100 * row["accuracies"][epoch] for row in some])
            for epoch in (0, -1)
        ]
        print(
            f"{sparsity:<14.0%}{method:8}{shares[0]:12.3%}{shares[1]:9.3%}"
            f"{cells[0]:>15}{cells[1]:>15}{len(some):7}"
        )


def plot(rows: list[Row], folder: Path) -> None:
    """Draw test accuracy after each epoch, a panel for each sparsity."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "snap"
    sparsities = sorted({row["run"]["sparsity"] for row in rows})
    figure = Figure(figsize=(3.5 * len(sparsities), 3), layout="constrained")
    panels = figure.subplots(1, len(sparsities), squeeze=False, sharey=True)[0]
    for panel, sparsity in zip(panels, sparsities, strict=True):
        for method, colour in zip(METHODS, ("C0", "C1"), strict=True):
            curves = [
                [100 * a for a in row["accuracies"]]
                for row in groups(rows).get((sparsity, method), [])
            ]
            if not curves:
                continue
            epochs = range(1, len(curves[0]) + 1)
            columns = list(zip(*curves, strict=True))
            panel.plot(
                epochs, [mean(c) for c in columns], colour, label=method, marker="."
            )
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            panel.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
        panel.set_title(f"{sparsity:.0%} of the channels taken out", fontsize="medium")
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False)
    figure.savefig(folder / "snap.png", dpi=150)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default="vgg16_bn", help="any timm model that takes 32x32")
    add("--sparsities", type=float, nargs="+", default=[0.8, 0.93, 0.97])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_training(parser, images=10_000, epochs=8)
    add_threads(parser)
    add_files(parser, Path(__file__).with_suffix(".json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    use_threads(args)
    rows = read_rows(args.source or args.store)
    shared, data = replace(shared_run(args), model=args.model, gates="open"), None
    plan = [
        (seed, sparsity, method)
        for seed in args.seeds
        for sparsity in args.sparsities
        for method in METHODS
    ]
    for seed, sparsity, method in [] if args.source else plan:
        run = replace(shared, seed=seed, sparsity=sparsity)
        if any(row["run"] == vars(run) and row["method"] == method for row in rows):
            continue
        print(f"seed {seed}, {sparsity:.0%}, {method}", file=sys.stderr, flush=True)
        data = data or load(run.data, Path(args.data), run.images)
        facts = {"run": vars(run), "method": method, "machine": machine("cpu")}
        rows.append(facts | execute(run, method, data))
        write_json(args.store, rows)
    show(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
