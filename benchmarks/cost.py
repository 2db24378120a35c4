"""What scoring costs over the gradients it needs: ours and bare, side by side.

    python benchmarks/cost.py                              # about an hour on two cores
    python benchmarks/cost.py --only step memory --store cost.json
    python benchmarks/cost.py --compare cost.json          # exit status 1: it got worse
    python benchmarks/cost.py --from cost.json --plot docs # measures nothing
    python benchmarks/cost.py --only step --noise 1 --store noisy.json

A line is a pair: ours, with everything that ``force_prune`` does, and bare, the forward
and backward passes alone. Both take turns in one process, within a call where it is
long: its loader stops our clock, takes as many bare steps, and goes on. A ratio is that
of the medians, its spread that of the pairs. The sections, chosen with ``--only``:

step       ResNet-50 at 32x32, batch 128, as in the FORCE paper's CIFAR experiments
large      224x224, ten batches a step
synflow    over the passes of a positive float64 network that was converted once
grasp      over one bare step of as many samples
memory     peak over that of a bare step, in fresh processes, bytes a prunable weight
selection  the k largest scores over the fastest of three others; about 10 GB at 1e9
below      options that make a step cheaper than bare, and what they cost in exactness
authors    the authors' code; needs --force-repo and --grasp-repo
profile    milliseconds of each part of a step

``--store`` keeps what the file has of other sections from the same machine.

Where a section takes few steps, what a call does once (stand-ins, the search for gates,
the last look at the mask, pruning the model) counts as in a call of 60 steps.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import inspect
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset

from force_plugin import force_prune, get_masks
from force_plugin.files import write_whole
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import scores_of
from force_plugin.pruning.doubts import Doubts
from force_plugin.scoring.gradients import Gradients, Sums
from force_plugin.scoring.malloc import freed_memory_kept
from force_plugin.scoring.probe import Probe
from force_plugin.selection.top_k import top_k_masks
from force_plugin.zoo import digits

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]
Result = TypeVar("Result")

STEPS = 60  # of a call, in the FORCE paper
# Keyword arguments of force_prune, and two that are not: the number of samples in a
# batch, and what the weights are multiplied by.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounding": {"scale": 1 + 1e-7},
    "channels_last": {"channels_last": True},
    "autocast": {"autocast": torch.bfloat16},
    "channels_last+autocast": {"channels_last": True, "autocast": torch.bfloat16},
    "compile": {"compile": True},
    "microbatch": {"microbatch": 32},
    "batch_size_64": {"batch_size": 64},
    "batch_size_32": {"batch_size": 32},
}


def make_model(name: str, size: int, device: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if "resnet" in name:
        options["zero_init_last"] = False  # the papers' networks have no closed gates
    if "vit" in name:
        options["img_size"] = size
    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model.to(device)


def make_batch(samples: int, size: int, device: str) -> Batch:
    torch.manual_seed(0)
    inputs = torch.randn(samples, 3, size, size, device=device)
    return inputs, torch.randint(10, (samples,), device=device)


def prune(
    model: nn.Module, loader: Iterable[Any], sparsity: float = 0.9, **options: Any
) -> None:
    # What is kept of random data does not matter here.
    options |= {"on_collapse": "warn", "progress": False}
    force_prune(model, loader, sparsity, **options)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def bare(model: nn.Module, batch: Batch, number: int, per_step: int = 1) -> None:
    """The gradients of a number of batches, and nothing else."""
    for done in range(1, number + 1):
        torch.autograd.backward(forward(model, batch))
        if done % per_step == 0:
            model.zero_grad()


def clock() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = clock()
    run()
    return clock() - start


@dataclass
class Turns:
    """Seconds of our turns and of the bare ones within one call.

    Ours begin with what is done before the first batch, and the last of them has what
    is done after the last step.
    """

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def all_of_it(self) -> tuple[float, float]:
        """What the call took, and the bare steps."""
        return sum(self.ours), sum(self.bare)

    def step(self) -> tuple[float, float]:
        """One step of each, where a turn is a step: not the first, not the last."""
        return statistics.median(self.ours[2:-1]), statistics.median(self.bare[1:-1])

    def once(self) -> float:
        """What is done once in a call, whatever the number of its steps."""
        return sum(self.ours) - len(self.bare) * self.step()[0]

    def step_of_60(self) -> tuple[float, float]:
        """One step of each, ours with its share of what is done once."""
        ours, bare = self.step()
        return ours + self.once() / STEPS, bare


def take_turns(
    dense: nn.Module,
    batch: Batch,
    steps: int,
    turn: int = 1,
    batches: int = 1,
    loaded: Batch | None = None,
    **options: Any,
) -> Turns:
    """Prune a copy, and take bare steps of the network after every few of ours.

    Args:
        dense: The network.
        batch: What all bare steps take.
        steps: Of the call.
        turn: Steps of a turn.
        batches: Batches of a step.
        loaded: What ``force_prune`` takes, if another batch.
        options: Of ``force_prune``.
    """
    turns, start = Turns(), 0.0

    def loader() -> Iterator[Batch]:
        nonlocal start
        for number in count():
            if number % (turn * batches) == 0:
                turns.ours.append(clock() - start)
                work = partial(bare, dense, batch, turn * batches, batches)
                turns.bare.append(seconds(work))
                start = clock()
            yield loaded or batch

    model = copy.deepcopy(dense)
    start = clock()
    prune(model, loader(), steps=steps, batches=batches, **options)
    turns.ours.append(clock() - start)
    return turns


def seconds_bare(run: Callable[[], object]) -> float:
    """Wall time of one call that keeps the memory of its passes, as ours do."""
    with freed_memory_kept():
        return seconds(run)


def alternate(
    ours: Callable[[nn.Module], object],
    dense: nn.Module,
    theirs: Callable[[], object],
    runs: int,
) -> list[tuple[float, float]]:
    """Seconds of both, in turns; ours is given a copy of the network each time."""
    pairs = [
        (seconds(partial(ours, copy.deepcopy(dense))), seconds_bare(theirs))
        for _ in range(runs + 1)
    ]
    return pairs[1:]  # the first warms up


def make_row(
    section: str,
    setting: str,
    case: str,
    unit: str,
    pairs: Sequence[tuple[float, float]],
    bound: float | None = None,
    difference: bool = False,
    **more: Any,
) -> Row:
    """A line of a table: both sides, and the ratio (or difference) of their medians."""

    def compared(ours: float, theirs: float) -> float:
        return ours - theirs if difference else ours / theirs

    def spread(values: Sequence[float]) -> Row:
        middle = statistics.median(values)
        return {"median": middle, "min": min(values), "max": max(values)}

    ours, theirs = (spread(side) for side in zip(*pairs, strict=True))
    # Of the medians; what pairs tell is how much it may be off.
    over = spread([compared(*pair) for pair in pairs])
    over["median"] = compared(ours["median"], theirs["median"])
    row: Row = {"section": section, "setting": setting, "case": case, "unit": unit}
    row |= {"runs": len(pairs), "ours": ours, "bare": theirs, "ratio": over}
    return row | {"bound": bound, "difference": difference} | more


def milliseconds(
    pairs: Iterable[tuple[float, float]], per: int = 1
) -> list[tuple[float, float]]:
    return [(1000 * ours / per, 1000 * theirs / per) for ours, theirs in pairs]


def row_of_few(
    section: str,
    setting: str,
    case: str,
    turns: Sequence[Turns],
    remark: str = "",
    **more: Any,
) -> Row:
    """A line about calls of few steps, and beneath it what they do once."""
    once = 1000 * statistics.median(t.once() for t in turns)
    more["note"] = f"{remark}done once: {once:.0f} ms"
    pairs = milliseconds(t.step_of_60() for t in turns)
    return make_row(section, setting, case, "ms a step", pairs, **more)


@dataclass
class Case:
    """What the sections about a step measure."""

    setting: str
    dense: nn.Module
    batch: Batch
    steps: int
    turn: int


def step_case(args: argparse.Namespace) -> Case:
    # Turns of two seconds: within longer ones the machine's own speed may change.
    name, samples, steps, turn = "resnet50", 128, STEPS, 5
    if args.quick:
        name, samples, steps, turn = "test_resnet", 16, 8, 4
    dense = make_model(name, 32, args.device)
    batch = make_batch(samples, 32, args.device)
    return Case(f"{name} 32x32, batch {samples}", dense, batch, steps, turn)


def measure_step(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    setting = f"{case.setting}, {case.steps} steps"
    for method in ("force", "iter_snip", "grasp_it"):
        take = partial(take_turns, case.dense, case.batch, turn=case.turn)
        take(steps=2, method=method)  # warms up
        turns = [take(steps=case.steps, method=method) for _ in range(args.runs or 5)]
        pairs = milliseconds((t.all_of_it() for t in turns), case.steps)
        yield make_row("step", setting, method, "ms a step", pairs, 1.12)


def measure_large(args: argparse.Namespace) -> Iterator[Row]:
    # Batches such that a step's ten take some four seconds on two cores.
    models = {
        "resnet18": 8,
        "resnet50": 4,
        "vit_base_patch16_224": 2,
        "convnext_tiny": 4,
    }
    size, batches = 224, 10
    if args.quick:
        models, size, batches = {"test_resnet": 2, "test_vit": 2}, 64, 3
    for name, samples in models.items():
        dense = make_model(name, size, args.device)
        data = make_batch(samples, size, args.device)
        bare(dense, data, 2)  # warms up
        turns = [
            take_turns(dense, data, 4, batches=batches) for _ in range(args.runs or 3)
        ]
        setting = f"{size}x{size}, {batches} batches a step, force"
        remark = f"batch {samples}; "
        yield row_of_few("large", setting, name, turns, remark, bound=1.03)


def measure_synflow(args: argparse.Namespace) -> Iterator[Row]:
    models, sizes, few, more = ["resnet50", "vgg16_bn"], [32, 224], 2, 10
    if args.quick:
        models, sizes, more = ["test_resnet"], [32], 4
    for size in sizes:
        for name in models:
            dense = make_model(name, size, args.device)
            loader = [make_batch(2, size, args.device)]
            ours = partial(prune, loader=loader, method="synflow")
            # As the authors do: the conversion is made once, and flows both ways.
            positive = copy.deepcopy(dense).double().eval()
            for tensor in (*positive.parameters(), *positive.buffers()):
                tensor.data.abs_()
            ones = torch.ones(1, 3, size, size, dtype=torch.float64)
            theirs = partial(flow, positive, ones.to(args.device), more)
            found, once = [], []
            for _ in range((args.runs or 3) + 1):
                # One batch serves all steps, so that no loader can stop our clock.
                short, long = (
                    seconds(partial(ours, copy.deepcopy(dense), steps=steps))
                    for steps in (few, few + more)
                )
                step = (long - short) / more
                once.append(short - few * step)
                found.append((step + once[-1] / STEPS, seconds_bare(theirs) / more))
            note = f"done once: {1000 * statistics.median(once[1:]):.0f} ms"
            pairs = milliseconds(found[1:])  # the first warms up
            setting = f"{size}x{size}"
            row = ("synflow", setting, name, "ms a step", pairs, 1.12)
            yield make_row(*row, note=note)


def flow(positive: nn.Module, ones: Tensor, number: int) -> None:
    for _ in range(number):
        torch.autograd.backward(positive(ones).sum())
        positive.zero_grad()


def measure_grasp(args: argparse.Namespace) -> Iterator[Row]:
    name, batch = ("test_resnet", 16) if args.quick else ("resnet50", 128)
    dense, data = make_model(name, 32, args.device), make_batch(batch, 32, args.device)
    for batches in (1, 4):
        ours = partial(prune, loader=[data], method="grasp", batches=batches)
        theirs = partial(bare, dense, data, batches, batches)
        pairs = milliseconds(alternate(ours, dense, theirs, args.runs or 5))
        case = f"batches={batches}"
        setting = f"{name} 32x32, batch {batch}"
        yield make_row("grasp", setting, case, "ms a call", pairs, 4.5)


def of_process(what: str) -> int:
    """Bytes of memory of this process.

    Not ``ru_maxrss``: a process that was started by a large one inherits its peak.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(s.split()[1]) for s in lines if s.startswith(what))


