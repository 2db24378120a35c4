"""Networks to make smaller, masks for them, and comparisons with the smaller ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from force_plugin import compact
from force_plugin.data.containers import tensors

Masks = dict[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shrink(model: nn.Module, inputs: Any) -> nn.Module:
    return compact(model, inputs, progress=False)


def vectors(width: int = 6, samples: int = 2) -> Tensor:
    return torch.randn(samples, width, generator=generator(1), dtype=torch.float64)


def images(size: int = 32, channels: int = 3, samples: int = 2) -> Tensor:
    shape = samples, channels, size, size
    return torch.randn(shape, generator=generator(1), dtype=torch.float64)


def prunable(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    }


def as_trained(model: nn.Module, seed: int = 0) -> None:
    """All values random: biases, running statistics, gates that were closed."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=g) * scale)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=g) * 0.1)
            elif "running_var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)


def random_masks(model: nn.Module, density: float, seed: int = 0) -> Masks:
    g = generator(seed)
    return {
        f"{name}.weight".lstrip("."): torch.rand(layer.weight.shape, generator=g)
        < density
        for name, layer in prunable(model).items()
    }


def row_masks(model: nn.Module, seed: int = 0) -> Masks:
    """Without half of the rows, and without a third of the columns."""
    g = generator(seed)
    masks = {}
    for name, layer in prunable(model).items():
        mask = torch.ones(layer.weight.shape, dtype=torch.bool)
        mask[torch.rand(mask.shape[0], generator=g) < 0.5] = False
        mask[:, torch.rand(mask.shape[1], generator=g) < 0.3] = False
        mask[0] |= not mask.any()
        masks[f"{name}.weight".lstrip(".")] = mask
    return masks


def without(layer: Any, *, rows: Any = (), columns: Any = ()) -> None:
    """Prune rows and columns of a layer with PyTorch's own means."""
    mask = torch.ones_like(layer.weight)
    mask[list(rows)] = 0
    mask[:, list(columns)] = 0
    prune.custom_from_mask(layer, "weight", mask)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        return list(tensors(model(**inputs)))
    return list(tensors(model(*inputs) if isinstance(inputs, tuple) else model(inputs)))


def others(inputs: Any, seed: int = 2) -> Any:
    """Inputs of the same kind with other values, and many more samples."""
    if isinstance(inputs, Tensor):
        shape = 16, *inputs.shape[1:]
        if inputs.is_floating_point():
            return torch.randn(shape, generator=generator(seed)).to(inputs.dtype)
        high = int(inputs.max()) + 1
        return torch.randint(high, shape, generator=generator(seed)).to(inputs.dtype)
    if isinstance(inputs, Mapping):
        return {key: others(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(others(value) for value in inputs)
    return inputs


def assert_same(model: nn.Module, small: nn.Module, inputs: Any) -> None:
    """Assert that two models in float64 have the same outputs in evaluation mode."""
    model.eval(), small.eval()
    inputs = others(inputs)
    expected, found = outputs(model, inputs), outputs(small, inputs)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape[:2]) for name, m in prunable(model).items()}


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def convolutions(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers).double()


class Wrapped(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        self.layers = nn.ModuleList(layers)
        self.double()

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.layers, *inputs)


def shrink_or_complain(model: nn.Module, inputs: Any) -> nn.Module | None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with unchanged(model):
                small = shrink(model, inputs)
        except RuntimeError:
            return None
    assert all(issubclass(one.category, UserWarning) for one in told)
    assert_same(model, small, inputs)
    return small


def fixed_shape() -> nn.Module:
    return Wrapped(
        lambda m, x: m[1](m[0](x).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8)),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )


def recurrent(kind: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Wrapped(
        lambda m, x: m[2](m[1](m[0](x))[0]),
        nn.Linear(6, 8, bias=False),
        kind(8, 8, batch_first=True),
        nn.Linear(8, 3),
    )


def sequences() -> Tensor:
    return torch.randn(2, 5, 6, generator=generator()).double()
