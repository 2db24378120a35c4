"""Compare the authors' own code of the methods with ours: time, memory and masks.

    python benchmarks/authors.py --force-repo PATH --grasp-repo PATH

The paths are checkouts of https://github.com/naver/force (FORCE, Iter SNIP, GraSP-It)
and of https://github.com/alecwangcq/GraSP. Either path may be left out. Both sides get
equal weights and an equal batch of noise, and are called as in the authors' scripts.
Both sides prune the network at the end, except GraSP's authors' code, which stops at
the masks. Two points differ from the authors' scripts:

- FORCE's code takes ``nll_loss`` of the network's outputs. The authors' networks return
  logits, but the loss of the paper is the cross entropy. A log-softmax at the end of
  the network turns ``nll_loss`` into the cross entropy, for both sides.
- GraSP's code draws new weights for the last layer before it scores. An option turns
  this off, and is used here. GraSP's code picks samples of each class: as many as its
  authors do, if the batch has enough. Our code gets these samples in the two halves
  that GraSP's code uses.

A bare step is the forward and backward pass of an equal number of samples, in one
batch. Bare steps, the authors' code and our code alternate in one process. The first
round is a warm-up. A ratio is the ratio of medians. Peaks of memory are measured in
separate processes, minus the peak of a process that takes the bare steps. On the CPU,
peaks need Linux. FORCE is ill-conditioned: compare masks with ``--dtype float64``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from harness.machine import in_words
from harness.memory import freed_at_once, peak
from harness.options import add_threads, parser_of
from harness.storage import write_json
from harness.timing import timed
from torch import Tensor, nn

from force_plugin import force_prune, get_masks

CLASSES = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Methods in the FORCE authors' code, with their numbers there.
NUMBERS = {"force": 3, "iter_snip": 1, "grasp_it": 2}
REPOSITORIES = {
    "naver/force": "pruning/pruning_algos.py",
    "alecwangcq/GraSP": "pruner/GraSP.py",
}

Batch = tuple[Tensor, Tensor]
# Theirs returns the masks in the order of the modules. Ours prunes the network.
Theirs = Callable[[nn.Module], Iterable[Tensor]]
Ours = Callable[[nn.Module], object]


def prunable(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers that both authors' codes prune, in their order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def named(model: nn.Module, masks: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the authors' masks by parameter name; the masks come without names."""
    by_name = {}
    for (name, module), mask in zip(prunable(model).items(), masks, strict=True):
        if mask.shape != module.weight.shape:
            raise ValueError(
                f"{name}: expected a mask of shape {tuple(module.weight.shape)}, "
                f"theirs has {tuple(mask.shape)}"
            )
        by_name[f"{name}.weight"] = mask.bool()
    return by_name


def load(repo: str, name: str) -> Any:
    """Import a module of a checkout, without writing to the checkout."""
    sys.dont_write_bytecode = True
    if repo not in sys.path:
        sys.path.insert(0, repo)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        sys.exit(f"{repo} needs {error.name}: pip install {error.name}")


def build(args: argparse.Namespace) -> tuple[nn.Module, Batch]:
    """Return the network without closed gates, and a batch of all classes."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = timm.create_model(args.model, num_classes=CLASSES)
    # Our code would open closed gates while scoring, the authors' code would not. A
    # ResNet becomes equal to a ResNet made with zero_init_last=False.
    for name, parameter in model.named_parameters():
        scales = parameter.ndim == 1 and not name.endswith("bias")
        if scales and parameter.abs().max() <= 0.01:
            nn.init.ones_(parameter)
    inputs = torch.randn(args.batch_size, 3, args.size, args.size).to(dtype)
    return model.to(DEVICE, dtype), (inputs, torch.arange(args.batch_size) % CLASSES)


def of_force(args: argparse.Namespace, batch: Batch) -> tuple[Theirs, Ours, Batch]:
    """Return the authors' and our method of T steps, and the batch of a step."""
    algorithms = load(args.repo, "pruning.pruning_algos")
    networks = load(args.repo, "pruning.mask_networks")

    def theirs(model: nn.Module) -> Iterable[Tensor]:
        model = nn.Sequential(model, nn.LogSoftmax(dim=1))
        masks: list[Tensor] = algorithms.iterative_pruning(
            model,
            [batch],  # every step reads the loader from its start
            DEVICE,
            1 - args.sparsity,
            prune_method=NUMBERS[args.method],
            num_steps=args.steps,
        )
        networks.apply_prune_mask(model, masks)
        return masks

    def ours(model: nn.Module) -> object:
        return prune(model, [batch], args, steps=args.steps)

    return theirs, ours, batch


