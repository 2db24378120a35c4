"""Replace classes in PyTorch's ``test/nn/test_pruning.py`` with our classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import Magnitude, Random
from force_plugin.model.reparametrisation import Container, Reparametrisation


class FromMask(Reparametrisation):
    """Pruning by a given mask, whose values True and False are the scores."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the weights that both masks keep, as PyTorch's class does."""
        removed = int((default_mask.bool() & ~self.mask).sum())
        return Magnitude(removed).compute_mask(self.mask, default_mask)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, mask: Tensor
    ) -> Any:
        """Apply the mask to a tensor of a module."""
        kept = getattr(module, f"{name}_mask", torch.ones_like(mask)).bool()
        removed = int((kept & ~mask.bool()).sum())
        return Magnitude.apply(module, name, removed, importance_scores=mask.bool())


class Identity:
    """Pruning by a mask of ones, which removes nothing."""

    @staticmethod
    def apply(module: nn.Module, name: str) -> Any:
        """Apply the mask of ones to a tensor of a module."""
        return Magnitude.apply(module, name, amount=0)


def check_size(amount: float | int, tensor_size: int) -> None:
    weights = torch.rand(tensor_size)
    Magnitude(amount).compute_mask(weights, torch.ones(tensor_size))


def number_to_prune(amount: float | int, tensor_size: int) -> int:
    weights = torch.rand(tensor_size)
    mask = Magnitude(amount).compute_mask(weights, torch.ones(tensor_size))
    return int((~mask).sum())


def pytest_configure() -> None:
    """Replace classes and functions that PyTorch's ``l1_unstructured`` etc. call."""
    theirs: Any = prune
    theirs.L1Unstructured = Magnitude
    theirs.RandomUnstructured = Random
    theirs.CustomFromMask = FromMask
    theirs.Identity = Identity
    theirs.PruningContainer = Container
    theirs._validate_pruning_amount_init = Magnitude
    theirs._validate_pruning_amount = check_size
    theirs._compute_nparams_toprune = number_to_prune
