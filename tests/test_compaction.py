"""A smaller model that computes the same: without the channels that masks cut off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, ResidualBlock, conv_network, tiny_resnet
from state import unchanged
from timm.layers import SqueezeExcite
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from force_plugin import apply_masks, compact, force_prune, get_masks, make_permanent
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


def prunable(model: nn.Module) -> dict[str, nn.Module]:
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


def without(layer: nn.Module, *, rows: Any = (), columns: Any = ()) -> None:
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


# Real networks: the same outputs.


def small_vgg() -> nn.Module:
    return nn.Sequential(
        *convolutions(3, 16),
        nn.MaxPool2d(2),
        *convolutions(16, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def small_densenet() -> nn.Module:
    return timm.models.densenet.DenseNet(4, (2, 2), num_classes=5, bn_size=2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tiny_resnet": (tiny_resnet, 16),
    "test_resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 32),
    "test_convnext": (lambda: timm.create_model("test_convnext", num_classes=10), 32),
    "test_vit": (lambda: timm.create_model("test_vit", num_classes=10), 160),
    "test_efficientnet": (
        lambda: timm.create_model("test_efficientnet", num_classes=10),
        32,
    ),
    "regnetx": (lambda: timm.create_model("regnetx_002", num_classes=10), 32),
    "densenet": (small_densenet, 32),
    "vgg": (small_vgg, 16),
}


def made(name: str, trained: bool = False) -> tuple[nn.Module, Tensor]:
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    if trained:
        as_trained(model)
    return model, images(size)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_under_random_masks(name: str, trained: bool) -> None:
    model, inputs = made(name, trained)
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    if not trained:  # else there may be a constant in each of the channels
        assert size(small) < size(model)
    assert_same(model, small, inputs)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "vgg"])
def test_outputs_stay_without_rows_and_columns(name: str, trained: bool) -> None:
    model, inputs = made(name, trained)
    apply_masks(model, row_masks(model))
    small = shrink(model, inputs)
    assert size(small) < size(model)
    assert_same(model, small, inputs)


def test_outputs_stay_in_a_resnet_of_full_width() -> None:
    model = timm.create_model("resnet18", num_classes=10).double()
    apply_masks(model, row_masks(model))
    small = shrink(model, images())
    assert size(small) < 0.5 * size(model)
    assert_same(model, small, images())


def _structured(model: nn.Module) -> None:
    for layer in list(prunable(model).values())[:-1]:
        prune.ln_structured(layer, "weight", 0.4, n=2, dim=0)


def _global(model: nn.Module) -> None:
    pairs = [(layer, "weight") for layer in prunable(model).values()]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.99)


def _custom(model: nn.Module) -> None:
    for name, mask in random_masks(model, 0.03).items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", mask)


def _permanent(model: nn.Module) -> None:
    apply_masks(model, random_masks(model, 0.03))
    make_permanent(model)


def _zeros(model: nn.Module) -> None:
    apply_masks(model, random_masks(model, 0.03))
    make_permanent(model, hold_zeros=False)


def _twice(model: nn.Module) -> None:
    _custom(model)
    for layer in prunable(model).values():
        prune.l1_unstructured(layer, "weight", 0.5)


def _norms_and_biases(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            prune.l1_unstructured(module, "weight", 0.5)
            prune.l1_unstructured(module, "bias", 0.7)


def _by_force(model: nn.Module) -> None:
    batch = (images(16), torch.arange(2))
    force_prune(model, [batch], sparsity=0.9, steps=3, progress=False)


PRUNINGS: dict[str, Callable[[nn.Module], None]] = {
    "structured": _structured,
    "global": _global,
    "custom": _custom,
    "permanent": _permanent,
    "zeros": _zeros,
    "twice": _twice,
    "norms_and_biases": _norms_and_biases,
    "force": _by_force,
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_outputs_stay_however_it_was_pruned(pruning: str, trained: bool) -> None:
    model, inputs = made("tiny_resnet", trained)
    PRUNINGS[pruning](model)
    masks = get_masks(model)
    small = shrink(model, inputs)
    if not trained and pruning not in ("norms_and_biases", "force"):
        assert size(small) < size(model)
    assert set(get_masks(small)) == set(masks)
    assert prune.is_pruned(small) == prune.is_pruned(model)
    assert_same(model, small, inputs)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_channels_that_a_masked_normalisation_silences_go(trained: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ).double()
    if trained:
        as_trained(model)
    mask = torch.arange(8) % 2 == 0
    apply_masks(model, {"1.weight": mask, "1.bias": mask})
    small = shrink(model, images(8))
    assert small[0].out_channels == small[1].num_features == 4
    assert_same(model, small, images(8))


@pytest.mark.parametrize("pruning", ["random", "rows"])
def test_outputs_are_the_same_when_gates_that_were_closed_open(pruning: str) -> None:
    model, inputs = made("tiny_resnet")
    gates = [3, 7]
    for block in gates:
        nn.init.zeros_(model[block].bn2.weight)
    masks = random_masks(model, 0.03) if pruning == "random" else row_masks(model)
    apply_masks(model, masks)
    small = shrink(model, inputs)
    assert size(small) < size(model)
    # A gate does not cut off what is behind it.
    assert small[3].conv1.out_channels > 1
    for one in (model, small):
        for block in gates:
            nn.init.ones_(one[block].bn2.weight)
    assert_same(model, small, inputs)


def test_weak_weights_stay_weak_or_are_refused() -> None:
    # A mask of PyTorch may hold other values than 0 and 1.
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    mask = torch.ones(8, 6, dtype=torch.float64)
    mask[:3], mask[3] = 0, 0.5
    prune.custom_from_mask(model[0], "weight", mask)
    try:
        small = shrink(model, vectors())
    except (RuntimeError, ValueError):
        return
    assert_same(model, small, vectors())


# Which channels go: a fixed point over the masks.


def kept_channels(masks: list[Tensor]) -> list[Tensor]:
    """Of each layer's inputs, and of the last one's outputs, those that stay."""
    kept = [torch.ones(mask.shape[1], dtype=torch.bool) for mask in masks]
    kept.append(torch.ones(len(masks[-1]), dtype=torch.bool))
    flat = [mask.flatten(2).any(2) if mask.dim() > 2 else mask for mask in masks]
    before = None
    while before != (before := [int(one.sum()) for one in kept]):
        for i in range(1, len(masks)):
            written = flat[i - 1][:, kept[i - 1]].any(1)
            read = flat[i][kept[i + 1]].any(0)
            kept[i] = kept[i] & written & read
    for one in kept:
        one[0] |= not one.any()
    return kept


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


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("build", [mlp, convolutions])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    density=st.sampled_from([0.02, 0.05, 0.1, 0.2, 0.4]),
    seed=st.integers(0, 1000),
)
def test_channels_go_that_a_fixed_point_over_the_masks_cuts_off(
    build: Callable[..., nn.Sequential], hidden: list[int], density: float, seed: int
) -> None:
    model = build(3, *hidden, 2)
    masks = random_masks(model, density, seed)
    for mask in masks.values():
        mask.view(-1)[0] = True  # in PyTorch, too, nothing is no mask
    masks["0.weight"][-1] = False
    apply_masks(model, masks)
    inputs = vectors(3) if build is mlp else images(5)
    small = shrink(model, inputs)
    kept = kept_channels(list(masks.values()))
    found = [(m.weight.shape[1], m.weight.shape[0]) for m in prunable(small).values()]
    counts = [int(one.sum()) for one in kept]
    assert found == list(pairwise(counts))
    assert_same(model, small, inputs)


@pytest.mark.parametrize("build", [mlp, convolutions])
def test_values_and_masks_are_the_rows_and_columns_that_stay(
    build: Callable[..., nn.Sequential],
) -> None:
    model = build(3, 20, 20, 4).float()
    masks = random_masks(model, 0.1 if build is mlp else 0.015)
    apply_masks(model, masks)
    small = shrink(model, vectors(3) if build is mlp else images(5))
    kept = kept_channels(list(masks.values()))
    assert any(not one.all() for one in kept)
    assert list(get_masks(small)) == list(masks)
    for i, (name, layer) in enumerate(prunable(small).items()):
        original = model.get_submodule(name)
        rows, columns = kept[i + 1], kept[i]
        # Under the mask, too.
        expected = original.weight_orig[rows][:, columns]
        assert torch.equal(layer.weight_orig, expected)
        mask = masks[f"{name}.weight"][rows][:, columns]
        assert torch.equal(get_masks(small)[f"{name}.weight"], mask)
        assert torch.equal(layer.weight, expected * mask)
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    small_norms = [m for m in small if isinstance(m, nn.BatchNorm2d)]
    for one, norm, rows in zip(small_norms, norms, kept[1:], strict=bool(norms)):
        for key, value in one.state_dict().items():
            own = norm.state_dict()[key]
            assert torch.equal(value, own[rows] if own.dim() else own)


def test_channels_that_carry_a_constant_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].bias.data = torch.tensor([1.0, 1, -1, -1, 0, 0, 1, -1]).double()
    without(model[0], rows=range(6))
    small = shrink(model, vectors())
    # What ReLU makes 0 of carries none.
    assert small[0].bias.tolist() == [1, 1, 1, -1]
    assert_same(model, small, vectors())


def test_constants_that_nobody_reads_go() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    as_trained(model)
    without(model[2], columns=[1, 4])
    small = shrink(model, vectors())
    assert torch.equal(small[0].bias, model[0].bias[[0, 2, 3, 5, 6, 7]])
    assert_same(model, small, vectors())


def test_a_running_mean_of_what_was_alive_is_a_constant() -> None:
    model = convolutions(3, 8, 4)
    model[1].running_mean.fill_(-1)
    without(model[0], rows=[0, 1])
    small = shrink(model, images(6))
    assert small[0].out_channels == 8
    model[1].running_mean.fill_(1)  # below 0, and ReLU makes 0 of it
    small = shrink(model, images(6))
    assert small[0].out_channels == 6
    assert_same(model, small, images(6))


def test_channels_asleep_in_the_example_alone_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    without(model[2], columns=[0])
    small = shrink(model, torch.zeros(1, 6))
    assert small[0].out_features == 63


def test_units_behind_a_layer_normalisation_stay_even_if_they_are_mostly_asleep() -> (
    None
):
    # Whatever the signs of the weights, what is normalised is as often below 0.
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4096), nn.ReLU()
    ).append(nn.Linear(4096, 3))
    model.double()
    without(model[4], columns=[0])
    small = shrink(model, vectors(6, 1))
    assert_same(model, small, vectors())
    assert small[2].out_features == 4095


class Wrapped(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        self.layers = nn.ModuleList(layers)
        self.double()

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.layers, *inputs)


def test_units_that_sleep_where_all_else_is_positive_stay() -> None:
    torch.manual_seed(0)
    model = Wrapped(
        lambda m, x: m[1](torch.relu(-m[0](x))), nn.Linear(6, 512), nn.Linear(512, 3)
    )
    without(model.layers[1], columns=[0])
    small = shrink(model, vectors(6, 1))
    assert_same(model, small, vectors())
    assert small.layers[0].out_features == 511


@pytest.mark.parametrize("samples", [1, 2])
def test_integers_that_are_computed_with_vary_like_other_inputs(samples: int) -> None:
    torch.manual_seed(0)
    model = Wrapped(
        lambda m, x: m[1](torch.relu(m[0](x.double() - 4))),
        nn.Linear(6, 64),
        nn.Linear(64, 3),
    )
    without(model.layers[1], columns=[0])
    inputs = torch.randint(9, (samples, 6), generator=generator(), dtype=torch.uint8)
    small = shrink(model, inputs)
    assert_same(model, small, inputs)
    assert small.layers[0].out_features == 63


def test_rows_of_a_table_that_are_looked_up_by_function_vary_too() -> None:
    torch.manual_seed(0)
    model = Wrapped(
        lambda m, x: m[2](torch.relu(m[1](F.embedding(x, m[0].weight).flatten(1)))),
        nn.Embedding(9, 3),
        nn.Linear(6, 64),
        nn.Linear(64, 3),
    )
    without(model.layers[2], columns=[0])
    inputs = torch.tensor([[3, 8]])
    small = shrink(model, inputs)
    assert_same(model, small, inputs)
    assert small.layers[1].out_features == 63


def test_zeros_that_are_the_largest_of_some_channels_stay() -> None:
    torch.manual_seed(0)
    model = Wrapped(
        lambda m, x: m[1]((y := m[0](x)) * y.amax(1, keepdim=True)),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )
    without(model.layers[0], rows=[0, 1])
    with unchanged(model), pytest.raises(RuntimeError, match="output would change"):
        shrink(model, vectors())


# How channels are tied to each other.


def test_channels_of_a_residual_sum_go_if_all_that_write_them_are_gone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), ResidualBlock(8), nn.Conv2d(8, 2, 3)
    ).double()
    without(model[0], rows=[0, 1, 2, 3])
    without(model[1].conv2, rows=[2, 3, 4, 5])
    small = shrink(model, images(8))
    assert widths(small) == {
        "0": (6, 3),
        "1.conv1": (8, 6),
        "1.conv2": (6, 8),
        "2": (2, 6),
    }
    kept = [0, 1, 4, 5, 6, 7]
    assert torch.equal(small[0].weight_orig, model[0].weight_orig[kept])
    assert torch.equal(small[1].conv1.weight, model[1].conv1.weight[:, kept])
    assert torch.equal(small[1].conv2.weight_orig, model[1].conv2.weight_orig[kept])
    assert torch.equal(small[2].weight, model[2].weight[:, kept])
    assert_same(model, small, images(8))


def test_a_whole_branch_goes_but_for_a_channel() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), ResidualBlock(8), nn.Conv2d(8, 2, 3)
    ).double()
    without(model[1].conv2, rows=range(8))
    small = shrink(model, images(8))
    assert widths(small)["1.conv1"] == (1, 8)
    assert_same(model, small, images(8))


def test_channels_side_by_side_go_each_by_itself() -> None:
    model = Wrapped(
        lambda m, x: m[2](torch.cat([torch.relu(m[0](x)), torch.relu(m[1](x))], 1)),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.Conv2d(3, 6, 3, bias=False),
        nn.Conv2d(10, 2, 3),
    )
    without(model.layers[0], rows=[1])
    without(model.layers[2], columns=[1, 4, 9])
    small = shrink(model, images(8))
    assert [*widths(small).values()] == [(3, 3), (4, 3), (2, 7)]
    kept = [0, 2, 3, 5, 6, 7, 8]
    last = model.layers[2].weight_orig
    assert torch.equal(small.layers[2].weight_orig, last[:, kept])
    assert_same(model, small, images(8))


def test_halves_of_a_gated_layer_go_together() -> None:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        a, b = m[0](x).chunk(2, -1)
        return m[1](a * torch.sigmoid(b))

    model = Wrapped(forward, nn.Linear(6, 12, bias=False), nn.Linear(6, 3))
    without(model.layers[1], columns=[2])
    without(model.layers[0], rows=[0, 6, 4])
    small = shrink(model, vectors())
    # 0 as both halves are, 2 as nobody reads it, and 4 as what is gated is 0.
    first = model.layers[0].weight_orig[[1, 3, 5, 7, 9, 11]]
    assert torch.equal(small.layers[0].weight_orig, first)
    assert_same(model, small, vectors())


@pytest.mark.parametrize("axis", [1, -1])
def test_a_gate_by_function_is_cut_or_it_is_said_why_not(axis: int) -> None:
    model = Wrapped(
        lambda m, x: m[1](F.glu(m[0](x), axis)), nn.Linear(6, 12), nn.Linear(6, 3)
    )
    without(model.layers[1], columns=[2])
    shrink_or_complain(model, vectors())


@pytest.mark.parametrize("split", ["chunk", "split", "slices"])
def test_halves_however_they_are_split(split: str) -> None:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = m[0](x)
        parts = {
            "chunk": lambda: y.chunk(2, 1),
            "split": lambda: y.split(y.shape[1] // 2, 1),
            "slices": lambda: (y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]),
        }
        a, b = parts[split]()
        return m[1](a * torch.sigmoid(b))

    model = Wrapped(forward, nn.Conv2d(3, 12, 3), nn.Conv2d(6, 3, 3))
    without(model.layers[1], columns=[1, 3])
    small = shrink_or_complain(model, images(8))
    if split != "slices":
        assert small is not None
        assert [*widths(small).values()] == [(8, 3), (3, 4)]


def test_sums_with_some_of_the_channels_pass_them_on() -> None:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        y = m[0](x)
        for layer in m[1:-1]:
            wider = layer(torch.relu(y))
            some, others = wider[:, : y.shape[1]], wider[:, y.shape[1] :]
            y = torch.cat([some + y, others], 1)
        return m[-1](y)

    sizes = [3, *range(6, 60, 6), 2]  # ReXNet's blocks, as many as it has
    layers = [nn.Conv2d(*pair, 1, bias=False) for pair in pairwise(sizes)]
    model = Wrapped(forward, *layers)
    for layer in model.layers[:-1]:
        without(layer, rows=[1])
    small = shrink(model, images(4))
    assert [rows for rows, _ in widths(small).values()] == [
        *(size - 1 for size in sizes[1:-1]),
        2,
    ]
    assert_same(model, small, images(4))


def test_a_layer_keeps_a_channel_of_a_set_that_it_shares() -> None:
    model = Wrapped(
        lambda m, x: m[3](m[0](x) + torch.cat([m[1](x), m[2](x)], 1)),
        *(nn.Conv2d(3, size, 1, bias=False) for size in (6, 2, 4)),
        nn.Conv2d(6, 2, 1),
    )
    without(model.layers[3], columns=[0, 1, 4])
    small = shrink(model, images(4))
    assert [rows for rows, _ in widths(small).values()] == [4, 1, 3, 2]
    assert_same(model, small, images(4))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_module_that_keeps_the_sizes_of_a_split_has_new_ones(kind: type) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Mixed(kind([2, 6]))).double()
    without(model[0], rows=[1, 3, 4])
    small = shrink(model, images(4))
    assert (model[1].sizes, small[1].sizes) == (kind([2, 6]), kind([1, 4]))
    assert [*widths(small).values()] == [(5, 3), (3, 1), (3, 4)]
    assert_same(model, small, images(4))


class MixedBlock(nn.Module):
    """A residual block that convolves some of its channels, as in InceptionNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (2, 3, 3)
        self.depthwise = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.layer = nn.Conv2d(8, 8, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.split(self.sizes, 1)
        y = self.layer(torch.cat([a, self.depthwise(b), c], 1))
        return x + y * self.scale.view(1, -1, 1, 1)


def test_parts_of_a_residual_stream_pass_through_layers_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), MixedBlock(), MixedBlock())
    model.append(nn.Conv2d(8, 2, 1)).double()
    for layer in (model[0], model[1].layer, model[2].layer):
        without(layer, rows=[1, 3, 7])
    small = shrink(model, images(4))
    assert [rows for rows, _ in widths(small).values()] == [5, 2, 5, 2, 5, 2]
    assert small[1].sizes == small[2].sizes == (1, 2, 2)
    assert_same(model, small, images(4))


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("force_plugin.structure.dependencies.Patience.LOOKS", 0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3)).double()
    without(model[0], rows=[1])
    with unchanged(model), pytest.raises(RuntimeError, match="go together has no end"):
        shrink(model, vectors())


