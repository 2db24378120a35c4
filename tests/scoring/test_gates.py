"""Closed gates are opened while scoring, and nothing else is.

What is expected comes from a copy of the network whose gates were opened by hand, and
which is scored with ``open_gates=False``: bit for bit the same scores.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from state import unchanged
from timm.layers import LayerScale
from timm.models import convnext, nfnet, regnet, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import SaliencyMethod, SparsityReport, force_prune, saliency
from force_plugin.scoring.probe import Probe

EVERY_METHOD = ["force", "iter_snip", "snip", "grasp", "grasp_it", "snip_it", "synflow"]

NORMS = "normalisation weights"
SCALES = "branch scales"
WEIGHTS = "prunable weights"

Batch = tuple[Tensor, Tensor]
Join = Callable[..., Tensor]


def images(count: int = 4, size: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return [(inputs, torch.arange(count) % 10)]


def vectors() -> list[Batch]:
    inputs = torch.linspace(0, 9, 40, dtype=torch.float64).view(8, 5).sin()
    return [(inputs, torch.arange(8) % 4)]


def scored(
    model: nn.Module, method: str | type[SaliencyMethod] = "snip", **options: Any
) -> dict[str, Tensor]:
    return saliency(model, vectors(), method, **options)


def assert_same(scores: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit, and in the same order."""
    assert list(scores) == list(expected)
    assert [n for n in expected if not torch.equal(scores[n], expected[n])] == []


def opened_by_hand(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in which these parameters are 1."""
    model = deepcopy(model)
    for name in names:
        nn.init.ones_(model.get_parameter(name))
    return model


def named_in(report: SparsityReport) -> dict[str, list[str]]:
    """The gates that a report names, by kind."""
    pattern = (
        r"gates opened while scoring: (\d+) ([a-z ]+) (?:of 0|of at most \S+), set to "
        r"(?:1|a random initialisation) \((.*)\)"
    )
    found = {}
    for text in report.warnings:
        if "gates opened" in text:
            count, kind, names = re.fullmatch(pattern, text).groups()
            assert kind not in found
            found[kind] = names.split(", ")
            assert len(found[kind]) == int(count)
    return found


def gates_of(
    model: nn.Module, batches: list[Batch] | None = None, **options: Any
) -> dict[str, list[str]]:
    """The gates that a pruning of a copy reports, by kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = force_prune(
            deepcopy(model),
            batches or vectors(),
            0.0,
            method="snip",
            progress=False,
            **options,
        )
    return named_in(report)


def assert_opens(
    model: nn.Module,
    names: Sequence[str],
    kind: str,
    *,
    method: str | type[SaliencyMethod] = "snip",
    **options: Any,
) -> None:
    """Scored is the network with exactly these gates at 1, and it stays as it is."""
    with unchanged(model):
        scores = scored(model, method, **options)
    expected = scored(opened_by_hand(model, names), method, open_gates=False, **options)
    assert_same(scores, expected)
    assert [name for name, score in scores.items() if not score.any()] == []
    assert gates_of(model, **options) == {kind: list(names)}


def assert_opens_nothing(model: nn.Module, **options: Any) -> None:
    with unchanged(model):
        scores = scored(model, **options)
    assert_same(scores, scored(model, open_gates=False, **options))
    assert gates_of(model, **options) == {}


@pytest.fixture(scope="module")
def closed() -> nn.Module:
    """ResNet-18 as timm initialises it: the last norm of each block is 0."""
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10)


@pytest.fixture(scope="module")
def opened(closed: nn.Module) -> nn.Module:
    """The same network with these norms at 1, as PyTorch initialises them."""
    model = deepcopy(closed)
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            assert not module.weight.any()
            nn.init.ones_(module.weight)
    return model


class Block(nn.Module):
    """Two layers with a norm after each, around a skip connection."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = norm(6)
        self.second = nn.Linear(6, 6)
        self.gate = norm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.second(torch.relu(self.norm(self.first(x)))))


def residual(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    """A small network with one closed gate, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Block(norm), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].gate.weight)
    return model


class Gated(nn.Module):
    """A branch and a parameter that may close it; the names do not tell.

    Args:
        gate: The parameter's values.
        join: Trunk, branch, gate and what else there is to one tensor.
        maps: Convolutions on maps of 6 channels instead of linear layers.
        more: Other modules, and values of other parameters, by name.
    """

    def __init__(
        self, gate: Tensor, join: Join, *, maps: bool = False, **more: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        if maps:
            self.k1 = nn.Sequential(
                nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 6, 3, padding=1)
            )
            self.k2 = nn.Sequential(
                nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)
            )
            self.k3 = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
        else:
            self.k1 = nn.Linear(5, 6)
            self.k2 = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self.k3 = nn.Linear(6, 4)
        self.q7 = nn.Parameter(gate)
        self.join, self.more = join, list(more)
        for name, it in more.items():
            setattr(self, name, nn.Parameter(it) if isinstance(it, Tensor) else it)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.k1(x)
        more = [getattr(self, name) for name in self.more]
        return self.k3(self.join(x, self.k2(x), self.q7, *more))


