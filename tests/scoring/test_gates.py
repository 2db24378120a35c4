"""Closed gates of every make are opened while scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_networks import (
    NORMS,
    SCALES,
    Block,
    Gated,
    Join,
    assert_opens,
    assert_opens_nothing,
    gated_by,
    gates_of,
    named_in,
    opened_by_hand,
    residual,
    scaled,
    scored,
    vectors,
)
from state import assert_same, unchanged
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from force_plugin import force_prune, saliency

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
    model: Any = gated_by(make(), maps=maps)
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
    model: Any = nn.Sequential(
        nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 4)
    ).double()
    nn.init.zeros_(model[1].gate.weight)
    model[2].gate.weight = model[1].gate.weight
    scores = scored(model)
    assert all(score.any() for score in scores.values())
    assert_opens(model, ["1.gate.weight"], NORMS)


def test_gates_in_series_are_all_opened() -> None:
    model: Any = residual()
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
