"""Channels by what they mean to the loss: for torch-pruning's pruners, and SNAP-it.

What is expected comes from sums over the weights of each channel, written out for each
network; from gates that hooks multiply the outputs of layers by; and from networks that
read zeros where channels have been taken out. torchrun starts this file as well.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import floor
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch_pruning as tp
from processes import Seen, launch, same, take_part
from state import failed, unchanged
from timm.models.densenet import DenseNet
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from force_plugin import (
    SaliencyImportance,
    force_prune,
    get_masks,
    make_permanent,
    saliency,
    snap_prune,
)

Batch = tuple[Tensor, Tensor]


def images(count: int = 1, size: int = 6, seed: int = 1) -> list[Batch]:
    """Batches of six small images in float64, three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 3, size, size, generator=generator, dtype=torch.float64),
            torch.randint(3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


class Counted(list[Batch]):
    """Batches that count how often they are read from the beginning."""

    reads = 0

    def __iter__(self) -> Iterator[Batch]:
        self.reads += 1
        return super().__iter__()


# Networks, and which channels go together in each.


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
        return x + self.norm2(self.conv2(inner))


class Joined(nn.Module):
    """Two convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


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
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
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


def grouped() -> nn.Sequential:
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2)
    return made(*layers, *HEAD, nn.Linear(4, 3))


def transposed() -> nn.Sequential:
    return made(
        nn.Conv2d(3, 4, 3),
        nn.ConvTranspose2d(4, 6, 2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        *HEAD,
        nn.Linear(4, 3),
    )


def joined() -> nn.Sequential:
    return made(Joined(), nn.Conv2d(7, 5, 1), *HEAD, nn.Linear(5, 3))


@dataclass
class Sets:
    """Which set of channels each layer writes and reads, and each norm passes."""

    writes: dict[str, str]
    reads: dict[str, str]
    passes: dict[str, str] = field(default_factory=dict)

    def sizes(self, model: nn.Module) -> dict[str, int]:
        return {
            name: model.get_submodule(layer).weight.shape[0]
            for layer, name in self.writes.items()
        }


CHAIN = Sets({"0": "a", "3": "b", "6": "c"}, {"3": "a", "6": "b", "8": "c"}, {"1": "a"})
RESIDUAL = Sets(
    {"0": "a", "1.conv2": "a", "1.conv1": "b"},
    {"1.conv1": "a", "4": "a", "1.conv2": "b"},
    {"1.norm1": "b", "1.norm2": "a"},
)
DEPTHWISE = Sets({"0": "a", "2": "a", "4": "b"}, {"2": "a", "4": "a", "7": "b"})
JOINED = Sets({"0.left": "a", "0.right": "b", "1": "c"}, {"4": "c"})

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Sets]] = {
    "chain": (lambda: chain(bias=False), CHAIN),
    "chain with biases": (chain, CHAIN),
    "chain with a norm": (lambda: chain(norm=True), CHAIN),
    "residual": (residual, RESIDUAL),
    "residual with norms": (lambda: residual(norm=True), RESIDUAL),
    "depthwise": (depthwise, DEPTHWISE),
}

Score = dict[str, Tensor]


def sums(count: int, weights: Callable[[int], list[Tensor]]) -> list[float]:
    return [sum(float(w.sum()) for w in weights(c)) for c in range(count)]


# By the layers that write them, the sums over the weights of each channel.
SUMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Score], dict[str, Any]]]] = {
    "chain": (
        chain,
        lambda s: {
            "0": sums(6, lambda c: [s["0"][c], s["3"][:, c]]),
            "3": sums(7, lambda c: [s["3"][c], s["6"][:, 4 * c : 4 * c + 4]]),
            "6": sums(8, lambda c: [s["6"][c], s["8"][:, c]]),
            "8": sums(3, lambda c: [s["8"][c]]),
        },
    ),
    "residual": (
        lambda: residual(norm=True),
        lambda s: {
            "0 1.conv2": sums(
                5,
                lambda c: [
                    s["0"][c],
                    s["1.conv2"][c],
                    s["1.conv1"][:, c],
                    s["4"][:, c],
                ],
            ),
            "1.conv1": sums(6, lambda c: [s["1.conv1"][c], s["1.conv2"][:, c]]),
            "4": sums(3, lambda c: [s["4"][c]]),
        },
    ),
    "depthwise": (
        depthwise,
        lambda s: {
            "0 2": sums(6, lambda c: [s["0"][c], s["2"][c], s["4"][:, c]]),
            "4": sums(5, lambda c: [s["4"][c], s["7"][:, c]]),
            "7": sums(3, lambda c: [s["7"][c]]),
        },
    ),
    "grouped": (
        grouped,
        lambda s: {
            "0": sums(
                6, lambda c: [s["0"][c], s["1"][c // 3 * 2 : c // 3 * 2 + 2, c % 3]]
            ),
            "1": sums(4, lambda c: [s["1"][c], s["4"][:, c]]),
            "4": sums(3, lambda c: [s["4"][c]]),
        },
    ),
    "transposed": (
        transposed,
        lambda s: {
            "0": sums(4, lambda c: [s["0"][c], s["1"][c]]),
            "1": sums(6, lambda c: [s["1"][:, c], s["2"][c]]),
            "2": sums(
                4, lambda c: [s["2"][c // 2 * 3 : c // 2 * 3 + 3, c % 2], s["5"][:, c]]
            ),
            "5": sums(3, lambda c: [s["5"][c]]),
        },
    ),
    "joined": (
        joined,
        lambda s: {
            "0.left": sums(4, lambda c: [s["0.left"][c], s["1"][:, c]]),
            "0.right": sums(3, lambda c: [s["0.right"][c], s["1"][:, 4 + c]]),
            "1": sums(5, lambda c: [s["1"][c], s["4"][:, c]]),
            "4": sums(3, lambda c: [s["4"][c]]),
        },
    ),
}


# SaliencyImportance.


def graph_of(model: nn.Module, size: int = 6) -> tp.DependencyGraph:
    inputs = torch.zeros(2, 3, size, size, dtype=torch.float64)
    return tp.DependencyGraph().build_dependency(model, inputs)


def outputs_group(model: nn.Module, layer: str, indices: list[int]) -> Any:
    graph, module = graph_of(model), model.get_submodule(layer)
    cut = graph.get_pruner_of_module(module).prune_out_channels
    return graph.get_pruning_group(module, cut, indices)


def in_order(scores: Tensor, indices: list[int]) -> Tensor:
    return scores[torch.tensor(indices)]


@pytest.mark.parametrize("method", ["force", "snip", "grasp", "synflow", "magnitude"])
@pytest.mark.parametrize("network", SUMS)
def test_importance_is_the_sum_over_the_weights_of_each_channel(
    network: str, method: str
) -> None:
    build, expected = SUMS[network]
    model = build()
    graph = graph_of(model)  # leaves it in evaluation mode
    scores = saliency(model, images(), method)
    naive = expected({n.removesuffix(".weight"): s for n, s in scores.items()})
    importance = SaliencyImportance(model, images(), method)
    names = {module: name for name, module in model.named_modules()}
    seen = set()
    for group in graph.get_all_groups():
        root = names[group[0].dep.target.module]
        (layers,) = (layers for layers in naive if root in layers.split())
        found = importance(group)
        assert found.dtype == torch.float64
        wanted = in_order(
            torch.tensor(naive[layers], dtype=torch.float64), group[0].idxs
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        seen.add(layers)
    assert seen == set(naive)


@pytest.mark.parametrize(
    ("network", "layer", "indices"),
    [
        ("chain", "3", [5, 0, 2]),
        ("residual", "1.conv2", [4, 1]),
        ("residual", "0", [3]),
        ("depthwise", "0", [5, 1]),
        ("joined", "0.right", [2, 0]),
        ("transposed", "1", [4, 1, 0]),
    ],
)
def test_importance_of_some_channels_is_in_their_order(
    network: str, layer: str, indices: list[int]
) -> None:
    model = SUMS[network][0]()
    importance = SaliencyImportance(model, images())
    size = model.get_submodule(layer).out_channels
    whole = importance(outputs_group(model, layer, list(range(size))))
    some = importance(outputs_group(model, layer, indices))
    torch.testing.assert_close(some, in_order(whole, indices))
    assert len(set(some.tolist())) == len(indices)


def test_importance_of_one_half_of_a_split_has_a_value_for_each_index() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.head = nn.Linear(4, 6), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.both(x).chunk(2, -1)
            return self.head(torch.sigmoid(gate) * value)

    model = made(*HEAD, nn.Linear(3, 4), Halves())
    importance = SaliencyImportance(model, images())
    group = outputs_group(model, "3.both", [1])
    assert sorted(group[0].idxs) == [1, 4]
    whole = importance(outputs_group(model, "3.both", list(range(6))))
    some = importance(group)
    assert some.shape == (2,)
    torch.testing.assert_close(some.sum(), in_order(whole, [1, 4]).sum())


def test_importance_is_measured_once_and_again_after_layers_were_cut() -> None:
    model, loader = residual(norm=True), Counted(images())
    importance = SaliencyImportance(model, loader)
    graph = graph_of(model)
    groups = list(graph.get_all_groups())
    assert loader.reads == 0
    before = [importance(group) for group in groups]
    assert [importance(group).tolist() for group in groups] == [
        scores.tolist() for scores in before
    ]
    assert loader.reads == 1
    outputs = tp.prune_conv_out_channels
    graph.get_pruning_group(model[1].conv1, outputs, [0, 3]).prune()
    for group in graph.get_all_groups():
        fresh = SaliencyImportance(model, images())(group)
        assert torch.equal(importance(group), fresh)
        assert len(fresh) == len(group[0].idxs)
    assert loader.reads == 2


def test_importance_takes_what_saliency_takes() -> None:
    model = chain()
    options: dict[str, Any] = {
        "batches": 2,
        "forward": lambda model, batch: model(batch[0]).square().mean(),
        "open_gates": False,
        "microbatch": 2,
    }
    scores = saliency(model, images(3), "snip", **options)
    importance = SaliencyImportance(model, images(3), "snip", **options)
    expected = scores["6.weight"].sum(1) + scores["8.weight"].sum(0)
    found = importance(outputs_group(model, "6", list(range(8))))
    torch.testing.assert_close(found, expected)
    other = SaliencyImportance(model, images(3), "snip", loss_fn=nn.CrossEntropyLoss())
    assert not torch.allclose(
        other(outputs_group(model, "6", list(range(8)))), expected
    )


def test_scoring_leaves_the_model_as_it_is() -> None:
    model = marked(residual(norm=True))
    importance = SaliencyImportance(model, images(), "force")
    groups = list(graph_of(copy.deepcopy(model)).get_all_groups())
    own = list(graph_of(model).get_all_groups())
    assert len(groups) == len(own)
    with unchanged(model):
        for group in own:
            importance(group)


def test_importance_of_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="method: expected one of"):
        SaliencyImportance(chain(), images(), "no such method")


PRUNERS: dict[str, tuple[type, dict[str, Any]]] = {
    "local": (tp.pruner.BasePruner, {}),
    "global": (tp.pruner.BasePruner, {"global_pruning": True}),
    "magnitude": (tp.pruner.MagnitudePruner, {"global_pruning": True}),
    "batch norm": (tp.pruner.BNScalePruner, {}),
    "group norm": (tp.pruner.GroupNormPruner, {}),
    "growing": (tp.pruner.GrowingRegPruner, {}),
}


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


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruner_prunes_a_residual_network_in_steps(pruner: str) -> None:
    kind, options = PRUNERS[pruner]
    model, loader = residual(norm=True).float(), Counted(float_images())
    one = kind(
        model,
        loader[0][0],
        SaliencyImportance(model, loader),
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model[4]],
        **options,
    )
    for step in range(3):
        one.step()
        assert model(loader[0][0]).shape == (6, 3)
        assert loader.reads == step + 1
    if options:
        assert model[0].out_channels + model[1].conv1.out_channels <= 6
    else:
        assert (model[0].out_channels, model[1].conv1.out_channels) == (2, 3)
    losses = trained(model, float_images())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("pruner", ["batch norm", "group norm", "growing"])
def test_pruner_trains_sparsely_by_the_importance(pruner: str) -> None:
    model = chain(norm=True).float()
    one = PRUNERS[pruner][0](
        model,
        float_images()[0][0],
        SaliencyImportance(model, float_images()),
        ignored_layers=[model[8]],
    )
    if pruner == "growing":
        one.update_reg()
    losses = trained(model, float_images(), one)
    assert losses[-1] < losses[0]
    one.step()
    assert model[0].out_channels == 3


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=3,
        mlp_ratio=1,
        num_classes=3,
    ).double()


@pytest.mark.parametrize(
    ("heads", "everywhere"), [(False, False), (False, True), (True, False)]
)
def test_pruner_prunes_a_vision_transformer(heads: bool, everywhere: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    attentions = [block.attn for block in model.blocks]
    loader = float_images(32)
    pruner = tp.pruner.BasePruner(
        model,
        loader[0][0],
        SaliencyImportance(model, loader, "snip"),
        pruning_ratio=0.5,
        global_pruning=everywhere,
        num_heads={one.qkv: one.num_heads for one in attentions},
        prune_num_heads=heads,
        prune_head_dims=not heads,
        head_pruning_ratio=0.5 if heads else 0.0,
        ignored_layers=[model.head],
    )
    before = sum(p.numel() for p in model.parameters())
    pruner.step()
    for one in attentions:
        one.num_heads = pruner.num_heads[one.qkv]
        one.head_dim = one.qkv.out_features // (3 * one.num_heads)
        one.attn_dim = one.qkv.out_features // 3
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    losses = trained(model, loader, rate=1e-3)
    assert losses[-1] < losses[0]


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
                return x * along(features, x)

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


def assert_cut(
    small: nn.Module, model: nn.Module, sets: Sets, kept: dict[str, Tensor]
) -> None:
    """The values of the layers are those of the channels that stay, bit for bit."""
    for layer in {**sets.writes, **sets.reads}:
        before, after = model.get_submodule(layer), small.get_submodule(layer)
        stay = kept.get(sets.writes.get(layer), torch.ones(len(before.weight)).bool())
        weight = before.weight[stay]
        if before.weight.shape[1] > 1:
            columns = kept.get(sets.reads.get(layer), torch.ones(1).bool())
            repeat = weight.shape[1] // len(columns)
            weight = weight[:, columns.repeat_interleave(repeat)]
        assert after.weight.shape == weight.shape, layer
        assert torch.equal(after.weight, weight), layer
        assert (before.bias is None) == (after.bias is None)
        if before.bias is not None:
            assert torch.equal(after.bias, before.bias[stay])
    for layer, name in sets.passes.items():
        before, after = model.get_submodule(layer), small.get_submodule(layer)
        for key, value in before.state_dict().items():
            whole = value if value.dim() == 0 else value[kept[name]]
            assert torch.equal(after.state_dict()[key], whole), (layer, key)


def snapped(
    model: nn.Module,
    loader: Any,
    sparsity: float,
    inputs: Any = None,
    **options: Any,
) -> nn.Module:
    inputs = torch.zeros(1, 3, 6, 6) if inputs is None else inputs
    return snap_prune(model, loader, inputs, sparsity, progress=False, **options)


def snapped_like_naive(
    name: str, sparsity: float, steps: int, batches: list[Batch] | None = None
) -> None:
    build, sets = NETWORKS[name]
    model, batches = build(), batches or images()
    kept = naive_snap(model, sets, batches, sparsity, steps)
    small = snapped(model, batches, sparsity, steps=steps, batches=None)
    assert_cut(small, model, sets, kept)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("network", NETWORKS)
def test_least_sensitive_channels_go_at_once(network: str, sparsity: float) -> None:
    snapped_like_naive(network, sparsity, 0)


@pytest.mark.parametrize(("sparsity", "steps"), [(0.6, 1), (0.8, 3), (0.4, 2)])
@pytest.mark.parametrize("network", NETWORKS)
def test_channels_go_in_steps_between_which_they_are_measured(
    network: str, sparsity: float, steps: int
) -> None:
    if network == "depthwise" and sparsity == 0.8:
        sparsity = 0.7
    snapped_like_naive(network, sparsity, steps)


def test_steps_give_other_channels_than_all_at_once() -> None:
    model, sets = NETWORKS["chain with a norm"][0](), CHAIN
    at_once, in_steps = (
        naive_snap(model, sets, images(), 0.8, steps) for steps in (0, 3)
    )
    assert any(not torch.equal(at_once[name], in_steps[name]) for name in at_once)


def test_every_batch_of_the_loader_counts() -> None:
    batches = images(3)
    snapped_like_naive("residual with norms", 0.6, 1, batches)
    model, sets = chain(), CHAIN
    two = naive_snap(model, sets, batches[:2], 0.6, 0)
    three = naive_snap(model, sets, batches, 0.6, 0)
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert_cut(snapped(model, batches, 0.6, steps=0, batches=2), model, sets, two)
    assert_cut(snapped(model, batches, 0.6, steps=0, batches=None), model, sets, three)


def test_sensitivities_are_those_of_evaluation_mode() -> None:
    model = chain(norm=True).train()
    evaluated = snapped(model.eval(), images(), 0.6, steps=1)
    trains = snapped(model.train(), images(), 0.6, steps=1)
    assert_same(trains, evaluated)
    assert trains.training and not evaluated.training


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert same(one.state_dict(), other.state_dict())


def test_heads_and_features_of_a_transformer_have_a_gate_each() -> None:
    model = small_vit()
    x, y = images(size=16)[0]
    gates = {
        name: torch.ones(size, dtype=torch.float64, requires_grad=True)
        for name, size in (("width", 12), ("heads", 3), ("hidden", 12))
    }
    block = model.blocks[0]
    with ExitStack() as hooks:

        def behind(module: nn.Module, gate: Callable[[Tensor], Tensor]) -> None:
            handle = module.register_forward_hook(lambda m, a, y: y * gate(y))
            hooks.callback(handle.remove)

        behind(model.patch_embed.proj, lambda y: gates["width"].view(-1, 1, 1))
        behind(block.attn.proj, lambda y: gates["width"])
        behind(block.mlp.fc2, lambda y: gates["width"])
        behind(block.mlp.fc1, lambda y: gates["hidden"])
        behind(block.attn.qkv, lambda y: gates["heads"].repeat_interleave(4).repeat(3))
        loss = cross_entropy(model.eval()(x), y)
    grads = torch.autograd.grad(loss, list(gates.values()))
    scores = {name: grad.abs() for name, grad in zip(gates, grads, strict=True)}
    assert len({float(one) for s in scores.values() for one in s}) == 27
    for one in scores.values():
        one[one.argmax()] = torch.inf
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[9]
    stay = {name: one >= threshold for name, one in scores.items()}
    small = snapped(model, [(x, y)], 0.62, x, steps=0)
    inner = small.blocks[0]
    width, hidden = stay["width"], stay["hidden"]
    assert torch.equal(inner.mlp.fc1.weight, block.mlp.fc1.weight[hidden][:, width])
    rows = stay["heads"].repeat_interleave(4).repeat(3)
    assert torch.equal(inner.attn.qkv.weight, block.attn.qkv.weight[rows][:, width])
    assert inner.attn.num_heads == int(stay["heads"].sum())
    assert torch.equal(small.pos_embed, model.pos_embed[..., width])


def test_channels_that_are_an_output_stay_and_are_not_counted() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.network = nn.Conv2d(3, 4, 1), chain()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(x), self.features(x)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        logits, features = model(batch[0])
        return cross_entropy(logits, batch[1]) + features.square().mean()

    torch.manual_seed(0)
    small = snapped(Two().double(), images(), 0.6, steps=0, forward=forward)
    assert [y.shape[1] for y in small(images()[0][0])] == [3, 4]
    expected = snapped(chain(), images(), 0.6, steps=0)
    assert_same(small.network, expected)


def test_channels_whose_loss_changes_the_others_stay_with_a_warning() -> None:
    class Shares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().sum(1, keepdim=True)

    model = made(
        nn.Conv2d(3, 4, 3), Shares(), nn.Conv2d(4, 6, 3), *HEAD, nn.Linear(6, 3)
    )
    message = "1 of 2 sets of channels stay as they are .*that of 0.*more than these"
    with unchanged(model), pytest.warns(UserWarning, match=message):
        small = snapped(model, images(), 0.5)
    assert (small[0].out_channels, small[2].out_channels) == (4, 3)


def test_network_of_which_nothing_can_go_is_an_error() -> None:
    model = made(nn.Flatten(), nn.Linear(108, 3))
    message = "no channels of Sequential can be taken out: there are none"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        snapped(model, images(), 0.5)


# How many stay.


class Watched:
    """A loss that remembers how wide the network is."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, ...]] = []

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        widths = tuple(
            layer.weight.shape[0]
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        )[:-1]
        if not self.widths or self.widths[-1] != widths:
            self.widths.append(widths)
        return cross_entropy(model(batch[0]), batch[1])


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((108, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return made(*layers[:-1])


@pytest.mark.parametrize(
    ("widths", "sparsity", "steps", "expected"),
    [
        ((50, 50), 0.95, 5, [100, 50, 27, 16, 10, 7, 6, 5]),
        ((50, 50), 0.95, 0, [100, 5]),
        ((20,), 0.9, 1, [20, 10, 6, 2]),
        ((20,), 0.95, 0, [20, 1]),
        ((20,), 0.3, 3, [20, 14]),
    ],
)
def test_kept_channels_follow_the_schedule(
    widths: tuple[int, ...], sparsity: float, steps: int, expected: list[int]
) -> None:
    watched = Watched()
    model = perceptron(*widths)
    small = snapped(model, images(), sparsity, steps=steps, forward=watched)
    watched(small, images()[0])
    assert [sum(widths) for widths in watched.widths] == expected
    assert [sum(widths), *counts(sum(widths), sparsity, steps)] == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.57, 0.7, 0.9])
@pytest.mark.parametrize("method", ["snap", "random"])
def test_exactly_the_rounded_down_fraction_stays(method: Any, sparsity: float) -> None:
    small = snapped(perceptron(30, 70), images(), sparsity, method=method)
    kept = small[1].out_features + small[3].out_features
    assert kept == floor((1 - sparsity) * 100 + 1e-9)


def test_a_single_channel_is_not_counted_as_it_cannot_go() -> None:
    small = snapped(perceptron(1, 10), images(), 0.5, steps=0)
    assert (small[1].out_features, small[3].out_features) == (1, 5)


def test_one_channel_of_each_set_stays_the_best_one() -> None:
    model = perceptron(9, 9, 9)
    with torch.no_grad():  # its gates weigh nothing, but for the others'
        model[3].weight.mul_(1e-6)
        model[3].bias.zero_()
    small = snapped(model, images(), 0.75, steps=0, open_gates=False)
    kept = [small[layer].out_features for layer in (1, 3, 5)]
    assert sum(kept) == 6 and min(kept) == 1
    small = snapped(model, images(), 8 / 9, steps=3, open_gates=False)
    assert [small[layer].out_features for layer in (1, 3, 5)] == [1, 1, 1]
    sets = Sets({"1": "a", "3": "b", "5": "c"}, {"3": "a", "5": "b", "7": "c"})
    assert_cut(small, model, sets, naive_snap(model, sets, images(), 8 / 9, 3))


@pytest.mark.parametrize(
    ("widths", "sparsity"),
    [((10, 10), 0.92), ((4, 3), 0.8), ((3,), 0.7), ((50, 50, 50), 0.999)],
)
def test_too_high_a_sparsity_names_one_that_is_possible(
    widths: tuple[int, ...], sparsity: float
) -> None:
    model = perceptron(*widths)
    with unchanged(model), pytest.raises(ValueError, match=r"at most \S+") as caught:
        snapped(model, images(), sparsity)
    possible = float(str(caught.value).split("at most ")[1].split()[0])
    small = snapped(model, images(), possible, steps=0)
    layers = [layer for layer in small if isinstance(layer, nn.Linear)][:-1]
    assert [layer.out_features for layer in layers] == [1] * len(widths)


@pytest.mark.parametrize("method", ["snap", "random"])
def test_sparsity_of_0_removes_nothing(method: Any) -> None:
    for build, _ in NETWORKS.values():
        model = build()
        small = snapped(model, images(), 0.0, method=method)
        assert small is not model
        assert_same(small, model)


def test_groups_of_a_convolution_may_become_one_channel_wide_before_the_last_step() -> (
    None
):
    model = made(
        nn.Conv2d(3, 8, 3),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=4),
        *HEAD,
        nn.Linear(8, 3),
    )
    small = snapped(model, images(), 0.5, steps=1)
    layers = small[0], small[2]
    assert [layer.out_channels for layer in layers] == [4, 4]
    assert small(images()[0][0]).shape == (6, 3)


