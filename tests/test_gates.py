"""Closed gates are opened while scoring, and nothing else is."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import timm
import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import force_prune, saliency

WITH_DATA = ["force", "grasp", "grasp_it", "synflow", "snip_it"]
Batch = tuple[Tensor, Tensor]


def images(count: int = 4, size: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return [(inputs, torch.arange(count) % 10)]


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


def vectors() -> list[Batch]:
    inputs = torch.linspace(0, 9, 40, dtype=torch.float64).view(8, 5).sin()
    return [(inputs, torch.arange(8) % 4)]


# A network of timm.


def test_no_layer_of_a_closed_network_is_without_saliency(closed: nn.Module) -> None:
    scores = saliency(closed, images(), "snip")
    assert len(scores) == 21
    assert [name for name, score in scores.items() if not score.any()] == []


def test_a_closed_network_is_scored_as_the_open_one(
    closed: nn.Module, opened: nn.Module
) -> None:
    scores, expected = (saliency(model, images(), "snip") for model in (closed, opened))
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


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
    assert all(torch.equal(with_gates[name], without[name]) for name in without)
    report = force_prune(deepcopy(opened), images(), 0.9, method="snip", progress=False)
    assert report.warnings == ()


# Every method, on a small network.


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("method", WITH_DATA)
def test_every_method_scores_the_open_network(
    method: str, norm: type[nn.Module]
) -> None:
    model = residual(norm)
    with unchanged(model):
        scores = saliency(model, vectors(), method)
    nn.init.ones_(model[1].gate.weight)
    expected = saliency(model, vectors(), method, open_gates=False)
    assert list(scores) == list(expected)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", WITH_DATA)
def test_every_method_scores_an_open_network_as_it_is(method: str) -> None:
    model = residual()
    # A gate that lets a single channel pass is not closed.
    model[1].gate.weight.data[2] = 0.5
    scores = saliency(model, vectors(), method)
    expected = saliency(model, vectors(), method, open_gates=False)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


def test_gates_stay_open_over_all_steps() -> None:
    model, reference = residual(), residual()
    nn.init.ones_(reference[1].gate.weight)
    for network in (model, reference):
        force_prune(network, vectors(), 0.8, steps=5, progress=False)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not model[1].gate.weight.any()


def test_a_gate_that_several_modules_share_is_opened_in_all_of_them() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].gate.weight)
    model[2].gate.weight = model[1].gate.weight
    scores = saliency(model, vectors(), "snip")
    assert all(score.any() for score in scores.values())


def test_only_what_multiplies_counts_as_a_gate() -> None:
    model = residual()
    nn.init.ones_(model[1].gate.weight)
    # Biases of 0 are usual, and add.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    scores = saliency(model, vectors(), "snip")
    expected = saliency(model, vectors(), "snip", open_gates=False)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


# A classifier of zeros.


def zero_head() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[2].weight)
    return model


def test_a_zero_head_is_scored_with_pytorchs_own_initialisation() -> None:
    model = zero_head()
    with unchanged(model):
        scores = saliency(model, vectors(), "snip")

    # Uniform between ± 1 / sqrt(fan-in), as nn.Linear.reset_parameters has it.
    generator = torch.Generator().manual_seed(0)
    head = (torch.rand(4, 6, generator=generator) * 2 - 1) / 6**0.5
    twin = zero_head()
    twin[2].weight.data.copy_(head)
    ((inputs, targets),) = vectors()
    cross_entropy(twin(inputs), targets).backward()
    for name, layer in (("0.weight", twin[0]), ("2.weight", twin[2])):
        expected = (layer.weight * layer.weight.grad).abs()
        assert torch.allclose(scores[name], expected, rtol=1e-5)


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


def test_the_report_tells_what_a_one_dimensional_weight_was_set_to() -> None:
    model = residual()
    chosen = [(model[0], "weight"), (model[1].gate, "weight")]
    report = force_prune(
        model, vectors(), 0.5, method="snip", parameters=chosen, progress=False
    )
    (text,) = [text for text in report.warnings if "1.gate.weight" in text]
    assert "set to 1" in text
