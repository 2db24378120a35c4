"""Masks of ResNet-50 on ImageNet, with the settings of the FORCE paper.

    torchrun --nproc-per-node 8 examples/imagenet/find_masks.py --data /data/imagenet

Prunes by each method at each sparsity in 60 steps on the exponential schedule, with 40
batches of 128 images a step, which the processes share (de Jorge et al. 2021, arXiv
2006.09081). Methods that score once see 40 batches, too: their multi-batch
variants. ``--data`` holds ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``.

Each network gets a folder ``--out/METHOD-SPARSITY`` with what ``force-prune`` writes:
``pruned.safetensors`` to train from, the masks, a table and a plot of the layers. One
that is there already is left alone, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch.distributed as dist

from force_plugin.cli import main as force_prune

METHODS = ("force", "iter_snip", "snip", "grasp", "random")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of train/CLASS/*.JPEG")
    add("--out", type=Path, default=Path("runs/imagenet"))
    add("--model", default="resnet50", help="of timm")
    add("--methods", nargs="+", default=METHODS)
    add("--sparsities", nargs="+", default=["0.9", "0.95", "0.99"])
    add("--steps", type=int, default=60)
    add("--batches", type=int, default=40, help="a step, of all processes together")
    add("--batch-size", type=int, default=128)
    add("--image-size", type=int, default=224)
    add("--workers", type=int, default=8, help="of each process")
    add("--seed", type=int, default=0, help="of the initial weights")
    args, others = parser.parse_known_args()

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batches % processes:
        parser.error(
            f"--batches: expected a multiple of the {processes} processes, got "
            f"{args.batches}"
        )
    if processes > 1:
        dist.init_process_group()
    for sparsity in args.sparsities:
        for method in args.methods:
            out = args.out / f"{method}-{sparsity}"
            if (out / "pruned.safetensors").exists():
                continue
            options = {
                "data": args.data,
                "method": method,
                "sparsity": sparsity,
                "steps": args.steps,
                "batches": args.batches // processes,
                "batch-size": args.batch_size,
                "image-size": args.image_size,
                "workers": args.workers,
                "seed": args.seed,
                "out": out,
            }
            words = [f"--{name}={value}" for name, value in options.items()]
            force_prune([args.model, *words, *others])
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
