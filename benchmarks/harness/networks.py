"""Make timm's networks and batches of noise, and take bare steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import force_prune
from harness.training import Batch


def make_model(name: str, size: int, device: str, **options: Any) -> nn.Module:
    """Return a network of ten classes for images of a given height and width."""
    torch.manual_seed(0)
    if "resnet" in name:
        options["zero_init_last"] = False  # the papers' networks have no closed gates
    if "vit" in name:
        options["img_size"] = size
    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model.to(device)


def make_batch(samples: int, size: int, device: str) -> Batch:
    """Return a batch of noise with random classes."""
    torch.manual_seed(0)
    inputs = torch.randn(samples, 3, size, size, device=device)
    return inputs, torch.randint(10, (samples,), device=device)


def prunable(model: nn.Module) -> int:
    """Return the number of prunable weights."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def prune(
    model: nn.Module, loader: Iterable[Any], sparsity: float = 0.9, **options: Any
) -> None:
    """Call ``force_prune`` on random data, where the masks do not matter."""
    options |= {"on_collapse": "warn", "progress": False}
    force_prune(model, loader, sparsity, **options)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a batch."""
    return cross_entropy(model(batch[0]), batch[1])


def bare(model: nn.Module, batch: Batch, number: int, per_step: int = 1) -> None:
    """Compute the gradients of a number of batches, and nothing else."""
    for done in range(1, number + 1):
        torch.autograd.backward(forward(model, batch))
        if done % per_step == 0:
            model.zero_grad()
