"""A network with zeros that stay in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from force_plugin import apply_masks, make_permanent

Masks = dict[str, Tensor]


def network() -> nn.Sequential:
    """Every weight that is kept has a gradient: no unit is dead or cut off."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 9),
    )


def images() -> Tensor:
    return torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def prune_some(model: nn.Module, *names: str) -> Masks:
    """Prune half of the named parameters, or of every one with two dimensions."""
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(parameter.shape, generator=generator) < 0.5
        for name, parameter in model.named_parameters()
        if (name in names if names else parameter.ndim > 1)
    }
    apply_masks(model, masks)
    return masks


def permanent_network() -> tuple[nn.Sequential, Masks]:
    model = network()
    masks = prune_some(model)
    make_permanent(model)
    return model, masks


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    x, second_order = images(), getattr(optimizer, "is_second_order", False)
    x = x.to(next(model.parameters()))

    @torch.enable_grad()  # timm's AdaHessian does so from 1.0.31 on only
    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward(create_graph=second_order)
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def values(model: nn.Module, names: Masks) -> Masks:
    """Of the named parameters, pruned or not."""
    return {
        name.removesuffix("_orig"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.removesuffix("_orig") in names
    }


def holds(model: nn.Module, masks: Masks) -> bool:
    """Whether what the masks prune is 0, and not -0."""
    return all(
        not value[~masks[name]].any() and not value[~masks[name]].signbit().any()
        for name, value in values(model, masks).items()
    )


def assert_holds_in_training(model: nn.Module, masks: Masks) -> None:
    optimizer, before = sgd(model), values(model, masks)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert holds(model, masks)
    for name, value in values(model, masks).items():
        assert (value != before[name])[masks[name]].all(), name


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32) for _ in range(2)))
    model[2].weight = model[1].weight
    return model


def _again_by_pytorch(model: Any) -> None:
    for index in (0, 4, 6):
        prune.random_unstructured(model[index], "weight", 0.3)