def test_depthwise_convolutions_pass_channels_on() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ).double()
    without(model[0], rows=[0])
    without(model[2], rows=[1])
    without(model[4], columns=[2])
    small = shrink(model, images(8))
    assert widths(small) == {"0": (5, 3), "2": (5, 1), "4": (2, 5)}
    assert small[2].groups == 5
    assert torch.equal(small[2].weight_orig, model[2].weight_orig[3:])
    assert_same(model, small, images(8))


def grouped(transposed: bool = False) -> nn.Sequential:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.ReLU(),
        kind(12, 12, 3, groups=3, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 2, 3),
    ).double()


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_keep_as_many_channels_as_the_fullest(transposed: bool) -> None:
    model = grouped(transposed)
    without(model[0], rows=[0, 1, 5, 8, 9, 10])  # 2, 1 and 3 of the groups
    without(model[4], columns=[0, 1, 2, 5, 6, 8, 11])  # 3, 2 and 2
    small = shrink(model, images(8))
    assert small[2].in_channels == 9 and small[2].groups == 3
    if not transposed:  # of which torch-pruning does not know the order
        assert small[2].out_channels == 6
    assert_same(model, small, images(8))


def test_groups_lose_other_channels_each() -> None:
    model = grouped()
    without(model[0], rows=[0, 5, 10])
    small = shrink(model, images(8))
    weight = model[2].weight.view(3, 4, 4, 3, 3)
    kept = [[1, 2, 3], [0, 2, 3], [0, 1, 3]]
    parts = [rows[:, columns] for rows, columns in zip(weight, kept, strict=True)]
    assert torch.equal(small[2].weight, torch.cat(parts))
    assert_same(model, small, images(8))


