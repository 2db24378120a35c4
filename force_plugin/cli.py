"""``force-prune``: prune a timm model at initialisation from the command line.

    force-prune resnet50 --data data --sparsity 0.99
    torchrun --nproc-per-node 4 -m force_plugin.cli resnet50 --data data --sparsity 0.99

Under ``torchrun`` the processes prune one model together, each on its own part of the
data. The first process prints and writes the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import nn

from force_plugin.command_line.parser import Parser, make_parser
from force_plugin.command_line.results import (
    make_writable,
    print_results,
    write_results,
)
from force_plugin.errors import (
    BatchError,
    CollapseError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    PruningError,
)
from force_plugin.methods.registry import METHODS
from force_plugin.parallel.ranks import Ranks
from force_plugin.pruning.loop import force_prune
from force_plugin.zoo import count_classes, load_data, load_dataset, load_model

# Errors and reports give advice for Python; this is advice for the command line. An
# error of no kind below is printed without advice.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``force-prune``.

    Under ``torchrun``, every process must call this function. If a process fails, all
    processes end with a status other than 0. The first process prints the reason.

    Args:
        argv: The arguments after the program's name. ``None``: the arguments of the
            process.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        SystemExit: After one line on stderr: status 2 for wrong arguments, status 1 if
            the pruning failed (memory, gradients that are not finite, another process,
            ...). Status 0 after ``--help``.
    """
    parser, args = make_parser(), argparse.Namespace()
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
            # Errors of other libraries may have several lines.
            print(f"{parser.prog}: {' '.join(said.split())}", file=sys.stderr)
    if status == 130:
        return status
    raise SystemExit(status)


def _told(error: Exception, args: argparse.Namespace) -> str:
    """Return the text of an error, with advice on options."""
    problem = error.problem if isinstance(error, PruningError) else str(error)
    advice = next((a for kind, a in _ADVICE.items() if isinstance(error, kind)), "")
    fixed = "method" in args and METHODS[args.method].steps is not None
    steps = "" if fixed else "another number of --steps, "
    return "; ".join(filter(None, (problem, advice.format(steps=steps))))


@contextmanager
def _process_group() -> Iterator[Ranks]:
    """Yield the processes of a ``torchrun``, or this process alone."""
    # Other launchers set WORLD_SIZE alone, as a number of machines.
    several = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    several = several and not dist.is_initialized()  # a script may call main() often
    if several:
        dist.init_process_group()  # gloo for tensors on CPUs, NCCL for tensors on GPUs
    try:
        # A module without parameters keeps the exchange between ranks on the CPU.
        yield Ranks(nn.Module())
    finally:
        if several:
            dist.destroy_process_group()


def _prune(
    parser: Parser,
    argv: Sequence[str] | None,
    args: argparse.Namespace,
    ranks: Ranks,
) -> None:
    """Prune as the arguments say, and write the results. Cheap checks come first."""
    with ranks:
        parser.parse_args(argv, args)
        random_seed(args.seed)
        # One process of each machine downloads, while the others wait.
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
            make_writable(out)
        else:  # equal weights on all ranks, but different crops and flips
            random_seed(args.seed, ranks.rank)

    with warnings.catch_warnings():
        # The report contains the warnings too.
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
            guard=args.guard,
            progress=not args.quiet,
        )
    with ranks:
        if ranks.rank == 0:
            problems = tuple(getattr(w, "problem", w) for w in report.warnings)
            report = replace(report, warnings=problems)
            options = {**vars(args), "processes": ranks.size}
            write_results(model, report, out, options)
            print_results(report, out, args.quiet)


if __name__ == "__main__":
    sys.exit(main())
