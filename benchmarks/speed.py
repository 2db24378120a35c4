"""Measure time and memory of a model: dense, masked, permanent, compacted, by channels.

    python benchmarks/speed.py                            # resumes where it stopped
    python benchmarks/speed.py --models resnet50:32:64 --sparsities 0.99 --no-snap
    python benchmarks/speed.py --from benchmarks/speed.json --plot docs
                                                          # measures nothing

FORCE prunes each model on scikit-learn's digits. Forward passes (evaluation mode,
``torch.inference_mode``) and training steps (forward, backward, SGD with momentum) of
one batch are timed for these forms of the model:

dense         before pruning
masked        after ``force_prune``
permanent     after ``make_permanent``
compact       after ``compact``, with the remaining masks
compact 16    after ``compact`` with ``round_to=16`` and ``make_permanent``
snap          after ``snap_prune``, with about the multiplications of the compacted
              model (six trials); not if the masks disconnect the network

In a round, each form runs for ``--seconds`` twice, in a new order. Times are medians
over rounds. A ratio compares a form with the dense model in one round; its median,
least and largest value are shown. Memory is the peak of two training steps in a new
process, minus the memory of the process before it has the model (Linux only).
Multiplications are a share of the dense model's multiplications.

A model at a sparsity is stored as soon as it is measured, and not measured again.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import warnings
from copy import deepcopy
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from harness.machine import machine
from harness.memory import fresh, of_process
from harness.options import add_files, add_quick, add_threads, parser_of, use_threads
from harness.reports import is_disconnected
from harness.storage import read_rows, write_json
from harness.tables import percent
from harness.timing import seconds_of
from harness.training import Batch, step
from speed_tables import Row, plot, show
from torch import Tensor, nn
from torch.utils.data import DataLoader

from force_plugin import compact, force_prune, make_permanent
from force_plugin.structure.compact_report import multiplications
from force_plugin.zoo import digits, load_data, load_model

MODELS = "resnet50:32:64 vgg19_bn:32:64 vit_tiny_patch16_224:224:8"
FULL = {"models": MODELS.split(), "sparsities": [0.9, 0.95, 0.98, 0.99, 0.995]}
FULL |= {"steps": 20, "rounds": 5, "seconds": 0.5}
QUICK = {"models": ["test_resnet:32:8"], "sparsities": [0.9]}
QUICK |= {"steps": 3, "rounds": 2, "seconds": 0.01}
SAMPLES = 32  # the least number of samples in a step of scoring


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def peaks(paths: list[Path]) -> list[int]:
    """Return the bytes that each stored model and its two training steps need."""
    warnings.simplefilter("ignore")
    found = []
    for path in (paths[0], *paths):  # the first run pays all one-time costs
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS now
        before = of_process("VmRSS")
        model, batch = torch.load(path, weights_only=False)
        optimizer = make_optimizer(model.train())
        for _ in range(2):  # the first step makes the momentum
            step(model, optimizer, batch)
        found.append(of_process("VmHWM") - before)
        del model, batch, optimizer
    return found[1:]


def memory(models: dict[str, nn.Module], batch: Batch) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{side}.pt" for side in models]
        for path, model in zip(paths, models.values(), strict=True):
            torch.save((model, batch), path)
        return dict(zip(models, fresh(peaks, paths), strict=True))


def forward(model: nn.Module, inputs: Tensor) -> None:
    with torch.inference_mode():
        model(inputs)


def take_turns(
    models: dict[str, nn.Module], batch: Batch, args: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a forward pass and a training step, by side and round."""
    optimizers = {side: make_optimizer(model) for side, model in models.items()}
    times: dict[str, dict[str, list[float]]] = {
        side: {"forward": [], "step": []} for side in models
    }
    for number in range(args.rounds + 1):
        for side in random.Random(number).sample(list(models), len(models)):
            model, optimizer = models[side], optimizers[side]
            runs = {
                "forward": partial(forward, model.eval(), batch[0]),
                "step": partial(step, model, optimizer, batch),
            }
            for what, run in runs.items():
                model.train(what == "step")
                # The first round is a warm-up.
                taken = seconds_of(run, args.seconds if number else 0)
                if number:
                    times[side][what].append(round(taken, 7))
            optimizer.zero_grad()
    return times