def scaled(x: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return x + f * g


def gated_by(last: nn.Module, *, maps: bool = False) -> Gated:
    """A network with this module at the end of its branch."""
    ones = torch.ones(())
    return Gated(ones, lambda x, f, g, last: x + g * last(f), maps=maps, last=last)


# Gates of every make.

SPELLINGS: dict[str, Join] = {
    "f * g": scaled,
    "g * f": lambda x, f, g: x + g * f,
    "f.mul(g)": lambda x, f, g: f.mul(g) + x,
    "f.mul_(g)": lambda x, f, g: x + f.mul_(g),
    "f *= g, then x += f": lambda x, f, g: x.clone().add_(f.mul_(g)),
    "torch.mul": lambda x, f, g: torch.add(torch.mul(f, g), x),
    "torch.multiply": lambda x, f, g: x + torch.multiply(g, f),
    "torch.einsum": lambda x, f, g: x + torch.einsum("bc,c->bc", f, g.expand(6)),
    "addcmul(x, g, f)": lambda x, f, g: torch.addcmul(x, g, f),
    "addcmul(x, f, g)": lambda x, f, g: torch.addcmul(x, f, g),
    "addcmul_": lambda x, f, g: x.clone().addcmul_(f, g),
    "torch.lerp": lambda x, f, g: torch.lerp(x, f, g.expand_as(f)),
    "lerp_": lambda x, f, g: x.clone().lerp_(f, g.expand_as(f)),
}


@pytest.mark.parametrize("value", [1e-4, 1e-6, -1e-6])
def test_a_scale_that_nearly_closes_a_branch_is_a_gate(value: float) -> None:
    assert_opens(Gated(torch.full((6,), value), scaled), ["q7"], SCALES)


@pytest.mark.parametrize("value", [1e-5, 0.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_closed_scale_is_a_gate_however_it_is_multiplied(
    spelling: str, value: float
) -> None:
    model = Gated(torch.full((6,), value), SPELLINGS[spelling])
    assert_opens(model, ["q7"], SCALES)


@pytest.mark.parametrize("value", [1e-5, 0.0])
@pytest.mark.parametrize(
    ("shape", "maps"),
    [
        ((), False),
        ((1,), False),
        ((6,), False),
        ((1, 6), False),
        ((8, 6), False),
        ((), True),
        ((6, 1, 1), True),
        ((1, 6, 1, 1), True),
        ((1, 6, 1, 5), True),
    ],
)
def test_a_scale_of_any_shape_is_a_gate(
    shape: tuple[int, ...], maps: bool, value: float
) -> None:
    assert_opens(Gated(torch.full(shape, value), scaled, maps=maps), ["q7"], SCALES)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "abs": torch.abs,
    "expm1": torch.expm1,
    "neg": torch.neg,
    "times a constant": lambda g: g * torch.linspace(0.5, 2, 6, dtype=g.dtype),
    "halved": lambda g: g / 2,
    "cast": lambda g: g.float().to(g.dtype),
    "expanded": lambda g: g[None, :].expand(8, 6),
    "put together": lambda g: torch.cat([g[:3], g[3:]]).clone(),
    "a row of a table": lambda g: torch.stack([g, torch.ones_like(g)])[0],
}


@pytest.mark.parametrize("how", MADE)
def test_a_gate_may_be_made_of_a_parameter(how: str) -> None:
    model = Gated(torch.zeros(6), lambda x, f, g: x + MADE[how](g) * f)
    assert_opens(model, ["q7"], SCALES)


def test_a_gate_that_is_a_sum_of_parameters_is_made_of_all_of_them() -> None:
    model = Gated(
        torch.zeros(6),
        lambda x, f, g, also: x + f * (g + also),
        also=torch.full((6,), 1e-3),
    )
    assert_opens(model, ["q7", "also"], SCALES)


def test_of_the_factors_of_a_gate_the_closed_ones_are_opened() -> None:
    model = Gated(
        torch.zeros(6),
        lambda x, f, g, other: x + f * (g * other),
        other=torch.full((6,), 0.3),
    )
    assert_opens(model, ["q7"], SCALES)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation with a gain, as in normaliser-free networks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.q7 = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))
        self.register_buffer("constant", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.view(1, self.out_channels, -1),
            None,
            None,
            weight=(self.q7 * self.constant).view(-1),
            training=True,
        )
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class HandStandardisedConv(StandardisedConv):
    """The same with the mean and the variance written out."""

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3)
        variance, mean = torch.var_mean(self.weight, dims, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        weight = weight * (self.q7 * self.constant)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    ("conv", "kind"), [(StandardisedConv, NORMS), (HandStandardisedConv, SCALES)]
)
def test_the_gain_of_a_standardised_weight_is_a_gate(
    conv: type[nn.Conv2d], kind: str
) -> None:
    model = Gated(torch.ones(()), lambda x, f, g: x + f, maps=True)
    model.k2[2] = conv(6, 6, 3, padding=1).double()
    assert_opens(model, ["k2.2.q7"], kind)


NORMALISATIONS: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), False, NORMS),
    "BatchNorm1d in evaluation mode": (lambda: nn.BatchNorm1d(6).eval(), False, NORMS),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), True, NORMS),
    "LayerNorm": (lambda: nn.LayerNorm(6), False, NORMS),
    "LayerNorm without a bias": (lambda: nn.LayerNorm(6, bias=False), False, NORMS),
    "LayerNorm of maps": (lambda: nn.LayerNorm((6, 1, 5)), True, NORMS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), True, NORMS),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), True, NORMS),
    # PyTorch computes it from products on the CPU.
    "RMSNorm": (lambda: nn.RMSNorm(6), False, SCALES),
}


@pytest.mark.parametrize("value", [1e-3, 0.0])
@pytest.mark.parametrize("norm", NORMALISATIONS)
def test_the_weight_of_any_normalisation_is_a_gate(norm: str, value: float) -> None:
    make, maps, kind = NORMALISATIONS[norm]
    model = gated_by(make(), maps=maps)
    nn.init.constant_(model.last.weight, value)
    assert_opens(model, ["last.weight"], kind)


def test_a_frozen_gate_is_opened_and_stays_frozen() -> None:
    model = Gated(torch.zeros(6), scaled)
    model.q7.requires_grad_(False)
    assert_opens(model, ["q7"], SCALES)
    assert not model.q7.requires_grad


def test_a_gate_in_a_network_whose_other_parameters_are_frozen_is_opened() -> None:
    model = Gated(torch.zeros(6), scaled).requires_grad_(False)
    assert_opens(model, ["q7"], SCALES)


