"""Parse the options of ``force-prune``."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import Any, NoReturn

import torch

from force_plugin.methods.registry import METHODS
from force_plugin.selection.schedules import SCHEDULES

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


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, so that ``main`` prints errors in one line."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise ValueError(message)


def make_parser() -> Parser:
    """Return the parser of ``force-prune``."""
    parser = Parser(
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
        "--guard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take a step again, in smaller ones, that would disconnect the network "
        "(default: take it again)",
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
