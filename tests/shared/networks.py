"""The networks of the reference masks, and other small ones that tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """conv – BN – ReLU – conv – BN, plus the input, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions around a skip connection."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def tiny_resnet() -> nn.Sequential:
    """The network of most files of ``golden/``: 16×16 RGB, 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        ResidualBlock(24),
        nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        ResidualBlock(48),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def chain_a() -> nn.Sequential:
    """The network of ``golden/snap_it_chain_a.npz``: 16×16 RGB, 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.LeakyReLU(0.05),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24),
        nn.LeakyReLU(0.05),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.05),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 40),
        nn.BatchNorm1d(40),
        nn.LeakyReLU(0.05),
        nn.Linear(40, 10),
    )


def batches(
    count: int, samples: int, shape: Sequence[int], classes: int, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Random inputs in float64, and random classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(samples, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (samples,), generator=generator),
        )
        for _ in range(count)
    ]


def vectors(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of eight vectors of five, four classes, in float64."""
    return batches(count, 8, (5,), 4)


def images(count: int = 2, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """A batch of random images in colour, of as many classes up to ten."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return [(inputs, torch.arange(count) % 10)]


def waves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch of five vectors of six, four classes, without a random number."""
    return torch.linspace(-1, 1, 30).view(5, 6).sin().to(dtype), torch.arange(5) % 4


def perceptron(*between: nn.Module) -> nn.Sequential:
    """For ``waves``: two linear layers, and a ReLU or others between them."""
    torch.manual_seed(0)
    middle = between or (nn.ReLU(),)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 4))


def conv_network(seed: int = 0) -> nn.Sequential:
    """Of 0.weight (4, 2, 3, 3), 3.weight (5, 36) and 5.weight (3, 5)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def tied_layers(seed: int = 0) -> nn.Sequential:
    """Two linear layers with one weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


class Mixed(nn.Module):
    """Convolutions that share the channels, as in MixNet."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.convs = nn.ModuleList(nn.Conv2d(size, 3, 1) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.convs, x.split(self.sizes, 1), strict=True)
        return torch.cat([conv(part) for conv, part in parts], 1)