def snapped(
    dense: nn.Module,
    loader: DataLoader[Any],
    example: Tensor,
    target: int,
    batches: int,
) -> tuple[float, nn.Module]:
    """Return the model by ``snap_prune`` with multiplications nearest to a number."""
    from force_plugin import snap_prune

    wanted = log(target / multiplications(dense, example))
    # Multiplications grow about with the square of the remaining channels. Then the
    # secant method is used on logarithms: (channels, multiplications, slope).
    at, seen, slope = 0.0, 0.0, 2.0
    best: tuple[float, float, nn.Module] | None = None
    for _ in range(6):
        before, had = at, seen
        at = min(at + (wanted - seen) / slope, 0.0)
        torch.manual_seed(1)
        small = snap_prune(
            dense, loader, example, 1 - exp(at), batches=batches, progress=False
        )
        seen = wanted + log(multiplications(small, example) / target)
        if best is None or abs(seen - wanted) < best[0]:
            best = abs(seen - wanted), 1 - exp(at), small
        if best[0] < 0.02 or at == before:
            break
        slope = max((seen - had) / (at - before), 0.5)
    assert best is not None
    return best[1:]


def measure(
    name: str, size: int, samples: int, sparsity: float, args: argparse.Namespace
) -> Row:
    def tell(what: str) -> None:
        case = f"{name}:{size}:{samples} at {percent(sparsity)}"
        print(f"{case}: {what}", file=sys.stderr, flush=True)

    torch.manual_seed(0)
    dense = load_model(name, num_classes=10, image_size=size)
    loader = load_data(dense, digits()[0], image_size=size, batch_size=samples)
    batch = next(iter(loader))
    example, batches = batch[0][:1], -(-SAMPLES // samples)
    models = {"dense": dense, "masked": deepcopy(dense)}
    tell("force_prune")
    report = force_prune(
        models["masked"],
        loader,
        sparsity,
        steps=args.steps,
        batches=batches,
        on_collapse="warn",
        progress=False,
    )
    facts: Row = {
        "emptied": len(report.empty_layers),
        "disconnected": is_disconnected(report.warnings),
    }
    tell("compact")
    models["permanent"] = deepcopy(models["masked"])
    models["compact"] = compact(models["masked"], example, progress=False)
    models["compact 16"] = compact(
        models["masked"], example, round_to=16, progress=False
    )
    for side in ("permanent", "compact 16"):
        make_permanent(models[side])
    if not (args.no_snap or facts["disconnected"]):  # a cut network is nearly empty
        tell("snap_prune")
        target = multiplications(models["compact"], example)
        facts["snap_sparsity"], models["snap"] = snapped(
            dense, loader, example, target, batches
        )
    if args.channels_last:
        batch = batch[0].to(memory_format=torch.channels_last), batch[1]
        for model in models.values():
            model.to(memory_format=torch.channels_last)
    tell("memory")
    sides: dict[str, Row] = {
        side: {
            "multiplications": multiplications(models[side], example),
            "parameters": sum(p.numel() for p in models[side].parameters()),
            "bytes": used,
        }
        for side, used in memory(models, batch).items()
    }
    tell("time")
    for side, times in take_turns(models, batch, args).items():
        sides[side] |= times
    return facts | {"sides": sides}


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME:SIZE:BATCH", help="any of timm's")
    add("--sparsities", type=float, nargs="+")
    add("--steps", type=int, help="of FORCE (default: 20)")
    add("--rounds", type=int, help="default: 5")
    add("--seconds", type=float, help="of a turn, at least (default: 0.5)")
    add("--channels-last", action="store_true", help="weights and images, of all sides")
    add("--no-snap", action="store_true", help="leave out snap_prune")
    add_threads(parser)
    add_quick(parser)
    add_files(parser, Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    for key, value in (QUICK if args.quick else FULL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    use_threads(args)
    rows = read_rows(args.source or args.store)
    for spec in () if args.source else args.models:
        name, size, samples = spec.split(":")
        for sparsity in args.sparsities:
            case: Row = {"model": name, "size": int(size), "batch": int(samples)}
            case |= {"sparsity": sparsity, "steps": args.steps}
            case |= {"channels_last": args.channels_last}
            if any(case.items() <= row.items() for row in rows):
                continue
            found = measure(name, int(size), int(samples), sparsity, args)
            case |= {"rounds": args.rounds, "machine": machine("cpu")}
            rows.append(case | found)
            write_json(args.store, rows)
    show(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