def of_grasp(args: argparse.Namespace, batch: Batch) -> tuple[Theirs, Ours, Batch]:
    """Return the authors' and our GraSP, and all samples of GraSP as one batch."""
    code = load(args.repo, "pruner.GraSP")
    # The authors' code stops after a further sample of each class, so the loader has
    # the batch twice. The authors take 10 samples of each class on CIFAR-10.
    loader = [batch, batch]
    each = min(10, args.batch_size // CLASSES)
    inputs, targets = code.GraSP_fetch_data(loader, CLASSES, each)
    half = len(inputs) // 2
    halves = [(inputs[:half], targets[:half]), (inputs[half:], targets[half:])]

    def theirs(model: nn.Module) -> Iterable[Tensor]:
        masks: dict[nn.Module, Tensor] = code.GraSP(
            model,
            args.sparsity,
            loader,
            DEVICE,
            num_classes=CLASSES,
            samples_per_class=each,
            reinit=False,
        )
        return masks.values()

    def ours(model: nn.Module) -> object:
        return prune(model, halves, args, batches=2)

    return theirs, ours, (inputs, targets)


def prune(
    model: nn.Module, loader: list[Batch], args: argparse.Namespace, **kwargs: Any
) -> object:
    return force_prune(
        model,
        loader,
        args.sparsity,
        method=args.method,
        parameters=[(module, "weight") for module in prunable(model).values()],
        on_collapse="warn",  # the masks of noise do not matter here
        progress=False,
        **kwargs,
    )


def take_bare_steps(model: nn.Module, batch: Batch, steps: int) -> None:
    for _ in range(steps):
        inputs, targets = (tensor.to(DEVICE) for tensor in batch)
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs), targets))
        model.zero_grad()


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Return times and masks, or the peak of one side; it runs in its own process."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    model, batch = build(args)
    prepare = of_grasp if args.method == "grasp" else of_force
    theirs, ours, bare_batch = prepare(args, batch)
    if args.side == "bare":
        take_bare_steps(model, bare_batch, args.steps)
        return {"peak": peak(DEVICE) / 2**20}
    if args.side != "times":
        run = theirs if args.side == "theirs" else ours
        result = run(model)  # keep the result until the peak is read
        return {"peak": peak(DEVICE) / 2**20, "result": type(result).__name__}

    times: dict[str, list[float]] = {"bare": [], "theirs": [], "ours": []}
    per_call = 1 if args.method == "grasp" else args.steps
    for run_number in range(args.runs + 1):
        networks = copy.deepcopy(model), copy.deepcopy(model)
        bare, _ = timed(partial(take_bare_steps, model, bare_batch, args.steps))
        by_them, masks = timed(partial(theirs, networks[0]))
        by_us, _ = timed(partial(ours, networks[1]))
        if run_number:  # the first run is a warm-up
            times["bare"].append(bare / args.steps)
            times["theirs"].append(by_them / per_call)
            times["ours"].append(by_us / per_call)
    left, right = named(model, masks), get_masks(networks[1])
    both = sum(int((left[name] & right[name]).sum()) for name in left)
    kept = {
        "theirs": sum(int(mask.sum()) for mask in left.values()),
        "ours": sum(int(mask.sum()) for mask in right.values()),
    }
    middle = {side: statistics.median(spent) for side, spent in times.items()}
    return {
        "method": args.method,
        "seconds": {
            side: {"median": middle[side], "min": min(spent), "max": max(spent)}
            for side, spent in times.items()
        },
        "per": "scoring" if args.method == "grasp" else "step",
        "samples": len(bare_batch[0]),
        "ratio": {side: middle[side] / middle["bare"] for side in ("theirs", "ours")},
        "weights": sum(mask.numel() for mask in left.values()),
        "kept": kept | {"both": both},
        "overlap": both / (sum(kept.values()) - both),
    }


