"""Prune a network, take out the channels that are cut off, and train what is left.

    python examples/from_masks_to_speed.py

A timm ResNet-18 at 99 % by FORCE, on scikit-learn's handwritten digits. Masks alone
make no step faster; the compacted network computes the same with fewer channels. Dense,
masked and compacted are trained on the same batches by the same plain loop. About two
minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from force_plugin import compact, compact_report, force_prune
from force_plugin.zoo import Digits, digits


def train(model: nn.Module, images: Digits, epochs: int) -> float:
    """Train, and return the median of the seconds that a step took."""
    torch.manual_seed(0)
    batches = DataLoader(images, batch_size=128, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * len(batches)
    )
    seconds = []
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
    return median(seconds)


@torch.no_grad()
def accuracy(model: nn.Module, images: Digits) -> float:
    inputs, targets = next(iter(DataLoader(images, len(images))))
    return float((model.eval()(inputs).argmax(1) == targets).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training")
    args = parser.parse_args()
    train_set, test_set = digits(32)
    example = train_set[0][0][None]
    torch.manual_seed(0)
    dense = timm.create_model("resnet18", num_classes=10)

    masked = timm.create_model("resnet18", num_classes=10)
    masked.load_state_dict(dense.state_dict())
    batches = DataLoader(train_set, batch_size=128, shuffle=True)
    force_prune(masked, batches, 0.99, steps=20, batches=1)
    compacted = compact(masked, example)
    print(compact_report(masked, compacted, example))

    print(f"\n{'':12}{'ms a step':>10}{'test accuracy':>15}")
    models = {"dense": dense, "masked": masked, "compacted": compacted}
    for name, model in models.items():
        milliseconds = 1000 * train(model, train_set, args.epochs)
        print(f"{name:12}{milliseconds:>10.0f}{accuracy(model, test_set):>15.2%}")


if __name__ == "__main__":
    main()
