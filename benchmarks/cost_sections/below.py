"""Measure options that make a step cheaper than bare, and their cost in exactness."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from harness.networks import forward, prune
from harness.tables import spread
from harness.training import Batch, accuracy, batches_of, train
from harness.turns import STEPS, take_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from cost_sections.rows import Row, row_of_few, step_case
from force_plugin import get_masks
from force_plugin.zoo import digits

# Keyword arguments of force_prune, and two others: ``batch_size`` (number of samples
# in a batch) and ``scale`` (a factor of the weights).
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounding": {"scale": 1 + 1e-7},
    "channels_last": {"channels_last": True},
    "autocast": {"autocast": torch.bfloat16},
    "channels_last+autocast": {"channels_last": True, "autocast": torch.bfloat16},
    "compile": {"compile": True},
    "microbatch": {"microbatch": 32},
    "batch_size_64": {"batch_size": 64},
    "batch_size_32": {"batch_size": 32},
}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    case = step_case(args)
    inputs, targets = case.batch
    quality = qualities(args)
    for option in args.options:
        settings = dict(OPTIONS[option])
        settings.pop("scale", None)  # a factor takes no time
        samples = settings.pop("batch_size", len(inputs))
        loaded = (inputs[:samples], targets[:samples])
        take = partial(take_turns, case.dense, case.batch, loaded=loaded)
        take(steps=3, **settings)  # warm-up
        turns = [take(steps=8, **settings) for _ in range(args.runs or 3)]
        setting = f"{case.setting}, force"
        yield row_of_few("below", setting, option, turns, quality=quality[option])


def qualities(args: argparse.Namespace) -> dict[str, Row]:
    """Return the effect of options on the masks of a small network on real images.

    Each option has three measures, with a value for each seed:

    - ``overlap``: intersection over union of its mask and the plain mask,
    - ``signal``: the objective of FORCE on images that were not scored, as a share of
      the objective with the plain mask,
    - ``accuracy``: test accuracy in % after a short training.
    """
    seeds, steps, epochs = (1, 3, 1) if args.quick else (3, STEPS, 8)
    train_set: Dataset[Batch]
    train_set, test_set = digits(32, channels=1)
    if args.quick:
        train_set = Subset(train_set, range(256))
    images, targets = next(iter(DataLoader(test_set, len(test_set))))
    held_out = (images.to(args.device), targets.to(args.device))
    found: dict[str, Row] = {
        option: {"overlap": [], "signal": [], "accuracy": []} for option in args.options
    }
    for seed in range(seeds):
        torch.manual_seed(seed)
        dense = timm.create_model(
            "resnet18", num_classes=10, in_chans=1, zero_init_last=False
        ).to(args.device)
        plain = get_masks(pruned(dense, train_set, seed, steps))
        reference = signal(dense, plain, held_out)
        for option, values in found.items():
            model = pruned(dense, train_set, seed, steps, **OPTIONS[option])
            masks = get_masks(model)
            values["overlap"].append(overlap(masks, plain))
            values["signal"].append(signal(dense, masks, held_out) / reference)
            batches = batches_of(train_set, 128, seed)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
            train(model, batches, optimizer, epochs, args.device)
            values["accuracy"].append(100 * accuracy(model, [held_out], args.device))
    return found


def pruned(
    dense: nn.Module,
    images: Dataset[Batch],
    seed: int,
    steps: int,
    batch_size: int = 128,
    scale: float = 1.0,
    **options: Any,
) -> nn.Module:
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    loader = batches_of(images, batch_size, seed)
    prune(model, loader, 0.99, steps=steps, **options)
    return model


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    both = sum(int((masks[name] & others[name]).sum()) for name in masks)
    either = sum(int((masks[name] | others[name]).sum()) for name in masks)
    return both / either


def signal(dense: nn.Module, masks: Mapping[str, Tensor], batch: Batch) -> float:
    """Return the sum of |θ ⊙ g(θ ⊙ c)| over the kept weights, in float32."""
    model = copy.deepcopy(dense)
    kept = [parameter for name, parameter in model.named_parameters() if name in masks]
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    gradients = torch.autograd.grad(forward(model, batch), kept)
    # Pruned weights are 0, and add nothing.
    return sum(float((w * g).abs().sum()) for w, g in zip(kept, gradients, strict=True))


def show(rows: Sequence[Row]) -> None:
    """Print the cost in exactness of each option."""
    times = {row["case"]: row["ratio"]["median"] for row in rows}
    print(
        "\nbelow: resnet18 on digits, 99 %, mean ± standard deviation over seeds; the "
        "plain\nmask is the measure of overlap (intersection over union) and signal "
        "kept, and\nrounding: what a rounding difference does to it\n\n"
        f"{'':22}{'time / plain':>13}{'overlap':>14}{'signal':>14}{'accuracy, %':>17}"
    )
    for row in rows:
        quality = row["quality"]
        over = f"{times[row['case']] / times['plain']:.3f}" if "plain" in times else "–"
        print(
            f"{row['case']:22}{over:>13}{spread(quality['overlap'], 3):>14}"
            f"{spread(quality['signal'], 3):>14}{spread(quality['accuracy'], 1):>17}"
        )
