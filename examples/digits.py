"""Prune a timm ResNet-18 at initialisation, look at its layers, train it.

    python examples/digits.py

Prunes 99 % of the weights with FORCE, with SNIP and at random, on scikit-learn's
handwritten digits (real data, no download), prints the table of the FORCE network,
draws all three, and trains each beside the dense network with a plain PyTorch loop: the
same seed, data order and number of epochs for all. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from force_plugin import SparsityReport, force_prune
from force_plugin.zoo import Digits, digits


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet18", num_classes=10, zero_init_last=False)


def loader(images: Digits, seed: int) -> DataLoader:
    order = torch.Generator().manual_seed(seed)
    return DataLoader(
        images, batch_size=128, shuffle=True, drop_last=True, generator=order
    )


def train(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Nothing in here knows that the model is pruned."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=epochs * len(batches)
    )
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Digits) -> float:
    model.eval()
    right = sum(
        int((model(inputs).argmax(1) == targets).sum())
        for inputs, targets in DataLoader(images, batch_size=256)
    )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.99, help="fraction removed")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", type=Path, default=Path("sparsity.png"), help="file for the plot"
    )
    args = parser.parse_args()
    start = time.perf_counter()

    train_set, test_set = digits(32)
    models = {"dense": make_model(args.seed)}
    reports: dict[str, SparsityReport] = {}
    for method in ("force", "snip", "random"):
        model = models[method] = make_model(args.seed)
        reports[method] = force_prune(
            model, loader(train_set, args.seed), args.sparsity, method=method
        )

    print(reports["force"])
    reports["force"].plot(
        args.plot, compare={name: reports[name] for name in ("snip", "random")}
    )
    print(f"\nplot: {args.plot}\n")

    print(f"{'test accuracy':<16}{'sparsity':>10}{'accuracy':>10}")
    for name, model in models.items():
        torch.manual_seed(args.seed)
        train(model, loader(train_set, args.seed), args.epochs)
        sparsity = f"{reports[name].sparsity:.2%}" if name in reports else "0%"
        print(f"{name:<16}{sparsity:>10}{accuracy(model, test_set):>10.2%}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