def peak(
    method: str,
    name: str,
    size: int,
    samples: int,
    batches: int,
    device: str,
    microbatch: int | None = None,
) -> int:
    """Bytes that a model and a few steps of it need; an empty method: bare ones."""
    warnings.simplefilter("ignore")
    one = make_batch(2, 8, "cpu")
    prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), [one])  # what it imports
    before = of_process("VmRSS")
    model, data = make_model(name, size, device), make_batch(samples, size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if method:
        options = {"batches": batches, "microbatch": microbatch}
        prune(model, [data], method=method, steps=3, **options)
    else:
        bare(model, data, 3 * batches, batches)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return of_process("VmHWM") - before


def fresh(run: Callable[..., Result], *args: object) -> Result:
    """The result of a function in a process of its own."""
    # For glibc: by itself it keeps what is freed, more or less of it by chance.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        spawn = multiprocessing.get_context("spawn")
        threads = (torch.get_num_threads(),)
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads) as pool:
            return pool.submit(run, *args).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def prunable(model: nn.Module) -> int:
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    models = [("resnet50", 32, 128), ("vit_base_patch16_224", 224, 4)]
    methods = [("force", 1), ("iter_snip", 1), ("grasp_it", 1), ("force", 4)]
    if args.quick:
        models, methods = [("resnet18", 32, 2)], [("force", 1)]
    for name, size, samples in models:
        with torch.device("meta"):
            weights = prunable(make_model(name, size, "meta"))
        for method, batches in methods:
            pairs = []
            for _ in range(args.runs or 3):
                case = (name, size, samples, batches, args.device)
                ours, theirs = (fresh(peak, which, *case) for which in (method, ""))
                pairs.append((ours / weights, theirs / weights))
            yield make_row(
                "memory",
                f"{name} {size}x{size}, batch {samples}",
                f"{method}, batches={batches}",
                "bytes a weight",
                pairs,
                9,
                difference=True,
            )


