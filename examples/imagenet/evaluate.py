"""Test what train.py has trained: top-1 and top-5, beside what is left of each layer.

    python examples/imagenet/evaluate.py --data /data/imagenet runs/imagenet/*/

Reads ``last.pt`` of each folder that has one, and tests the model and its average on
all images of ``val``, once each. Prints a line a folder as it goes; at the end all of
them and the density of each layer, and writes these to ``--out`` as CSV.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy
from torch import nn
from tqdm import tqdm

from force_plugin import sparsity_report


@torch.no_grad()
def top1_and_top5(model: nn.Module, args: argparse.Namespace) -> tuple[float, float]:
    """In %."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = resolve_data_config({"img_size": args.image_size}, model=model)
    dataset = create_dataset("", args.data, split="val")
    batches = create_loader(
        dataset,
        (3, args.image_size, args.image_size),
        args.batch_size,
        interpolation="bilinear",
        mean=config["mean"],
        std=config["std"],
        crop_pct=0.875,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        use_prefetcher=False,
    )
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    sums = [0.0, 0.0]
    for images, targets in tqdm(batches, "test", leave=False, disable=None):
        images = images.to(device, memory_format=torch.channels_last)
        found = accuracy(model(images), targets.to(device), topk=(1, 5))
        sums = [s + float(a) * len(targets) for s, a in zip(sums, found, strict=True)]
    return sums[0] / len(dataset), sums[1] / len(dataset)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders that train.py has written to")
    add("--data", required=True, type=Path, help="folder of val/CLASS/*.JPEG")
    add("--out", type=Path, default=Path("imagenet.csv"))
    add("--model", default="resnet50", help="of timm")
    add("--batch-size", type=int, default=256)
    add("--image-size", type=int, default=224)
    add("--workers", type=int, default=8)
    args = parser.parse_args()

    trained = [folder for folder in args.runs if (folder / "last.pt").exists()]
    if not trained:
        parser.error("runs: expected folders with a last.pt of train.py's, got none")
    for folder in sorted(set(args.runs) - set(trained)):
        print(f"{folder}: not trained yet, left out", file=sys.stderr)

    rows = []
    layers: dict[str, list[object]] = {}
    for folder in trained:
        state = torch.load(folder / "last.pt", map_location="cpu")
        row: dict[str, object] = {"run": folder.name, "epochs": len(state["log"])}
        for name in ("model", "average"):
            values = state[name]
            head = values[next(key for key in reversed(values) if "weight" in key)]
            model = timm.create_model(args.model, num_classes=len(head))
            model.load_state_dict(values)
            report = sparsity_report(model)
            one, five = top1_and_top5(model, args)
            row |= {f"top1 {name}": f"{one:.2f}", f"top5 {name}": f"{five:.2f}"}
        row["sparsity"] = f"{report.sparsity:.2%}"
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        for layer in report.layers:
            density = f"{100 * (1 - layer.sparsity):.2f}"
            layers.setdefault(layer.name, [layer.total]).append(density)

    names = [folder.name for folder in trained]
    table: list[list[object]] = [[*rows[0]], *([*row.values()] for row in rows)]
    profile: list[list[object]] = [["layer", "weights", *names]]
    profile += [[name, *values] for name, values in layers.items()]
    for title, lines in (("Accuracy, %", table), ("Weights kept, %", profile)):
        texts = [[str(cell) for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        print(f"\n{title}")
        for line in texts:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    with args.out.open("w", newline="") as file:
        csv.writer(file).writerows([*table, [], *profile])
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
