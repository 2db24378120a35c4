"""Networks with their batches, and the methods once more, as plainly as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from networks import batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import force_prune, get_masks

Batch = tuple[Tensor, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = 6 * 2 * 9 + 4 * 6 * 9 + 3 * 16
"""Number of weights of the small convolutional network."""


# Networks and data.


def convnet() -> nn.Sequential:
    """Two convolutions, a batch norm and a classifier, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def images(count: int = 3) -> list[Batch]:
    return batches(count, 8, (2, 4, 4), 3)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them, in float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def vectors(width: int, classes: int, count: int = 2) -> list[Batch]:
    return batches(count, 10, (width,), classes, seed=2)


def pruned(model: nn.Module, loader: Any, sparsity: float, **options: Any) -> Tensor:
    """All masks of a pruning as published, without a guard, in one row."""
    # Masks of small networks cut them through easily; what is said of it has tests.
    force_prune(
        model,
        loader,
        sparsity,
        **{"progress": False, "on_collapse": "warn", "guard": False, **options},
    )
    return row(get_masks(model))


def row(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether scores are the same up to rounding."""
    return list(ours) == list(theirs) and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-15)
        for name in theirs
    )


# The methods once more, as plainly as possible.


def prunable(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def naive_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    twin = deepcopy(model)
    for inputs, targets in batches:
        (cross_entropy(twin(inputs), targets) / len(batches)).backward()
    return {name: weight.grad for name, weight in prunable(twin).items()}


class Step(NamedTuple):
    """What one step of the naive loop has kept, and how many scores were not 0."""

    masks: dict[str, Tensor]
    alive: int


def naive_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    kept_after: Iterable[int],
    score: Score,
    *,
    regrow: bool = False,
    per_step: int = 1,
) -> list[Step]:
    """Algorithm 1 by a loop over copies of the model."""
    dense = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in dense.items()}
    history = []
    for kept in kept_after:
        twin = deepcopy(model)
        for name, weight in prunable(twin).items():
            weight.data *= masks[name]
        gradients = naive_gradients(twin, [next(batches) for _ in range(per_step)])
        scores = row({name: score(dense[name], gradients[name]) for name in dense})
        if not regrow:
            scores[~row(masks)] = -1
        flat = torch.zeros(len(scores), dtype=torch.bool)
        flat[scores.argsort(descending=True, stable=True)[:kept]] = True
        parts = flat.split([weight.numel() for weight in dense.values()])
        masks = {
            name: part.view(dense[name].shape)
            for name, part in zip(dense, parts, strict=True)
        }
        history.append(Step(masks, int((scores > 0).sum())))
    return history


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs()


def square(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient**2


def in_equal_steps(total: int, density: float, steps: int) -> list[int]:
    return [
        math.floor(total * (1 - t / steps * (1 - density)) + 1e-9)
        for t in range(1, steps + 1)
    ]


def hessian_gradient(
    model: nn.Module, batches: Sequence[Batch], temperature: float = 200
) -> dict[str, Tensor]:
    """θ ⊙ Hg of the summed losses, by torch.autograd.functional.hvp."""
    twin = deepcopy(model)
    weights = {name: weight.detach() for name, weight in prunable(twin).items()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([weight.numel() for weight in weights.values()])
        values = {
            name: part.view(weights[name].shape)
            for name, part in zip(weights, parts, strict=True)
        }
        total = flat.new_zeros(())
        for inputs, targets in batches:
            outputs = torch.func.functional_call(twin, values, (inputs,))
            total = total + cross_entropy(outputs / temperature, targets)
        return total

    theta = row(weights)
    g = torch.autograd.functional.vjp(loss, theta)[1]
    hg = torch.autograd.functional.hvp(loss, theta, g)[1]
    parts = (theta * hg).split([weight.numel() for weight in weights.values()])
    return {
        name: part.view(weights[name].shape)
        for name, part in zip(weights, parts, strict=True)
    }