def test_groups_of_which_one_output_is_left_read_their_own_inputs() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.Conv2d(8, 8, 1, groups=4, bias=False),
        nn.Conv2d(8, 2, 1),
    ).double()
    without(model[0], rows=[0, 3, 4, 7])
    without(model[2], columns=[1, 2, 5, 6])
    small = shrink(model, images(4))
    assert [*widths(small).values()] == [(4, 3), (4, 1), (2, 4)]
    assert_same(model, small, images(4))


def test_a_group_that_nothing_is_left_of_keeps_a_channel() -> None:
    model = grouped()
    without(model[0], rows=range(12))
    with pytest.warns(UserWarning, match="disconnected"):
        small = shrink(model, images(8))
    assert small[2].in_channels == 3
    assert_same(model, small, images(8))


def test_features_of_flattened_channels_go_with_them() -> None:
    model = conv_network().double()
    mask = torch.ones(5, 4, 9)
    mask[:, 1], mask[:, 2, :8] = 0, 0
    prune.custom_from_mask(model[3], "weight", mask.flatten(1))
    small = shrink(model, images(5, 2))
    assert widths(small) == {"0": (3, 2), "3": (5, 27), "5": (3, 5)}
    weight = model[3].weight_orig.view(5, 4, 9)[:, [0, 2, 3]].flatten(1)
    assert torch.equal(small[3].weight_orig, weight)
    assert_same(model, small, images(5, 2))


