"""A plain training loop that does not know whether a model is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    """A loader of an epoch's batches, with a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


def batches_of(images: Dataset[Any], size: int, seed: int) -> DataLoader[Any]:
    """Return a loader of whole shuffled batches, in an order that the seed fixes."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(images, size, shuffle=True, drop_last=True, generator=order)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """Return the optimizer for all networks that are trained side by side."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)


def one_cycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    """Return a schedule: up to the optimizer's learning rate, then down to about 0."""
    highest = optimizer.param_groups[0]["lr"]
    return OneCycleLR(optimizer, max_lr=highest, total_steps=steps)


def step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    """Take a training step: forward, backward and the optimizer's step."""
    optimizer.zero_grad()
    torch.autograd.backward(cross_entropy(model(batch[0]), batch[1]))
    optimizer.step()


def train(
    model: nn.Module,
    batches: Loader,
    optimizer: Optimizer,
    epochs: int,
    device: str = "cpu",
    progress: bool = False,
    after_epoch: Callable[[], object] = lambda: None,
) -> None:
    """Train a model on one cycle of the learning rate.

    Args:
        model: The network.
        batches: Loader of an epoch's batches.
        optimizer: Optimizer of the model's parameters, at the highest learning rate.
        epochs: Number of epochs.
        device: Device of the model.
        progress: Whether to show a bar for each epoch, if the output is a terminal.
        after_epoch: Called after each epoch. It may leave the model in evaluation mode.
    """
    schedule = one_cycle(optimizer, epochs * len(batches))
    for epoch in range(1, epochs + 1):
        model.train()
        # disable=None: no bar if the output is no terminal.
        hidden = None if progress else True
        bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=hidden)
        for inputs, targets in bar:
            step(model, optimizer, (inputs.to(device), targets.to(device)))
            schedule.step()
        after_epoch()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any], device: str = "cpu") -> float:
    """Return the share of images that a network classifies correctly."""
    model.eval()
    right = total = 0
    for inputs, targets in batches:
        found = model(inputs.to(device)).argmax(1)
        right += int((found == targets.to(device)).sum())
        total += len(targets)
    return right / total