# At random.


def test_the_global_generator_decides_which_go_at_random() -> None:
    model = residual()
    torch.manual_seed(3)
    one, other = (snapped(model, [], 0.5, method="random") for _ in range(2))
    torch.manual_seed(3)
    again = snapped(model, [], 0.5, method="random")
    assert_same(one, again)
    assert not same(one.state_dict(), other.state_dict())


def test_at_random_no_batch_is_read() -> None:
    loader = Counted(images())
    snapped(chain(), loader, 0.5, method="random")
    assert loader.reads == 0


def test_at_random_every_channel_has_the_same_chance() -> None:
    model = perceptron(4, 12)
    torch.manual_seed(0)
    kept = torch.zeros(16)
    for _ in range(60):
        small = snapped(model, [], 0.5, method="random", steps=0)
        for place, layer in ((0, 1), (4, 3)):
            whole, rest = model[layer].bias, small[layer].bias
            kept[place : place + len(whole)] += torch.isin(whole, rest)
    assert kept.min() > 15 and kept.max() < 47
    assert 0.35 < kept[:4].mean() / 60 < 0.65


# What stays.


def test_ignored_layers_keep_their_outputs() -> None:
    model = residual(norm=True)
    small = snapped(model, images(), 0.5, ignored_layers=[model[1].conv2])
    assert small[0].out_channels == small[1].conv2.out_channels == 5
    assert small[1].conv1.out_channels == 3  # of the 6 that can go