def test_a_squeeze_and_excitation_loses_channels_with_what_it_scales() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.ReLU(),
        SqueezeExcite(16, rd_channels=4),
        nn.Conv2d(16, 2, 3),
    ).double()
    as_trained(model)
    without(model[0], rows=[0, 1])
    without(model[2].fc2, columns=[3])
    without(model[3], columns=[5])
    small = shrink(model, images(8))
    # The gate of channel 5 needs it.
    assert small[0].out_channels == 14
    assert small[2].fc1.out_channels == small[2].fc2.in_channels == 3
    assert_same(model, small, images(8))


KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, (2, 3, 9)),
    "2d": (nn.Conv2d, (2, 3, 9, 9)),
    "3d": (nn.Conv3d, (2, 3, 7, 7, 7)),
    "transposed_1d": (nn.ConvTranspose1d, (2, 3, 9)),
    "transposed_2d": (nn.ConvTranspose2d, (2, 3, 9, 9)),
    "transposed_3d": (nn.ConvTranspose3d, (2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_of_all_kinds(kind: str) -> None:
    build, shape = KINDS[kind]
    model = nn.Sequential(build(3, 8, 2), nn.ReLU(), build(8, 5, 2), nn.Tanh())
    model.append(build(5, 4, 2)).double()
    inputs = torch.randn(shape, generator=generator()).double()
    axis = int("transposed" in kind)
    masks = {}
    for layer, gone in ((0, [1, 2]), (2, [0])):
        mask = torch.ones_like(model[layer].weight, dtype=torch.bool)
        mask.transpose(0, axis)[gone] = False
        model[layer].bias.data[gone] = 0
        masks[f"{layer}.weight"] = mask
    apply_masks(model, masks)
    small = shrink(model, inputs)
    found = [(m.in_channels, m.out_channels) for m in prunable(small).values()]
    assert found == [(3, 6), (6, 4), (4, 4)]
    assert_same(model, small, inputs)


def attention(heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), Attention(16, heads), nn.Linear(16, 3)
    )
    return model.double()


def test_a_head_that_nobody_reads_goes() -> None:
    model, inputs = attention(), torch.randn(2, 5, 6).double()
    without(model[2].proj, columns=[4, 5, 6, 7])
    small = shrink(model, inputs)
    assert small[2].num_heads == 3
    assert widths(small)["2.qkv"] == (36, 16) and widths(small)["2.proj"] == (16, 12)
    kept = [0, 1, 2, 3, *range(8, 16)]
    rows = [part + channel for part in (0, 16, 32) for channel in kept]
    assert torch.equal(small[2].qkv.weight, model[2].qkv.weight[rows])
    assert torch.equal(small[2].proj.weight_orig, model[2].proj.weight_orig[:, kept])
    assert_same(model, small, inputs)


def test_attention_over_five_axes_is_no_obstacle_to_what_is_beside_it() -> None:
    torch.manual_seed(0)
    block = timm.models.nest.TransformerLayer(16, num_heads=4)
    model = nn.Sequential(nn.Linear(6, 16), block, nn.Linear(16, 3)).double()
    inputs = torch.randn(2, 3, 5, 6).double()  # the parts of an image are an axis
    without(block.mlp.fc2, columns=[0, 1, 5])
    small = shrink(model, inputs)
    assert small[1].mlp.fc1.out_features == 61
    assert_same(model, small, inputs)


def test_samples_may_be_repeated_on_the_way() -> None:
    model = Wrapped(
        lambda m, x: m[1](torch.relu(m[0](x)).repeat_interleave(2, dim=0)),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )
    inputs = torch.randn(4, 2, 2, 6).double()
    without(model.layers[0], rows=[0, 1])
    small = shrink(model, inputs)
    assert small.layers[0].out_features == 6
    assert_same(model, small, inputs)


def test_a_head_stays_for_one_channel_that_is_read() -> None:
    model, inputs = attention(), torch.randn(2, 5, 6).double()
    without(model[2].proj, columns=[4, 5, 6, 8, 9, 10, 11])
    small = shrink(model, inputs)
    assert small[2].num_heads == 3
    assert_same(model, small, inputs)


def test_channels_of_a_layer_normalisation_stay() -> None:
    model, inputs = attention(), torch.randn(2, 5, 6).double()
    model[0].bias.data.zero_()
    without(model[0], rows=[0, 1, 2])
    small = shrink(model, inputs)
    assert size(small) == size(model)
    assert_same(model, small, inputs)


# Models of all kinds: the same outputs, or it is said why not.


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


class Called(nn.Module):
    """A module that is called twice between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 8, bias=False), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(y)))))


class Two(nn.Module):
    """Two inputs; a dictionary with a tuple and a dictionary in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(4, 8, bias=False)
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Any]:
        y = torch.relu(self.a(x)) + torch.relu(self.b(other))
        return {"two": (self.c(y), {"d": self.d(y)}), "name": "two", "none": None}


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False)
    )
    model[2].weight = model[0].weight
    return model.append(nn.Linear(6, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.ReLU()).append(
        nn.Linear(12, 4)
    )


def tied_tokens() -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)
    ).append(nn.Linear(8, 9, bias=False))
    model[4].weight = model[0].weight
    return model


