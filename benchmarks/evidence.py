"""The study: train networks that were pruned at initialisation, and test them.

    python benchmarks/evidence.py                   # resumes where it stopped
    python benchmarks/evidence.py --questions methods --seeds 3 4 --sparsities 0 0.99
    python benchmarks/evidence.py --preset long     # ten epochs, one sparsity
    python benchmarks/evidence.py --preset steady --out benchmarks/evidence_steady.jsonl
    python benchmarks/evidence.py --preset larger --out benchmarks/evidence_steady.jsonl
    python benchmarks/evidence.py --preset gpu      # larger networks, more epochs
    python benchmarks/evidence.py --preset digits --seeds 0 --questions methods
    python benchmarks/evidence_plots.py             # tables and plots of the results

Each run makes a network, prunes it, trains it and tests it. A seed fixes the initial
weights, the scored batches and the order of the training batches, for all methods
alike. The questions:

methods  Accuracy against sparsity, by method.
steps    FORCE and Iter SNIP in few and many steps T, on both schedules.
batches  SNIP and GraSP, which score once, with more batches.
steady   SteadyFORCE and Iter SNIP in few and many steps, on both networks and both
         schedules, and SteadyFORCE, Iter SNIP, FORCE and SynFlow at 99.9 %.
sanity   Masks shuffled within each layer, and masks with new initial values (Frankle
         et al. 2021, arXiv 2009.08576).

Each run also measures the objective of FORCE, the foresight connection sensitivity of
de Jorge et al. 2021 (arXiv 2006.09081, equation 4). It is the sum of
|weight * gradient| over the kept weights, in the pruned network, here on ten batches.
Each run counts the live weights too: kept weights with a saliency other than 0.

The data are all of Fashion-MNIST: ``apt-get install dataset-fashion-mnist`` on Debian,
or torchvision's folder given as ``--data``. The preset ``cpu`` trains small networks
for an epoch: 576 runs of half a minute, two to three hours on two cores. ``steady``
takes as long. ``larger`` trains three models of timm after SteadyFORCE and others: 81
runs, four hours of one core. ``long`` trains six methods for ten epochs, to see whether
the results change; it takes an hour.
``digits`` uses scikit-learn's digits and is a trial.

A finished run is a line of JSON in ``--out`` and is not run again. A run is identified
by the preset's name and its own options, so a changed preset needs a new name. Ctrl-C
loses the current runs only.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from evidence_networks import Batches, load, make
from harness.fashion_mnist import add_folder, need_folder
from harness.machine import made_with
from harness.options import parser_of
from harness.storage import append_run, read_runs
from harness.training import accuracy, adamw, train
from torch import nn
from tqdm import tqdm

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    reinitialise,
    saliency,
    shuffle_masks,
)

Result = dict[str, Any]

# Settings of the papers and of their authors' code. SNIP-MB and GraSP-MB see as many
# batches in a single step as FORCE in 60 steps.
METHODS: dict[str, dict[str, Any]] = {
    "force": {"method": "force", "steps": 60},
    "iter_snip": {"method": "iter_snip", "steps": 60},
    "steady_force": {"method": "steady_force", "steps": 60},
    "snip": {"method": "snip"},
    "snip_mb": {"method": "snip", "batches": 60},
    "grasp": {"method": "grasp"},
    "grasp_mb": {"method": "grasp", "batches": 60},
    "grasp_it": {"method": "grasp_it", "steps": 60},
    "synflow": {"method": "synflow", "steps": 100},
    "snip_it": {"method": "snip_it"},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
}
SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
STEPS = (1, 2, 5, 10, 20, 60, 120)
BATCHES = (1, 3, 10, 30, 60, 200)
CHECKED = ("force", "iter_snip", "snip", "grasp", "synflow", "magnitude")
USUAL = ("methods", "steps", "batches", "sanity")
QUESTIONS = (*USUAL, "steady")
# The question "steady": SteadyFORCE beside Iter SNIP with every number of steps, and
# beside others where the methods part.
STEADY_STEPS = (5, 10, 20, 60, 120)
STEADY_SPARSITIES = (0.95, 0.99, 0.995)
STEADY_SEEDS = (0, 1, 2)
EXTREME = (("steady_force", 60), ("iter_snip", 60), ("force", 60), ("synflow", 100))


@dataclass(frozen=True)
class Run:
    """The options that determine the result of a training."""

    preset: str
    network: str
    seed: int = 0
    sparsity: float = 0.0
    method: str = "dense"
    steps: int = 1
    schedule: str = "exponential"
    batches: int = 1
    mask: str = "own"  # or "shuffled"; or "reinitialised": new values, own mask

    def __str__(self) -> str:
        parts = [self.network, f"seed {self.seed}", self.method]
        if self.sparsity:
            parts += [f"{self.sparsity:.1%}", f"{self.steps} steps {self.schedule}"]
            parts += [f"{self.batches} batches", self.mask]
        return ", ".join(parts)


@dataclass(frozen=True)
class Preset:
    """A setting of the study: data, networks, and training on one cycle.

    The optimizer is SGD with momentum, or AdamW. ``lr`` is its highest learning rate,
    and ``rates`` has those of networks with another.
    """

    data: str
    networks: tuple[str, ...]
    epochs: int
    batch: int = 128
    lr: float = 0.1
    rates: Mapping[str, float] = field(default_factory=dict)
    adamw: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    sparsities: tuple[float, ...] = SPARSITIES
    methods: tuple[str, ...] = tuple(METHODS)
    questions: tuple[str, ...] = USUAL


PRESETS = {
    "cpu": Preset("fashion", ("resnet_small", "vgg_small"), epochs=1),
    "long": Preset(
        "fashion",
        ("resnet_small",),
        epochs=10,
        sparsities=(0.99,),
        methods=("force", "iter_snip", "snip", "grasp", "synflow", "random"),
        questions=("methods",),
    ),
    "steady": Preset(
        "fashion",
        ("resnet_small", "vgg_small"),
        epochs=1,
        seeds=(0, 1, 2, 3, 4),
        questions=("steady",),
    ),
    "larger": Preset(
        "fashion",
        ("mobilenetv3_small_100", "convnext_atto", "resnet18"),
        epochs=1,
        lr=2e-3,
        # The dense networks gain by these.
        rates={"mobilenetv3_small_100": 2.4e-2, "convnext_atto": 4e-3},
        adamw=True,
        sparsities=(0.95, 0.99),
        methods=("force", "iter_snip", "steady_force", "synflow"),
        questions=("methods",),
    ),
    "gpu": Preset("fashion", ("resnet18", "vgg16"), epochs=30, seeds=(0, 1, 2, 3, 4)),
    "digits": Preset("digits", ("resnet_small", "vgg_small"), epochs=6),
}


def measured(model: nn.Module, batches: Batches) -> Result:
    """Return the objective of FORCE, and the number of live weights."""
    masks = get_masks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of layers whose saliency is 0
        scores = saliency(model, batches, "force", batches=min(10, len(batches)))
    kept = [scores[name][mask] for name, mask in masks.items()]
    return {
        "sensitivity": sum(float(values.sum()) for values in kept),
        "live": sum(int(values.count_nonzero()) for values in kept),
    }


def shuffled(size: int, seed: int) -> Batches:
    images, targets = _shared["train"]
    return Batches(images, targets, size, seed)


def pruned(run: Run) -> tuple[nn.Module, Result]:
    """Return a pruned network before training, and measurements of its mask."""
    preset, device = PRESETS[run.preset], _shared["device"]
    model = make(run.network, run.seed)
    model = model.to(device).to(memory_format=torch.channels_last)
    if not run.sparsity:
        return model, {}
    report = force_prune(
        model,
        shuffled(preset.batch, 10 * run.seed),
        run.sparsity,
        method=run.method,
        steps=run.steps,
        schedule=run.schedule,
        batches=run.batches,
        on_collapse="warn",
        guard=run.preset in ("steady", "larger"),  # the others are as published
        progress=False,
    )
    if run.mask == "shuffled":
        masks = shuffle_masks(get_masks(model))
        model = make(run.network, run.seed)
        apply_masks(model.to(device).to(memory_format=torch.channels_last), masks)
    elif run.mask == "reinitialised":
        reinitialise(model, make(run.network, 1000 + run.seed))
    kept = [layer.kept for layer in report.layers]  # in the order of layers_of
    others = shuffled(preset.batch, 10 * run.seed + 2)
    return model, {"kept": kept, **measured(model, others)}


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    parameters = model.parameters()
    return torch.optim.SGD(
        parameters, lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


def execute(run: Run) -> Result:
    """Prune, train and test one network."""
    preset, device = PRESETS[run.preset], _shared["device"]
    model, result = pruned(run)
    batches = shuffled(preset.batch, 10 * run.seed + 1)
    rate = preset.rates.get(run.network, preset.lr)
    optimizer = (adamw if preset.adamw else sgd)(model, rate)
    train(model, batches, optimizer, preset.epochs, device)
    test = zip(*(part.split(500) for part in _shared["test"]), strict=True)
    return result | {
        "accuracy": accuracy(model, test, device),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **made_with(),
    }


def plan(
    preset: str, seeds: list[int], questions: list[str], names: list[str]
) -> list[Run]:
    """Return all runs of these methods, seed by seed, without duplicates."""
    runs: list[Run] = []
    for seed in seeds:
        for network in PRESETS[preset].networks:
            dense = Run(preset, network, seed)
            methods = {name: replace(dense, **METHODS[name]) for name in names}
            if "methods" in questions:
                runs.append(dense)
                runs += [
                    replace(run, sparsity=sparsity)
                    for sparsity in PRESETS[preset].sparsities
                    for run in methods.values()
                ]
            if "steady" in questions:
                runs += steady(dense)
            if network != PRESETS[preset].networks[0]:
                continue  # the other questions use one network
            if "steps" in questions:
                runs += [
                    replace(
                        methods[name], sparsity=0.99, steps=steps, schedule=schedule
                    )
                    for name in sorted(methods.keys() & {"force", "iter_snip"})
                    for steps in STEPS
                    for schedule in ("exponential", "linear")
                ]
            if "batches" in questions:
                runs += [
                    replace(methods[name], sparsity=0.99, batches=batches)
                    for name in sorted(methods.keys() & {"snip", "grasp"})
                    for batches in BATCHES
                ]
            if "sanity" in questions:
                runs += [
                    replace(methods[name], sparsity=sparsity, mask=mask)
                    for name in CHECKED
                    if name in methods
                    for sparsity in (0.95, 0.99)
                    for mask in ("own", "shuffled", "reinitialised")
                ]
    return list(dict.fromkeys(runs))


def steady(dense: Run) -> list[Run]:
    """Return the runs of the question "steady" on one network, with one seed."""
    runs = [
        replace(dense, sparsity=0.999, method=method, steps=steps)
        for method, steps in EXTREME
    ]
    if dense.seed not in STEADY_SEEDS:
        return runs
    return runs + [
        replace(dense, sparsity=sparsity, method=method, steps=steps, schedule=schedule)
        for sparsity in STEADY_SPARSITIES
        for steps in STEADY_STEPS
        for schedule in ("exponential", "linear")
        for method in ("steady_force", "iter_snip")
    ]


_shared: dict[str, Any] = {}


def prepare(data: str, folder: Path, device: str, threads: int) -> None:
    """Load the data that a process holds for all its runs."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", UserWarning)  # the results store what matters
    _shared.update(load(data, folder, device), device=device)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", help="only these (0: dense)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    add_folder(parser)
    parser.add_argument(
        "--processes", type=int, help="runs at once (default: a core each)"
    )
    parser.add_argument(
        "--threads", type=int, help="of each run (default: its share of the cores)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".jsonl")
    )
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if preset.data == "fashion":
        need_folder(parser, args.data, otherwise=", or --preset digits")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = os.cpu_count() or 1
    processes = args.processes or (1 if device == "cuda" else cores)
    done = read_runs(args.out, Run)
    questions = args.questions or list(preset.questions)
    seeds, names = args.seeds or preset.seeds, args.methods or preset.methods
    runs = plan(args.preset, list(seeds), questions, list(names))
    if args.sparsities:
        runs = [run for run in runs if run.sparsity in args.sparsities]
    todo = [run for run in runs if run not in done]
    print(f"{len(todo)} of {len(runs)} runs to do", file=sys.stderr, flush=True)
    pool = ProcessPoolExecutor(
        processes,
        get_context("spawn"),
        prepare,
        (preset.data, args.data, device, args.threads or max(1, cores // processes)),
    )
    failed: list[Run] = []
    try:
        futures = {pool.submit(execute, run): run for run in todo}
        bar = tqdm(as_completed(futures), "runs", len(todo), disable=None)
        for future in bar:
            run = futures[future]
            if error := future.exception():  # the other runs go on
                failed.append(run)
                bar.write(f"{run}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            result = future.result()
            append_run(args.out, run, result)
            bar.write(f"{run}: {result['accuracy']:.2%}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command does the rest", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        raise SystemExit(
            f"{len(failed)} runs failed; the same command tries them again"
        )


if __name__ == "__main__":
    main()