def test_ignored_layers_may_be_an_iterator() -> None:
    model = residual(norm=True)
    small = snapped(model, images(), 0.5, ignored_layers=iter([model[1].conv2]))
    assert small[0].out_channels == 5


def test_an_ignored_block_keeps_the_outputs_of_its_layers() -> None:
    model = residual(norm=True)
    torch_prunings = tp.pruner.BasePruner(
        residual(norm=True), images()[0][0], None, ignored_layers=[model[1]]
    )
    assert model[1].conv1 in torch_prunings.ignored_layers
    with pytest.raises(RuntimeError, match="there are none"):
        snapped(model, images(), 0.5, ignored_layers=[model[1]])


def test_ignored_layers_of_another_model_are_an_error() -> None:
    model = chain()
    message = "ignored_layers: expected modules of the model, got another Conv2d"
    with unchanged(model), pytest.raises(ValueError, match=message):
        snapped(model, images(), 0.5, ignored_layers=[chain()[0]])


def test_outputs_keep_their_shape_and_the_last_layer_its_rows() -> None:
    for build, _ in NETWORKS.values():
        model = build()
        small = snapped(model, images(), 0.6)
        assert small(images()[0][0]).shape == (6, 3)
        assert [*small.children()][-1].bias is None or torch.equal(
            small[-1].bias, model[-1].bias
        )


