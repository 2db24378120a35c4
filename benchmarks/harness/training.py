"""A plain training loop: nothing in here knows that a model is pruned."""

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
    """Batches of an epoch, and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


def batches_of(images: Dataset[Any], size: int, seed: int) -> DataLoader[Any]:
    """Whole shuffled batches, in an order that the seed fixes."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(images, size, shuffle=True, drop_last=True, generator=order)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """The optimizer of all that is trained side by side."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)


def one_cycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    """The learning rate goes up to that of the optimizer, and down to none."""
    highest = optimizer.param_groups[0]["lr"]
    return OneCycleLR(optimizer, max_lr=highest, total_steps=steps)


def step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    """Forward, backward and the optimizer's step."""
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
    """Train on one cycle of the learning rate.

    Args:
        model: The network.
        batches: Of an epoch.
        optimizer: Of its parameters, at the highest learning rate.
        epochs: How many.
        device: Where the model is.
        progress: Whether an epoch has a bar, where somebody looks.
        after_epoch: Called at the end of each, and may leave the model in evaluation
            mode.
    """
    schedule = one_cycle(optimizer, epochs * len(batches))
    for epoch in range(1, epochs + 1):
        model.train()
        # disable=None: no bar where nobody looks.
        hidden = None if progress else True
        bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=hidden)
        for inputs, targets in bar:
            step(model, optimizer, (inputs.to(device), targets.to(device)))
            schedule.step()
        after_epoch()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any], device: str = "cpu") -> float:
    """The share of images that a network gets right."""
    model.eval()
    right = total = 0
    for inputs, targets in batches:
        found = model(inputs.to(device)).argmax(1)
        right += int((found == targets.to(device)).sum())
        total += len(targets)
    return right / total
