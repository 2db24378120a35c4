"""Time the forward pass of pruned models: as they are, compacted, and by non-zeros.

    python benchmarks/sparse.py                                # resumes
    python benchmarks/sparse.py --models resnet50:224:1 --sparsities 0.99 --threads 1
    python benchmarks/sparse.py --table docs/sparse-table.md   # measures nothing

SteadyFORCE prunes each model in ten steps, on scikit-learn's digits. The models have no
closed gates. These forms are timed, in evaluation mode and ``torch.inference_mode``:

dense             the pruned model with permanent zeros, as PyTorch runs it
channels_last     the same in that memory format
compact           after ``compact``
sparse            after ``sparsify``
compact, sparse   after ``compact`` and ``sparsify``

In a round, each form runs for ``--seconds``, in a new order. A ratio compares a form
with the dense model in one round; the table has its median.

A model at a sparsity is stored as soon as it is measured, and not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness.machine import machine, told
from harness.options import add_threads, parser_of, use_threads
from harness.storage import read_rows, write_json
from harness.tables import markdown, percent
from harness.timing import seconds_of
from torch import Tensor, nn

from force_plugin import (
    compact,
    execution_report,
    force_prune,
    make_permanent,
    sparsify,
)
from force_plugin.files import write_whole
from force_plugin.zoo import load_data, load_dataset, load_model

MODELS = (
    "resnet18:224:1 resnet50:224:1 resnet50:224:8 resnet50:32:128 vgg16_bn:32:128 "
    "mobilenetv3_large_100:224:1 efficientnet_b0:224:1 vit_small_patch16_224:224:1 "
    "convnext_tiny:224:1"
)
SPARSITIES = [0.9, 0.95, 0.99, 0.995]
FORMS = ("channels_last", "compact", "sparse", "compact, sparse")
# They start with weights of 0 behind each block, which would cut all blocks off.
OPEN = {"resnet": {"zero_init_last": False}}
SAMPLES = 128  # in a step of scoring


def pruned(name: str, size: int, sparsity: float, steps: int) -> nn.Module:
    """Return a pruned model in evaluation mode, with permanent zeros."""
    torch.manual_seed(0)
    options = next((o for kind, o in OPEN.items() if name.startswith(kind)), {})
    model = load_model(name, num_classes=1000, image_size=size, **options)
    samples = max(1, min(SAMPLES, SAMPLES * 64 * 64 // (size * size)))
    loader = load_data(model, load_dataset(), image_size=size, batch_size=samples)
    force_prune(
        model,
        loader,
        sparsity,
        method="steady_force",
        steps=steps,
        on_collapse="warn",
        progress=False,
    )
    make_permanent(model, hold_zeros=False)
    return model.eval().requires_grad_(False)


def forward(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def measure(
    name: str, size: int, batch: int, sparsity: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of all forms by round, and what runs sparse."""

    def tell(what: str) -> None:
        case = f"{name}:{size}:{batch} at {percent(sparsity)}"
        print(f"{case}: {what}", file=sys.stderr, flush=True)

    tell("force_prune")
    dense = pruned(name, size, sparsity, args.steps)
    images = torch.randn(batch, 3, size, size)
    tell("compact")
    small = compact(dense, images[:2], progress=False)
    tell("sparsify")
    models = {
        "dense": dense,
        "channels_last": deepcopy(dense).to(memory_format=torch.channels_last),
        "compact": small,
        "sparse": sparsify(dense, images, progress=False),
        "compact, sparse": sparsify(small, images, progress=False),
    }
    last = images.contiguous(memory_format=torch.channels_last)
    given = {form: last if form == "channels_last" else images for form in models}
    with torch.inference_mode():
        expected = dense(images)
        off = {
            form: float((model(given[form]) - expected).abs().max())
            / float(expected.abs().max())
            for form, model in models.items()
        }
    tell("time")
    times: dict[str, list[float]] = {form: [] for form in models}
    for number in range(args.rounds + 1):
        for form in random.Random(number).sample([*models], len(models)):
            run = partial(forward, models[form], given[form])
            taken = seconds_of(run, args.seconds if number else 0)
            if number:  # the first round is a warm-up
                times[form].append(round(taken, 7))
    runs = [layer.runs for layer in execution_report(models["sparse"]).layers]
    kept = [p.count_nonzero() for p in dense.parameters() if p.dim() > 1]
    return {
        "seconds": times,
        "difference": off,
        "layers": {how: runs.count(how) for how in ("sparse", "dense")},
        "kept": int(sum(kept)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios in Markdown, with the machine."""
    titles = ["model, image, batch", "sparsity", "dense, ms", *FORMS]
    cells = []
    for row in rows:
        times = row["seconds"]
        ratios = (
            median(d / t for d, t in zip(times["dense"], times[form], strict=True))
            for form in FORMS
        )
        cells.append(
            [
                f"`{row['model']}`, {row['size']}, {row['batch']}",
                percent(row["sparsity"]),
                f"{1e3 * median(times['dense']):.1f}",
                *(f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    made = dict.fromkeys(told(row["machine"]).replace("\n", ". ") for row in rows)
    return "\n".join([*markdown(titles, cells), "", *made]) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME:SIZE:BATCH", default=MODELS.split())
    add("--sparsities", type=float, nargs="+", default=SPARSITIES)
    add("--steps", type=int, default=10, help="of SteadyFORCE (default: 10)")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--seconds", type=float, default=0.5, help="of a turn, at least (default: 0.5)")
    add("--store", type=Path, default=Path(__file__).with_suffix(".json"))
    add("--table", type=Path, help="Markdown file to write; measures nothing")
    add_threads(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    use_threads(args)
    rows = read_rows(args.store)
    for spec in () if args.table else args.models:
        name, size, batch = spec.split(":")
        for sparsity in args.sparsities:
            case = {"model": name, "size": int(size), "batch": int(batch)}
            case |= {"sparsity": sparsity, "threads": torch.get_num_threads()}
            if any(case.items() <= row.items() for row in rows):
                continue
            found = measure(name, int(size), int(batch), sparsity, args)
            rows.append(case | {"machine": machine("cpu")} | found)
            write_json(args.store, rows)
    text = table(rows)
    print(text)
    if args.table:
        write_whole(args.table, text.encode())


if __name__ == "__main__":
    main()
