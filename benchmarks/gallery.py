"""Which layers stay: FORCE and SNIP on ten well-known networks of timm.

    python benchmarks/gallery.py                     # resumes where it stopped
    python benchmarks/gallery.py --models resnet50

Each network, at timm's own initialisation, is pruned to 99 % by FORCE in 60 steps and
by SNIP in one, on the training images of Fashion-MNIST, enlarged to the size that the
network gets: 64x64 in batches of 64, or 224x224 in batches of 16 where its weights
depend on it. ``docs/gallery.md`` draws what stays of each layer from the lines of JSON
in ``--out``, one a network. The whole takes three quarters of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from cost import machine
from open_gates import DEBIAN, FASHION, load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

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
    """What one method keeps of one network."""
    size, batch = (224, 16) if name in LARGE else (64, 64)
    order = torch.Generator().manual_seed(0)
    images = load(FASHION, folder, 60_000)[0]
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, generator=order)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        enlarged = interpolate(batch[0], (size, size), mode="bilinear")
        return cross_entropy(model(enlarged), batch[1])

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are in the report
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS)
    add("--data", type=Path, default=DEBIAN, help=f"default: {DEBIAN}")
    add("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(
            f"--data: expected the folder of Fashion-MNIST, {args.data} is none; "
            "apt-get install dataset-fashion-mnist"
        )
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(row["model"], row["method"]) for row in map(json.loads, lines)}
    for name in args.models:
        for method in STEPS:
            if (name, method) not in done:
                row = prune(name, method, args.data)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, {method}: {row['seconds']} s")


if __name__ == "__main__":
    main()
