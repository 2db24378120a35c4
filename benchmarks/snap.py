"""Channels taken out before training, by SNAP-it and at random: what is learned.

    python benchmarks/snap.py                     # resumes where it stopped
    python benchmarks/snap.py --data digits --seeds 0 --sparsities 0.93
    python benchmarks/snap.py --from benchmarks/snap.json --plot docs

timm's VGG-16 with batch normalisation loses a share of its channels before training,
once by ``snap_prune`` and once at random, and both are trained on the same batches by
the loop of ``benchmarks/open_gates.py``, with its data: Fashion-MNIST, the first
``--images`` of the training and all of the test images. The paper's network and
sparsity (Verdenius et al. 2020, arXiv 2006.00896: VGG-16, 93 % of the channels), other
data, and a shorter training. Test accuracy after each epoch.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from cost import machine
from open_gates import DEBIAN, DIGITS, FASHION, Data, Run, accuracy, load, loader
from speed import read, show_machines, write
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from force_plugin import compact_report, snap_prune

Row = dict[str, Any]
METHODS = ("snap", "random")


def execute(run: Run, method: str, data: Data) -> Row:
    """Take channels out of one network and train it."""
    torch.manual_seed(run.seed)
    dense = timm.create_model(run.model, num_classes=10)
    example = data[0][0][0][None]
    start = time.perf_counter()
    model = snap_prune(
        dense,
        loader(data[0], run),
        example,
        run.sparsity,
        method=method,
        progress=False,
    )
    seconds = time.perf_counter() - start
    sizes = compact_report(dense, model, example)
    del dense
    batches = loader(data[0], run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=run.lr, total_steps=run.epochs * len(batches)
    )
    accuracies = []
    for epoch in range(run.epochs):
        model.train()
        for inputs, targets in tqdm(
            batches, f"epoch {epoch}", leave=False, disable=None
        ):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
        accuracies.append(accuracy(model, data[1]))
    return {
        "seconds_of_pruning": seconds,
        "channels": sizes.channels,
        "parameters": sizes.parameters,
        "multiplications": sizes.multiplications,
        "layers": [layer.outputs[1] for layer in sizes.layers],
        "accuracies": accuracies,
    }


def groups(rows: list[Row]) -> dict[tuple[float, str], list[Row]]:
    """Rows that differ in their seeds only, by sparsity and method."""
    found: dict[tuple[float, str], list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (row["run"]["sparsity"], row["run"]["seed"])
    ):
        found.setdefault((row["run"]["sparsity"], row["method"]), []).append(row)
    return found


def show(rows: list[Row]) -> None:
    """Machine and commands, then a row for each sparsity and method."""
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
        cells = []
        for epoch in (0, -1):
            values = [100 * row["accuracies"][epoch] for row in some]
            deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{deviation}")
        print(
            f"{sparsity:<14.0%}{method:8}{shares[0]:12.3%}{shares[1]:9.3%}"
            f"{cells[0]:>15}{cells[1]:>15}{len(some):7}"
        )


def plot(rows: list[Row], folder: Path) -> None:
    """Test accuracy after each epoch, a panel a sparsity."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="vgg16_bn", help="any timm model that takes 32x32")
    add("--sparsities", type=float, nargs="+", default=[0.8, 0.93, 0.97])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--data", help=f"a folder, or digits (default: {DEBIAN})")
    add("--images", type=int, default=10_000, help="training images")
    add("--epochs", type=int, default=8)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--threads", type=int, metavar="N", help="of PyTorch (default: its own)")
    here = Path(__file__)
    add("--store", type=Path, metavar="FILE", default=here.with_suffix(".json"))
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    add("--plot", type=Path, metavar="FOLDER", help="draw snap.png there")
    args = parser.parse_args()
    args.data = args.data or (str(DEBIAN) if DEBIAN.exists() else "digits")
    return args


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = read(args.source or args.store)
    dataset = DIGITS if args.data == "digits" else FASHION
    data = None
    plan = [
        (seed, sparsity, method)
        for seed in args.seeds
        for sparsity in args.sparsities
        for method in METHODS
    ]
    for seed, sparsity, method in [] if args.source else plan:
        settings = (dataset, args.images, args.epochs, args.batch, args.lr, args.model)
        run = Run(*settings, seed, "open", sparsity)
        if any(row["run"] == vars(run) and row["method"] == method for row in rows):
            continue
        print(f"seed {seed}, {sparsity:.0%}, {method}", file=sys.stderr, flush=True)
        data = data or load(dataset, Path(args.data), args.images)
        facts = {"run": vars(run), "method": method, "machine": machine("cpu")}
        rows.append(facts | execute(run, method, data))
        write(args.store, rows)
    show(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