def measure_selection(args: argparse.Namespace) -> Iterator[Row]:
    import selection

    sizes = [100_000] if args.quick else [int(size) for size in args.sizes]
    kinds = ["normal"] if args.quick else list(selection.INPUTS)
    shares = ["1 %"] if args.quick else list(selection.SHARES)
    for row in selection.rows(sizes, kinds, shares, args.runs or 3, args.device):
        times = row["times"]
        ours = times.pop("ours")
        fastest = min(times, key=lambda name: statistics.median(times[name]))
        yield make_row(
            "selection",
            f"{row['size']:,} scores, the fastest of {', '.join(times)}",
            f"{row['scores']}, {row['asked']}",
            "ms",
            list(zip(ours, times[fastest], strict=True)),
            1.10,
            size=row["size"],
            medians={name: statistics.median(times[name]) for name in times},
        )


def measure_below(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    inputs, targets = case.batch
    quality = qualities(args)
    for option in args.options:
        settings = dict(OPTIONS[option])
        settings.pop("scale", None)  # takes no time
        samples = settings.pop("batch_size", len(inputs))
        loaded = (inputs[:samples], targets[:samples])
        take = partial(take_turns, case.dense, case.batch, loaded=loaded)
        take(steps=3, **settings)  # warms up
        turns = [take(steps=8, **settings) for _ in range(args.runs or 3)]
        setting = f"{case.setting}, force"
        yield row_of_few("below", setting, option, turns, quality=quality[option])


def qualities(args: argparse.Namespace) -> dict[str, Row]:
    """What an option does to the masks of a small network on real images.

    By option, a value for each seed: the ``overlap`` of its mask with the plain one
    (intersection over union), the ``signal`` that its mask keeps of gradients of
    images that were not scored (what FORCE maximises, over the plain one's), and the
    test ``accuracy`` in % after a short training.
    """
    seeds, steps, epochs = (1, 3, 1) if args.quick else (3, STEPS, 8)
    train_set: Dataset[Batch]
    train_set, test_set = digits(32, channels=1)
    if args.quick:
        train_set = Subset(train_set, range(256))
    images, targets = next(iter(DataLoader(test_set, len(test_set))))
    held_out = (images.to(args.device), targets.to(args.device))
    found: dict[str, Row] = {
        option: {"overlap": [], "signal": [], "accuracy": []} for option in args.options
    }
    for seed in range(seeds):
        torch.manual_seed(seed)
        dense = timm.create_model(
            "resnet18", num_classes=10, in_chans=1, zero_init_last=False
        ).to(args.device)
        plain = get_masks(pruned(dense, train_set, seed, steps))
        reference = signal(dense, plain, held_out)
        for option, values in found.items():
            model = pruned(dense, train_set, seed, steps, **OPTIONS[option])
            masks = get_masks(model)
            values["overlap"].append(overlap(masks, plain))
            values["signal"].append(signal(dense, masks, held_out) / reference)
            train(model, batches_of(train_set, 128, seed), epochs, args.device)
            values["accuracy"].append(100 * accuracy(model, held_out))
    return found


def pruned(
    dense: nn.Module,
    images: Dataset[Batch],
    seed: int,
    steps: int,
    batch_size: int = 128,
    scale: float = 1.0,
    **options: Any,
) -> nn.Module:
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    loader = batches_of(images, batch_size, seed)
    prune(model, loader, 0.99, steps=steps, **options)
    return model


def batches_of(images: Dataset[Batch], size: int, seed: int) -> DataLoader[Batch]:
    order = torch.Generator().manual_seed(seed)
    return DataLoader(images, size, shuffle=True, drop_last=True, generator=order)


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    both = sum(int((masks[name] & others[name]).sum()) for name in masks)
    either = sum(int((masks[name] | others[name]).sum()) for name in masks)
    return both / either


def signal(dense: nn.Module, masks: Mapping[str, Tensor], batch: Batch) -> float:
    """The sum of |θ ⊙ g(θ ⊙ c)| over the weights that are kept, in float32."""
    model = copy.deepcopy(dense)
    kept = [parameter for name, parameter in model.named_parameters() if name in masks]
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    gradients = torch.autograd.grad(forward(model, batch), kept)
    # What is pruned is 0 in the weights.
    return sum(float((w * g).abs().sum()) for w, g in zip(kept, gradients, strict=True))


def train(
    model: nn.Module, batches: DataLoader[Batch], epochs: int, device: str
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=epochs * len(batches)
    )
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = forward(model, (inputs.to(device), targets.to(device)))
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    model.eval()
    return float((model(batch[0]).argmax(1) == batch[1]).float().mean())


def show_below(rows: Sequence[Row]) -> None:
    """What each option costs in exactness."""

    def spread(values: Sequence[float], digits: int = 3) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

    times = {row["case"]: row["ratio"]["median"] for row in rows}
    print(
        "\nbelow: resnet18 on digits, 99 %, mean ± standard deviation over seeds; the "
        "plain\nmask is the measure of overlap (intersection over union) and signal "
        "kept, and\nrounding: what a rounding difference does to it\n\n"
        f"{'':22}{'time / plain':>13}{'overlap':>14}{'signal':>14}{'accuracy, %':>17}"
    )
    for row in rows:
        quality = row["quality"]
        over = f"{times[row['case']] / times['plain']:.3f}" if "plain" in times else "–"
        print(
            f"{row['case']:22}{over:>13}{spread(quality['overlap']):>14}"
            f"{spread(quality['signal']):>14}{spread(quality['accuracy'], 1):>17}"
        )


def measure_authors(args: argparse.Namespace) -> Iterator[Row]:
    import authors

    name, samples, steps = ("resnet18", 20, 3) if args.quick else ("resnet50", 128, 20)
    rows = authors.compare(
        args.force_repo,
        args.grasp_repo,
        model=name,
        size=32,
        batch_size=samples,
        steps=steps,
        runs=args.runs or 3,
        threads=args.threads,
    )
    setting = f"{name} 32x32, batch {samples}, {steps} steps"
    for row in rows:
        base = row["seconds"]["bare"]["median"]
        ratio = {key: time / base for key, time in row["seconds"]["ours"].items()}
        case = {"section": "authors", "setting": setting, "case": row["method"]}
        yield case | {"ratio": ratio, "measured": row}


def show_authors(rows: Sequence[Row]) -> None:
    import authors

    print(f"\nauthors: {rows[0]['setting']}\n")
    print(authors.table([row["measured"] for row in rows]))


def measure_profile(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    take_turns(case.dense, case.batch, 2)  # warms up
    with cProfile.Profile() as profile:
        turns = take_turns(case.dense, case.batch, case.steps, case.turn)
    entries = {entry.code: entry for entry in profile.getstats()}

    def spent(function: Any, caller: Any) -> float:
        """Milliseconds a step of a function, called by another."""
        inner, outer = (inspect.unwrap(f).__code__ for f in (function, caller))
        calls = (outer in entries and entries[outer].calls) or []
        for call in calls:
            if call.code is inner:
                return 1000 * call.totaltime / case.steps
        raise LookupError(
            f"{caller.__qualname__} does not call {function.__qualname__} any more: "
            "change the parts in measure_profile"
        )

    gradients = spent(Probe.gradients, SaliencyMethod.measure)
    ours = {
        "forward": spent(Probe._loss_of, Gradients.mean),
        "backward": spent(Sums.add_gradients, Gradients.mean),
        "scores": spent(scores_of, force_prune) - gradients,
        "selection": spent(top_k_masks, force_prune),
        "masks on stand-ins": spent(Probe.prune, force_prune),
        "notes": spent(Doubts.on_selection, force_prune)
        + spent(Doubts.on_first_scores, force_prune),
        "connected": spent(Probe.flow, force_prune),
    }
    theirs = {
        "forward": spent(forward, bare),
        "backward": spent(torch.autograd.backward, bare),
    }
    for parts, times in ((ours, turns.ours), (theirs, turns.bare)):
        total = 1000 * sum(times) / case.steps
        parts["the rest"] = total - sum(parts.values())
        parts["all"] = total
    setting = f"{case.setting}, {case.steps} steps"
    for part, spent_on_it in ours.items():
        row = {"section": "profile", "setting": setting, "case": part}
        yield row | {"ours": spent_on_it, "bare": theirs.get(part, 0.0)}


def show_profile(rows: Sequence[Row]) -> None:
    print(f"\nprofile: {rows[0]['setting']}, force, ms a step under cProfile\n")
    print(f"{'':22}{'ours':>10}{'bare':>10}{'more':>10}{'% of bare':>12}")
    for row in rows:
        more = row["ours"] - row["bare"]
        share = 100 * more / rows[-1]["bare"]
        sides = f"{row['ours']:10.2f}{row['bare']:10.2f}"
        print(f"{row['case']:22}{sides}{more:10.2f}{share:12.2f}")


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "step": measure_step,
    "large": measure_large,
    "synflow": measure_synflow,
    "grasp": measure_grasp,
    "memory": measure_memory,
    "selection": measure_selection,
    "below": measure_below,
    "authors": measure_authors,
    "profile": measure_profile,
}
# Of sections that have more to show than pairs, or something else.
TABLES: dict[str, Callable[[Sequence[Row]], None]] = {
    "below": show_below,
    "authors": show_authors,
    "profile": show_profile,
}


def heading(row: Row) -> str:
    bound = "" if row["bound"] is None else f", bound {row['bound']:g}"
    last = "ours - bare" if row["difference"] else "ratio"
    columns = 2 * "  med.   min   max" + "  med.  min  max"
    return (
        f"\n{row['section']}: {row['setting']}\n"
        f"{row['unit']}, {row['runs']} runs{bound}\n\n"
        f"{'':23}{'ours':>18}{'bare':>18}{last:>16}\n{'':23}{columns}"
    )


def short(value: float) -> str:
    """Three digits and more, in six columns."""
    size = abs(value)
    return f"{value:6.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def ratio_of(row: Row) -> str:
    def digits(value: float, most: int) -> int:
        return most if value < 10 else 1

    ratio = row["ratio"]
    middle = f"{ratio['median']:6.{digits(ratio['median'], 3)}f}"
    ends = (f"{ratio[end]:5.{digits(ratio[end], 2)}f}" for end in ("min", "max"))
    return middle + "".join(ends)


def line(row: Row) -> str:
    sides = "".join(
        short(row[side][key])
        for side in ("ours", "bare")
        for key in ("median", "min", "max")
    )
    over = row["bound"] is not None and row["ratio"]["median"] > row["bound"]
    note = f"\n  {row['note']}" if "note" in row else ""
    return f"{row['case']:23}{sides}{ratio_of(row)}{' over' if over else ''}{note}"


def identity(row: Row) -> tuple[str, str, str]:
    return row["section"], row["setting"], row["case"]


def is_worse(row: Row, stored: Row) -> bool:
    """Whether a ratio is worse than a stored one by more than its spread and 3 %."""
    before = stored["ratio"]
    allowed = before["max"] - before["min"] + 0.03 * abs(before["median"])
    return bool(row["ratio"]["median"] > before["median"] + allowed)


def show(section: str, rows: Iterable[Row], stored: Mapping[Any, Row]) -> list[Row]:
    """Print rows as they come, and after each what was stored of it."""
    seen: list[Row] = []
    for row in rows:
        if section not in ("authors", "profile"):
            if not seen or heading(row) != heading(seen[-1]):
                print(heading(row))
            print(line(row))
            if before := stored.get(identity(row)):
                verdict = " worse" if is_worse(row, before) else ""
                print(f"{'  stored' + verdict:59}{ratio_of(before)}")
            elif stored:
                print("  not stored")
        sys.stdout.flush()
        seen.append(row)
    if section in TABLES and seen:
        TABLES[section](seen)
    return seen


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw ratios with their bounds, times of selection, and the authors' code."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    bounded = [
        [row for row in rows if row["section"] == section and row.get("bound")]
        for section in ("step", "large", "synflow", "grasp", "memory")
    ]
    panels = [panel for panel in bounded if panel]
    if panels:
        figure, axes = plt.subplots(
            len(panels),
            figsize=(7, 1.2 * len(panels) + 0.3 * sum(map(len, panels))),
            gridspec_kw={"height_ratios": [len(panel) + 1 for panel in panels]},
            squeeze=False,
            layout="constrained",
        )
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            nothing = 0 if panel[0]["difference"] else 1
            names = [f"{row['setting'].split(',')[0]}: {row['case']}" for row in panel]
            over = [row["ratio"]["median"] - nothing for row in panel]
            ends = [[row["ratio"][end] for row in panel] for end in ("min", "max")]
            axis.barh(names, over, left=nothing, height=0.6)
            axis.hlines(names, *ends, color="black", linewidth=1)
            axis.axvline(panel[0]["bound"], color="tab:red", label="bound")
            axis.invert_yaxis()
            what = "bytes a weight more than" if nothing == 0 else "times"
            axis.set_title(f"{panel[0]['section']}: {what} bare", fontsize="medium")
            axis.locator_params(axis="x", nbins=6)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside upper right"
        )
        figure.savefig(folder / "ratios.png", dpi=150)

    chosen = [
        row
        for row in rows
        if row["section"] == "selection" and row["case"] == "normal, 10 %"
    ]
    if chosen:
        figure, axis = plt.subplots(layout="constrained")
        sizes = [row["size"] for row in chosen]
        axis.loglog(
            sizes, [row["ours"]["median"] for row in chosen], "o-", label="ours"
        )
        for name in chosen[0]["medians"]:
            able = [row for row in chosen if name in row["medians"]]
            times = [row["medians"][name] for row in able]
            axis.loglog([row["size"] for row in able], times, "o--", label=name)
        axis.set(xlabel="scores", ylabel="ms, the largest 10 %")
        axis.legend()
        figure.savefig(folder / "selection.png", dpi=150)

    theirs = [row["measured"] for row in rows if row["section"] == "authors"]
    if theirs:
        figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
        for side, shift in (("theirs", -0.2), ("ours", 0.2)):
            at = np.arange(len(theirs)) + shift
            axis.bar(at, [row["ratio"][side] for row in theirs], 0.4, label=side)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(theirs)), [row["method"] for row in theirs])
        axis.set(ylabel="time over that of the bare gradients")
        axis.legend()
        figure.savefig(folder / "authors.png", dpi=150)