@pytest.mark.parametrize("where", ["around the call", "in the model"])
@pytest.mark.parametrize("spelling", ["f * g", "torch.einsum"])
def test_a_gate_under_autocast_is_opened(where: str, spelling: str) -> None:
    model = Gated(torch.full((6,), 1e-5), SPELLINGS[spelling]).float()
    batches = [(inputs.float(), targets) for inputs, targets in vectors()]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)

    def scores(model: nn.Module, **options: Any) -> dict[str, Tensor]:
        if where == "around the call":
            with autocast:
                return saliency(model, batches, "snip", **options)
        return saliency(
            model,
            batches,
            "snip",
            forward=lambda m, b: cross_entropy(autocast(m)(b[0]).float(), b[1]),
            **options,
        )

    by_hand = opened_by_hand(model, ["q7"])
    with unchanged(model):
        found = scores(model)
    assert_same(found, scores(by_hand, open_gates=False))
    assert all(score.any() for score in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_any_precision_is_opened(dtype: torch.dtype) -> None:
    model = Gated(torch.full((6,), 1e-5), scaled).to(dtype)
    batches = [(inputs.to(dtype), targets) for inputs, targets in vectors()]
    scores = saliency(model, batches, "snip")
    by_hand = opened_by_hand(model, ["q7"])
    assert_same(scores, saliency(by_hand, batches, "snip", open_gates=False))


def test_a_gate_inside_a_checkpoint_is_opened() -> None:
    def join(x: Tensor, f: Tensor, g: Tensor, norm: nn.Module) -> Tensor:
        def branch(x: Tensor, f: Tensor) -> Tensor:
            return x + g * norm(F.dropout(f.tanh()))

        return checkpoint(branch, x, f, use_reentrant=False)

    model = Gated(torch.zeros(6), join, norm=nn.BatchNorm1d(6))
    assert_opens(model, ["q7"], SCALES)


def test_a_gate_in_a_data_parallel_model_is_opened() -> None:
    inner = Gated(torch.zeros(6), scaled)
    model = nn.DataParallel(inner)
    assert_opens(inner, ["q7"], SCALES)
    with unchanged(model):
        assert_same(scored(model), scored(inner))
    assert gates_of(model) == {SCALES: ["q7"]}


def test_a_gate_behind_hooks_that_see_gradients_is_opened() -> None:
    model = Gated(torch.zeros(6), scaled)
    for module in (model.k2, model.k2[0], model.k3):
        module.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert_opens(model, ["q7"], SCALES)


def test_a_gate_in_a_parameter_list_is_opened() -> None:
    model = Gated(
        torch.ones(()),
        lambda x, f, g, gains: x + f * gains[1],
        gains=nn.ParameterList([torch.ones(6), torch.zeros(6)]),
    )
    assert_opens(model, ["gains.1"], SCALES)


def test_a_gate_with_a_mask_of_its_own_is_opened_where_the_mask_lets_it() -> None:
    models = [Gated(torch.full((6,), value), scaled) for value in (0.0, 1.0)]
    for model in models:
        nn.utils.prune.l1_unstructured(model, "q7", 2)
    scores, expected = (scored(model) for model in models)
    assert_same(scores, expected)
    report = force_prune(models[0], vectors(), 0.0, method="snip", progress=False)
    assert named_in(report) == {SCALES: ["q7"]}


def test_a_gate_at_the_end_of_the_network_hides_all_of_it() -> None:
    class Tempered(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.temperature

    model = Tempered(torch.ones(()), scaled, temperature=torch.zeros(()))
    model.more = []
    assert_opens(model, ["temperature"], SCALES)


# Several gates.


def test_a_gate_that_several_modules_share_is_opened_in_all_of_them() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].gate.weight)
    model[2].gate.weight = model[1].gate.weight
    scores = scored(model)
    assert all(score.any() for score in scores.values())
    assert_opens(model, ["1.gate.weight"], NORMS)


def test_gates_in_series_are_all_opened() -> None:
    model = residual()
    model[1].gate = nn.Sequential(
        nn.BatchNorm1d(6), LayerScale(6, 1e-5), LayerScale(6, 0)
    ).double()
    nn.init.zeros_(model[1].gate[0].weight)
    names = ["1.gate.0.weight", "1.gate.1.gamma", "1.gate.2.gamma"]
    scores = scored(model)
    by_hand = opened_by_hand(model, names)
    assert_same(scores, scored(by_hand, open_gates=False))
    assert gates_of(model) == {NORMS: names[:1], SCALES: names[1:]}


