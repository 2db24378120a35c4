r"""Train a pruned network on ImageNet: 90 epochs, DDP, mixed precision, an average.

    torchrun --nproc-per-node 8 examples/imagenet/train.py --data /data/imagenet \
        --pruned runs/imagenet/force-0.99/pruned.safetensors

The recipe is that of PyTorch's ImageNet example: SGD with momentum 0.9 and weight decay
1e-4 in batches of 256 of all processes together, a learning rate of 0.1 that is divided
by 10 every 30 epochs, random crops and flips. Other than there, and as in timm, biases
and normalisations are not decayed, and timm's ResNet starts with closed gates. Passes
are in bfloat16, and an average of the weights (EMA) is tested beside the model. Two
lines are ours; without ``--pruned`` the dense network is trained.

After each epoch ``last.pt`` is written beside ``--pruned``, and the same command goes
on from there; ``log.csv`` has a line an epoch. The learning rate is always that of the
command: more epochs, or other batches, may be asked for when going on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from force_plugin import make_permanent, sparsity_report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of train/CLASS/*.JPEG")
    add("--pruned", type=Path, help="its weights (default: the dense network)")
    add("--out", type=Path, help="default: the folder of --pruned, or runs/dense")
    add("--model", default="resnet50", help="of timm")
    add("--epochs", type=int, default=90)
    add("--batch-size", type=int, default=256, help="of all processes together")
    add("--lr", type=float, default=0.1, help="for batches of 256")
    add("--image-size", type=int, default=224)
    add("--workers", type=int, default=8, help="of each process")
    add("--ema", type=float, default=0.9999, help="decay of the average")
    add("--seed", type=int, default=0, help="of weights that are not given, and order")
    args = parser.parse_args()
    args.out = args.out or (args.pruned.parent if args.pruned else Path("runs/dense"))
    return args


def loaders(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Any:
    """Batches to train on and to test, of which each process has its part."""
    config = resolve_data_config({"img_size": args.image_size}, model=model)
    cuda = device.type == "cuda"
    for split in ("train", "val"):
        training = split == "train"
        batches = create_loader(
            create_dataset("", args.data, split=split),
            (3, args.image_size, args.image_size),
            args.batch_size // dist.get_world_size(),
            is_training=training,
            color_jitter=0.0,
            interpolation="bilinear",
            mean=config["mean"],
            std=config["std"],
            crop_pct=0.875,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=cuda,
            distributed=True,
            device=device,
            use_prefetcher=cuda,
        )
        batches.sampler.seed = args.seed
        yield batches


def on_device(batches: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        images = images.to(device, memory_format=torch.channels_last)
        yield images, targets.to(device)


@torch.no_grad()
def top1(model: nn.Module, batches: Any, device: torch.device) -> float:
    """Of all processes."""
    model.eval()
    counts = torch.zeros(2, device=device)
    # The sampler repeats images at the end, to give all processes as many.
    mine = len(range(dist.get_rank(), len(batches.dataset), dist.get_world_size()))
    for images, targets in on_device(batches, device):
        with torch.autocast(device.type, torch.bfloat16):
            right = (model(images).argmax(1) == targets)[:mine]
        mine -= len(right)
        counts += torch.tensor([right.sum(), len(right)], device=device)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def resume(
    last: Path, made_of: dict[str, Any], parts: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """Load what was saved, and return the rows of its log, one an epoch."""
    state = torch.load(last, map_location=device) if last.exists() else None
    rows = state["log"] if state else []
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(rows))
    if len(set(counts)) > 1:
        raise SystemExit(
            f"--out: expected a folder that all processes share, but in {last} they "
            f"find {counts} epochs"
        )
    if state:
        for name, value in made_of.items():
            if state["made_of"][name] != value:
                raise SystemExit(
                    f"--{name}: {last} was made with {state['made_of'][name]}, not "
                    f"{value}: give the same, or another --out"
                )
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return rows


def main() -> None:
    args = arguments()
    dist.init_process_group()
    rank, cuda = dist.get_rank(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else "cpu"
    device = torch.device(device)
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    random_seed(args.seed, rank)
    classes = sum(path.is_dir() for path in (args.data / "train").iterdir())
    model = timm.create_model(args.model, num_classes=classes)
    model = model.to(device, memory_format=torch.channels_last)
    if args.pruned:
        model.load_state_dict(load_file(args.pruned, device=str(device)))
        make_permanent(model)  # what is 0 stays 0
    average = ModelEmaV3(model, decay=args.ema, use_warmup=True)
    whole = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 1e-4},
        {"params": others},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=args.lr * args.batch_size / 256,
        momentum=0.9,
    )
    parts = {"model": model, "average": average.module, "optimizer": optimizer}
    pruned = args.pruned and hashlib.sha256(args.pruned.read_bytes()).hexdigest()
    made_of = {"model": args.model, "pruned": pruned, "seed": args.seed}
    last = args.out / "last.pt"
    rows = resume(last, made_of, parts, device)
    train, test = loaders(args, model, device)

    for epoch in range(len(rows), args.epochs):
        for group in optimizer.param_groups:
            tenths = epoch // max(1, args.epochs // 3)
            group["lr"] = args.lr * args.batch_size / 256 * 0.1**tenths
        train.sampler.set_epoch(epoch)
        losses = torch.zeros((), device=device)
        whole.train()
        bar = tqdm(
            on_device(train, device),
            f"epoch {epoch + 1}",
            len(train),
            disable=True if rank else None,
        )
        for step, (images, targets) in enumerate(bar, start=epoch * len(train)):
            with torch.autocast(device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(whole(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=step)
            losses += loss.detach()
        dist.all_reduce(losses)
        for one in (model, average.module):
            distribute_bn(one, dist.get_world_size(), reduce=True)
        row = {
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": float(losses) / len(train) / dist.get_world_size(),
            "top1": top1(model, test, device),
            "top1_average": top1(average.module, test, device),
            "sparsity": sparsity_report(model).sparsity,
        }
        rows.append(row)
        if rank == 0:
            print(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
            args.out.mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in parts.items()}
            saved = {"made_of": made_of, "log": rows, **states}
            torch.save(saved, last.with_suffix(".new"))
            last.with_suffix(".new").replace(last)  # a whole one, always
            with (args.out / "log.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows(rows)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