def shuffled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 3)
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3)
    ).extend([nn.InstanceNorm2d(8), nn.PReLU(8), nn.Upsample(9), nn.Conv2d(8, 3, 3)])


def over_channels() -> nn.Module:
    return Wrapped(
        lambda m, x: m[1](m[0](x).softmax(1) + m[0](x).mean(1, keepdim=True)),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )


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


def multihead() -> nn.Module:
    return Wrapped(
        lambda m, x: m[2](m[1](y := m[0](x), y, y)[0]),
        nn.Linear(6, 8, bias=False),
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.Linear(8, 3),
    )


def features() -> nn.Module:
    return timm.create_model("test_resnet", features_only=True)


def parametrised(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), norm(nn.Linear(8, 8)), nn.Linear(8, 3)
    )


def sequences() -> Tensor:
    return torch.randn(2, 5, 6, generator=generator()).double()


def numbers() -> Tensor:
    return torch.arange(9).view(3, 3)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "called_twice": (Called, vectors()),
    "tied": (tied, vectors()),
    "two_by_name": (Two, {"x": vectors(), "other": vectors(4)}),
    "two_in_order": (Two, (vectors(), vectors(4))),
    "tokens": (tokens, numbers()),
    "tied_tokens": (tied_tokens, numbers()),
    "shuffled": (shuffled, images(8)),
    "normalised": (normalised, images(8)),
    "over_channels": (over_channels, vectors()),
    "fixed_shape": (fixed_shape, vectors()),
    "gru": (recurrent(nn.GRU), sequences()),
    "lstm": (recurrent(nn.LSTM), sequences()),
    "multihead": (multihead, sequences()),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(6, 2, 16, 0, batch_first=True),
        sequences(),
    ),
    "features": (features, images()),
    "layer": (lambda: nn.Linear(6, 3), vectors()),
    "weight_norm": (
        parametrised(torch.nn.utils.parametrizations.weight_norm),
        vectors(),
    ),
    "spectral_norm": (
        parametrised(torch.nn.utils.parametrizations.spectral_norm),
        vectors(),
    ),
}