def test_result_gives_what_the_network_gives_without_reading_the_rest() -> None:
    for name in ("residual with norms", "chain with a norm", "depthwise"):
        build, sets = NETWORKS[name]
        model = build().eval()
        kept = naive_snap(model, sets, images(), 0.6, 2)
        small = snapped(model, images(), 0.6, steps=2)
        ones = {n: torch.ones(size) for n, size in sets.sizes(model).items()}
        x = images(seed=5)[0][0]
        with gated(model, sets, ones, kept):
            expected = model(x)
        torch.testing.assert_close(small(x), expected)


def test_result_has_the_types_modes_and_gradients_of_its_original() -> None:
    model = residual(norm=True).float()
    model[1].eval()
    model[0].requires_grad_(False)
    small = snapped(model, float_images(), 0.5)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert [m.training for m in small.modules()] == [
        m.training for m in model.modules()
    ]
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        "0.weight",
        "0.bias",
    }
    assert all(p.grad is None and p.is_leaf for p in small.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}


def test_result_trains_and_copies() -> None:
    small = snapped(residual(norm=True), images(), 0.6)
    x = images(seed=5)[0][0]
    losses = trained(small, images())
    assert losses[-1] < losses[0]
    small.eval()
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert torch.equal(other(x), small(x))
    again = snapped(small, images(), 0.25)
    assert again(x).shape == (6, 3)


