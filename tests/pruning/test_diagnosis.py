"""What diagnose says of a network before it is pruned: numbers and findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from diagnosed import (
    ONE_SHOT,
    Batch,
    Crooked,
    emptied,
    made_up,
    straight,
    widest,
)
from kinds_of_methods import WITH_PASSES
from networks import images, vectors
from state import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import METHODS, SNIP, Diagnosis, diagnose, force_prune, saliency
from force_plugin.errors import NoGradientError
from force_plugin.scoring.gates import SCALE, WEIGHT

# What a pruning says of its network is asserted where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*saliency of exactly 0 everywhere")


# Networks and data.


USED = ["stem", *(f"body.{i}.{n}" for i in (0, 2) for n in ("first", "second"))]
USED = [f"{name}.weight" for name in [*USED, "dead", "head"]]
GATES = ["body.0.norm.weight", "body.2.norm.weight"]


def sentences(diagnosis: Diagnosis, word: str) -> list[str]:
    return [finding for finding in diagnosis.findings if word in finding]


# Its numbers


@pytest.mark.parametrize("method", METHODS)
def test_the_shares_of_the_stages_are_those_of_saliency(method: str) -> None:
    model = Crooked(unused=False)
    # The scores of "random" are the first that its seed gives.
    torch.manual_seed(3)
    diagnosis = diagnose(model, vectors(), method)
    stages = {
        "stem": ["stem"],
        "body.0": ["body.0.first", "body.0.second"],
        "body.2": ["body.2.first", "body.2.second"],
        "dead": ["dead"],
        "head": ["head"],
        "aux": ["aux"],
    }
    for open_gates, shares in (
        (True, [stage.saliency for stage in diagnosis.stages]),
        (False, [stage.closed for stage in diagnosis.stages]),
    ):
        torch.manual_seed(3)
        scores = saliency(model, vectors(), method, open_gates=open_gates)
        amounts = {name: float(s.abs().sum()) for name, s in scores.items()}
        expected = [
            sum(amounts[f"{layer}.weight"] for layer in layers) / sum(amounts.values())
            for layers in stages.values()
        ]
        assert shares == pytest.approx(expected, rel=1e-6)
        assert sum(shares) == pytest.approx(1, rel=1e-12)
    assert [stage.name for stage in diagnosis.stages] == list(stages)
    assert [stage.layers for stage in diagnosis.stages] == [1, 2, 2, 1, 1, 1]
    assert [stage.weights for stage in diagnosis.stages] == [30, 72, 72, 36, 24, 24]


@pytest.mark.parametrize("method", METHODS)
def test_emptied_layers_are_counted_as_a_sort_of_all_scores_counts(method: str) -> None:
    model = Crooked()
    sparsities = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
    options: dict[str, Any] = {}
    if method in WITH_PASSES:
        options["parameters"] = [(model.get_submodule(n[:-7]), "weight") for n in USED]
    torch.manual_seed(3)
    diagnosis = diagnose(model, vectors(), method, sparsities=sparsities, **options)
    scores = []
    for open_gates in (True, False):
        torch.manual_seed(3)
        scores.append(
            saliency(model, vectors(), method, open_gates=open_gates, **options)
        )
    assert diagnosis.emptied == {
        sparsity: tuple(emptied(one, sparsity) for one in scores)
        for sparsity in sparsities
    }
    # All of them are lost where no weight is left, none where all are.
    assert diagnosis.emptied[0.999] == (diagnosis.layers, diagnosis.layers)
    assert diagnosis.emptied[0.0] == (0, 0)
    assert list(diagnosis.emptied) == list(sparsities)


@pytest.mark.parametrize("method", [*WITH_PASSES, "magnitude"])
def test_pruning_at_once_empties_as_many_layers_as_were_foretold(method: str) -> None:
    sparsities = (0.5, 0.8, 0.9, 0.95, 0.98)
    foretold = diagnose(
        Crooked(unused=False), vectors(), method, sparsities=sparsities
    ).emptied
    for sparsity in sparsities:
        # Methods with several steps keep another density after the first of them.
        if METHODS[method].steps not in (None, 1):
            continue
        for at, open_gates in enumerate((True, False)):
            report = force_prune(
                Crooked(unused=False),
                vectors(),
                sparsity,
                method=method,
                open_gates=open_gates,
                **ONE_SHOT,
            )
            assert len(report.empty_layers) == foretold[sparsity][at]


def test_a_share_of_a_million_weights_is_counted_without_rounding_errors() -> None:
    # 1 - 0.9999 is a little less than 0.0001, and 10 weights are to stay: one a layer.
    class Ten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(100, 100) for _ in range(10))
            for number, layer in enumerate(self.layers):
                weight = layer.get_parameter("weight")
                nn.init.zeros_(weight)
                weight.data[number, number] = 1.0

    for sparsity, empty in ((0.9999, 0), (0.99991, 1), (0.99999, 9)):
        diagnosis = diagnose(Ten(), [], "magnitude", sparsities=(sparsity,))
        assert diagnosis.emptied == {sparsity: (empty, empty)}


def test_all_parameters_are_counted_and_a_shared_one_once() -> None:
    model = nn.Sequential(
        nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 4)
    ).double()
    model[2].weight = model[0].weight
    diagnosis = diagnose(model, vectors())
    assert diagnosis.parameters == 25 + 5 + 10 + 5 + 20 + 4
    assert diagnosis.prunable == 25 + 20
    assert diagnosis.layers == 2
    assert [stage.name for stage in diagnosis.stages] == ["0", "3"]


def test_several_batches_are_averaged_and_none_means_the_whole_loader() -> None:
    for batches, count in ((1, 1), (2, 2), (None, 3)):
        model, loader = straight(), vectors(3)
        shares = [s.saliency for s in diagnose(model, loader, batches=batches).stages]
        scores = saliency(model, loader[:count], batches=count)
        sums = [float(score.sum()) for score in scores.values()]
        assert shares == pytest.approx([s / sum(sums) for s in sums], rel=1e-9)


def test_the_default_is_force_with_one_batch_at_90_95_and_99_percent() -> None:
    asked: list[int] = []

    class Loader:
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(vectors(3)):
                asked.append(number)
                yield batch

    diagnosis = diagnose(straight(), Loader())
    assert diagnosis.method == "force"
    assert list(diagnosis.emptied) == [0.9, 0.95, 0.99]
    assert asked == [0]


def test_both_scorings_see_the_batch_that_a_shuffled_loader_gives_first() -> None:
    inputs, targets = (torch.cat(parts) for parts in zip(*vectors(8), strict=True))
    model = Crooked()
    model.body.eval()
    used = [(model.get_submodule(name[:-7]), "weight") for name in USED]
    torch.manual_seed(5)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)
    with unchanged(model):
        stages = diagnose(model, loader, parameters=used).stages
        scores = saliency(model, loader, parameters=used, open_gates=False)
    total = sum(float(score.sum()) for score in scores.values())
    assert stages[0].closed == pytest.approx(
        float(scores["stem.weight"].sum()) / total, rel=1e-9
    )


def test_a_class_of_ones_own_is_named_and_scored_as_it_says() -> None:
    class Largest(SNIP):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return weight.abs()

    diagnosis = diagnose(straight(), vectors(), Largest)
    amounts = [m.weight.abs().sum().item() for m in straight()[::2]]
    assert diagnosis.method == "Largest"
    assert "ranked once by Largest" in str(diagnosis)
    assert [stage.saliency for stage in diagnosis.stages] == pytest.approx(
        [amount / sum(amounts) for amount in amounts], rel=1e-9
    )


def test_scores_with_a_sign_share_by_their_magnitudes() -> None:
    model = straight()
    scores = saliency(model, vectors(), "grasp")
    assert any((s < 0).any() for s in scores.values())
    stages = diagnose(model, vectors(), "grasp").stages
    assert all(0 < stage.saliency < 1 for stage in stages)
    assert sum(stage.saliency for stage in stages) == pytest.approx(1)


# Findings


@pytest.mark.parametrize("method", WITH_PASSES)
def test_gates_are_those_that_a_report_names(method: str) -> None:
    model = Crooked(unused=False)
    diagnosis = diagnose(model, vectors(), method)
    report = force_prune(model, vectors(), 0.0, method=method, **ONE_SHOT)
    assert [gate.name for gate in diagnosis.gates] == GATES
    assert [w for w in report.warnings if "gates" in w] == sentences(
        diagnosis, "gates opened"
    )
    assert diagnosis.findings[0] == (
        "gates opened while scoring: 2 normalisation weights of 0, set to 1 "
        f"({', '.join(GATES)})"
    )


def test_weights_that_are_0_are_gates_unless_the_method_ranks_them_unseen() -> None:
    model: Any = straight()
    nn.init.zeros_(model[2].weight)
    for method in ("snip", "synflow"):
        diagnosis = diagnose(model, vectors(), method)
        assert [(g.name, g.kind) for g in diagnosis.gates] == [("2.weight", WEIGHT)]
        assert diagnosis.silent == {}
        # As they are, they also hide what comes before.
        assert diagnosis.hidden == ("0.weight", "2.weight")
    magnitude = diagnose(model, vectors(), "magnitude")
    assert magnitude.gates == ()
    assert magnitude.hidden == ("2.weight",)
    assert magnitude.silent == {"2.weight": "its weights are 0"}
    noise = diagnose(model, vectors(), "random")
    assert (noise.gates, noise.hidden, noise.silent) == ((), (), {})


def test_gates_that_are_only_nearly_closed_hide_no_layer() -> None:
    model = Crooked(dead=False, unused=False)
    for name in GATES:
        nn.init.constant_(model.get_parameter(name), 1e-6)
    diagnosis = diagnose(model, vectors())
    assert [gate.largest for gate in diagnosis.gates] == [1e-6, 1e-6]
    assert diagnosis.hidden == ()
    assert len(diagnosis.findings) == 1
    assert "of at most 1e-06" in diagnosis.findings[0]
    closed = {stage.name: stage.closed for stage in diagnosis.stages}
    assert 0 < closed["body.0"] < 1e-4


def test_layers_behind_closed_gates_are_hidden_and_the_advice_is_to_open_them() -> None:
    diagnosis = diagnose(Crooked(dead=False, unused=False), vectors())
    assert list(diagnosis.hidden) == [name for name in USED if "body" in name]
    assert sentences(diagnosis, "open_gates") == [
        "4 of 8 layers (body.0.first.weight, body.0.second.weight, "
        "body.2.first.weight and 1 more) have no saliency as long as the gates are "
        "closed: keep open_gates=True"
    ]


def test_silent_layers_come_with_their_cause() -> None:
    diagnosis = diagnose(Crooked(unused=False), vectors())
    assert diagnosis.silent == {"dead.weight": "the gradient ends at relu"}
    assert sentences(diagnosis, "exactly 0") == [
        "1 of 8 layers (dead.weight) had a saliency of exactly 0 everywhere at the "
        "first step: the gradient ends at relu; what is kept of them is not a choice "
        "of the method"
    ]


@pytest.mark.parametrize("method", WITH_PASSES)
def test_silent_layers_are_those_of_a_pruning(method: str) -> None:
    diagnosis = diagnose(Crooked(unused=False), vectors(), method)
    report = force_prune(
        Crooked(unused=False), vectors(), 0.0, method=method, **ONE_SHOT
    )
    # In absolute values nothing is dead: the cause is the activation, not the weight.
    assert list(diagnosis.silent) == ([] if method == "synflow" else ["dead.weight"])
    assert sentences(diagnosis, "exactly 0") == [
        warning for warning in report.warnings if "saliency of exactly 0" in warning
    ]


def test_the_advice_to_open_gates_is_for_layers_that_it_helps() -> None:
    diagnosis = diagnose(Crooked(unused=False), vectors())
    assert set(diagnosis.hidden) > set(diagnosis.silent) == {"dead.weight"}
    # With open gates the dead layer has no saliency either: its own line says so.
    (advice,) = sentences(diagnosis, "keep open_gates=True")
    assert advice.startswith("4 of 8 layers (body.0.first.weight, ")


def test_without_gates_hidden_layers_are_the_silent_ones_and_advice_is_withheld() -> (
    None
):
    model: Any = straight()
    nn.init.constant_(model[0].bias, torch.inf)
    # tanh(∞) = 1, and is flat there.
    diagnosis = diagnose(model, vectors())
    assert diagnosis.hidden == tuple(diagnosis.silent) == ("0.weight",)
    assert len(diagnosis.findings) == 1
    assert sentences(diagnosis, "open_gates") == []


@pytest.mark.parametrize("method", WITH_PASSES)
def test_a_layer_that_is_not_used_is_named_and_the_others_are_diagnosed(
    method: str,
) -> None:
    model = Crooked()
    with pytest.raises(NoGradientError, match=r"^no gradient reached aux\.weight"):
        force_prune(model, vectors(), 0.5, method=method, progress=False)
    with unchanged(model):
        diagnosis = diagnose(model, vectors(), method)
    assert diagnosis.unused == ("aux.weight",)
    assert diagnosis.findings[-1] == (
        "the loss does not use aux.weight: leave such layers out with parameters=, or "
        "pass a forward= whose loss uses them"
    )
    used = [(model.get_submodule(name[:-7]), "weight") for name in USED]
    assert dataclasses.replace(diagnosis, unused=()) == diagnose(
        model, vectors(), method, parameters=used
    )
    # It counts as a parameter, not as one that can be pruned.
    assert diagnosis.prunable == sum(model.get_parameter(n).numel() for n in USED)
    assert diagnosis.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_without_data_see_no_difference_between_used_and_unused(
    method: str,
) -> None:
    diagnosis = diagnose(Crooked(), [], method)
    assert (diagnosis.unused, diagnosis.hidden, diagnosis.silent) == ((), (), {})
    assert diagnosis.layers == 8


def test_findings_come_in_the_order_gates_hidden_silent_unused() -> None:
    diagnosis = diagnose(Crooked(), vectors())
    words = ("gates opened", "open_gates=True", "exactly 0", "does not use")
    assert len(diagnosis.findings) == 4
    for word, finding in zip(words, diagnosis.findings, strict=True):
        assert word in finding


def test_only_the_first_of_many_unused_layers_are_named() -> None:
    diagnosis = made_up(unused=tuple("abcdef"))
    assert diagnosis.findings == (
        "the loss does not use a, b, c and 3 more: leave such layers out with "
        "parameters=, or pass a forward= whose loss uses them",
    )


# Real networks


def test_a_resnet_of_timm_hides_what_zero_init_last_hides() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    with unchanged(model):
        diagnosis = diagnose(model, images(), "snip")
    gates = ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn3", "layer4.0.bn2"]
    assert not any(model.get_submodule(name).weight.any() for name in gates)
    # What leads to nothing but a norm of weight 0; a downsample passes it by.
    behind = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and name.startswith("layer")
        and "downsample" not in name
    ]
    assert [gate.name for gate in diagnosis.gates] == [f"{g}.weight" for g in gates]
    assert list(diagnosis.hidden) == behind
    assert (len(behind), diagnosis.layers) == (9, 16)
    assert diagnosis.findings == (
        "gates opened while scoring: 4 normalisation weights of 0, set to 1 "
        f"({', '.join(f'{gate}.weight' for gate in gates)})",
        "9 of 16 layers (layer1.0.conv1.weight, layer1.0.conv2.weight, "
        "layer2.0.conv1.weight and 6 more) have no saliency as long as the gates are "
        "closed: keep open_gates=True",
    )
    names = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [stage.name for stage in diagnosis.stages] == names
    assert diagnosis.stages[1].closed == 0 < diagnosis.stages[1].saliency
    assert diagnosis.parameters == sum(p.numel() for p in model.parameters())
    # At the least, the hidden ones lose everything.
    assert all(closed >= 9 > opened for opened, closed in diagnosis.emptied.values())


def test_a_resnet_50_hides_48_of_its_54_layers() -> None:
    # One image is enough to see it, and the stem alone is what takes time.
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=10, in_chans=1)
    batch = (torch.randn(2, 1, 32, 32), torch.arange(2))
    diagnosis = diagnose(model, [batch], "snip", sparsities=())
    assert len(diagnosis.gates) == 16
    assert (len(diagnosis.hidden), diagnosis.layers) == (48, 54)
    assert sentences(diagnosis, "48 of 54 layers (layer1.0.conv1.weight")
    assert len(diagnosis.findings) == 2
    assert widest(diagnosis) <= 80


def test_a_convnext_of_timm_hides_nothing_but_has_faint_branches() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10)
    with unchanged(model):
        diagnosis = diagnose(model, images(), "snip", sparsities=(0.9,))
    scales = [name for name, _ in model.named_parameters() if name.endswith("gamma")]
    assert [gate.name for gate in diagnosis.gates] == scales
    assert {gate.kind for gate in diagnosis.gates} == {SCALE}
    assert (diagnosis.hidden, diagnosis.silent) == ((), {})
    gates, small = diagnosis.findings
    assert f"{len(scales)} branch scales of at most 1e-06" in gates
    opened, closed = diagnosis.emptied[0.9]
    assert 0 < opened < closed
    # Its weights have a standard deviation of 0.02, whatever their number.
    assert small.startswith(f"{opened} of {diagnosis.layers} layers (")
    for name, size in diagnosis.small.items():
        weight = model.get_parameter(name).detach().double()
        usual = 1 / (3 * weight[0].numel()) ** 0.5
        assert size == pytest.approx(float(weight.square().mean().sqrt()) / usual)
        assert size < 0.5
    assert widest(diagnosis) <= 80
