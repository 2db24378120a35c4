"""The networks and the data of the study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from harness.fashion_mnist import read_part
from torch import Tensor, nn

from force_plugin.zoo import digits


def make(network: str, seed: int) -> nn.Module:
    """Return a network for grey 28x28 images of 10 classes, without closed gates."""
    torch.manual_seed(seed)
    if network == "resnet18":
        return resnet(layers=(2, 2, 2, 2), channels=(64, 128, 256, 512))
    if network == "resnet_small":
        stem = {"stem_type": "deep_tiered", "stem_width": 8}  # as in timm's resnet10t
        return resnet(layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), **stem)
    if network in ("mobilenetv3_small_100", "convnext_atto"):
        model = timm.create_model(network, num_classes=10, in_chans=1)
        return nn.Sequential(
            nn.ZeroPad2d(2), model
        )  # 32x32, which it halves five times
    if network == "vgg16":
        return vgg(64, 64, 0, 128, 128, 0, *(256,) * 3, 0, *(512,) * 3, 0, *(512,) * 3)
    return vgg(8, 0, 24, 0, 64, 64, 0, 128, 128, 0, 256, 256)


def resnet(**widths: Any) -> nn.Module:
    model: nn.Module = timm.create_model(
        "resnet18", num_classes=10, in_chans=1, zero_init_last=False, **widths
    )
    return model


def vgg(*widths: int) -> nn.Module:
    """Return convolutions with batch normalisation, then a linear layer.

    A width of 0 stands for a pooling.
    """
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        if width == 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    head = nn.Linear(channels, 10)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def layers_of(network: str) -> dict[str, int]:
    """Return the number of weights of each pruned layer, by name."""
    modules = make(network, seed=0).named_modules()
    kinds = (nn.Conv2d, nn.Linear)
    return {f"{n}.weight": m.weight.numel() for n, m in modules if isinstance(m, kinds)}


def channels_of(network: str) -> int:
    """Return the number of output channels of all pruned layers."""
    modules = make(network, seed=0).modules()
    kinds = (nn.Conv2d, nn.Linear)
    return sum(m.weight.shape[0] for m in modules if isinstance(m, kinds))


class Batches:
    """Shuffled whole batches of tensors, in a new order for each iteration."""

    def __init__(self, images: Tensor, targets: Tensor, size: int, seed: int) -> None:
        self.data, self.size = (images, targets), size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data[1]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data[1]), generator=self.generator)
        for number in range(len(self)):
            places = order[number * self.size : (number + 1) * self.size]
            images, targets = (part[places] for part in self.data)
            yield images.contiguous(memory_format=torch.channels_last), targets


def load(data: str, folder: Path, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return normalised grey 28x28 images and their classes, for training and test."""
    parts = {}
    if data == "digits":
        for name, part in zip(("train", "test"), digits(28, channels=1), strict=True):
            images = torch.stack([part[i][0] for i in range(len(part))])
            parts[name] = images.to(device), part.targets.to(device)
        return parts
    for name, file in (("train", "train"), ("test", "t10k")):
        images, targets = read_part(folder, file)
        parts[name] = images.to(device), targets.to(device)
    return parts
