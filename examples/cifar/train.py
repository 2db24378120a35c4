"""CIFAR-10 and CIFAR-100 as in the FORCE paper: prune, train for 350 epochs, test.

    python examples/cifar/train.py --data ~/data --dataset cifar10 --model resnet50
    python examples/cifar/train.py --data ~/data --dataset cifar100 --model vgg19 \
        --method iter_snip --sparsity 0.995 --batches 10
    python examples/cifar/train.py --data ~/data --sparsity 0    # the dense network

The recipe is that of de Jorge et al. 2021 (arXiv 2006.09081) and of their code: masks
in 60 exponential steps (SynFlow: 100) of one batch, on CIFAR-100 of ten, or in one step
of one batch where a method takes one; then SGD with momentum 0.9 and
weight decay 5e-4 in batches of 128, a learning rate of 0.1 that is divided by 10 after
epochs 150 and 250, crops and flips. A tenth of the training images is held out; its
accuracy is in each line of the log, that of the test images at the end only.

torchvision downloads the data to ``--data``. After each epoch ``last.pt`` is written to
``--out``, and the same command goes on from there. At the end ``result.json`` has the
test accuracy; ``report.json`` and ``layers.png`` have what is left of each layer.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from force_plugin import force_prune, make_permanent, sparsity_report
from force_plugin.methods.registry import METHODS

DATASETS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
# Mean and standard deviation of the training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder for torchvision's data")
    add("--dataset", choices=DATASETS, default="cifar10")
    add("--model", choices=("resnet50", "vgg19"), default="resnet50")
    add("--method", choices=METHODS, default="force")
    add("--sparsity", type=float, default=0.99, help="fraction removed; 0: dense")
    add("--steps", type=int, help="default: the paper's")
    add("--batches", type=int, help="a step (default: the paper's)")
    add("--on-collapse", choices=("raise", "warn"), default="raise")
    add("--epochs", type=int, default=350)
    add("--batch-size", type=int, default=128)
    add("--workers", type=int, default=4)
    add("--seed", type=int, default=0, help="of initial weights, masks and order")
    add("--out", type=Path, help="default: runs/DATASET/MODEL-METHOD-SPARSITY-SEED...")
    args = parser.parse_args()
    method = f"{args.method}-{args.sparsity:g}" if args.sparsity else "dense"
    words = [args.model, method, args.seed]
    words += [f"{args.steps}steps"] if args.steps else []
    words += [f"{args.batches}batches"] if args.batches else []
    args.out = args.out or Path("runs", args.dataset, "-".join(map(str, words)))
    iterates = METHODS[args.method].steps is None
    args.steps = args.steps or (100 if args.method == "synflow" else 60)
    ten = args.dataset == "cifar100" and iterates
    args.batches = args.batches or (10 if ten else 1)
    return args


def make(model: str, classes: int) -> nn.Module:
    """The network for images of 32x32."""
    if model == "vgg19":
        features = timm.create_model("vgg19_bn").features
        features[-1] = nn.AvgPool2d(2)  # as the authors' ends
        head = nn.Linear(512, classes)
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)
        return nn.Sequential(features, nn.Flatten(), head)
    # Without closed gates, like the authors', and with their stem that keeps the size.
    network = timm.create_model("resnet50", num_classes=classes, zero_init_last=False)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def load(args: argparse.Namespace) -> tuple[Subset, Subset, datasets.CIFAR10]:
    """Images to train on, those held out, and those to test on."""
    plain = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*STATISTICS[args.dataset]),
    ]
    changed = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    kind, options = DATASETS[args.dataset], {"root": args.data, "download": True}
    train = kind(transform=v2.Compose(changed + plain), **options)
    held_out = kind(transform=v2.Compose(plain), **options)
    test = kind(transform=v2.Compose(plain), train=False, **options)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    tenth = len(train) // 10
    return (
        Subset(train, order[tenth:].tolist()),
        Subset(held_out, order[:tenth].tolist()),
        test,
    )


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: str) -> float:
    model.eval()
    right = [
        model(images.to(device)).argmax(1).cpu() == targets
        for images, targets in batches
    ]
    return float(torch.cat(right).double().mean())


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    train, held_out, test = load(args)
    batches = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, **options
    )
    model = make(args.model, classes=len(test.classes))
    model = model.to(device).to(memory_format=torch.channels_last)
    args.out.mkdir(parents=True, exist_ok=True)
    last = args.out / "last.pt"
    state = torch.load(last, map_location=device) if last.exists() else None
    free = {"data", "epochs", "workers", "out", "on_collapse"}  # when going on
    made_of = {name: value for name, value in vars(args).items() if name not in free}
    if state and state["made_of"] != made_of:
        raise SystemExit(
            f"{last} was made of {state['made_of']}, not of {made_of}: give the same "
            "options, or another --out"
        )

    if args.sparsity and not state:
        report = force_prune(
            model,
            batches,
            args.sparsity,
            method=args.method,
            steps=args.steps,
            batches=args.batches,
            on_collapse=args.on_collapse,
        )
        print(report)
        report.plot(args.out / "layers.png")
        (args.out / "report.json").write_text(json.dumps(report.to_dict(), indent=2))
        make_permanent(model)  # plain parameters, whose zeros stay 0

    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [150, 250], gamma=0.1)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    rows = []
    if state:
        rows = state["log"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"].cpu())  # other crops than in epoch 1
        if args.sparsity:
            make_permanent(model)  # what is 0 stays 0
    for epoch in range(len(rows), args.epochs):
        model.train()
        losses = torch.zeros((), device=device)
        for images, targets in tqdm(batches, f"epoch {epoch + 1}", disable=None):
            images = images.to(device, memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(images), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach()
        schedule.step()
        row = {
            "epoch": epoch + 1,
            "loss": float(losses) / len(batches),
            "held_out": accuracy(model, DataLoader(held_out, 500, **options), device),
            "sparsity": sparsity_report(model).sparsity,
        }
        print(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        rows.append(row)
        states = {name: part.state_dict() for name, part in parts.items()}
        states |= {"made_of": made_of, "log": rows, "random": torch.get_rng_state()}
        torch.save(states, last.with_suffix(".new"))
        last.with_suffix(".new").replace(last)  # a whole one, always
        with (args.out / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)
    tested = accuracy(model, DataLoader(test, 500, **options), device)
    result = {**made_of, **rows[-1], "test": tested}
    (args.out / "result.json").write_text(json.dumps(result, indent=2))
    print(f"test accuracy {tested:.2%} ({args.out})")


if __name__ == "__main__":
    main()