SHRINK = {"called_twice", "two_by_name", "two_in_order", "tokens", "tied_tokens"}
SHRINK |= {"encoder", "features"}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("masks", ["random", "rows"])
@pytest.mark.parametrize("case", MODELS)
def test_outputs_stay_or_it_is_said_why_not(
    case: str, masks: str, trained: bool
) -> None:
    build, inputs = MODELS[case]
    torch.manual_seed(0)
    model = build().double().eval()
    if trained:
        as_trained(model)
    known = {name for name, _ in model.named_parameters()}
    made = random_masks(model, 0.15) if masks == "random" else row_masks(model)
    apply_masks(model, {name: mask for name, mask in made.items() if name in known})
    small = shrink_or_complain(model, inputs)
    if case in SHRINK and masks == "rows" and not trained:
        assert small is not None and size(small) < size(model)


def test_a_mask_on_one_owner_of_a_weight_is_not_put_on_the_other() -> None:
    model = tied().double()
    without(model[0], rows=[0, 1])
    model[2].weight = model[0].weight_orig
    shrink_or_complain(model, vectors())


def test_weights_that_stay_tied_are_one_parameter() -> None:
    model = tied_tokens().double()
    without(model[1], rows=[0, 1])
    model[1].bias.data[:2] = 0
    small = shrink(model, numbers())
    assert small[1].out_features == 10
    assert small[4].weight is small[0].weight is not model[0].weight


def test_a_layer_that_is_called_in_training_only_still_fits() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
            self.auxiliary = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y) + self.auxiliary(y) if self.training else self.b(y)

    model = Auxiliary().double()
    without(model.a, rows=[0, 1])
    small = shrink_or_complain(model, vectors())
    if small is not None:
        torch.testing.assert_close(
            small.train()(vectors()), model.train()(vectors()), rtol=1e-10, atol=1e-10
        )


def test_outputs_that_are_infinite_are_compared_too() -> None:
    hidden = torch.tensor([False, True, False])
    model = Wrapped(
        lambda m, x: m[1](torch.relu(m[0](x))).masked_fill(hidden, -torch.inf),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 3),
    )
    without(model.layers[0], rows=[0, 1])
    small = shrink(model, vectors())
    assert small.layers[0].out_features == 6
    assert_same(model, small, vectors())


def test_sets_that_cannot_be_cut_stay_beside_those_that_can() -> None:
    model = Wrapped(
        lambda m, x: m[2](torch.relu(m[1](m[0](x).view(-1, 4, 2).flatten(1)))),
        nn.Linear(6, 8, bias=False),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 3),
    )
    without(model.layers[0], rows=[1, 2, 3])
    without(model.layers[1], rows=[0])
    with pytest.warns(UserWarning, match=r"^1 of 2 sets .* layers\.0, for one"):
        small = shrink(model, vectors())
    assert [*widths(small).values()] == [(8, 6), (7, 8), (3, 7)]
    assert_same(model, small, vectors())


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_small_outputs_are_compared_as_strictly_as_large_ones(scale: float) -> None:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(12)]

    def share(m: Any, x: Tensor) -> Tensor:
        for layer in m[:-1]:
            x = torch.relu(layer(x))
        return m[-1](x / x.shape[1])

    model = Wrapped(share, *layers, nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(scale * torch.rand(8, 8))
    without(layers[-1], rows=[0, 1])
    assert (float(outputs(model.double(), vectors(8))[0].abs().max()) > 1e-10) == (
        scale == 1
    )
    with unchanged(model), pytest.raises(RuntimeError, match=r"change by 0\.333"):
        shrink(model, vectors(8))


# What stays, and what is left when all is cut off.


@pytest.mark.parametrize("name", ["tiny_resnet", "regnetx", "densenet", "vgg"])
def test_a_channel_stays_everywhere_and_it_is_told(name: str) -> None:
    model, inputs = made(name)
    masks = {f"{n}.weight": torch.zeros(()) for n in prunable(model)}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    apply_masks(model, {n: mask.expand(shapes[n]) for n, mask in masks.items()})
    with pytest.warns(UserWarning, match="the masks have disconnected the network"):
        small = shrink(model, inputs)
    found = widths(small)
    assert min(min(pair) for pair in found.values()) == 1
    assert size(small) < 0.1 * size(model)
    assert found[next(iter(found))][1] == 3
    assert_same(model, small, inputs)


def test_units_that_are_asleep_are_no_disconnection() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    without(model[0], rows=[1])
    with torch.no_grad():
        model[0].bias.fill_(-100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(model, vectors())


def test_a_network_that_is_connected_warns_of_nothing() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(model, inputs)


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("name", ["tiny_resnet", "test_resnet", "test_vit"])
def test_a_second_time_takes_out_nothing_more(name: str) -> None:
    model, inputs = made(name)
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    again = shrink(small, inputs)
    assert widths(again) == widths(small) != widths(model)
    expected = small.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key])


