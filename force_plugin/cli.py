"""``force-prune``: prune a timm model at initialisation from the command line.

    force-prune resnet50 --data data --sparsity 0.99
    torchrun --nproc-per-node 4 -m force_plugin.cli resnet50 --data data --sparsity 0.99

Under ``torchrun`` the processes prune one model, each with its part of the data. The
first of them prints and writes what one process alone would.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import nn

from force_plugin import (
    SparsityReport,
    force_prune,
    get_masks,
    save_masks,
)
from force_plugin.errors import (
    BatchError,
    CollapseError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    PruningError,
)
from force_plugin.files import write_whole
from force_plugin.hold import save_pruned
from force_plugin.methods.registry import METHODS
from force_plugin.parallel.ranks import Ranks
from force_plugin.selection.schedules import SCHEDULES
from force_plugin.zoo import count_classes, load_data, load_dataset, load_model

DESCRIPTION = """\
Prune a timm model at initialisation. Prints what is left of each layer and writes the
masks, the report and a plot. Without --data and --dataset, the data are the digits that
come with scikit-learn: no download, for a first try."""

EXAMPLES = """\
examples:
  a first try, on the digits:
    force-prune resnet18 --sparsity 0.95 --steps 5

  FORCE on a folder of images, data/train/CLASS/*.jpg:
    force-prune resnet50 --data data --sparsity 0.99 --steps 60 --batches 40 \\
        --workers 4 --out runs/r50

  the same on four GPUs, 40 batches a step on each:
    torchrun --nproc-per-node 4 -m force_plugin.cli resnet50 --data data \\
        --sparsity 0.99 --steps 60 --batches 40 --workers 4 --out runs/r50

  then timm's own train.py, as it is:
    python -m force_plugin.hold train.py --model resnet50 --data-dir data \\
        --initial-checkpoint runs/r50/pruned.safetensors

In Python, apply_masks(model, load_masks("runs/r50/masks.safetensors")) prunes a model
with the masks; load_metadata(...) of the same file tells how they were made. The same
--seed makes the same model, so a model made in Python after
timm.utils.random_seed(seed) has the weights that these masks were chosen for."""

# What errors and reports advise is for Python. Of an error without a line here, its
# problem is all there is to say.
_ADVICE: dict[type[Exception], str] = {
    BatchError: "look at --data, --num-classes and --batch-size",
    CollapseError: (
        "take {steps}more --batches, a lower --sparsity or another --method, or "
        "--on-collapse warn to write it all the same"
    ),
    NoGradientError: "take another model, or --method magnitude or random",
    NotFiniteError: "look at the data and initial weights, or leave --autocast out",
    NothingToPruneError: "take another model",
    torch.cuda.OutOfMemoryError: "take a smaller --microbatch or --batch-size",
}


class _Parser(argparse.ArgumentParser):
    """A parser that leaves it to ``main`` to say what is wrong, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``force-prune``.

    In a process of a ``torchrun`` with several, every one of them must run it. They end
    with a status other than 0 where any of them fails; the first says why.

    Args:
        argv: The arguments after the program's name. None: those of the process.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        SystemExit: After one line on stderr, with status 2 for wrong arguments and 1
            where the pruning failed (memory, gradients that are not finite, another
            process, ...); with status 0 after ``--help``.
    """
    parser, args = _make_parser(), argparse.Namespace()
    with _process_group() as ranks:
        try:
            _prune(parser, argv, args, ranks)
            return 0
        except (ValueError, OSError) as error:
            status, said = 2, f"error: {_told(error, args)}"
        except RuntimeError as error:
            status, said = 1, f"error: {_told(error, args)}"
        except KeyboardInterrupt:
            status, said = 130, "interrupted"
        if ranks.rank == 0:
            # Errors of the libraries below can have several lines.
            print(f"{parser.prog}: {' '.join(said.split())}", file=sys.stderr)
    if status == 130:
        return status
    raise SystemExit(status)


def _told(error: Exception, args: argparse.Namespace) -> str:
    """An error, and what to do about it by options."""
    problem = error.problem if isinstance(error, PruningError) else str(error)
    advice = next((a for kind, a in _ADVICE.items() if isinstance(error, kind)), "")
    fixed = "method" in args and METHODS[args.method].steps is not None
    steps = "" if fixed else "another number of --steps, "
    return "; ".join(filter(None, (problem, advice.format(steps=steps))))


@contextmanager
def _process_group() -> Iterator[Ranks]:
    """The processes of a ``torchrun``, or this one by itself."""
    # Other launchers set WORLD_SIZE alone, and mean machines.
    several = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    several = several and not dist.is_initialized()  # a script may call main() often
    if several:
        dist.init_process_group()  # gloo for tensors on a CPU, NCCL for those on GPUs
    try:
        # Without parameters: what the ranks tell each other stays on the CPU.
        yield Ranks(nn.Module())
    finally:
        if several:
            dist.destroy_process_group()


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="force-prune",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="name of a timm model, e.g. resnet50")

    data = parser.add_argument_group("data and model")
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of images, DIR/CLASS/*.jpg or DIR/train/CLASS/*.jpg, or of the "
        "--dataset (default: scikit-learn's digits)",
    )
    data.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="data set that timm.data.create_dataset reads by name, e.g. torch/cifar10 "
        "(default: a folder of images)",
    )
    data.add_argument(
        "--download",
        action="store_true",
        help="download the --dataset if it is not in --data yet",
    )
    data.add_argument(
        "--batch-size",
        type=_count,
        default=128,
        metavar="N",
        help="images a batch, of each process (default: %(default)s)",
    )
    data.add_argument(
        "--image-size",
        type=_count,
        metavar="PIXELS",
        help="height and width of the images (default: the model's own; for the "
        "digits 32 if the model takes any size)",
    )
    data.add_argument(
        "--num-classes",
        type=_count,
        metavar="N",
        help="outputs of the model (default: as many as the data have classes)",
    )
    data.add_argument(
        "--workers",
        type=_count_or_zero,
        default=0,
        metavar="N",
        help="processes that load the data; 0: none but this one (default: "
        "%(default)s)",
    )
    data.add_argument(
        "--model-kwargs",
        type=_keyword,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments for timm.create_model, values as in Python, e.g. "
        "zero_init_last=False (default: none)",
    )

    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--sparsity",
        type=_sparsity,
        required=True,
        metavar="S",
        help="fraction of the prunable weights to remove, 0 <= S < 1 (required)",
    )
    pruning.add_argument(
        "--method",
        choices=list(METHODS),
        default="force",
        help="one of %(choices)s (default: %(default)s)",
        metavar="NAME",
    )
    pruning.add_argument(
        "--steps",
        type=_count,
        default=60,
        metavar="T",
        help="pruning steps; snip, grasp, magnitude and random always take 1, snip_it "
        "takes 7 (default: %(default)s)",
    )
    pruning.add_argument(
        "--schedule",
        choices=list(SCHEDULES),
        default="exponential",
        help="density after each step, one of %(choices)s (default: %(default)s)",
        metavar="NAME",
    )
    pruning.add_argument(
        "--batches",
        type=_batches,
        default=1,
        metavar="N",
        help="batches a step, of each process, or 'all' for the whole data set once a "
        "step (default: %(default)s)",
    )
    pruning.add_argument(
        "--open-gates",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="while scoring, open the gates that timm initialises to (nearly) 0, such "
        "as the last batch norm of a block or LayerScale (default: open)",
    )
    pruning.add_argument(
        "--on-collapse",
        choices=["raise", "warn"],
        default="raise",
        help="fail where the mask disconnects the network, or warn and write it all "
        "the same (default: %(default)s)",
    )
    pruning.add_argument(
        "--microbatch",
        type=_count,
        metavar="N",
        help="images that are passed through the model at once, where a batch does not "
        "fit into memory; batch norms normalise over as many (default: a batch)",
    )
    pruning.add_argument(
        "--autocast",
        choices=["bfloat16"],
        help="score in mixed precision, bfloat16 (default: in the model's own)",
        metavar="DTYPE",
    )
    pruning.add_argument(
        "--channels-last",
        action="store_true",
        help="hand the images over in PyTorch's channels-last format, which may be "
        "faster (default: channels first)",
    )
    pruning.add_argument(
        "--compile",
        choices=[
            "default",
            "reduce-overhead",
            "max-autotune",
            "max-autotune-no-cudagraphs",
        ],
        nargs="?",
        const="default",
        default=False,
        metavar="MODE",
        help="compile the scoring passes by torch.compile, in one of its modes: "
        "%(choices)s; not for grasp and synflow (default: not compiled)",
    )
    pruning.add_argument(
        "--seed",
        type=_count_or_zero,
        default=0,
        metavar="N",
        help="seed of the initial weights and of the order of the data (default: "
        "%(default)s)",
    )
    pruning.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to prune, e.g. cpu or cuda:1; under torchrun, cuda is a GPU for "
        "each process (default: cuda if there is one, else cpu)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to, made if missing; files of an earlier run in it are "
        "replaced (default: runs/MODEL-METHOD-SPARSITY)",
    )
    output.add_argument(
        "--quiet", action="store_true", help="print nothing but errors and warnings"
    )
    return parser


def _prune(
    parser: _Parser,
    argv: Sequence[str] | None,
    args: argparse.Namespace,
    ranks: Ranks,
) -> None:
    """Do what the arguments say, the cheap checks before the pruning."""
    with ranks:
        parser.parse_args(argv, args)
        random_seed(args.seed)
        # One process of each machine downloads, and the others wait.
        waits = os.environ.get("LOCAL_RANK", "0") != "0"
        if waits:
            ranks.any(False)
        dataset = load_dataset(args.data, dataset=args.dataset, download=args.download)
        if not waits:
            ranks.any(False)
        made_with = {
            "num_classes": args.num_classes or count_classes(dataset),
            "image_size": args.image_size,
            **dict(args.model_kwargs),
        }
        model = load_model(args.model, **made_with).to(args.device)
        loader = load_data(
            model,
            dataset,
            image_size=args.image_size,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        out = args.out or Path("runs", f"{args.model}-{args.method}-{args.sparsity}")
        if ranks.rank == 0:
            _make_writable(out)
        else:  # the same weights, but not the same crops and flips
            random_seed(args.seed, ranks.rank)

    with warnings.catch_warnings():
        # The report has them too.
        warnings.simplefilter("ignore", UserWarning)
        report = force_prune(
            model,
            loader,
            args.sparsity,
            method=args.method,
            steps=args.steps,
            schedule=args.schedule,
            batches=args.batches,
            open_gates=args.open_gates,
            microbatch=args.microbatch,
            autocast=args.autocast and getattr(torch, args.autocast),
            channels_last=args.channels_last,
            compile=args.compile,
            on_collapse=args.on_collapse,
            progress=not args.quiet,
        )
    with ranks:
        if ranks.rank == 0:
            problems = tuple(getattr(w, "problem", w) for w in report.warnings)
            report = replace(report, warnings=problems)
            options = {**vars(args), "processes": ranks.size}
            _write(model, report, out, options)
            _print(report, out, args.quiet)


def _write(
    model: nn.Module, report: SparsityReport, out: Path, options: dict[str, Any]
) -> None:
    # Paths and devices are written as text.
    options = json.loads(json.dumps(options, default=str))
    save_masks(get_masks(model), out / "masks.safetensors", _made_by(options))
    save_pruned(model, out / "pruned.safetensors")
    _write_csv(report, out / "report.csv")
    report.plot(out / "sparsity.png")
    _write_json(report, out / "report.json", options)  # the last: all of it is there


def _print(report: SparsityReport, out: Path, quiet: bool) -> None:
    if quiet:
        for warning in report.warnings:
            print(f"force-prune: warning: {warning}", file=sys.stderr)
        return
    print(report)
    print(
        f"\nwritten to {out}:\n"
        "  masks.safetensors  a bit for each weight, 1 = kept, and what made them\n"
        "  pruned.safetensors the initial weights, 0 where pruned, to train from\n"
        "  report.json        the options of this run and the table above\n"
        "  report.csv         the table above, a row a layer\n"
        "  sparsity.png       the share of weights kept in each layer"
    )


def _make_writable(out: Path) -> None:
    """Make a folder and check that a file can be written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: read-only mounts, full quotas, the root user.
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(
            f"argument --out: expected a folder to write to, got {str(out)!r}: "
            f"{error.strerror}"
        ) from error


def _made_by(options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide the masks, with the steps and schedule as they were."""
    method = METHODS[options["method"]]
    used = {
        "steps": method.steps or options["steps"],
        "schedule": method.schedule or options["schedule"],
    }
    other = {"download", "workers", "out", "quiet"}
    return {key: used.get(key, options[key]) for key in options if key not in other}


def _write_json(report: SparsityReport, path: Path, options: dict[str, Any]) -> None:
    text = json.dumps({"options": options, **report.to_dict()}, indent=2)
    write_whole(path, f"{text}\n".encode())


def _write_csv(report: SparsityReport, path: Path) -> None:
    layers = report.to_dict()["layers"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(layers[0]))
    writer.writeheader()
    for layer in layers:
        writer.writerow({**layer, "shape": "x".join(map(str, layer["shape"]))})
    write_whole(path, text.getvalue().encode())


# Types of arguments. argparse turns an ArgumentTypeError into an error of the argument.


def _sparsity(text: str) -> float:
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = float("nan")
    if not 0 <= sparsity < 1:
        raise argparse.ArgumentTypeError(
            "expected the fraction of weights to remove, 0 <= S < 1 (0.99 removes "
            f"99 %), got {text}"
        )
    return sparsity


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected a whole number >= {least}, got {text}"
        )
    return int(text)


def _count_or_zero(text: str) -> int:
    return _count(text, least=0)


def _batches(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _device(text: str) -> torch.device:
    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        # Only a tensor shows whether this machine has the device.
        return torch.empty(0, device=text).device
    # A missing CUDA driver is an AssertionError, an unknown name a RuntimeError.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine, got {text}: {first_line}"
        ) from error


def _keyword(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value  # text needs no quotes


if __name__ == "__main__":
    sys.exit(main())
