"""Measure which layers FORCE and SNIP keep in ten well-known networks of timm.

    python benchmarks/gallery.py                     # resumes where it stopped
    python benchmarks/gallery.py --models resnet50

Each network starts at timm's own initialisation and is pruned to 99 %, by FORCE in 60
steps and by SNIP in a single step. The data are the training images of Fashion-MNIST,
enlarged to 64x64 in batches of 64. Networks whose weights depend on the image size get
224x224 in batches of 16. Each network is a line of JSON in ``--out``. From these lines,
``docs/gallery.md`` draws the density of each layer. The whole run takes three quarters
of an hour on one core.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from harness.fashion_mnist import FASHION, add_folder, load, need_folder
from harness.machine import machine
from harness.options import parser_of
from harness.storage import append_line, read_lines
from harness.training import Batch, batches_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from force_plugin import force_prune

LARGE = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_b16_224")
MODELS = (
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "regnety_016",
    "convnext_tiny",
    *LARGE,
)
STEPS = {"force": 60, "snip": 1}


def prune(name: str, method: str, folder: Path) -> dict[str, Any]:
    """Return the weights that a method keeps in each layer of a network."""
    size, batch = (224, 16) if name in LARGE else (64, 64)
    loader = batches_of(load(FASHION, folder, 60_000)[0], batch, seed=0)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        enlarged = interpolate(batch[0], (size, size), mode="bilinear")
        return cross_entropy(model(enlarged), batch[1])

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has the warnings
        report = force_prune(
            model,
            loader,
            0.99,
            method=method,
            steps=STEPS[method],
            forward=loss,
            on_collapse="warn",
        )
    return {
        "model": name,
        "method": method,
        "sparsity": 0.99,
        "size": size,
        "batch": batch,
        "seconds": round(time.perf_counter() - start, 1),
        "layers": [[layer.name, layer.shape, layer.kept] for layer in report.layers],
        "warnings": report.warnings,
        "machine": machine("cpu"),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    add_folder(parser)
    out = Path(__file__).with_suffix(".jsonl")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    need_folder(parser, args.data)
    done = {(row["model"], row["method"]) for row in read_lines(args.out)}
    for name in args.models:
        for method in STEPS:
            if (name, method) not in done:
                row = prune(name, method, args.data)
                append_line(args.out, row)
                print(f"{name}, {method}: {row['seconds']} s")


if __name__ == "__main__":
    main()
