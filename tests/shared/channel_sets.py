"""Networks, and which channels go together in each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import floor
from typing import Any

import torch
import torch_pruning as tp
from networks import batches
from state import same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import snap_prune

Batch = tuple[Tensor, Tensor]


def images(count: int = 1, size: int = 6, seed: int = 1) -> list[Batch]:
    """Batches of six small images in float64, three classes."""
    return batches(count, 6, (3, size, size), 3, seed)


class Counted(list[Batch]):
    """Batches that count how often they are read from the beginning."""

    reads = 0

    def __iter__(self) -> Iterator[Batch]:
        self.reads += 1
        return super().__iter__()


class Residual(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, width: int = 5, inner: int = 6, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.norm1(self.conv1(x)))
        return x + self.norm2(self.conv2(inner))  # type: ignore[no-any-return]


def made(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """A network in float64 whose norms are not those of a new one."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(copy.deepcopy(layer) for layer in layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return model.double()


HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


def chain(bias: bool = True, norm: bool = False, seed: int = 0) -> nn.Sequential:
    return made(
        nn.Conv2d(3, 6, 3, bias=bias),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 7, 3, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(28, 8, bias=bias),
        nn.Tanh(),
        nn.Linear(8, 3, bias=bias),
        seed=seed,
    )


def residual(norm: bool = False) -> nn.Sequential:
    stem = nn.Conv2d(3, 5, 3, padding=1)
    return made(stem, Residual(norm=norm), *HEAD, nn.Linear(5, 3))


def depthwise() -> nn.Sequential:
    return made(
        nn.Conv2d(3, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Tanh(),
        nn.Conv2d(6, 5, 1),
        *HEAD,
        nn.Linear(5, 3),
    )


@dataclass
class Sets:
    """Which set of channels each layer writes and reads, and each norm passes."""

    writes: dict[str, str]
    reads: dict[str, str]
    passes: dict[str, str] = field(default_factory=dict)

    def sizes(self, model: nn.Module) -> dict[str, int]:
        layers: dict[str, Any] = dict(model.named_modules())
        return {name: len(layers[layer].weight) for layer, name in self.writes.items()}


CHAIN = Sets({"0": "a", "3": "b", "6": "c"}, {"3": "a", "6": "b", "8": "c"}, {"1": "a"})

RESIDUAL = Sets(
    {"0": "a", "1.conv2": "a", "1.conv1": "b"},
    {"1.conv1": "a", "4": "a", "1.conv2": "b"},
    {"1.norm1": "b", "1.norm2": "a"},
)

DEPTHWISE = Sets({"0": "a", "2": "a", "4": "b"}, {"2": "a", "4": "a", "7": "b"})

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Sets]] = {
    "chain": (lambda: chain(bias=False), CHAIN),
    "chain with biases": (chain, CHAIN),
    "chain with a norm": (lambda: chain(norm=True), CHAIN),
    "residual": (residual, RESIDUAL),
    "residual with norms": (lambda: residual(norm=True), RESIDUAL),
    "depthwise": (depthwise, DEPTHWISE),
}


def graph_of(model: nn.Module, size: int = 6) -> tp.DependencyGraph:
    inputs = torch.zeros(2, 3, size, size, dtype=torch.float64)
    return tp.DependencyGraph().build_dependency(model, inputs)


def outputs_group(model: nn.Module, layer: str, indices: list[int]) -> Any:
    graph, module = graph_of(model), model.get_submodule(layer)
    cut = graph.get_pruner_of_module(module).prune_out_channels
    return graph.get_pruning_group(module, cut, indices)


def trained(
    model: nn.Module, batches: list[Batch], pruner: Any = None, rate: float = 0.05
) -> list[float]:
    """Losses of a few steps of descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        if pruner is not None:
            pruner.regularize(model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def float_images(size: int = 6) -> list[Batch]:
    return [(x.float(), y) for x, y in images(size=size)]


# snap_prune: the naive one.


def along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


@contextmanager
def gated(
    model: nn.Module, sets: Sets, gates: dict[str, Tensor], kept: dict[str, Tensor]
) -> Iterator[None]:
    """Gates behind layers that write, and zeros for those that read what has gone."""
    with ExitStack() as hooks:
        for layer, name in sets.writes.items():

            def write(_: Any, __: Any, y: Tensor, gate: Tensor = gates[name]) -> Tensor:
                return y * along(gate, y)

            module = model.get_submodule(layer)
            hooks.callback(module.register_forward_hook(write).remove)
        for layer, name in sets.reads.items():

            def read(_: Any, args: Any, stay: Tensor = kept[name]) -> Tensor:
                (x,) = args
                features = stay.repeat_interleave(x.shape[1] // len(stay))
                return x * along(features, x)  # type: ignore[no-any-return]

            module = model.get_submodule(layer)
            hooks.callback(module.register_forward_pre_hook(read).remove)
        yield


def gradients_of_gates(
    model: nn.Module, sets: Sets, batches: list[Batch], kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Magnitudes of the gradients of gates that all writers of a set share."""
    model = copy.deepcopy(model).eval()
    gates = {
        name: torch.ones(size, dtype=torch.float64, requires_grad=True)
        for name, size in sets.sizes(model).items()
    }
    with gated(model, sets, gates, kept):
        losses = [cross_entropy(model(x), y) for x, y in batches]
    loss = torch.stack(losses).mean()
    found = torch.autograd.grad(loss, list(gates.values()))
    return {name: grad.abs() for name, grad in zip(gates, found, strict=True)}


def counts(total: int, sparsity: float, steps: int) -> list[int]:
    """How many are kept after each step."""
    sparsities = [sparsity]
    if steps and sparsity > 0.5:
        steps_of = range(steps + 1)
        sparsities = [sparsity - (sparsity - 0.5) / 2**i for i in steps_of] + sparsities
    return [floor((1 - s) * total + 1e-9) for s in sparsities]


def naive_snap(
    model: nn.Module, sets: Sets, batches: list[Batch], sparsity: float, steps: int
) -> dict[str, Tensor]:
    """Which channels stay."""
    sizes = sets.sizes(model)
    kept = {name: torch.ones(n, dtype=torch.bool) for name, n in sizes.items()}
    for count in counts(sum(sizes.values()), sparsity, steps):
        scores = gradients_of_gates(model, sets, batches, kept)
        ranked = []
        for name, stay in kept.items():
            own = [(float(scores[name][c]), name, c) for c in stay.nonzero().flatten()]
            best = max(own)
            ranked += [(one is best, *one) for one in own]
        ranked.sort(key=lambda one: one[:2], reverse=True)
        for *_, name, channel in ranked[count:]:
            kept[name][channel] = False
    return kept


def snapped(
    model: nn.Module,
    loader: Any,
    sparsity: float,
    inputs: Any = None,
    **options: Any,
) -> nn.Module:
    inputs = torch.zeros(1, 3, 6, 6) if inputs is None else inputs
    return snap_prune(model, loader, inputs, sparsity, progress=False, **options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert same(one.state_dict(), other.state_dict())


def marked(model: Any) -> Any:
    """With hooks, gradients, a frozen layer, a part in evaluation mode and a memory."""
    cross_entropy(model(images()[0][0]), images()[0][1]).backward()
    model[0].requires_grad_(False)
    model[1].eval()
    model.seen = []
    model.register_forward_hook(lambda module, args, y: module.seen.append(len(y)))
    model.register_full_backward_pre_hook(lambda module, y: None)
    return model
