"""A network of two layers, and what scores leave of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


def weights_of(model: nn.Sequential) -> list[tuple[Any, str]]:
    return [(model[0], "weight"), (model[3], "weight")]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.arange(8) % 5


def noise(shape: Sequence[int], seed: int = 2) -> Tensor:
    """Positive scores, all different."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def removed_of(total: int, amount: float) -> int:
    """How many weights an amount removes, by exact arithmetic."""
    if isinstance(amount, int):
        return amount
    return total - math.floor((1 - Fraction(str(amount))) * total)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask without the smallest scores."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[:count]] = False
    return mask.view(scores.shape)
