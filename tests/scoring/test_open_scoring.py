"""Every method scores the open network, and the model stays as it is."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from gated_networks import (
    NORMS,
    SCALES,
    Batch,
    Block,
    Gated,
    TrainThenEvaluate,
    assert_opens,
    gates_of,
    named_in,
    opened_by_hand,
    residual,
    scaled,
    scored,
    shuffled,
    vectors,
)
from kinds_of_methods import WITH_PASSES
from networks import images
from state import assert_same, unchanged
from timm.layers import LayerScale
from timm.models import convnext, nfnet, regnet, resnet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import SaliencyMethod, force_prune, saliency
from force_plugin.methods import Measurements


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


# Every method.


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("method", WITH_PASSES)
def test_every_method_scores_the_open_network(
    method: str, norm: type[nn.Module]
) -> None:
    model = residual(norm)
    kind = SCALES if norm is nn.RMSNorm else NORMS
    assert_opens(model, ["1.gate.weight"], kind, method=method)


@pytest.mark.parametrize("method", WITH_PASSES)
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
        self.replaced: Tensor
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


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("batches", [1, 2, None])
@pytest.mark.parametrize("method", WITH_PASSES)
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


@pytest.mark.parametrize("method", WITH_PASSES)
def test_random_numbers_stay_in_step_where_nothing_is_closed(method: str) -> None:
    model = opened_by_hand(Restless(), RESTLESS_GATES)
    results = []
    for gates in (True, False):
        seed_everything(3)
        results.append(saliency(model, shuffled(), method, batches=2, open_gates=gates))
    assert_same(*results)


@pytest.mark.parametrize("method", WITH_PASSES)
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


@pytest.mark.parametrize("method", WITH_PASSES)
def test_batch_norms_in_evaluation_mode_use_the_statistics_they_have(
    method: str,
) -> None:
    model = residual()
    with torch.no_grad():
        for factor in (1, 3, 5):
            model(factor * vectors()[0][0])
    assert_opens(model.eval(), ["1.gate.weight"], NORMS, method=method)


def test_a_method_that_measures_twice_sees_the_statistics_of_a_single_pass() -> None:
    assert_opens(residual(), ["1.gate.weight"], NORMS, method=TrainThenEvaluate)


def test_a_method_that_measures_flow_first_measures_the_rest_with_gates_open() -> None:
    class FlowThenLoss(SaliencyMethod):
        @classmethod
        def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:
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

    model: Any = Gated(torch.full((6,), gate), scaled)
    nn.init.zeros_(model.k3.bias)
    scored(model, batches=3, loss_fn=loss_fn)
    assert len(calls) == passes


# The model stays as it is.


@pytest.mark.parametrize("method", WITH_PASSES)
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
    scores = saliency(closed, images(4), "snip")
    assert len(scores) == 21
    assert [name for name, score in scores.items() if not score.any()] == []


def test_a_closed_network_is_scored_as_the_open_one(
    closed: nn.Module, opened: nn.Module
) -> None:
    scores, expected = (
        saliency(model, images(4), "snip") for model in (closed, opened)
    )
    assert_same(scores, expected)


def test_without_opening_the_papers_score_is_0_behind_the_gates(
    closed: nn.Module,
) -> None:
    scores = saliency(closed, images(4), "snip", open_gates=False)
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
            model, images(4), 0.9, method="snip", open_gates=False, progress=False
        )
    assert any("saliency of exactly 0" in text for text in report.warnings)
    assert not any("gates opened" in text for text in report.warnings)


def test_nothing_changes_where_no_gate_is_closed(opened: nn.Module) -> None:
    with_gates = saliency(opened, images(4), "snip", open_gates=True)
    without = saliency(opened, images(4), "snip", open_gates=False)
    assert_same(with_gates, without)
    report = force_prune(
        deepcopy(opened), images(4), 0.9, method="snip", progress=False
    )
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
        report = force_prune(model, images(4), 0.9, method="snip", progress=False)
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
    model: Any = nn.Sequential(
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


@pytest.mark.parametrize("method", WITH_PASSES)
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
