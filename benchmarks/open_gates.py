"""Is a network better pruned with its closed gates open? Trained, both ways.

    python benchmarks/open_gates.py                    # all, resumes where it stopped
    python benchmarks/open_gates.py --models resnet50 --seeds 0
    python benchmarks/open_gates.py --table docs/open-gates-table.md
    python benchmarks/open_gates.py --models test_vit2 --epochs 8  # a table of its own

timm's ResNets start with every residual branch multiplied by 0, its ConvNeXts by 1e-6.
FORCE prunes each at timm's own initialisation, once with these gates opened while
scoring (``open_gates=True``) and once as the papers' scores have it
(``open_gates=False``); the same plain loop trains both and the dense network. A seed
fixes the initial weights and the order of the batches, the same for all three. What
is at stake is what the branches do: the shortcuts of a ``resnet18`` skip three of four
pixels at each stride, and without its branches it sees one corner of a 32x32 image;
those of a ``resnet18d`` take the mean of all four, those of a ConvNeXt see them all.

The data are Fashion-MNIST, all 10,000 test images and the first ``--images`` of the
training images: ``apt-get install dataset-fashion-mnist`` on Debian, or the four idx
files (gzipped or not, torchvision's folders will do) anywhere below ``--data``. Without
them, scikit-learn's digits take their place.

A finished run is a line of JSON in ``--out`` and is not run again; Ctrl-C loses the
current one only. All runs take about two hours on one core. Processes with other
``--seeds`` or ``--models`` can share the work and the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from force_plugin import SparsityReport, force_prune
from force_plugin.files import write_whole
from force_plugin.zoo import digits

FASHION, DIGITS = "Fashion-MNIST", "scikit-learn's digits"
TRAINING_IMAGES = {FASHION: 60_000, DIGITS: 1437}
EPOCHS = {FASHION: 4, DIGITS: 40}
# A ViT takes no other size than it is made for; 16 patches of these images.
OPTIONS = {"test_vit2": {"img_size": 32, "patch_size": 8}}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Data = tuple[Dataset[Any], Dataset[Any]]
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All that decides the result of one training."""

    data: str
    images: int
    epochs: int
    batch: int
    lr: float
    model: str = ""
    seed: int = 0
    gates: str = "dense"  # not pruned; or "open", "closed"
    sparsity: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        """The part that changes from run to run."""
        pruned = f"{percent(self.sparsity)}, gates {self.gates}"
        return f"{self.model}, seed {self.seed}, {pruned if self.sparsity else 'dense'}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"


def read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an idx file, gzipped or not, somewhere below a folder."""
    path = next(folder.rglob(f"{name}*"), None)
    if path is None:
        raise SystemExit(f"--data: expected {name} or {name}.gz below {folder}")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    # Byte 3 is the number of dimensions; their sizes and the values follow.
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.from_numpy(values.reshape(shape).copy())


def load(data: str, folder: Path, images: int) -> Data:
    """Training and test images of 3x32x32."""
    if data == DIGITS:
        train, test = digits(32)
        return Subset(train, range(images)), test
    parts = []
    for part in ("train", "t10k"):
        pixels = pad(read_idx(folder, f"{part}-images-idx3-ubyte"), (2, 2, 2, 2))
        targets = read_idx(folder, f"{part}-labels-idx1-ubyte").long()
        # Mean and standard deviation of the training images.
        normal = (pixels[:, None] / 255 - 0.2860) / 0.3530
        parts.append(TensorDataset(normal.expand(-1, 3, -1, -1), targets))
    return Subset(parts[0], range(images)), parts[1]


def loader(images: Dataset[Any], run: Run) -> DataLoader[Any]:
    order = torch.Generator().manual_seed(run.seed)
    return DataLoader(images, run.batch, shuffle=True, drop_last=True, generator=order)


def train(model: nn.Module, batches: DataLoader[Any], run: Run) -> None:
    """Nothing in here knows that the model is pruned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=run.lr, total_steps=run.epochs * len(batches)
    )
    model.train()
    for epoch in range(1, run.epochs + 1):
        # disable=None: no bar where nobody looks.
        bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=None)
        for inputs, targets in bar:
            loss = cross_entropy(model(inputs.to(DEVICE)), targets.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset[Any]) -> float:
    model.eval()
    right = total = 0
    for inputs, targets in DataLoader(images, 500):
        right += int((model(inputs.to(DEVICE)).argmax(1).cpu() == targets).sum())
        total += len(targets)
    return right / total