def ask(task: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a new process, as names in the two checkouts clash."""
    with nullcontext() if task["side"] == "times" else freed_at_once():
        process = subprocess.run(
            [sys.executable, __file__, "--worker", json.dumps(task)],
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(
            f"{task['method']}, {task['side']}: the process ended with "
            f"{process.returncode}\n{process.stderr.strip()}"
        )
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


def compare(
    force_repo: Path | None,
    grasp_repo: Path | None,
    *,
    model: str = "resnet50",
    size: int = 32,
    batch_size: int = 128,
    steps: int = 8,
    runs: int = 3,
    sparsity: float = 0.9,
    dtype: str = "float32",
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each method of the given checkouts, ready for JSON.

    Times are seconds for a step or for a whole scoring (``per``), and seconds for a
    bare step of an equal number of ``samples``. ``memory`` is in MiB: the peak of the
    bare steps, and the excess of the authors' peak and of our peak.

    Raises:
        ValueError: A path is no checkout of a known repository, or GraSP lacks samples.
        RuntimeError: A process failed; the message contains its output.
    """
    setting = {"model": model, "size": size, "batch_size": batch_size}
    setting |= {"steps": steps, "runs": runs, "sparsity": sparsity, "dtype": dtype}
    setting |= {"threads": threads}
    tasks: list[dict[str, Any]] = []
    for (name, file), repo, methods in zip(
        REPOSITORIES.items(),
        (force_repo, grasp_repo),
        (list(NUMBERS), ["grasp"]),
        strict=True,
    ):
        if repo is None:
            continue
        if not (repo / file).is_file():
            raise ValueError(
                f"expected a checkout of https://github.com/{name}, with {file}, got "
                f"{repo}"
            )
        shared = {**setting, "repo": str(repo.resolve())}
        tasks += [{**shared, "method": method} for method in methods]
    if grasp_repo is not None and batch_size < CLASSES:
        raise ValueError(
            f"GraSP takes samples of every class: expected a batch of at least "
            f"{CLASSES}, got {batch_size}"
        )
    rows = []
    bare: dict[int, float] = {}  # shared by methods with equal sample numbers
    for task in tasks:
        row = ask({**task, "side": "times"})
        if row["samples"] not in bare:
            bare[row["samples"]] = ask({**task, "side": "bare"})["peak"]
        base = bare[row["samples"]]
        more = {s: ask({**task, "side": s})["peak"] - base for s in ("theirs", "ours")}
        rows.append({**row, "memory": {"bare": base, **more}})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of 80 columns."""
    sides = ("bare", "theirs", "ours")
    lines = [
        f"{'':10}{'seconds':>24}{'over bare':>16}{'peak MiB, + over bare':>28}",
        f"{'':10}{'bare':>8}{'theirs':>8}{'ours':>8}{'theirs':>8}{'ours':>8}"
        f"{'bare':>10}{'theirs':>9}{'ours':>9}",
    ]
    for row in rows:
        seconds = "".join(f"{row['seconds'][side]['median']:8.3f}" for side in sides)
        ratios = "".join(f"{row['ratio'][side]:8.2f}" for side in sides[1:])
        more = "".join(f"{row['memory'][side]:+9.0f}" for side in sides[1:])
        bare = f"{row['memory']['bare']:10.0f}"
        lines.append(f"{row['method']:10}{seconds}{ratios}{bare}{more}")
    lines += [
        "",
        f"{'':10}{'kept by theirs':>16}{'by ours':>14}{'by both':>14}"
        f"{'of weights':>13}{'overlap':>11}",
    ]
    for row in rows:
        kept = row["kept"]
        lines.append(
            f"{row['method']:10}{kept['theirs']:16,}{kept['ours']:14,}{kept['both']:14,}"
            f"{row['weights']:13,}{row['overlap']:11.8f}"
        )
    lines += ["", "seconds: of a step; overlap: kept by both over kept by either"]
    lines += [
        f"{row['method']}: seconds of a whole scoring of {row['samples']} samples; a "
        "bare step has as many"
        for row in rows
        if row["per"] == "scoring"
    ]
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--force-repo", type=Path, help="checkout of naver/force")
    parser.add_argument("--grasp-repo", type=Path, help="checkout of alecwangcq/GraSP")
    parser.add_argument("--model", default="resnet50", help="any timm model")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps of one run")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each side")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    add_threads(parser)
    parser.add_argument("--store", type=Path, help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.worker:
        warnings.simplefilter("ignore")
        # The scripts of FORCE's authors set this too.
        torch.backends.cudnn.deterministic = True
        with redirect_stdout(io.StringIO()):  # the authors' code prints every step
            answer = work(argparse.Namespace(**json.loads(args.worker)))
        print(json.dumps(answer))
        return
    if args.force_repo is None and args.grasp_repo is None:
        parser.error("pass --force-repo, --grasp-repo or both")
    names = ["model", "size", "batch_size", "steps", "runs", "sparsity", "dtype"]
    setting = {name: getattr(args, name) for name in [*names, "threads"]}
    try:
        rows = compare(args.force_repo, args.grasp_repo, **setting)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    threads = args.threads or torch.get_num_threads()
    machine = in_words(DEVICE, threads, "torch", "timm")
    print(
        f"{args.model} at {args.size}x{args.size}, batch {args.batch_size}, "
        f"{args.steps} steps, {args.runs} runs, {args.dtype}\n{machine}\n"
    )
    print(table(rows))
    if args.store:
        stored = {"machine": machine, "date": str(date.today()), **setting}
        write_json(args.store, {**stored, "rows": rows})


if __name__ == "__main__":
    main()
