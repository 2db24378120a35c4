"""Channels by what they mean to the loss, for torch-pruning's pruners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from channel_sets import (
    HEAD,
    Counted,
    chain,
    depthwise,
    float_images,
    graph_of,
    images,
    made,
    marked,
    outputs_group,
    residual,
    trained,
)
from state import unchanged
from torch import Tensor, nn

from force_plugin import SaliencyImportance, saliency


class Joined(nn.Module):
    """Two convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


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
    model: Any = SUMS[network][0]()
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


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruner_prunes_a_residual_network_in_steps(pruner: str) -> None:
    kind, options = PRUNERS[pruner]
    model: Any = residual(norm=True).float()
    loader = Counted(float_images())
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
