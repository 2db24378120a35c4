"""Train a compacted, a masked and a dense network side by side, and compare them.

    python benchmarks/compact_training.py              # resumes where it stopped
    python benchmarks/compact_training.py --data digits --seeds 0
    python benchmarks/compact_training.py --from benchmarks/compact_training.json

FORCE prunes a network, and ``compact`` removes the channels that the masks cut off. The
dense, the masked and the compacted network are then trained. They share initial
weights, masks, the order of batches and the schedule. The networks take turns, a step
each, so that all step times are measured within the same minutes.

In exact arithmetic, the masked and the compacted network compute equal outputs at
first. Training may give a constant to a channel that was cut off from the inputs (the
bias of its normalisation). The outputs differ once this constant reaches the outputs.

Data and training are as in benchmarks/open_gates.py: the first ``--images`` training
images and all test images of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import timm
import torch
from harness.fashion_mnist import Data, load
from harness.machine import machine, show_machines
from harness.options import add_files, add_quick, add_threads, parser_of, use_threads
from harness.reports import is_disconnected
from harness.runs import Run, add_training, shared_run
from harness.storage import read_rows, write_json
from harness.tables import percent, spread
from harness.timing import seconds
from harness.training import accuracy, adamw, one_cycle, step
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from force_plugin import compact, force_prune
from force_plugin.structure.compact_report import multiplications

Row = dict[str, Any]

SIDES = ("dense", "masked", "compacted")


def train(models: dict[str, nn.Module], data: Data, run: Run) -> dict[str, list[float]]:
    """Train all models on the same batches, and return the seconds of each step."""
    batches = run.loader(data[0])
    total = run.epochs * len(batches)
    trained = []
    for side, model in models.items():
        optimizer = adamw(model.train(), run.lr)
        trained.append((side, model, optimizer, one_cycle(optimizer, total)))
    times: dict[str, list[float]] = {side: [] for side in models}
    order = random.Random(0)
    # disable=None: no bar if the output is no terminal.
    with tqdm(total=total, desc=f"seed {run.seed}", leave=False, disable=None) as bar:
        for _ in range(run.epochs):
            for batch in batches:
                for side, model, optimizer, schedule in order.sample(trained, 3):
                    times[side].append(seconds(partial(step, model, optimizer, batch)))
                    schedule.step()
                bar.update()
    return times


def execute(run: Run, data: Data) -> Row:
    """Prune, compact, train and test one seed."""
    torch.manual_seed(run.seed)
    models = {"dense": timm.create_model(run.model, num_classes=10)}
    masked = models["masked"] = deepcopy(models["dense"])
    report = force_prune(
        masked,
        run.loader(data[0]),
        run.sparsity,
        steps=run.steps,
        on_collapse="warn",
        progress=False,
    )
    example = data[0][0][0][None]
    models["compacted"] = compact(masked, example, progress=False)
    with torch.no_grad():
        one, other = (models[side].eval()(example) for side in SIDES[1:])
    result: Row = {
        "disconnected": is_disconnected(report.warnings),
        "emptied": len(report.empty_layers),
        "distance": float((one - other).abs().max() / other.abs().max()),
        "sides": {},
    }
    for side, taken in train(models, data, run).items():
        result["sides"][side] = {
            "accuracy": accuracy(models[side], DataLoader(data[1], 500)),
            "seconds": median(taken),
            "multiplications": multiplications(models[side], example),
            "parameters": sum(p.numel() for p in models[side].parameters()),
        }
    return result


def show(rows: list[Row]) -> None:
    """Print machine and commands, then a block for each setting."""
    show_machines(rows)
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        setting = row["run"] | {"seed": 0}
        blocks.setdefault(json.dumps(setting), []).append(row)
    for block in blocks.values():
        run = Run(**block[0]["run"])
        seeds = ", ".join(str(row["run"]["seed"]) for row in block)
        print(
            f"\n{run.model}, FORCE at {percent(run.sparsity)} in {run.steps} steps; "
            f"{run.data}:\n{run.images:,} images, {run.epochs} epochs in batches of "
            f"{run.batch}, AdamW, one cycle up to {run.lr:g}\n"
            f"test accuracy in %, mean ± standard deviation over seeds {seeds}\n\n"
            f"{'':23}{'accuracy':>15}{'ms a step':>12}{'ratio':>8}"
            f"{'mult.':>8}{'parameters':>13}"
        )
        accuracies = {}
        for side in SIDES:
            seen = [row["sides"][side] for row in block]
            dense = [row["sides"]["dense"] for row in block]
            pairs = list(zip(seen, dense, strict=True))
            accuracies[side] = [100 * one["accuracy"] for one in seen]
            shares = {
                key: mean(one[key] / base[key] for one, base in pairs)
                for key in ("seconds", "multiplications", "parameters")
            }
            print(
                f"{side:23}{spread(accuracies[side]):>15}"
                f"{1000 * mean(one['seconds'] for one in seen):12.1f}"
                f"{shares['seconds']:8.3f}{shares['multiplications']:8.3f}"
                f"{shares['parameters']:13.3f}"
            )
        both = zip(accuracies["compacted"], accuracies["masked"], strict=True)
        print(f"{'compacted - masked':23}{spread([a - b for a, b in both]):>15}")
        if cut := sum(row["disconnected"] for row in block):
            print(f"disconnected by their masks: {cut} of {len(block)}")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default="resnet18", help="any timm model that takes 32x32")
    add("--sparsity", type=float, default=0.99)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=60, help="of FORCE")
    add_training(parser, images=10_000)
    add_threads(parser)
    add_quick(parser)
    add_files(parser, Path(__file__).with_suffix(".json"), draws=False)
    args = parser.parse_args()
    if args.quick:
        args.model, args.data, args.epochs, args.steps = "test_resnet", "digits", 1, 3
        args.images, args.batch, args.seeds = 64, 32, args.seeds[:2]
    return args


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    use_threads(args)
    rows = read_rows(args.source or args.store)
    asked = {"model": args.model, "gates": "open", "sparsity": args.sparsity}
    shared = replace(shared_run(args), steps=args.steps, **asked)
    data = None
    for seed in () if args.source else args.seeds:
        run = replace(shared, seed=seed)
        if any(row["run"] == vars(run) for row in rows):
            continue
        print(f"seed {seed}", file=sys.stderr, flush=True)
        data = data or load(run.data, Path(args.data), run.images)
        found = execute(run, data)
        rows.append({"run": vars(run), "machine": machine("cpu")} | found)
        write_json(args.store, rows)
    show(rows)


if __name__ == "__main__":
    main()