@pytest.mark.parametrize(
    ("inner", "outer", "names"),
    [(0.0, 0.0, ["q7", "inner"]), (0.0, 1.0, ["inner"]), (1.0, 0.0, ["q7"])],
)
def test_nested_gates_are_opened_where_they_are_closed(
    inner: float, outer: float, names: list[str]
) -> None:
    def nested(x: Tensor, f: Tensor, g: Tensor, h: Tensor, *k: nn.Module) -> Tensor:
        return x + g * (k[0](x) + h * k[1](f))

    model = Gated(
        torch.full((6,), outer),
        nested,
        inner=torch.full((6,), inner),
        k4=nn.Linear(6, 6),
        k5=nn.Linear(6, 6),
    )
    assert_opens(model, names, SCALES)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_ways_to_a_weight_the_one_with_the_fewest_gates_is_opened(
    first: bool,
) -> None:
    def fork(x: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        one, two = f * g, (f * a) * b
        return (x + one) + two if first else (x + two) + one

    zeros = torch.zeros(6)
    model = Gated(zeros, fork, a=zeros.clone(), b=zeros.clone())
    assert_opens(model, ["q7"], SCALES)


def test_a_weight_with_an_open_way_does_not_open_the_closed_one() -> None:
    model = Gated(torch.zeros(6), lambda x, f, g: x + f + f.tanh() * g)
    assert_opens_nothing(model)


def test_a_shared_layer_that_one_block_shows_does_not_open_the_other() -> None:
    class Twice(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = self.k1(x)
            x = x + self.k2(x)
            return self.k3(x + self.q7 * self.k2(x))

    assert_opens_nothing(Twice(torch.zeros(6), scaled))


def test_each_branch_opens_its_own_gate() -> None:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(4)
    ]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
            self.blocks = nn.ModuleList(blocks)
            self.scales = nn.ModuleList(LayerScale(6, 10.0**-n) for n in range(1, 5))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block, scale in zip(self.blocks, self.scales, strict=True):
                x = x + scale(block(x))
            return self.head(x)

    # 0.1 is open; 0.01, 0.001 and 0.0001 are not.
    assert_opens(Stack(), [f"scales.{i}.gamma" for i in (1, 2, 3)], SCALES)


# What is no gate.


@pytest.mark.parametrize(
    ("value", "closed"),
    [
        (0.01, True),
        (-0.01, True),
        (0.0101, False),
        (-0.0101, False),
        (0.1, False),
        (1.0, False),
        (-1.0, False),
    ],
)
def test_a_gate_is_closed_up_to_a_hundredth(value: float, closed: bool) -> None:
    model = Gated(torch.full((6,), value, dtype=torch.float64), scaled)
    if closed:
        assert_opens(model, ["q7"], SCALES)
    else:
        assert_opens_nothing(model)


def test_a_gate_with_a_single_open_channel_is_open() -> None:
    gate = torch.zeros(6)
    gate[3] = 0.5
    assert_opens_nothing(Gated(gate, scaled))
    assert_opens_nothing(Gated(-gate, scaled))
    assert_opens_nothing(Gated(gate, lambda x, f, g: torch.addcmul(x, f, g)))
    model = residual()
    model[1].gate.weight.data[2] = 0.5
    assert_opens_nothing(model)


class Attention(nn.Module):
    """One head with a class token, positions and a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(1, 6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.positions = nn.Parameter(torch.zeros(1, 6, 6))
        self.table = nn.Parameter(torch.zeros(11))
        places = torch.arange(6)
        self.register_buffer("distances", places[:, None] - places + 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = q @ k.mT / 6**0.5 + self.table[self.distances]
        return self.head((weights.softmax(-1) @ v).mean(1))


def response_normalised(x: Tensor, f: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """The global response normalisation of ConvNeXt V2."""
    n = f.norm(dim=0, keepdim=True)
    n = n / (n.mean(-1, keepdim=True) + 1e-6)
    return x + f + torch.addcmul(bias, g, f * n)


OPEN: dict[str, Callable[[], nn.Module]] = {
    "a bias": lambda: Gated(torch.zeros(6), lambda x, f, g: x + f + g),
    "a class token, positions and a table of relative positions": Attention,
    "the weight of a norm that is centred at 0": lambda: Gated(
        torch.zeros(6),
        lambda x, f, g: x + f * f.square().mean(-1, keepdim=True).rsqrt() * (1 + g),
    ),
    "the slope of a PReLU": lambda: Gated(
        torch.zeros(6), lambda x, f, g: F.prelu(f, g)
    ),
    "a global response normalisation": lambda: Gated(
        torch.zeros(6), response_normalised, bias=torch.zeros(6)
    ),
    "a residual scale beside the activations": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g * f
    ),
    "a logit of a sigmoid": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * g.sigmoid()
    ),
    "an exponent": lambda: Gated(torch.zeros(6), lambda x, f, g: x + f * g.exp()),
    "a power": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * (2 + x.detach().abs()) ** g
    ),
    "the logits of a softmax over branches": lambda: Gated(
        torch.zeros(2), lambda x, f, g: x * g.softmax(0)[0] + f * g.softmax(0)[1]
    ),
    "an offset of a lerp that is open": lambda: Gated(
        torch.zeros(6), lambda x, f, g: torch.lerp(x, f, (0.5 + g).expand_as(f))
    ),
    "a factor that is small, then made large": lambda: Gated(
        torch.full((6,), 0.005), lambda x, f, g: x + f * (g * 100)
    ),
    "a factor of another parameter": lambda: Gated(
        torch.zeros(6),
        lambda x, f, g, other: x + f + g * other,
        other=torch.linspace(-1, 1, 6),
    ),
    "a factor of the data": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g * x.detach()
    ),
    "a bias in a gate that a layer computes": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f * (1e-3 * x.tanh() + g)
    ),
    "a parameter that nothing uses": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f
    ),
    "a parameter that is used without its gradient": lambda: Gated(
        torch.zeros(6), lambda x, f, g: x + f + g.detach() * f
    ),
}


@pytest.mark.parametrize("what", OPEN)
def test_a_zero_that_hides_no_weight_is_no_gate(what: str) -> None:
    assert_opens_nothing(OPEN[what]())


def test_a_factor_of_the_input_is_no_gate() -> None:
    class Scaled(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x * self.q7)

    assert_opens_nothing(Scaled(torch.zeros(5), lambda x, f, g: x + f))


def test_a_gate_before_what_is_not_to_be_pruned_is_no_gate() -> None:
    model = Gated(
        torch.zeros(6),
        lambda x, f, g, lstm: x + f + g * lstm(x[:, None])[0][:, 0],
        lstm=nn.LSTM(6, 6, batch_first=True),
    )
    assert_opens_nothing(model)


def test_a_gate_before_layers_that_are_left_out_is_no_gate() -> None:
    model = Gated(torch.zeros(6), scaled)
    chosen = [(model.k1, "weight"), (model.k3, "weight")]
    scores = scored(model, parameters=chosen)
    expected = scored(model, parameters=chosen, open_gates=False)
    assert_same(scores, expected)
    chosen += [(model.k2[0], "weight")]
    scores = scored(model, parameters=chosen)
    by_hand = opened_by_hand(model, ["q7"])
    chosen = [(m, "weight") for m in (by_hand.k1, by_hand.k3, by_hand.k2[0])]
    expected = scored(by_hand, parameters=chosen, open_gates=False)
    assert_same(scores, expected)


def test_a_buffer_of_zeros_is_no_gate() -> None:
    model = gated_by(LayerScale(6, 0))
    gamma = model.last.gamma.detach()
    del model.last.gamma
    model.last.register_buffer("gamma", gamma)
    assert_opens_nothing(model)


def test_a_mask_of_zeros_in_the_data_is_no_gate() -> None:
    model = Gated(torch.zeros(6), lambda x, f, g: x + g + f * (x.detach() > 1e9))
    assert_opens_nothing(model)


def test_only_what_multiplies_counts_as_a_gate() -> None:
    model = residual()
    nn.init.ones_(model[1].gate.weight)
    # Biases of 0 are usual, and add.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    assert_opens_nothing(model)


# Weights.


class Dense(SaliencyMethod):
    """Scores a weight by itself: what the network was scored with."""

    steps = 1

    @staticmethod
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight.clone()


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform between ± 1 / √fan-in, as nn.Linear.reset_parameters has it."""
    fan_in = torch.empty(shape)[0].numel()
    return (torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5


def zero_head() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[2].weight)
    return model


def test_a_zero_head_is_scored_with_pytorchs_own_initialisation() -> None:
    model = zero_head()
    with unchanged(model):
        scores = scored(model)

    head = draw((4, 6), torch.Generator().manual_seed(0))
    twin = zero_head()
    twin[2].weight.data.copy_(head)
    ((inputs, targets),) = vectors()
    cross_entropy(twin(inputs), targets).backward()
    for name, layer in (("0.weight", twin[0]), ("2.weight", twin[2])):
        expected = (layer.weight * layer.weight.grad).abs()
        assert torch.allclose(scores[name], expected, rtol=1e-5)


def test_a_tiny_head_is_scored_as_a_zero_one() -> None:
    model = zero_head()
    expected = scored(model)
    nn.init.normal_(model[2].weight, std=1e-6)
    with unchanged(model):
        assert_same(scored(model), expected)
    (text,) = force_prune(model, vectors(), 0.5, method="snip", progress=False).warnings
    # The largest of 24 normal values of this width.
    assert re.search(r"1 prunable weights of at most [1-4](\.\d)?e-06, set to a", text)


def test_without_opening_a_zero_head_hides_the_network() -> None:
    scores = saliency(zero_head(), vectors(), "snip", open_gates=False)
    assert not any(score.any() for score in scores.values())


def test_a_zero_head_is_scored_the_same_whatever_the_seed() -> None:
    results = []
    for seed in (1, 2):
        model = zero_head()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        report = force_prune(model, vectors(), 0.6, steps=3, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(torch.cat([m.flatten() for m in (model[0].weight_mask,)]))
        assert not model[2].weight_orig.any()
        assert [text for text in report.warnings if "random initialisation" in text]
        assert "2.weight" in report.warnings[0]
    assert torch.equal(*results)


def test_two_closed_weights_of_one_shape_get_different_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, 6) for n in (5, 6, 6, 6))).double()
    for layer in model[1:3]:
        nn.init.zeros_(layer.weight)
    values = scored(model, Dense)
    generator = torch.Generator().manual_seed(0)
    for name in ("1.weight", "2.weight"):
        assert torch.allclose(values[name], draw((6, 6), generator).double())
    assert not torch.equal(values["1.weight"], values["2.weight"])
    assert torch.equal(values["3.weight"], model[3].weight)
    assert gates_of(model) == {WEIGHTS: ["1.weight", "2.weight"]}