@pytest.mark.parametrize("permanent", [False, True])
def test_masks_are_taken_along(permanent: bool) -> None:
    build, sets = NETWORKS["residual with norms"]
    model = build()
    force_prune(model, images(), 0.6, method="snip", progress=False)
    masks = get_masks(model)
    kept = naive_snap(model, sets, images(), 0.5, 1)
    if permanent:
        make_permanent(model)
    with unchanged(model):
        small = snapped(model, images(), 0.5, steps=1)
    found = get_masks(small)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        layer = name.removesuffix(".weight")
        rows = kept.get(sets.writes.get(layer), torch.ones(len(mask)).bool())
        columns = torch.ones(mask.shape[1]).bool()
        columns = kept.get(sets.reads.get(layer), columns)
        assert torch.equal(found[name], mask[rows][:, columns])
        weight = small.get_submodule(layer).weight
        assert torch.equal(weight, model.get_submodule(layer).weight[rows][:, columns])
    trained(small, images())
    for name, mask in found.items():
        assert not small.get_submodule(name.removesuffix(".weight")).weight[~mask].any()


# The original stays as it is.


def marked(model: nn.Module) -> nn.Module:
    """With hooks, gradients, a frozen layer, a part in evaluation mode and a memory."""
    cross_entropy(model(images()[0][0]), images()[0][1]).backward()
    model[0].requires_grad_(False)
    model[1].eval()
    model.seen = []
    model.register_forward_hook(lambda module, args, y: module.seen.append(len(y)))
    model.register_full_backward_pre_hook(lambda module, y: None)
    return model


