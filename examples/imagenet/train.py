r"""Train a pruned network on ImageNet: 90 epochs, DDP, mixed precision, an average.

    torchrun --nproc-per-node 8 examples/imagenet/train.py --data /data/imagenet \
        --pruned runs/imagenet/force-0.99/pruned.safetensors

The recipe is that of PyTorch's ImageNet example: SGD with momentum 0.9 and weight decay
1e-4 in batches of 256 of all processes together, a learning rate of 0.1 that is divided
by 10 every 30 epochs, random crops and flips. Two lines of it are ours, and without
``--pruned`` the dense network is trained. The average (EMA) is tested beside the model.

After each epoch ``last.pt`` is written beside ``--pruned``, and the same command goes
on from there; ``log.csv`` has a line an epoch.
"""

from __future__ import annotations

import argparse
import csv
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
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or (args.pruned.parent if args.pruned else Path("runs/dense"))
    return args


def loaders(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Any:
    """Batches to train on and to test, of which each process has its part."""
    config = resolve_data_config({"img_size": args.image_size}, model=model)
    for split in ("train", "val"):
        training = split == "train"
        yield create_loader(
            create_dataset("", args.data, split=split),
            (3, args.image_size, args.image_size),
            args.batch_size // dist.get_world_size(),
            is_training=training,
            color_jitter=0.0,
            interpolation="random" if training else config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=0.875,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            distributed=True,
            device=device,
            use_prefetcher=device.type == "cuda",
        )


def on_device(batches: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        images = images.to(device, memory_format=torch.channels_last)
        yield images, targets.to(device)


@torch.no_grad()
def top1(model: nn.Module, batches: Any, device: torch.device) -> float:
    """Of all processes."""
    model.eval()
    counts = torch.zeros(2, device=device)
    for images, targets in on_device(batches, device):
        right = model(images).argmax(1) == targets
        counts += torch.tensor([right.sum(), len(targets)], device=device)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def main() -> None:
    args = arguments()
    dist.init_process_group()
    rank, cuda = dist.get_rank(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else "cpu"
    device = torch.device(device)
    if cuda:
        torch.cuda.set_device(device)
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
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": others}],
        lr=args.lr * args.batch_size / 256,
        momentum=0.9,
        nesterov=True,
    )
    third = max(1, args.epochs // 3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, third, gamma=0.1)
    parts = {
        "model": model,
        "average": average.module,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    last, first_epoch = args.out / "last.pt", 0
    if last.exists():
        state = torch.load(last, map_location=device)
        first_epoch = state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    train, test = loaders(args, model, device)

    for epoch in range(first_epoch, args.epochs):
        train.sampler.set_epoch(epoch)
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
        schedule.step()
        for one in (model, average.module):
            distribute_bn(one, dist.get_world_size(), reduce=True)
        row = {
            "epoch": epoch + 1,
            "loss": float(loss.detach()),
            "top1": top1(model, test, device),
            "top1_average": top1(average.module, test, device),
            "sparsity": sparsity_report(model).sparsity,
        }
        if rank == 0:
            print(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
            args.out.mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"epoch": epoch + 1, **states}, last.with_suffix(".new"))
            last.with_suffix(".new").replace(last)  # a whole one, always
            with (args.out / "log.csv").open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if epoch == 0:
                    writer.writeheader()
                writer.writerow(row)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