class SpatialGate(nn.Module):
    """The gating unit of gMLP: near 0 where it mixes places, with a bias of 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(1, 12)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(6, 4)
        nn.init.normal_(self.mix.weight, std=1e-6)
        nn.init.ones_(self.mix.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.embed(x[..., None])).chunk(2, -1)
        v = self.mix(self.norm(v).mT).mT
        return self.out((u * v).mean(1))


def test_a_spatial_gate_near_0_is_scored_with_random_values() -> None:
    model = SpatialGate()
    with unchanged(model):
        scores = scored(model)
    by_hand = deepcopy(model)
    values = scored(model, Dense)["mix.weight"]
    expected = draw((5, 5), torch.Generator().manual_seed(0)).double()
    assert torch.allclose(values, expected)
    by_hand.mix.weight.data.copy_(values)
    assert_same(scores, scored(by_hand, open_gates=False))
    assert gates_of(model) == {WEIGHTS: ["mix.weight"]}


def test_closed_weights_that_are_left_out_are_opened_too() -> None:
    model = Gated(torch.ones(()), lambda x, f, g: f, maps=True)
    nn.init.zeros_(model.k2[2].weight)
    chosen = [(model.k1[1], "weight"), (model.k2[0], "weight")]
    assert not any(
        score.any()
        for score in scored(model, parameters=chosen, open_gates=False).values()
    )
    with unchanged(model):
        scores = scored(model, parameters=chosen)
    by_hand = deepcopy(model)
    fresh = draw((6, 6, 3, 3), torch.Generator().manual_seed(0))
    by_hand.k2[2].weight.data.copy_(fresh)
    expected = scored(
        by_hand,
        parameters=[(by_hand.k1[1], "weight"), (by_hand.k2[0], "weight")],
        open_gates=False,
    )
    assert list(scores) == ["k1.1.weight", "k2.0.weight"]
    for name, score in scores.items():
        assert score.any()
        assert torch.allclose(score, expected[name], rtol=1e-5)
    report = force_prune(
        model, vectors(), 0.5, method="snip", parameters=chosen, progress=False
    )
    assert named_in(report) == {WEIGHTS: ["k2.2.weight"]}
    assert not model.k2[2].weight.any()
    assert not hasattr(model.k2[2], "weight_orig")


@pytest.mark.parametrize(
    ("layer", "value", "closed"),
    [
        # 0.01 / √fan-in: 16 inputs; one map of 2 × 2, with groups; 4 maps of 2 × 2.
        (lambda: nn.Linear(16, 4), 0.0025, True),
        (lambda: nn.Linear(16, 4), -0.0025, True),
        (lambda: nn.Linear(16, 4), 0.00251, False),
        (lambda: nn.Conv2d(4, 4, 2, groups=4), 0.005, True),
        (lambda: nn.Conv2d(4, 4, 2, groups=4), 0.00501, False),
        (lambda: nn.Conv2d(4, 4, 2), 0.0025, True),
        (lambda: nn.Conv2d(4, 4, 2), 0.00251, False),
    ],
)
def test_a_weight_is_closed_up_to_a_hundredth_of_its_usual_bound(
    layer: Callable[[], nn.Module], value: float, closed: bool
) -> None:
    torch.manual_seed(0)
    layer = layer()
    nn.init.constant_(layer.weight, value)
    if isinstance(layer, nn.Linear):
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), layer).double()
    else:
        model = nn.Sequential(
            nn.Linear(5, 16), nn.Tanh(), nn.Unflatten(1, (4, 2, 2)), layer, nn.Flatten()
        ).double()
    name = next(n for n, p in model.named_parameters() if p is layer.weight)
    # The constant itself, not the float32 nearest to it.
    nn.init.constant_(layer.weight, value)
    values = scored(model, Dense)[name]
    assert torch.equal(values, layer.weight) is not closed
    assert gates_of(model) == ({WEIGHTS: [name]} if closed else {})


def test_a_weight_with_one_usual_value_is_open() -> None:
    model = zero_head()
    model[2].weight.data[1, 2] = 0.1
    scores = scored(model)
    assert_same(scores, scored(model, open_gates=False))


def test_a_wide_layer_of_small_values_as_pytorch_draws_them_is_open() -> None:
    torch.manual_seed(0)
    # VGG-16 has a layer of this fan-in; its values are at most 0.0063.
    model = nn.Linear(25088, 10)
    assert model.weight.abs().max() < 0.01
    batches = [(torch.randn(2, 25088), torch.tensor([1, 2]))]
    scores = saliency(model, batches, "snip")
    assert_same(scores, saliency(model, batches, "snip", open_gates=False))
    assert gates_of(model, batches) == {}


def test_a_gate_that_a_zero_layer_computes_is_opened_by_its_weight() -> None:
    # adaLN-Zero: what multiplies the branch depends on the data through a zero layer.
    model = Gated(
        torch.ones(()),
        lambda x, f, g, modulate: x + f * modulate(x),
        modulate=nn.Linear(6, 6),
    )
    nn.init.zeros_(model.modulate.weight)
    nn.init.zeros_(model.modulate.bias)
    scores = scored(model)
    assert all(score.any() for score in scores.values())
    assert gates_of(model) == {WEIGHTS: ["modulate.weight"]}


def test_weights_and_gates_are_opened_together() -> None:
    model = Gated(torch.zeros(6), scaled)
    nn.init.zeros_(model.k3.weight)
    scores = scored(model)
    by_hand = opened_by_hand(model, ["q7"])
    # A zero head is opened in the copy as well, and nothing else.
    assert gates_of(by_hand) == {WEIGHTS: ["k3.weight"]}
    assert_same(scores, scored(by_hand))
    assert all(score.any() for score in scores.values())
    assert gates_of(model) == {SCALES: ["q7"], WEIGHTS: ["k3.weight"]}


def test_a_gate_that_is_to_be_pruned_itself_is_scored_at_1() -> None:
    model = Gated(torch.zeros(6), scaled)
    chosen = [(model.k1, "weight"), (model, "q7")]
    scores = scored(model, parameters=chosen)
    by_hand = opened_by_hand(model, ["q7"])
    expected = scored(
        by_hand,
        parameters=[(by_hand.k1, "weight"), (by_hand, "q7")],
        open_gates=False,
    )
    assert scores["q7"].all()
    assert_same(scores, expected)


def test_the_report_tells_what_a_one_dimensional_weight_was_set_to() -> None:
    model = residual()
    chosen = [(model[0], "weight"), (model[1].gate, "weight")]
    report = force_prune(
        model, vectors(), 0.5, method="snip", parameters=chosen, progress=False
    )
    (text,) = [text for text in report.warnings if "1.gate.weight" in text]
    assert "set to 1" in text


# Every method.


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_scores_the_open_network(
    method: str, norm: type[nn.Module]
) -> None:
    model = residual(norm)
    kind = SCALES if norm is nn.RMSNorm else NORMS
    assert_opens(model, ["1.gate.weight"], kind, method=method)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_scores_an_open_network_as_it_is(method: str) -> None:
    model = residual()
    # A gate that lets a single channel pass is not closed.
    model[1].gate.weight.data[2] = 0.5
    scores = scored(model, method)
    expected = scored(model, method, open_gates=False)
    assert_same(scores, expected)


class Restless(nn.Module):
    """A closed network that draws random numbers and changes with every pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.block, self.after = Block(), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("written", torch.zeros(6))
        self.register_buffer("replaced", torch.zeros(6))
        self.calls = 0
        nn.init.zeros_(self.block.gate.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x))
        self.calls += 1
        self.written.lerp_(x.detach().mean(0), 0.1)
        self.replaced = 0.9 * self.replaced + x.detach().amax(0)
        x = x - self.written + self.replaced / (1 + self.calls)
        x = x * (1 + random.random() * float(np.random.rand()))
        x = self.block(x)
        return self.head(x + self.scale * self.drop(self.after(x).tanh()))


