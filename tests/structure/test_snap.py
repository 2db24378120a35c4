"""SNAP-it: which channels go, and how many stay."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from math import floor
from typing import Any

import pytest
import timm
import torch
from channel_sets import (
    CHAIN,
    HEAD,
    NETWORKS,
    Batch,
    Counted,
    Sets,
    assert_same,
    chain,
    counts,
    float_images,
    images,
    made,
    naive_snap,
    residual,
    snapped,
    trained,
)
from state import same, unchanged
from timm.models.densenet import DenseNet
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import snap_prune


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


def assert_cut(
    small: nn.Module, model: nn.Module, sets: Sets, kept: dict[str, Tensor]
) -> None:
    """The values of the layers are those of the channels that stay, bit for bit."""
    for layer in {**sets.writes, **sets.reads}:
        before: Any = model.get_submodule(layer)
        after: Any = small.get_submodule(layer)
        everything = torch.ones(len(before.weight)).bool()
        stay = kept.get(sets.writes.get(layer, ""), everything)
        weight = before.weight[stay]
        if before.weight.shape[1] > 1:
            columns = kept.get(sets.reads.get(layer, ""), torch.ones(1).bool())
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


def test_heads_and_features_of_a_transformer_have_a_gate_each() -> None:
    model: Any = small_vit()
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
    small: Any = snapped(model, [(x, y)], 0.62, x, steps=0)
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
    small: Any = snapped(Two().double(), images(), 0.6, steps=0, forward=forward)
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
    small: Any = snapped(model, images(), possible, steps=0)
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
    model: Any = perceptron(4, 12)
    torch.manual_seed(0)
    kept = torch.zeros(16)
    for _ in range(60):
        small: Any = snapped(model, [], 0.5, method="random", steps=0)
        for place, layer in ((0, 1), (4, 3)):
            whole, rest = model[layer].bias, small[layer].bias
            kept[place : place + len(whole)] += torch.isin(whole, rest)
    assert kept.min() > 15 and kept.max() < 47
    assert 0.35 < kept[:4].mean() / 60 < 0.65


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


def inner_widths(model: Any) -> list[int]:
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


def regnet_channels(model: Any) -> int:
    """One of each group of a convolution with groups is one channel."""
    found = model.stem.conv.out_channels
    for stage in (model.s1, model.s2, model.s3, model.s4):
        found += stage.b1.conv3.conv.out_channels
        for block in stage.children():
            assert block.conv2.conv.groups in (2, 4, 8, 16)
            found += block.conv1.conv.out_channels // block.conv2.conv.groups
            found += block.conv2.conv.out_channels // block.conv2.conv.groups
    return found


def resnet_channels(model: Any) -> int:
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


def vit_channels(model: Any) -> int:
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
    small: Any = snap_prune(model, loader, loader[0][0], 0.6, progress=False)
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


def test_what_is_no_loader_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(TypeError, match="loader: expected an iterable of batches"):
        snap_prune(model, 5, torch.randn(1, 3, 8, 8), 0.5)  # type: ignore[arg-type]


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with convolutions or lin"):
        snap_prune(nn.ReLU(), [], torch.randn(1, 3), 0.5)
