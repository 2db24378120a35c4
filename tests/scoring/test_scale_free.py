"""A normalisation behind a layer is found by what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from force_plugin import FORCE, saliency

Batch = tuple[Tensor, Tensor]


def scale_free(model: nn.Module, batch: Batch, **options: Any) -> set[str]:
    """What a method is told."""
    found: list[set[str]] = []

    class Asks(FORCE):
        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            gradients: dict[str, Tensor] = probe.gradients()
            found.append(probe.scale_free(gradients))
            return gradients

    saliency(model, [batch], Asks, **options)
    return found[-1]


def unmoved(model: nn.Module, batch: Batch, weights: list[str]) -> set[str]:
    """The weights whose channels can be scaled, and the outputs stay what they were.

    They move by less than a tenth of what they move by if each weight is scaled by
    itself.
    """

    def outputs() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(batch[0])
            return found

    before, found = outputs(), set()
    parameters = dict(model.named_parameters())
    for name in weights:
        values = parameters[name].data
        own = values.clone()
        moved = []
        for shape in (values.shape[:1] + (1,) * (values.dim() - 1), values.shape):
            values.copy_(own * (0.99 + 0.02 * torch.rand(shape).to(values)))
            moved.append(float((outputs() - before).norm()))
        values.copy_(own)
        if moved[0] < 0.1 * moved[1]:
            found.add(name)
    return found


class Layer(nn.Module):
    """A layer between two others, and something behind it."""

    def __init__(self, layer: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.behind = nn.Conv2d(3, 8, 1), layer, behind
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if not isinstance(self.layer, nn.Conv2d | nn.ConvTranspose2d):
            x = x.movedim(1, -1).contiguous()
            x = self.behind(self.layer(x).movedim(-1, 1).contiguous())
        else:
            x = self.behind(self.layer(x))
        found: Tensor = self.head(torch.relu(x).flatten(2).amax(2))
        return found


class PerPixel(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 12, 3, bias=False),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
    "linear": lambda: nn.Linear(8, 12),
    "Conv1D": lambda: Conv1D(12, 8),
}
BEHIND: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "batch norm": (lambda: nn.BatchNorm2d(12), True),
    "batch norm in evaluation mode": (lambda: nn.BatchNorm2d(12).eval(), False),
    "instance norm": (lambda: nn.InstanceNorm2d(12), True),
    "group norm": (lambda: nn.GroupNorm(3, 12), False),
    "group norm, a group a channel": (lambda: nn.GroupNorm(12, 12), True),
    "layer norm": (lambda: PerPixel(12), False),
    "nothing": (nn.Identity, False),
}


def made(layer: nn.Module, behind: nn.Module) -> tuple[nn.Module, Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64)
    model = Layer(layer, behind).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    return model, (x, torch.arange(16) % 5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("behind", BEHIND)
def test_a_layer_before_a_normalisation_of_its_channels(
    layer: str, behind: str
) -> None:
    make, normalises = BEHIND[behind]
    model, batch = made(LAYERS[layer](), make())
    assert scale_free(model, batch) == ({"layer.weight"} if normalises else set())


def test_standardised_weights_need_no_normalisation() -> None:
    model, batch = made(ScaledStdConv2d(8, 12, 3), nn.Identity())
    assert scale_free(model, batch) == {"layer.weight"}


def test_tiny_gradients_do_not_underflow() -> None:
    model, batch = made(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    model.float()
    batch = batch[0].float(), batch[1]
    for tiny in (1.0, 1e-25):
        found = scale_free(
            model, batch, loss_fn=lambda out, y, t=tiny: t * cross_entropy(out, y)
        )
        assert found == {"layer.weight"}


def test_a_layer_without_any_saliency_has_no_normalisation() -> None:
    model, batch = made(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    assert scale_free(model, batch, open_gates=False) == set()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"]
)
def test_in_a_model_of_timm_the_loss_agrees(name: str, mode: str) -> None:
    torch.manual_seed(0)
    options = {"zero_init_last": False} if name == "test_resnet" else {}
    model = timm.create_model(name, num_classes=10, **options).double()
    size = model.pretrained_cfg["input_size"][-1] if name == "test_vit" else 64
    batch = torch.randn(8, 3, size, size, dtype=torch.float64), torch.arange(8)
    model.train(mode == "train")
    weights = [
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    assert scale_free(model, batch, open_gates=False) == unmoved(model, batch, weights)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_16_bits_make_no_difference(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    batch = torch.randn(4, 3, 64, 64), torch.arange(4)
    found = scale_free(model, batch)
    assert found
    assert scale_free(model, batch, autocast=torch.bfloat16) == found
    model.bfloat16()
    assert scale_free(model, (batch[0].bfloat16(), batch[1])) == found


@pytest.mark.parametrize("channels", [1, 2])
def test_few_channels_are_seldom_taken_for_scale_free(channels: int) -> None:
    found = 0
    for seed in range(200):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, channels))
        batch = torch.randn(32, 6), torch.rand(32, channels)
        loss = {"loss_fn": nn.functional.binary_cross_entropy_with_logits}
        found += "2.weight" in scale_free(model, batch, **loss)
    assert found <= 2  # and 5 with a tenth as the limit of a single channel


def test_a_single_channel_behind_a_normalisation_is_found() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 1, 7), nn.BatchNorm2d(1), nn.Sigmoid(), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(36, 5))
        batch = torch.randn(16, 3, 12, 12), torch.randint(5, (16,))
        assert scale_free(model, batch) == {"0.weight"}


def test_the_rows_of_any_matrix_are_its_channels() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kernel = nn.Parameter(torch.randn(12, 6))
            self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(nn.functional.linear(x, self.kernel)))
            found: Tensor = self.head(x)
            return found

    model = Normalised()
    named = [(model, "kernel"), (model.head, "weight")]
    batch = torch.randn(16, 6), torch.randint(5, (16,))
    assert scale_free(model, batch, parameters=named) == {"kernel"}