RESTLESS_GATES = ["scale", "block.gate.weight"]


def shuffled(count: int = 24, generator: torch.Generator | None = None) -> DataLoader:
    data = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, dtype=torch.float64, generator=data)
    dataset = TensorDataset(inputs, torch.arange(count) % 4)
    return DataLoader(dataset, 8, shuffle=True, generator=generator)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("batches", [1, 2, None])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_random_numbers_and_buffers_are_those_of_a_single_pass(
    method: str, batches: int | None
) -> None:
    model = Restless()
    results = []
    for network, gates in (
        (model, True),
        (opened_by_hand(model, RESTLESS_GATES), False),
    ):
        seed_everything(3)
        with unchanged(network):
            results.append(
                saliency(network, shuffled(), method, batches=batches, open_gates=gates)
            )
    assert_same(*results)
    assert all(score.any() for score in results[0].values())


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_random_numbers_stay_in_step_where_nothing_is_closed(method: str) -> None:
    model = opened_by_hand(Restless(), RESTLESS_GATES)
    results = []
    for gates in (True, False):
        seed_everything(3)
        results.append(saliency(model, shuffled(), method, batches=2, open_gates=gates))
    assert_same(*results)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_all_steps_prune_as_in_the_open_network(method: str) -> None:
    masks, histories = [], []
    for network, gates in (
        (Restless(), True),
        (opened_by_hand(Restless(), RESTLESS_GATES), False),
    ):
        seed_everything(3)
        force_prune(
            network,
            shuffled(),
            0.5,
            method=method,
            steps=3,
            batches=2,
            open_gates=gates,
            on_collapse="warn",
            progress=False,
        )
        masks.append({n: b for n, b in network.named_buffers() if n.endswith("_mask")})
        histories.append(torch.get_rng_state())
    assert_same(*masks)
    assert torch.equal(*histories)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_batch_norms_in_evaluation_mode_use_the_statistics_they_have(
    method: str,
) -> None:
    model = residual()
    with torch.no_grad():
        for factor in (1, 3, 5):
            model(factor * vectors()[0][0])
    assert_opens(model.eval(), ["1.gate.weight"], NORMS, method=method)


class TrainThenEvaluate(SaliencyMethod):
    """The gradient in training mode, and what its batch statistics leave behind."""

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, Tensor]:
        first = probe.gradients()
        with probe.evaluation_mode():
            second = probe.gradients()
        return {name: first[name] + second[name] for name in first}

    @staticmethod
    def score(weight: Tensor, signal: Tensor) -> Tensor:
        return signal


def test_a_method_that_measures_twice_sees_the_statistics_of_a_single_pass() -> None:
    assert_opens(residual(), ["1.gate.weight"], NORMS, method=TrainThenEvaluate)


def test_a_method_that_measures_flow_first_measures_the_rest_with_gates_open() -> None:
    class FlowThenLoss(SaliencyMethod):
        @classmethod
        def measure(cls, probe: Probe) -> Mapping[str, Tensor]:
            flow, loss = probe.synflow_gradients(), probe.gradients()
            return {name: flow[name] * loss[name] for name in flow}

        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return signal

    assert_opens(residual(), ["1.gate.weight"], NORMS, method=FlowThenLoss)


def test_gates_stay_open_over_all_steps() -> None:
    model, reference = residual(), residual()
    nn.init.ones_(reference[1].gate.weight)
    for network in (model, reference):
        force_prune(network, vectors(), 0.8, steps=5, progress=False)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not model[1].gate.weight.any()


@pytest.mark.parametrize(("gate", "passes"), [(0.0, 4), (1.0, 3)])
def test_looking_for_gates_costs_a_pass_only_where_there_are_some(
    gate: float, passes: int
) -> None:
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(outputs, targets)

    model = Gated(torch.full((6,), gate), scaled)
    nn.init.zeros_(model.k3.bias)
    scored(model, batches=3, loss_fn=loss_fn)
    assert len(calls) == passes


# The model stays as it is.


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_closed_network_and_its_gradients_stay_as_they_are(method: str) -> None:
    model, generator = Restless(), torch.Generator().manual_seed(4)
    ((inputs, targets),) = vectors()
    cross_entropy(model(inputs), targets).backward()
    model.stem.bias.requires_grad_(False)
    model.head.eval()
    assert model.scale.grad is not None
    with unchanged(model, generator):
        saliency(model, shuffled(generator=generator), method, batches=2)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["force", "grasp", "snip_it"])
