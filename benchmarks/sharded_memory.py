"""Measure the memory of scoring a sharded model, over the memory for a whole model.

    python benchmarks/sharded_memory.py

Each number of ranks has its own processes (gloo, on the CPU). The processes hold the
model whole, or sharded by ``fully_shard`` with a unit for each block, and prune it by
FORCE. The result is the largest peak of any rank, in bytes per weight: the peak of the
process, minus the peak of a process without a model. Freed memory returns to the system
at once, so a peak is memory in use.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from harness.machine import in_words
from harness.memory import freed_at_once, of_process
from harness.options import parser_of
from harness.timing import seconds
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from force_plugin import force_prune


def work(
    rank: int, size: int, form: str, args: argparse.Namespace, folder: str
) -> None:
    """Prune, and write the peak of this rank and the seconds per step to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(
        args.batch_size, 3, args.image, args.image, generator=generator
    )
    batches = [(inputs, torch.zeros(args.batch_size, dtype=torch.int64))]
    spent = 0.0
    if form != "nothing":
        torch.manual_seed(0)
        with torch.device("meta" if form == "sharded" else "cpu"):
            model = timm.create_model(args.model, img_size=args.image)
        if form == "sharded":
            # The whole model never exists in memory.
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                nn.init.normal_(parameter.to_local(), 0.02, 0.02)
        options = {"steps": args.steps, "on_collapse": "warn", "progress": False}
        call = partial(force_prune, model, batches, 0.9, **options)
        spent = seconds(call) / args.steps
    peak = of_process("VmHWM")
    Path(folder, str(rank)).write_text(f"{peak} {spent}", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, form: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return the largest peak of any rank in bytes, and the seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (size, form, args, folder), nprocs=size)
        rows = [Path(folder, str(r)).read_text("utf-8").split() for r in range(size)]
    peaks, times = zip(*rows, strict=True)
    return max(map(float, peaks)), max(map(float, times))


def tell(args: argparse.Namespace, weights: int) -> None:
    """Print a line for each number of ranks and form of the model."""
    for size in args.ranks:
        nothing, _ = measure(size, "nothing", args)
        base = 0.0
        for form in ("whole", "sharded"):
            peak, step = measure(size, form, args)
            used = (peak - nothing) / weights
            base = base or used
            print(f"{size:<8}{form:<8}{used:22.1f}{used / base:8.2f}{step:10.2f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT")
    parser.add_argument("--image", type=int, default=64, help="height and width")
    parser.add_argument("--batch-size", type=int, default=1, help="of each rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()

    with torch.device("meta"):
        model = timm.create_model(args.model, img_size=args.image)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model} at {args.image}x{args.image}, {weights:,} parameters, batch "
        f"{args.batch_size}, FORCE, {args.steps} steps\n"
        f"{in_words('cpu', '1 thread a rank', 'torch', 'timm')}\n"
    )
    print(f"ranks   model   {'peak, bytes a weight':>22}{'ratio':>8}{'s a step':>10}")
    with freed_at_once():
        tell(args, weights)


if __name__ == "__main__":
    main()