def test_masks_that_cut_off_nothing_give_a_copy() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.9))
    small = shrink(model, inputs)
    state, expected = small.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert not {*map(id, small.parameters())} & {*map(id, model.parameters())}


# The original and the process around it.


def hooked(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with hooks, modes, gradients and a frozen layer."""
    torch.manual_seed(seed)
    model = tiny_resnet()
    apply_masks(model, random_masks(model, 0.02))
    model(images(16).float()).sum().backward()
    model[3].eval()
    model[0].weight_orig.requires_grad_(False)
    model[4].register_forward_hook(print_nothing)
    return model, images(16)


def print_nothing(*_: object) -> None: ...


def test_the_original_is_untouched() -> None:
    model, inputs = hooked()
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shrink(model, inputs)


@pytest.mark.parametrize("pruning", ["structured", "permanent", "zeros", "force"])
def test_the_original_is_untouched_however_it_was_pruned(pruning: str) -> None:
    model, inputs = made("tiny_resnet")
    PRUNINGS[pruning](model)
    model(inputs).sum().backward()
    with unchanged(model):
        shrink(model, inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_can_be_called_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    with mode():
        small = shrink(model, inputs)
    assert size(small) < size(model)
    small.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_examples_are_not_changed_and_may_be_of_any_number() -> None:
    model = mlp(6, 12, 3)
    without(model[0], rows=[0, 1])
    for samples in (1, 2, 7):
        inputs = vectors(samples=samples)
        before = inputs.clone()
        assert shrink(model, inputs)[0].out_features == 10
        assert torch.equal(inputs, before) and not inputs.requires_grad


def test_the_same_call_gives_the_same_model() -> None:
    model, inputs = made("test_resnet")
    apply_masks(model, random_masks(model, 0.03))
    one = shrink(model, inputs)
    torch.manual_seed(17)
    other = shrink(model, inputs)
    assert widths(one) == widths(other)


WRONG: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "not_pruned": (conv_network, images(5, 2), ValueError, r"^compact: .*without any"),
    "no_module": (lambda: 3, vectors(), TypeError, r"^model: expected a torch\.nn"),
    "class": (lambda: nn.Linear, vectors(), TypeError, r"^model: .*got type"),
    "no_tensor": (lambda: pruned(), "images", TypeError, r"^example_inputs: .*a str"),
    "nothing": (lambda: pruned(), None, TypeError, r"^example_inputs: expected"),
    "empty": (lambda: pruned(), (), TypeError, r"^example_inputs: .*a tuple of 0"),
    "shape": (
        lambda: pruned(),
        vectors(3),
        RuntimeError,
        r"^Sequential cannot be run with example_inputs.*The model is as it was$",
    ),
    "names": (
        lambda: pruned(),
        {"y": vectors()},
        RuntimeError,
        r"^Sequential cannot be run .*'y'.*The model is as it was$",
    ),
    "untraceable": (
        lambda: pruned(recurrent(nn.GRU)(), "layers.0"),
        sequences(),
        RuntimeError,
        r"^torch-pruning cannot trace Wrapped, .* GRU. The model is as it was$",
    ),
    "fixed": (
        lambda: pruned(fixed_shape(), "layers.0"),
        vectors(),
        RuntimeError,
        r"^Wrapped: none of the channels .*The model is as it was$",
    ),
}


def pruned(model: nn.Module | None = None, layer: str = "0") -> nn.Module:
    model = model or mlp(6, 8, 3)
    without(model.get_submodule(layer), rows=[0, 1, 2])
    return model


@pytest.mark.parametrize("case", WRONG)
def test_an_error_says_what_is_wrong_and_leaves_the_model(case: str) -> None:
    build, inputs, error, message = WRONG[case]
    model = build()
    watched = model if isinstance(model, nn.Module) else nn.ReLU()
    with unchanged(watched), pytest.raises(error, match=message):
        shrink(model, inputs)


# The smaller model.


def test_modes_and_frozen_parameters_are_those_of_the_original() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, row_masks(model))
    model.train()
    model[3].eval()
    model[4].weight_orig.requires_grad_(False)
    small = shrink(model, inputs)
    for (name, one), (other, own) in zip(
        small.named_modules(), model.named_modules(), strict=True
    ):
        assert name == other and one.training is own.training
    frozen = [n for n, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["4.weight_orig"]
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype) -> None:
    model = tiny_resnet().to(dtype)
    apply_masks(model, row_masks(model))
    small = shrink(model, images(16))
    expected = {k: v.dtype for k, v in model.state_dict().items()}
    assert {k: v.dtype for k, v in small.state_dict().items()} == expected
    assert size(small) < size(model)
    # Bit for bit, under the mask and not: nothing of it went through another type.
    own = {n: {*p.flatten().tolist()} for n, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        assert {*parameter.flatten().tolist()} <= own[name]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("permanent", [False, True])
def test_parameters_keep_names_and_order(name: str, permanent: bool) -> None:
    model, inputs = made(name)
    apply_masks(model, row_masks(model))
    order = [n for n, _ in model.named_parameters()]
    if permanent:
        make_permanent(model)
        order = [n for n, _ in model.named_parameters()]
    small = shrink(model, inputs)
    assert [n for n, _ in small.named_parameters()] == order
    assert list(small.state_dict()) == list(model.state_dict())
    for (_, one), (_, own) in zip(
        small.named_parameters(), model.named_parameters(), strict=True
    ):
        assert one.dim() == own.dim() and one.numel() <= own.numel()


@pytest.mark.parametrize("permanent", [False, True])
def test_what_is_pruned_stays_0_in_training(permanent: bool) -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.05))
    if permanent:
        make_permanent(model)
    small = shrink(model, inputs).train()
    masks = get_masks(small)
    assert any(not mask.all() for mask in masks.values())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(small(inputs), torch.tensor([1, 2])).backward()
        optimizer.step()
    small(inputs)
    for name, mask in masks.items():
        module, _, key = name.rpartition(".")
        assert not getattr(small.get_submodule(module), key)[~mask].any()
    after = dict(small.named_parameters())
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_it_can_be_copied_and_pruned_further() -> None:
    model, inputs = made("tiny_resnet")
    apply_masks(model, random_masks(model, 0.03))
    small = shrink(model, inputs)
    small(inputs)
    copied = copy.deepcopy(small)
    assert_same(small, copied, inputs)
    force_prune(
        copied, [(inputs, torch.arange(2))], sparsity=0.99, steps=1, progress=False
    )
    for name, mask in get_masks(copied).items():
        assert not (mask & ~get_masks(small)[name]).any()


def test_timm_models_know_the_width_of_their_new_head() -> None:
    model, inputs = made("test_resnet")
    without(model.fc, columns=range(60))
    small = shrink(model, inputs)
    width = small.get_classifier().in_features
    assert width < model.get_classifier().in_features == model.num_features
    assert small.num_features == width
    assert small.forward_head(small.forward_features(inputs), True).shape == (2, width)
    small.reset_classifier(7)
    small.double()
    assert small(inputs).shape == (2, 7)


def test_layers_that_count_channels_count_those_that_stay() -> None:
    model, inputs = made("regnetx")
    apply_masks(model, row_masks(model))
    for module in shrink(model, inputs).modules():
        if isinstance(module, nn.Conv2d):
            rows, columns = module.weight.shape[:2]
            assert module.out_channels == rows
            assert module.in_channels == columns * module.groups
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


def losses(model: nn.Module, steps: int, momentum: float = 0.0) -> list[float]:
    inputs = images(6) if isinstance(model[0], nn.Conv2d) else vectors(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs).flatten(1).mean(1), torch.ones(2).double())
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("build", [mlp, convolutions])
def test_it_trains_as_the_masked_model_does(
    build: Callable[..., nn.Sequential], momentum: float
) -> None:
    torch.manual_seed(1)
    model = build(3, 40, 40, 4) if build is mlp else build(3, 20, 20, 4)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.bias.requires_grad_(False)
    apply_masks(model, random_masks(model, 0.3 if build is mlp else 0.04))
    small = shrink(model, _inputs(build))
    assert size(small) < 0.8 * size(model)
    expected = losses(model, 6, momentum)
    assert expected[-1] < expected[0]
    assert losses(small, 6, momentum) == pytest.approx(expected, rel=1e-8)


def _inputs(build: object) -> Tensor:
    return vectors(3) if build is mlp else images(6)


def test_channels_that_nobody_reads_are_not_missed_in_training() -> None:
    torch.manual_seed(0)
    model = convolutions(3, 12, 12, 4)
    as_trained(model)
    without(model[3], columns=[0, 1, 5])
    without(model[6], columns=[2, 3, 4, 7])
    small = shrink(model, images(6))
    assert [*widths(small).values()] == [(9, 3), (8, 9), (4, 8)]
    assert losses(small, 5) == pytest.approx(losses(model, 5), rel=1e-8)


def test_progress_is_shown_unless_it_is_not_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shrink(pruned(), vectors())
    assert capsys.readouterr() == ("", "")
    compact(pruned(), vectors())
    shown = capsys.readouterr()
    assert "compact" in shown.err and "100%" in shown.err and not shown.out


@pytest.mark.parametrize("round_to", [1, 4, 8, 64])
def test_a_multiple_stays_as_far_as_there_are_that_many(round_to: int) -> None:
    model = mlp(6, 24, 3)
    without(model[0], rows=[*range(0, 22, 2)])
    small = compact(model, vectors(6), round_to=round_to, progress=False)
    stay = {1: 13, 4: 16, 8: 16, 64: 24}[round_to]
    assert small[0].out_features == small[2].in_features == stay
    assert_same(model, small, vectors(6))


def test_what_is_rounded_to_must_be_a_number_above_0() -> None:
    with pytest.raises(ValueError, match="round_to: expected at least 1, got 0"):
        compact(pruned(), vectors(6), round_to=0)


def test_outputs_that_are_nan_cannot_be_compared() -> None:
    model = pruned()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="its outputs are NaN"):
        compact(model, vectors(6), progress=False)