def test_a_network_whose_loss_fails_once_its_gates_are_open_stays_as_it_is(
    method: str, error: type[BaseException]
) -> None:
    model, generator = Restless(), torch.Generator().manual_seed(4)
    calls = []

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        loss = cross_entropy(model(batch[0]), batch[1])
        if len(calls) == 2:
            raise error("the second pass")
        return loss

    loader = shuffled(generator=generator)
    with unchanged(model, generator), pytest.raises(error, match="the second pass"):
        force_prune(model, loader, 0.5, method=method, forward=forward, progress=False)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (IndexError, ValueError, "loss_fn failed on .*the second pass"),
        (ArithmeticError, ArithmeticError, "^the second pass$"),
    ],
)
def test_a_loss_fn_that_fails_once_the_gates_are_open_is_named(
    own: type[Exception], error: type[Exception], message: str
) -> None:
    model = residual()
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise own("the second pass")
        return cross_entropy(outputs, targets)

    with unchanged(model), pytest.raises(error, match=message):
        scored(model, loss_fn=loss_fn)


# Networks of timm.


def test_no_layer_of_a_closed_network_is_without_saliency(closed: nn.Module) -> None:
    scores = saliency(closed, images(), "snip")
    assert len(scores) == 21
    assert [name for name, score in scores.items() if not score.any()] == []


def test_a_closed_network_is_scored_as_the_open_one(
    closed: nn.Module, opened: nn.Module
) -> None:
    scores, expected = (saliency(model, images(), "snip") for model in (closed, opened))
    assert_same(scores, expected)


def test_without_opening_the_papers_score_is_0_behind_the_gates(
    closed: nn.Module,
) -> None:
    scores = saliency(closed, images(), "snip", open_gates=False)
    blind = [name for name, score in scores.items() if not score.any()]
    assert blind == [
        f"layer{i}.{j}.conv{k}.weight"
        for i in range(1, 5)
        for j in range(2)
        for k in (1, 2)
    ]


def test_a_network_that_is_scored_closed_warns(closed: nn.Module) -> None:
    model = deepcopy(closed)
    message = r"16 of 21 layers \(layer1\.0\.conv1\.weight, .*saliency of exactly 0"
    with pytest.warns(UserWarning, match=message):
        report = force_prune(
            model, images(), 0.9, method="snip", open_gates=False, progress=False
        )
    assert any("saliency of exactly 0" in text for text in report.warnings)
    assert not any("gates opened" in text for text in report.warnings)


def test_nothing_changes_where_no_gate_is_closed(opened: nn.Module) -> None:
    with_gates = saliency(opened, images(), "snip", open_gates=True)
    without = saliency(opened, images(), "snip", open_gates=False)
    assert_same(with_gates, without)
    report = force_prune(deepcopy(opened), images(), 0.9, method="snip", progress=False)
    assert report.warnings == ()


def skip_init() -> nn.Module:
    """A normaliser-free network with SkipInit, as DeepMind's have it."""
    config = replace(nfnet.model_cfgs["test_nfnet"], skipinit=True)
    return nfnet.NormFreeNet(config, num_classes=10)


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, init_values=1e-5, img_size=32
    )


# By type of module what closes it; a name is built as timm initialises it.
TIMM: list[tuple[str | Callable[[], nn.Module], dict[type[nn.Module], str], str]] = [
    (
        "test_resnet",
        {resnet.BasicBlock: "bn2.weight", resnet.Bottleneck: "bn3.weight"},
        NORMS,
    ),
    ("regnetx_002", {regnet.Bottleneck: "conv3.bn.weight"}, NORMS),
    ("test_nfnet", {nfnet.NormFreeBlock: "conv3.gain"}, NORMS),
    (skip_init, {nfnet.NormFreeBlock: "skipinit_gain"}, SCALES),
    ("test_convnext", {convnext.ConvNeXtBlock: "gamma"}, SCALES),
    ("test_mambaout", {LayerScale: "gamma"}, SCALES),
    ("test_vit2", {LayerScale: "gamma"}, SCALES),
    (small_vit, {LayerScale: "gamma"}, SCALES),
]


@pytest.mark.parametrize(("network", "types", "kind"), TIMM)
def test_a_network_of_timm_has_its_gates_opened_and_no_blind_layer(
    network: str | Callable[[], nn.Module],
    types: dict[type[nn.Module], str],
    kind: str,
) -> None:
    torch.manual_seed(0)
    if callable(network):
        model = network()
    else:
        model = timm.create_model(network, num_classes=10)
    gates = {
        f"{prefix}.{types[type(module)]}"
        for prefix, module in model.named_modules()
        if type(module) in types
    }
    batches = images(2)
    scores = saliency(model, batches, "snip")
    assert [n for n, score in scores.items() if not score.any()] == []
    found = gates_of(model, batches)
    assert found == {kind: [n for n, _ in model.named_parameters() if n in gates]}
    assert set(found[kind]) == gates
    by_hand = opened_by_hand(model, sorted(gates))
    assert_same(scores, saliency(by_hand, batches, "snip", open_gates=False))


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "convnextv2_atto"])
def test_a_network_of_timm_without_closed_gates_is_scored_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    batches = images(2, 160 if name == "test_vit" else 32)
    # There is something to be mistaken: parameters of zeros.
    assert any(not parameter.any() for parameter in model.parameters())
    torch.manual_seed(1)
    scores = saliency(model, batches, "snip")
    torch.manual_seed(1)
    assert_same(scores, saliency(model, batches, "snip", open_gates=False))
    assert [n for n, score in scores.items() if not score.any()] == []
    assert gates_of(model, batches) == {}


# The report.