@pytest.mark.parametrize("build", [chain, lambda: residual(norm=True), depthwise])
@pytest.mark.parametrize("steps", [0, 2])
def test_original_is_untouched(build: Callable[[], nn.Module], steps: int) -> None:
    model = marked(build())
    with unchanged(model):
        snapped(model, images(), 0.6, steps=steps)


def test_original_is_untouched_at_random() -> None:
    model = marked(residual(norm=True))
    torch.manual_seed(1)
    torch.randint(2**62, ())
    drawn_once = torch.get_rng_state()
    torch.manual_seed(1)
    seeded = copy.deepcopy(model)
    snapped(model, [], 0.6, method="random")
    assert torch.equal(torch.get_rng_state(), drawn_once)
    assert_same(model, seeded)
    assert [m.training for m in model.modules()] == [
        m.training for m in seeded.modules()
    ]


def failing_loader() -> Iterator[Batch]:
    raise OSError("the disk is gone")
    yield


def interrupted(*_: Any) -> Tensor:
    raise KeyboardInterrupt


class Broken(list[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        raise OSError("the disk is gone")


class Late:
    """A loss that fails in a later step, where the network is smaller."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if model[0].out_channels < 5:
            raise OSError("too late")
        return cross_entropy(model(batch[0]), batch[1])


NAN = [(x * torch.nan, y) for x, y in images()]

FAILURES: dict[str, tuple[type[BaseException], str, Any, dict[str, Any]]] = {
    "loader": (OSError, "the disk is gone", Broken(images()), {}),
    "loss": (KeyboardInterrupt, "^$", images(), {"loss_fn": interrupted}),
    "second step": (OSError, "too late", images(), {"forward": Late()}),
    "nan": (RuntimeError, "nan", NAN, {}),
    "no gradient": (
        RuntimeError,
        "sensitivity of every channel is exactly 0",
        images(),
        {"forward": lambda model, batch: model(batch[0]).sum() * 0},
    ),
    "inputs": (
        RuntimeError,
        "Sequential cannot be run with example_inputs",
        images(),
        {"inputs": torch.zeros(1, 7)},
    ),
    "no tensor": (TypeError, "example_inputs: expected", images(), {"inputs": "x"}),
    "method": (ValueError, 'expected "snap" or "random"', images(), {"method": "x"}),
    "steps": (ValueError, "steps: expected an integer", images(), {"steps": -1}),
    "half a step": (ValueError, "steps: expected an integer", [], {"steps": 1.5}),
    "true steps": (ValueError, "steps: expected an integer", [], {"steps": True}),
    "sparsity": (ValueError, "sparsity: expected", images(), {"sparsity": 1.0}),
    "text": (TypeError, "sparsity: expected a number", [], {"sparsity": "0.5"}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_original_is_untouched_by_an_error(failure: str) -> None:
    error, message, loader, options = FAILURES[failure]
    model = marked(residual(norm=True))
    with unchanged(model), pytest.raises(error, match=message):
        snapped(model, loader, **{"sparsity": 0.7, **options})


def test_gradient_that_overflows_is_an_error() -> None:
    model = chain()
    message = "the sensitivity of .* is not finite|loss is|gradient"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        snapped(
            model,
            images(),
            0.5,
            forward=lambda model, batch: (
                model(batch[0]).mul(1e300).mul(1e300).tanh().sum()
            ),
        )


def test_example_inputs_stay_as_they_are() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = made(InPlace(), nn.Flatten(), nn.Linear(108, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = images()[0][0]
    before = inputs.clone()
    snapped(model, [], 0.5, inputs, method="random")
    assert torch.equal(inputs, before)


# What it is called with.


def test_model_and_batches_may_have_names_for_their_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = chain()

        def forward(self, *, pixels: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": self.network(pixels * scale)}

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model(pixels=batch["pixels"])["logits"], batch["labels"])

    x, y = images()[0]
    small = snap_prune(
        Named(),
        [{"pixels": x, "labels": y}],
        {"pixels": x[:1]},
        0.6,
        forward=forward,
        progress=False,
    )
    assert_same(small.network, snapped(chain(), images(), 0.6))


def test_microbatches_give_what_whole_batches_give() -> None:
    for build, _ in NETWORKS.values():
        whole = snapped(build(), images(), 0.6)
        assert_same(snapped(build(), images(), 0.6, microbatch=2), whole)


@pytest.mark.parametrize("score", ["importance", "snap"])
def test_no_more_samples_than_a_microbatch_pass_at_once(score: str) -> None:
    passed = set()

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        passed.add(len(batch[0]))
        return cross_entropy(model(batch[0]), batch[1])

    model, options = chain(), {"forward": forward, "microbatch": 2}
    if score == "snap":
        snapped(model, images(), 0.6, **options)
    else:
        importance = SaliencyImportance(model, images(), **options)
        importance(outputs_group(model, "0", [0]))
    assert passed == {2}


def test_loss_function_decides() -> None:
    model = chain()
    watched = snapped(model, images(), 0.6, loss_fn=lambda p, y: p[:, 0].mean())
    assert not same(watched.state_dict(), snapped(model, images(), 0.6).state_dict())


def test_no_grad_and_inference_mode_around_it_do_no_harm() -> None:
    expected = snapped(residual(), images(), 0.6)
    model = residual()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            small = snapped(model, images(), 0.6)
        assert_same(small, expected)
        assert not any(p.is_inference() for p in small.parameters())


def test_a_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    snap_prune(chain(), images(), torch.zeros(1, 3, 6, 6), 0.6, steps=2)
    assert "snap: 100%" in capsys.readouterr().err
    snapped(chain(), images(), 0.6)
    assert capsys.readouterr().err == ""


# Closed gates.


def closed_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        channels=(4, 6, 6, 8),
        num_classes=3,
        zero_init_last=True,
    )
    return model.double()


def opened_by_hand(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            assert not module.weight.any()
            nn.init.ones_(module.weight)
    return model


def inner_widths(model: nn.Module) -> list[int]:
    return [m.conv1.out_channels for m in model.modules() if hasattr(m, "conv2")]


def test_branches_behind_closed_gates_are_scored_as_if_they_were_open() -> None:
    model = closed_resnet()
    x = images(size=32)[0][0]
    batches = [(x, torch.arange(6) % 3)]
    options: dict[str, Any] = {"inputs": x, "steps": 0}
    with unchanged(model):
        small = snapped(model, batches, 0.5, **options)
        blind = snapped(model, batches, 0.5, open_gates=False, **options)
    by_hand = snapped(opened_by_hand(model), batches, 0.5, open_gates=False, **options)
    for key, value in by_hand.state_dict().items():
        if not key.endswith("bn2.weight"):
            assert torch.equal(small.state_dict()[key], value), key
        else:
            assert not small.state_dict()[key].any()
    assert inner_widths(blind) == [1, 1, 1, 1]
    assert max(inner_widths(small)) > 1


def test_no_branch_of_resnet18_is_emptied_for_its_closed_gate() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=True)
    loader = [(float_images(32)[0][0], torch.arange(6))]
    x = loader[0][0]
    small = snapped(model, loader, 0.7, x, steps=0)
    assert min(inner_widths(small)) > 1
    blind = snapped(model, loader, 0.7, x, steps=0, open_gates=False)
    assert max(inner_widths(blind)) == 1


# Networks of timm.


def small_regnet() -> nn.Module:
    config = RegNetCfg(w0=8, wa=8, wm=2.0, depth=6, group_size=4, stem_width=8)
    return RegNet(config, num_classes=3)


def regnet_channels(model: nn.Module) -> int:
    """One of each group of a convolution with groups is one channel."""
    found = model.stem.conv.out_channels
    for stage in (model.s1, model.s2, model.s3, model.s4):
        found += stage.b1.conv3.conv.out_channels
        for block in stage.children():
            assert block.conv2.conv.groups in (2, 4, 8, 16)
            found += block.conv1.conv.out_channels // block.conv2.conv.groups
            found += block.conv2.conv.out_channels // block.conv2.conv.groups
    return found


def resnet_channels(model: nn.Module) -> int:
    names = {
        "layer4.0.conv2",
        "layer3.0.conv3",
        "layer2.0.conv2",
        "layer1.0.conv2",
        "conv1.3",
        "conv1.0",
        "layer1.0.conv1",
        "layer2.0.conv1",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer4.0.conv1",
    }
    return sum(model.get_submodule(name).out_channels for name in names)


def vit_channels(model: nn.Module) -> int:
    blocks = [(b.mlp.fc1.out_features, b.attn.num_heads) for b in model.blocks]
    return model.patch_embed.proj.out_channels + sum(map(sum, blocks))


def densenet_channels(model: nn.Module) -> int:
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


TIMM: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], int]]] = {
    "test_resnet": (
        lambda: timm.create_model("test_resnet", num_classes=3),
        resnet_channels,
    ),
    "test_vit": (
        lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
        vit_channels,
    ),
    "regnet": (small_regnet, regnet_channels),
    "densenet": (
        lambda: DenseNet(growth_rate=4, block_config=(2, 2), bn_size=2, num_classes=3),
        densenet_channels,
    ),
}


@pytest.mark.parametrize("method", ["snap", "random"])
@pytest.mark.parametrize("network", TIMM)
def test_network_of_timm_becomes_smaller(network: str, method: Any) -> None:
    build, channels = TIMM[network]
    torch.manual_seed(0)
    model, loader = build(), float_images(32)
    x = loader[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = snapped(model, loader, 0.6, x[:1], steps=1, method=method)
    assert channels(small) == floor(0.4 * channels(model))
    assert small(x).shape == model(x).shape == (6, 3)
    assert small(x).isfinite().all()
    assert small.num_features == small.get_classifier().in_features
    losses = trained(small, loader)
    assert losses[-1] < losses[0]


# Two processes.


class Beside(nn.Module):
    """A layer whose channels are those of two others, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(3, 6, 1, bias=False)
        self.small = nn.Conv2d(3, 2, 1, bias=False)
        self.large = nn.Conv2d(3, 4, 1, bias=False)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.small(x), self.large(x)], 1)
        return self.last(torch.relu(self.whole(x) + both)).mean((2, 3))