def describe(report: SparsityReport) -> Result:
    """What is on record of a pruning."""
    opened = [w for w in report.warnings if w.startswith("gates opened")]
    return {
        "layers": len(report.layers),
        "emptied": len(report.empty_layers),
        "gates_opened": sum(int(w.split(": ")[1].split()[0]) for w in opened),
        "disconnected": any("disconnected" in w for w in report.warnings),
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
            loader(data[0], run),
            run.sparsity,
            steps=run.steps,
            open_gates=run.gates == "open",
            on_collapse="warn",
            progress=sys.stderr.isatty(),
        )
        result |= describe(report)
    pruned = time.perf_counter()
    torch.manual_seed(run.seed)  # dropout
    train(model, loader(data[0], run), run)
    trained = time.perf_counter()
    return result | {
        "accuracy": accuracy(model, data[1]),
        "seconds_pruning": round(pruned - start, 1),
        "seconds_training": round(trained - pruned, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{DEVICE}, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def read(path: Path) -> dict[Run, Result]:
    """The results so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = map(json.loads, lines)
    return {Run(**record.pop("run")): record for record in records}


def table(results: dict[Run, Result]) -> list[list[str]]:
    """Titles, and a row for each network and sparsity."""

    def spread(found: list[Result]) -> str:
        values = [100 * result["accuracy"] for result in found]
        deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{deviation}" if values else "–"

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
        rows.append([model, percent(sparsity), *map(spread, (dense, opened, closed))])
        rows[-1].append(counts + of)
    return rows


def caption(results: dict[Run, Result], planned: int) -> str:
    """What the table shows, and where and when it was measured."""
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
    """All runs, a seed at a time."""
    base = Run(args.dataset, args.images, args.epochs, args.batch, args.lr)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["resnet18", "resnet18d", "convnext_atto"]
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="steps of FORCE")
    parser.add_argument("--data", help=f"a folder, or digits (default: {DEBIAN})")
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, help="default: 4; for the digits 40")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".jsonl")
    )
    parser.add_argument("--table", type=Path, help="only write the table, as Markdown")
    args = parser.parse_args()
    args.data = args.data or (str(DEBIAN) if DEBIAN.exists() else "digits")
    args.dataset = DIGITS if args.data == "digits" else FASHION
    args.images = min(args.images, TRAINING_IMAGES[args.dataset])
    args.epochs = args.epochs or EPOCHS[args.dataset]
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", UserWarning)  # they are in the reports
    runs, known = plan(args), read(args.out)
    results = {run: known[run] for run in runs if run in known}
    if args.table:
        if not results:
            raise SystemExit(f"--table: none of these runs is in {args.out} yet")
        titles, *rows = table(results)
        rows = [titles, ["---"] + ["--:"] * (len(titles) - 1), *rows]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        text = textwrap.fill(caption(results, len(runs)), 88)
        write_whole(args.table, "\n".join([*lines, "", text, ""]).encode())
        return

    todo = [run for run in runs if run not in results]
    print(f"{args.dataset}: {len(todo)} of {len(runs)} runs to do", flush=True)
    try:
        data = load(args.dataset, Path(args.data), args.images)
        for number, run in enumerate(todo, start=1):
            result = results[run] = execute(run, data)
            with args.out.open("a") as file:
                file.write(json.dumps({"run": asdict(run)} | result) + "\n")
            print(
                f"[{number}/{len(todo)}] {run}: {result['accuracy']:.2%}, "
                f"{result.get('emptied', 0)} layers emptied, {result['seconds']} s",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; the same command does the rest", file=sys.stderr)
    if results:
        rows = table(results)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print()
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        print("\n" + textwrap.fill(caption(results, len(runs)), 80))


if __name__ == "__main__":
    main()