def test_the_report_names_the_gates_that_were_opened(closed: nn.Module) -> None:
    model = deepcopy(closed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # opened gates are no reason to warn
        report = force_prune(model, images(), 0.9, method="snip", progress=False)
    opened = [text for text in report.warnings if "gates opened" in text]
    assert len(opened) == 1
    assert "8 normalisation weights of 0, set to 1" in opened[0]
    assert "layer1.0.bn2.weight, layer1.1.bn2.weight" in opened[0]
    assert not any("saliency of exactly 0" in text for text in report.warnings)
    assert report.empty_layers == ()
    # The model's own gates are as closed as before.
    assert not model.layer1[0].bn2.weight.any()


def test_the_report_has_a_line_a_kind_with_every_name_and_the_largest_value() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6),
        Block(),
        *(Gated(torch.full((6,), value), scaled) for value in (1e-6, 1e-5, -2e-4)),
        Block(),
        nn.Linear(6, 4),
    ).double()
    for layer in model[2:5]:
        layer.k1, layer.k3 = nn.Identity(), nn.Identity()
    for block in (model[1], model[5]):
        nn.init.zeros_(block.gate.weight)
    nn.init.zeros_(model[6].weight)
    report = force_prune(model, vectors(), 0.2, method="snip", progress=False)
    assert report.warnings[:3] == (
        "gates opened while scoring: 2 normalisation weights of 0, set to 1 "
        "(1.gate.weight, 5.gate.weight)",
        "gates opened while scoring: 3 branch scales of at most 0.0002, set to 1 "
        "(2.q7, 3.q7, 4.q7)",
        "gates opened while scoring: 1 prunable weights of 0, set to a random "
        "initialisation (6.weight)",
    )


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_the_report_of_every_method_names_the_gates(method: str) -> None:
    report = force_prune(
        Restless(),
        shuffled(),
        0.5,
        method=method,
        steps=2,
        on_collapse="warn",
        progress=False,
    )
    assert named_in(report) == {NORMS: ["block.gate.weight"], SCALES: ["scale"]}


def test_the_report_of_a_closed_scoring_names_no_gate() -> None:
    assert gates_of(Restless(), open_gates=False) == {}


# What a network does on its way is felt by nobody.


def test_a_frozen_parameter_of_zeros_may_be_written_to_in_forward() -> None:
    # RuntimeError: a leaf Variable that requires grad is being used in an in-place
    # operation. Candidates get requires_grad=True, frozen ones as well.
    def count(x: Tensor, f: Tensor, g: Tensor, calls: Tensor) -> Tensor:
        calls += 1
        return x + f

    model = Gated(torch.ones(()), count, calls=torch.zeros(1))
    model.calls.requires_grad_(False)
    assert_opens_nothing(model)


def test_what_a_frozen_zero_multiplies_may_be_written_to_in_forward() -> None:
    # RuntimeError: a variable needed for gradient computation has been modified. For
    # the gradient of the frozen parameter, which nobody needs, autograd keeps f.
    model = Gated(torch.zeros(6), lambda x, f, g: f.add_(f * g).add_(x))
    model.q7.requires_grad_(False)
    assert_opens_nothing(model)


def test_a_product_with_a_complex_filter_is_scored_as_it_is() -> None:
    # TypeError: aminmax not implemented for ComplexDouble. GFNet and Fourier neural
    # operators have such filters; any zero bias besides makes scoring look at them.
    def filtered(x: Tensor, f: Tensor, g: Tensor, filters: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(f) * torch.view_as_complex(filters)
        return x + torch.fft.irfft(spectrum, n=6)

    filters = torch.linspace(-1, 1, 8).view(4, 2)
    model = Gated(torch.ones(()), filtered, filters=filters)
    nn.init.zeros_(model.k3.bias)
    assert_opens_nothing(model)


@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_a_weight_of_small_values_that_is_scaled_is_no_gate(
    shape: tuple[int, ...],
) -> None:
    # It is set to 1: all its values are at most 0.01, and it is part of a product. As
    # a weight of 64 inputs it is far from closed.
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.gain, self.bias)

    torch.manual_seed(0)
    head = Scaled(64, 4)
    head.gain = nn.Parameter(torch.ones(shape))
    nn.init.uniform_(head.weight, -0.009, 0.009)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), head).double()
    values = scored(model, Dense)["2.weight"]
    assert torch.equal(values, head.weight)
    assert_opens_nothing(model)


def test_a_checkpoint_that_draws_anew_is_scored_as_it_is() -> None:
    # The scores differ: to read what a checkpoint has saved is to compute it again,
    # and here that draws random numbers.
    def join(x: Tensor, f: Tensor, g: Tensor, norm: nn.Module) -> Tensor:
        def branch(f: Tensor) -> Tensor:
            return F.dropout(norm(f))

        return (
            x
            + g
            + F.dropout(
                checkpoint(branch, f, use_reentrant=False, preserve_rng_state=False)
            )
        )

    model = Gated(torch.zeros(6), join, norm=nn.LayerNorm(6))
    results = []
    for gates in (True, False):
        torch.manual_seed(3)
        results.append(saliency(model, shuffled(), "snip", batches=2, open_gates=gates))
    assert_same(*results)


def test_a_norm_in_a_checkpoint_keeps_the_statistics_of_a_single_pass() -> None:
    # The same cause: each look computes the branch again, and its batch norm takes
    # part in the running statistics once more. A method that measures in evaluation
    # mode afterwards sees them.
    def join(x: Tensor, f: Tensor, g: Tensor, norm: nn.Module) -> Tensor:
        return x + g + checkpoint(norm, f, use_reentrant=False)

    model = Gated(torch.zeros(6), join, norm=nn.BatchNorm1d(6))
    scores = scored(model, TrainThenEvaluate)
    expected = scored(model, TrainThenEvaluate, open_gates=False)
    assert_same(scores, expected)


def test_a_parameter_that_forward_updates_is_that_of_a_single_pass() -> None:
    # Buffers are put back before the second pass, parameters are not: an average that
    # is kept in a frozen parameter takes part twice.
    def centred(x: Tensor, f: Tensor, g: Tensor, average: Tensor) -> Tensor:
        with torch.no_grad():
            average.lerp_(x.mean(0), 0.1)
        return (x - average).tanh() + f * g

    model = Gated(torch.zeros(6), centred, average=torch.zeros(6))
    model.average.requires_grad_(False)
    assert_opens(model, ["q7"], SCALES)


def test_a_generator_of_the_models_own_is_that_of_a_single_pass() -> None:
    # Only the global generators are put back before the second pass.
    def noisy(x: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return x + f * g + torch.rand(6, generator=generator, dtype=x.dtype)

    generator = torch.Generator()
    results = []
    for value, gates in ((0.0, True), (1.0, False)):
        generator.manual_seed(3)
        model = Gated(torch.full((6,), value), noisy)
        model.generator = generator
        results.append(scored(model, open_gates=gates))
    assert_same(*results)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(8, dtype=torch.float64).to_sparse(),
        lambda: torch.ones(6).to(torch.float8_e4m3fn),
    ],
    ids=["sparse", "float8"],
)
def test_a_parameter_that_has_no_largest_value_is_left_alone(
    make: Callable[[], Tensor],
) -> None:
    # NotImplementedError: aminmax is not implemented for sparse tensors and float8.
    model = Gated(torch.ones(()), lambda x, f, g: x + f)
    model.other = nn.Parameter(make(), requires_grad=False)
    scores = scored(model)
    assert_same(scores, scored(model, open_gates=False))
