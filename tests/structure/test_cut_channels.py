"""Which channels go: a fixed point over the masks, and how they are tied."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, ResidualBlock, conv_network
from smaller_models import (
    Wrapped,
    as_trained,
    assert_same,
    convolutions,
    generator,
    images,
    mlp,
    prunable,
    random_masks,
    shrink,
    shrink_or_complain,
    size,
    vectors,
    widths,
    without,
)
from state import unchanged
from timm.layers import SqueezeExcite
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from force_plugin import apply_masks, get_masks
from force_plugin.structure.channels import Channels


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
    small: Any = shrink(model, vectors(3) if build is mlp else images(5))
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
    model: Any = nn.Sequential(
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
    model: Any = nn.Sequential(
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
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), MixedBlock(), MixedBlock()
    )
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
    model: Any = nn.Sequential(
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
    model: Any = nn.Sequential(build(3, 8, 2), nn.ReLU(), build(8, 5, 2), nn.Tanh())
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


def test_of_a_set_whose_units_are_unknown_nothing_is_removable() -> None:
    unknown = Channels("a", 4)
    assert unknown.choices.dtype == torch.int64
    assert not unknown.removable(torch.ones(4, dtype=torch.bool)).any()
