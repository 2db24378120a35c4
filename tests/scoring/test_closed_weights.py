"""Weights of 0 are scored with values that they usually have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from gated_networks import (
    SCALES,
    Dense,
    Gated,
    gates_of,
    named_in,
    opened_by_hand,
    residual,
    scaled,
    scored,
    vectors,
)
from state import assert_same, unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from force_plugin import force_prune, saliency

WEIGHTS = "prunable weights"


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform between ± 1 / √fan-in, as nn.Linear.reset_parameters has it."""
    fan_in = torch.empty(shape)[0].numel()
    return (torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5


def zero_head() -> nn.Sequential:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
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
    model: Any = zero_head()
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
    model: Any = nn.Sequential(*(nn.Linear(n, 6) for n in (5, 6, 6, 6))).double()
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
    model: Any = Gated(torch.ones(()), lambda x, f, g: f, maps=True)
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
    ("build", "value", "closed"),
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
    build: Callable[[], nn.Module], value: float, closed: bool
) -> None:
    torch.manual_seed(0)
    layer: Any = build()
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
    model: Any = Gated(
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
    model: Any = Gated(torch.zeros(6), scaled)
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
    model: Any = residual()
    chosen = [(model[0], "weight"), (model[1].gate, "weight")]
    report = force_prune(
        model, vectors(), 0.5, method="snip", parameters=chosen, progress=False
    )
    (text,) = [text for text in report.warnings if "1.gate.weight" in text]
    assert "set to 1" in text