def test_each_layer_of_a_set_keeps_a_channel() -> None:
    torch.manual_seed(0)
    model = Beside()
    with torch.no_grad():
        model.small.weight.mul_(1e-3)
        model.whole.weight[:2].mul_(1e-3)
    loader = [(torch.randn(8, 3, 4, 4), torch.randint(2, (8,)))]
    small = snap_prune(model, loader, loader[0][0], 0.6, progress=False)
    assert len(small.small.weight) == 1
    assert len(small.whole.weight) == len(small.large.weight) + 1 == 2


class Apart(nn.Module):
    """Layers that read a part each of what one layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1, bias=False)
        self.few = nn.Conv2d(2, 3, 1, bias=False)
        self.many = nn.Conv2d(6, 3, 1, bias=False)
        self.last = nn.Conv2d(6, 2, 1)
        self.sizes = [2, 6]

    def forward(self, x: Tensor) -> Tensor:
        few, many = torch.relu(self.first(x)).split(self.sizes, 1)
        return self.last(torch.cat([self.few(few), self.many(many)], 1)).mean((2, 3))


def apart() -> Apart:
    torch.manual_seed(0)
    model = Apart()
    with torch.no_grad():  # the two channels of the small layer are worth the least
        model.few.weight.mul_(1e-3)
    return model


def test_each_layer_that_reads_a_part_of_a_set_keeps_a_channel() -> None:
    model = apart()
    loader = [(torch.randn(8, 3, 4, 4), torch.randint(2, (8,)))]
    kept = [model.few, model.many]
    small = snap_prune(
        model, loader, loader[0][0], 0.7, ignored_layers=kept, progress=False
    )
    assert (small.few.in_channels, small.many.in_channels) == (1, 1)
    assert small(loader[0][0]).shape == (8, 2)


def test_too_few_channels_for_each_layer_to_keep_one_are_an_error() -> None:
    model = apart()
    loader = [(torch.randn(8, 3, 4, 4), torch.randint(2, (8,)))]
    kept = [model.few, model.many]
    message = "expected a lower one, as 1 channels would be left, and 2 must stay"
    with unchanged(model), pytest.raises(ValueError, match=message):
        snap_prune(
            model, loader, loader[0][0], 0.85, ignored_layers=kept, progress=False
        )


def halves(rank: int) -> list[Batch]:
    return [
        (x[rank * 3 : rank * 3 + 3], y[rank * 3 : rank * 3 + 3]) for x, y in images(2)
    ]


def run(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, (build, _) in NETWORKS.items():
        small = snapped(build(), halves(rank), 0.6, steps=2, batches=2)
        seen[name] = small.state_dict()
    wrapped = DistributedDataParallel(residual())
    seen["wrapped"] = snapped(wrapped, halves(rank), 0.6).state_dict()
    model = residual()
    torch.manual_seed(10 + rank)
    small = snapped(model, halves(rank), 0.6, method="random")
    seen["random"] = small.state_dict()
    importance = SaliencyImportance(model, halves(rank), "snip")
    seen["importance"] = {"0": importance(outputs_group(model, "0", [3, 1]))}
    loader = Broken(images()) if rank == 1 else halves(rank)
    seen["fails"] = failed(lambda: snapped(model, loader, 0.6), model)
    seen["sparsity"] = failed(
        lambda: snapped(model, halves(rank), 0.4 + 0.1 * rank, steps=0), model
    )
    other = chain(seed=rank)
    seen["weights"] = failed(lambda: snapped(other, halves(rank), 0.4, steps=0), other)
    dist.barrier()
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_take_the_same_channels_as_one(ranks: Seen, network: str) -> None:
    model = NETWORKS[network][0]()
    alone = snapped(model, images(2), 0.6, steps=2, batches=2)
    for seen in ranks:
        assert same(seen[network], alone.state_dict())


def test_two_processes_take_a_wrapped_model(ranks: Seen) -> None:
    alone = snapped(residual(), images(2), 0.6)
    for seen in ranks:
        assert same(seen["wrapped"], alone.state_dict())


def test_at_random_rank_0_decides(ranks: Seen) -> None:
    model = residual()
    torch.manual_seed(10)
    alone = snapped(model, [], 0.6, method="random")
    for seen in ranks:
        assert same(seen["random"], alone.state_dict())


def test_importance_is_that_of_the_whole_batch(ranks: Seen) -> None:
    model = residual()
    alone = SaliencyImportance(model, images(), "snip")
    expected = {"0": alone(outputs_group(model, "0", [3, 1]))}
    for seen in ranks:
        assert same(seen["importance"], expected, 1e-9)


def test_rank_that_fails_fails_all(ranks: Seen) -> None:
    assert ranks[1]["fails"].startswith("OSError: the disk is gone")
    assert ranks[0]["fails"].startswith("RankError: rank 1 of 2 failed")


@pytest.mark.parametrize("what", ["sparsity", "weights"])
def test_ranks_that_differ_are_an_error(ranks: Seen, what: str) -> None:
    for seen in ranks:
        assert seen[what].startswith("RankError")


if __name__ == "__main__":
    take_part(run)


def test_each_step_takes_the_next_batches() -> None:
    seen: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(3):
                seen.append(number)
                yield torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
    ).append(nn.Linear(16 * 16, 3))
    example = torch.randn(1, 3, 8, 8)
    snap_prune(model, Counted(), example, 0.5, steps=2, progress=False)
    assert seen == [0, 1, 2, 0]


def test_what_is_no_loader_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(TypeError, match="loader: expected an iterable of batches"):
        snap_prune(model, 5, torch.randn(1, 3, 8, 8), 0.5)


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with convolutions or lin"):
        snap_prune(nn.ReLU(), [], torch.randn(1, 3), 0.5)
