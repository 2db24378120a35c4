"""Masks of ResNet-50 on ImageNet, with the settings of the FORCE paper.

    torchrun --nproc-per-node 8 examples/imagenet/find_masks.py --data /data/imagenet

Prunes by each method at each sparsity in 60 steps on the exponential schedule, with 40
batches of 128 images a step, which the processes share (de Jorge et al. 2021, arXiv
2006.09081). Methods that score once see 40 batches, too: their multi-batch
variants. ``--data`` holds ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``. Images are
augmented as timm does by default.

Each network gets a folder ``--out/METHOD-SPARSITY`` with what ``force-prune`` writes:
``pruned.safetensors`` to train from, the masks, a table and a plot of the layers. One
that is there already is left alone, so the same command goes on where it was stopped.
One that cannot be pruned is said so, and the others follow. Other options are those of
``force-prune``: ``--microbatch 32`` where a batch does not fit into memory (GraSP
takes several times what the others do), ``--on-collapse warn`` to write masks that
disconnect the network, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from force_plugin.cli import main as force_prune

METHODS = ("force", "iter_snip", "snip", "grasp", "random")


def is_there(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the folder has these masks; an error where it has others."""
    report = folder / "report.json"  # the last file that is written
    if not report.exists():
        return False
    found = json.loads(report.read_text())["options"]
    found["batches"] *= found["processes"]
    for name, value in options.items():
        made_with = found[name.replace("-", "_")]
        if str(made_with) != str(value):
            raise SystemExit(
                f"{folder} was made with --{name} {made_with}, not {value}: take the "
                "same, or another --out"
            )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of train/CLASS/*.JPEG")
    add("--out", type=Path, default=Path("runs/imagenet"))
    add("--model", default="resnet50", help="of timm")
    add("--methods", nargs="+", default=METHODS)
    add("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.99])
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
    first = int(os.environ.get("RANK", 0)) == 0
    failed = []
    for sparsity in args.sparsities:
        for method in args.methods:
            out = args.out / f"{method}-{sparsity:g}"
            options = {
                "method": method,
                "sparsity": sparsity,
                "steps": args.steps,
                "batches": args.batches // processes,
                "batch-size": args.batch_size,
                "image-size": args.image_size,
                "seed": args.seed,
            }
            of_all = {"model": args.model, "batches": args.batches}
            if is_there(out, options | of_all):
                if first:
                    print(f"{out} is there already", file=sys.stderr)
                continue
            options |= {"data": args.data, "workers": args.workers, "out": out}
            words = [f"--{name}={value}" for name, value in options.items()]
            try:
                if force_prune([args.model, *words, *others]):
                    raise SystemExit(130)  # Ctrl-C
            except SystemExit as error:
                if error.code != 1:
                    raise  # wrong arguments are wrong for all of them
                failed.append(out.name)
    if processes > 1:
        dist.destroy_process_group()
    if failed:
        said = f"not pruned, for the reasons above: {', '.join(failed)}"
        raise SystemExit(said if first else 1)


if __name__ == "__main__":
    main()
