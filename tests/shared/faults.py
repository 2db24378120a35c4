"""A network, a batch for it, and calls that fail, as rows of tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import perceptron, waves
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from force_plugin import (
    LayerReport,
    SaliencyMethod,
    SparsityReport,
    force_prune,
    saliency,
    sparsity_report,
)

NAN, INF = float("nan"), float("inf")
Batch = tuple[Any, Any]
ADVICE = "ake more steps, more batches, a lower sparsity or another method"
ONCE = "ake more batches, a lower sparsity or a method that prunes in steps"


def network() -> nn.Sequential:
    return perceptron(nn.BatchNorm1d(8), nn.Tanh())


def batch() -> Batch:
    return waves()


def words(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 6, sparse=sparse)
    return nn.Sequential(embedding, nn.Flatten(), nn.Linear(30, 8), nn.Linear(8, 4))


def sentences() -> Batch:
    return torch.arange(25).view(5, 5) % 10, TARGETS


def prune_it(model: nn.Module, **options: Any) -> SparsityReport:
    """``force_prune`` in three steps, quietly."""
    usual = {"loader": [batch()], "sparsity": 0.5, "steps": 3, "progress": False}
    return force_prune(model, **{**usual, **options})


def score_it(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return saliency(model, **{"loader": [batch()], **options})


BOTH: dict[str, Callable[..., object]] = {"force_prune": prune_it, "saliency": score_it}


@dataclass(frozen=True)
class Fault:
    """A call that fails.

    Attributes:
        call: The call, given a network.
        error: The exception.
        message: A pattern that its text holds.
        model: Makes the network.
    """

    call: Callable[[Any], object]
    error: type[BaseException]
    message: str
    model: Callable[[], nn.Module] = network


def pruned() -> nn.Sequential:
    model = network()
    prune_it(model, sparsity=0.25)
    return model


def report(*kept: int) -> SparsityReport:
    return SparsityReport(
        tuple(LayerReport(f"{i}.weight", (9,), k, 9) for i, k in enumerate(kept))
    )


MASK = {"0.weight": torch.ones(8, 6)}
NO_MODULE = r"^model: expected a torch.nn.Module, got "
NO_PATH = r"expected str, bytes or os.PathLike object, not "
INPUTS, TARGETS = batch()


class Extra(nn.Linear):
    """A layer of 6 inputs and 4 outputs that holds another parameter, too."""

    def __init__(self, extra: Tensor) -> None:
        super().__init__(6, 4)
        self.extra = nn.Parameter(extra, extra.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.extra.sum().real.float()


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def by_hand(name: str) -> Callable[[], nn.Module]:
    """A network of which PyTorch has pruned a layer."""

    def build() -> nn.Module:
        model = network()
        if name == "twice":
            prune.l1_unstructured(model[0], "weight", 0.1)
            prune.random_unstructured(model[0], "weight", 0.1)
        elif name == "structure":
            prune.ln_structured(model[0], "weight", 2, n=2, dim=0)
        else:
            prune.l1_unstructured(model[0], "bias", 2)
        return model

    return build


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    model[3].weight = model[0].weight
    return model


def parametrised() -> nn.Module:
    model = network()
    model[0] = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        parametrizations.weight_norm(nn.Linear(6, 8)),
    )
    return model


def closed() -> Any:
    model: Any = network()
    nn.init.zeros_(model[1].weight)
    return model


def with_a_past() -> nn.Module:
    model = network()
    model[3].register_forward_hook(lambda *_: None)
    model[0].register_full_backward_hook(lambda *_: None)
    inputs, targets = batch()
    cross_entropy(model(inputs.requires_grad_()), targets).backward()
    model[0].bias.grad = None
    return model


WHERE: dict[str, Callable[[], nn.Module]] = {
    "fresh": network,
    "in evaluation mode": lambda: network().eval(),
    "frozen": lambda: network().requires_grad_(False),
    "made in inference mode": in_inference_mode,
    "with gradients and hooks": with_a_past,
    "with a closed gate": closed,
    "with tied weights": tied,
    "with parametrised weights": parametrised,
    "with complex parameters": lambda: Extra(torch.ones(3) + 1j),
    "with integer parameters": lambda: Extra(torch.ones(3).int()),
    "with empty parameters": lambda: Extra(torch.ones(3, 0)),
    "pruned": pruned,
    "pruned twice by pytorch": by_hand("twice"),
    "pruned by structure": by_hand("structure"),
    "with a pruned bias": by_hand("bias"),
}


def vgg(norm: bool, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 0, 12, 12, 0):
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10, bias=bias)]
    return nn.Sequential(*layers)


def images(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10)


def layers_of(model: nn.Module) -> dict[str, int]:
    """Names and sizes of the prunable weights."""
    return {layer.name: layer.total for layer in sparsity_report(model).layers}


def emptying(layer: str) -> type[SaliencyMethod]:
    """A method that scores one layer lowest, and reads a batch as others do."""

    class Emptying(SaliencyMethod):
        steps = 1

        @classmethod
        def measure(cls, probe: Any) -> Any:
            return {name: name == layer for name in probe.gradients()}

        @staticmethod
        def score(weight: Tensor, lowest: bool) -> Tensor:
            return torch.full_like(weight, -1) if lowest else weight.abs()

    return Emptying


def share_of(layer: str, model: nn.Module) -> float:
    """The sparsity that removes as many weights as a layer has."""
    sizes = layers_of(model)
    return sizes[layer] / sum(sizes.values())