@contextmanager
def noise(processes: int) -> Iterator[None]:
    """Processes that do nothing as busily as they can."""
    busy = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(busy) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = (s.split(":")[1].strip() for s in lines if s.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="default: all")
    add("--store", type=Path, metavar="FILE", help="JSON file to write")
    add("--compare", type=Path, metavar="FILE", help="exit with 1 if any got worse")
    add("--from", dest="source", type=Path, metavar="FILE", help="show what is stored")
    add("--plot", type=Path, metavar="DIR", help="draw it into this folder")
    add("--noise", type=int, default=0, metavar="N", help="busy processes beside it")
    add("--runs", type=int, metavar="N", help="of each pair (default: 3 or 5)")
    add("--threads", type=int, metavar="N", help="of PyTorch (default: its own)")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add(
        "--sizes",
        type=float,
        nargs="+",
        default=[1e6, 1e7, 1e8, 1e9],
        help="of selection",
    )
    add("--options", nargs="+", choices=OPTIONS, metavar="OPTION", help="of below")
    add("--force-repo", type=Path, metavar="PATH", help="a clone of naver/force")
    add("--grasp-repo", type=Path, metavar="PATH", help="a clone of alecwangcq/GraSP")
    add("--quick", action="store_true", help="small models: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.runs = args.runs or 1
    # To compile takes a minute.
    quick = [option for option in OPTIONS if option != "compile"]
    args.options = args.options or (quick if args.quick else list(OPTIONS))
    repos = args.force_repo or args.grasp_repo or args.source
    if args.only is None:
        args.only = [name for name in SECTIONS if repos or name != "authors"]
    elif "authors" in args.only and not repos:
        parser.error("--only authors: pass --force-repo, --grasp-repo or both")
    return args


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """What is stored in a file, or where and with what it is to be measured."""
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.source:
        record: dict[str, Any] = json.loads(args.source.read_text("utf-8"))
    else:
        record = machine(args.device) | {"quick": args.quick}
    print(
        "{cpu}, {cores} cores, {threads} threads, on {device}\n"
        "Python {python}, torch {torch}, timm {timm}, {date}".format(**record)
    )
    told = record.get("sections", {}).values() or [record["command"]]
    print(*dict.fromkeys(told), sep="\n")
    return record


def keep_others(args: argparse.Namespace, record: Row) -> list[Row]:
    """What a file has of other sections, measured on the same machine."""
    if args.source or not args.store or not args.store.exists():
        return []
    earlier = json.loads(args.store.read_text("utf-8"))
    kept = [row for row in earlier["rows"] if row["section"] not in args.only]
    differing = [
        f"{key}: {earlier.get(key)!r}, now {value!r}"
        for key, value in record.items()
        if key not in ("date", "command") and earlier.get(key) != value
    ]
    if kept and differing:
        raise SystemExit(
            f"--store {args.store}: expected a new file, or one that was measured "
            f"under the same conditions, got {'; '.join(differing)}"
        )
    record["sections"] = {
        section: told
        for section, told in earlier["sections"].items()
        if section not in args.only
    }
    return kept


def main() -> None:
    args = arguments()
    record = begin(args)
    stored: dict[Any, Row] = {}
    if args.compare:
        rows = json.loads(args.compare.read_text("utf-8"))["rows"]
        stored = {identity(row): row for row in rows if row.get("ratio")}
    record.setdefault("noise", args.noise)
    if record["noise"]:
        print(f"busy processes beside it: {record['noise']}")
    others = keep_others(args, record)
    told = record.setdefault("sections", {})
    done: list[Row] = []
    with ExitStack() as stack:
        if not args.source:
            stack.enter_context(noise(args.noise))
        for section in args.only:
            if args.source:
                rows = [row for row in record["rows"] if row["section"] == section]
            else:
                rows = SECTIONS[section](args)
                told[section] = f"{record['date']}: {record['command']}"
            done += show(section, rows, stored)
            if args.store:  # after each section: the next may be interrupted
                args.store.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(record | {"rows": others + done}, indent=1)
                write_whole(args.store, f"{text}\n".encode())
    if args.plot:
        plot(done, args.plot)
    worse = [
        row
        for row in done
        if identity(row) in stored and is_worse(row, stored[identity(row)])
    ]
    if args.compare:
        print(f"\n{len(worse)} of {len(done)} worse than in {args.compare}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
