"""What diagnose says of a network before it is pruned."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from networks import vectors
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import (
    METHODS,
    SNIP,
    Diagnosis,
    StageDiagnosis,
    apply_masks,
    diagnose,
    force_prune,
    get_masks,
    saliency,
)
from force_plugin.errors import NoGradientError
from force_plugin.scoring.gates import NORMALISATION, SCALE, WEIGHT, Gate

# What a pruning says of its network is asserted where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*saliency of exactly 0 everywhere")

Batch = tuple[Tensor, Tensor]

WITH_LOSS = ["force", "iter_snip", "snip", "grasp", "grasp_it", "snip_it"]
WITH_FORWARD = [*WITH_LOSS, "synflow"]
ONE_SHOT = {"steps": 1, "progress": False, "on_collapse": "warn"}


# Networks and data.


def images(count: int = 2, size: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return [(inputs, torch.arange(count) % 10)]


class Block(nn.Module):
    """Two layers around a skip connection, which a norm of weight 0 closes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(torch.relu(self.first(x))))


class Crooked(nn.Module):
    """A network with one of each: closed gates, a dead layer, one that is not used.

    Args:
        dead: Whether the units of ``dead`` never fire.
        unused: Whether the outputs depend on ``aux``.
    """

    def __init__(self, *, dead: bool = True, unused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.body = nn.Sequential(Block(), nn.Dropout(0.1), Block())
        self.dead = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.aux = nn.Linear(6, 4)
        self.unused = unused
        if dead:
            nn.init.constant_(self.dead.bias, -100.0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.body(self.stem(x))
        outputs = self.head(x + torch.relu(self.dead(x)))
        return outputs if self.unused else outputs + self.aux(x)


USED = ["stem", *(f"body.{i}.{n}" for i in (0, 2) for n in ("first", "second"))]
USED = [f"{name}.weight" for name in [*USED, "dead", "head"]]
GATES = ["body.0.norm.weight", "body.2.norm.weight"]


def straight(*widths: int) -> nn.Sequential:
    """A network in whose way nothing stands, in float64."""
    torch.manual_seed(0)
    widths = widths or (5, 12, 8, 4)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class Arithmetic(nn.Module):
    """y = head · (h + gate ⊙ branch · h), h = stem · x, in small integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2, bias=False)
        self.branch = nn.Linear(2, 2, bias=False)
        self.gate = nn.Parameter(torch.zeros(2))
        self.head = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            self.branch.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
            self.head.weight.copy_(torch.tensor([[1.0, 1.0]]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.gate * self.branch(h))


def arithmetic(**options: Any) -> Diagnosis:
    batch = (torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.zeros(1))
    return diagnose(
        Arithmetic(), [batch], "snip", loss_fn=lambda y, _: y.sum(), **options
    )


def emptied(scores: Mapping[str, Tensor], sparsity: float) -> int:
    """Layers without a weight among the best, by a sort of all (score, position)."""
    flat = [
        (-float(value), layer, index)
        for layer, tensor in enumerate(scores.values())
        for index, value in enumerate(tensor.flatten())
    ]
    kept = int((1 - sparsity) * len(flat) + 1e-9)
    return len(scores) - len({layer for _, layer, _ in sorted(flat)[:kept]})


def sentences(diagnosis: Diagnosis, word: str) -> list[str]:
    return [finding for finding in diagnosis.findings if word in finding]


def made_up(
    names: Sequence[str] = ("stem", "body"),
    *,
    layers: int = 3,
    weights: int = 1000,
    method: str = "force",
    **found: Any,
) -> Diagnosis:
    """A diagnosis of a network that does not exist."""
    stages = tuple(
        StageDiagnosis(name, layers, weights, 1 / len(names), 0.0) for name in names
    )
    return Diagnosis(
        **{
            "parameters": weights * len(names) + 7,
            "prunable": weights * len(names),
            "method": method,
            "stages": stages,
            "gates": (),
            "silent": {},
            "hidden": (),
            "unused": (),
            "emptied": {0.9: (0, 0)},
            "small": {},
            **found,
        }
    )


def widest(diagnosis: Diagnosis) -> int:
    return max(map(len, str(diagnosis).splitlines()))


# The text


def test_the_whole_text_of_a_network_that_can_be_worked_out_by_hand() -> None:
    # Closed: y = h = (5, 11); |θ ⊙ g| is ((1, 4), (3, 8)), 0 and (5, 11).
    # Open: y = (21, 22); it is ((2, 8), (9, 24)), ((5, 11), (0, 11)) and (21, 22).
    assert str(arithmetic(sparsities=(0.5, 0.9, 0.995))).splitlines() == [
        "12 parameters, 10 of them (83.3 %) prunable in 3 layers",
        "",
        "stage   layers  weights    share  saliency  gates closed",
        "--------------------------------------------------------",
        "stem         1        4  40.00 %   38.05 %       50.00 %",
        "branch       1        4  40.00 %   23.89 %        0.00 %",
        "head         1        2  20.00 %   38.05 %       50.00 %",
        "--------------------------------------------------------",
        "",
        "layers that lose every weight, ranked once by snip",
        "  at 50 %     0 of 3 (1 with gates closed)",
        "  at 90 %     2 of 3 (2 with gates closed)",
        "  at 99.5 %   3 of 3 (3 with gates closed)",
        "",
        "- gates opened while scoring: 1 branch scales of 0, set to 1 (gate)",
        "- 1 of 3 layers (branch.weight) have no saliency as long as the gates are",
        "  closed: keep open_gates=True",
    ]


def test_its_numbers_are_exact() -> None:
    diagnosis = arithmetic(sparsities=(0.5,))
    assert (diagnosis.parameters, diagnosis.prunable, diagnosis.layers) == (12, 10, 3)
    assert diagnosis.stages == (
        StageDiagnosis("stem", 1, 4, 43 / 113, 0.5),
        StageDiagnosis("branch", 1, 4, 27 / 113, 0.0),
        StageDiagnosis("head", 1, 2, 43 / 113, 0.5),
    )
    assert diagnosis.gates == (Gate("gate", SCALE, 0.0),)
    assert diagnosis.hidden == ("branch.weight",)
    assert (diagnosis.silent, diagnosis.unused) == ({}, ())
    assert diagnosis.emptied == {0.5: (0, 1)}
    assert diagnosis.method == "snip"


def test_a_network_without_findings_says_so_and_has_no_column_for_gates() -> None:
    diagnosis = diagnose(straight(), vectors())
    lines = str(diagnosis).splitlines()
    assert diagnosis.findings == ()
    assert diagnosis.gates == diagnosis.hidden == diagnosis.unused == ()
    assert lines[0] == "212 parameters, 188 of them (88.7 %) prunable in 3 layers"
    assert lines[2].split() == ["stage", "layers", "weights", "share", "saliency"]
    assert lines[-1] == "every layer has a saliency"
    assert "gates" not in str(diagnosis)


def test_a_notebook_shows_the_table() -> None:
    diagnosis = made_up()
    assert repr(diagnosis) == str(diagnosis)


def test_the_columns_are_aligned() -> None:
    names = ("a", "stages.10", "head")
    gate = Gate("stages.10.norm.weight", NORMALISATION, 0.0)
    for gates in ((), (gate,)):
        table = str(made_up(names, weights=10**6, gates=gates)).splitlines()[2:8]
        assert len({len(line) for line in table}) == 1
        assert table[1] == table[-1] == "-" * len(table[0])


def test_no_line_exceeds_80_columns() -> None:
    rng = random.Random(0)
    letters = "abcdefghij_.0123456789"

    def name() -> str:
        return "".join(rng.choices(letters, k=rng.choice([1, 8, 33, 79, 81, 300])))

    for _ in range(300):
        layers = rng.choice([1, 54, 1234])
        weights = 10 ** rng.randint(1, 8)
        diagnosis = made_up(
            [name() for _ in range(rng.randint(1, 6))],
            layers=layers,
            weights=weights,
            gates=tuple(
                Gate(name(), rng.choice([NORMALISATION, SCALE, WEIGHT]), 1e-6)
                for _ in range(rng.choice([0, 1, 40]))
            ),
            silent={name(): "the gradient ends at " + name() for _ in range(5)},
            hidden=tuple(name() for _ in range(rng.choice([0, 9]))),
            unused=tuple(name() for _ in range(rng.choice([0, 1, 9]))),
            emptied={0.9: (layers, 0), 0.999: (layers, layers)},
        )
        assert widest(diagnosis) <= 80, str(diagnosis)


def test_stage_names_and_numbers_of_any_length_leave_each_number_whole() -> None:
    gate = Gate("gate", SCALE, 0.0)
    for gates in ((), (gate,)):
        diagnosis = made_up(
            ["x" * 300, "y" * 300], layers=123_456, weights=10**9, gates=gates
        )
        lines = str(diagnosis).splitlines()
        rule = lines.index("-" * 80)
        rows = lines[rule + 1 : rule + 3]
        for letter, row in zip("xy", rows, strict=True):
            cells = row.split()
            assert set(cells[0]) == {letter, "…"}
            assert cells[1:3] == ["123456", "1,000,000,000"]
            assert cells[3:7] == ["50.00", "%", "50.00", "%"]
            assert len(row) == 80


def test_no_line_exceeds_80_columns_for_ten_billion_parameters() -> None:
    # A language model of 10 billion parameters in 225 layers.
    diagnosis = made_up(["blocks"], layers=225, weights=10_012_345_678)
    assert widest(diagnosis) <= 80


def test_no_line_exceeds_80_columns_for_a_method_with_a_long_name() -> None:
    assert widest(made_up(method="GradientTimesMagnitudeOverTheWholeTrainingSet")) <= 80


def test_a_sparsity_with_many_digits_is_apart_from_the_number_of_layers() -> None:
    lines = str(made_up(emptied={2 / 3: (5, 0), 0.9999999: (6, 0)})).splitlines()
    assert [line for line in lines if "  at " in line] == [
        "  at 66.66666667 %   5 of 6",
        "  at 99.99999 %      6 of 6",
    ]


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
    if method in WITH_FORWARD:
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


@pytest.mark.parametrize("method", [*WITH_FORWARD, "magnitude"])
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
                nn.init.zeros_(layer.weight)
                layer.weight.data[number, number] = 1.0

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


@pytest.mark.parametrize("method", WITH_FORWARD)
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
    model = straight()
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


@pytest.mark.parametrize("method", [*WITH_LOSS, "synflow"])
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
    model = straight()
    nn.init.constant_(model[0].bias, torch.inf)
    # tanh(∞) = 1, and is flat there.
    diagnosis = diagnose(model, vectors())
    assert diagnosis.hidden == tuple(diagnosis.silent) == ("0.weight",)
    assert len(diagnosis.findings) == 1
    assert sentences(diagnosis, "open_gates") == []


@pytest.mark.parametrize("method", WITH_FORWARD)
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


# Arguments


def test_a_loss_of_ones_own_reads_any_batch() -> None:
    (inputs, targets), model = vectors()[0], Crooked(unused=False)
    batches = [{"image": inputs, "label": targets}]

    def loss(network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(network(batch["image"]), batch["label"])

    with unchanged(model):
        theirs = diagnose(model, batches, forward=loss)
    assert theirs == diagnose(model, vectors())


def test_only_the_parameters_that_are_named_are_diagnosed() -> None:
    model = Crooked()
    chosen = [(model.stem, "weight"), (model.body[0].norm, "bias")]
    # A generator can be read once.
    diagnosis = diagnose(model, vectors(), parameters=(pair for pair in chosen))
    assert [s.name for s in diagnosis.stages] == ["stem", "body.0"]
    assert [s.weights for s in diagnosis.stages] == [30, 6]
    assert diagnosis.unused == ()
    scores = saliency(model, vectors(), parameters=chosen)
    amounts = [float(score.sum()) for score in scores.values()]
    assert [s.saliency for s in diagnosis.stages] == pytest.approx(
        [amount / sum(amounts) for amount in amounts], rel=1e-9
    )


def test_a_stage_whose_parameters_are_not_named_in_a_row_is_listed_once() -> None:
    model = Crooked(unused=False)
    pairs = [
        (model.body[0].first, "weight"),
        (model.stem, "weight"),
        (model.body[0].second, "weight"),
    ]
    diagnosis = diagnose(model, vectors(), parameters=pairs)
    assert [s.name for s in diagnosis.stages] == ["body.0", "stem"]
    assert [s.layers for s in diagnosis.stages] == [2, 1]
    assert [s.weights for s in diagnosis.stages] == [72, 30]
    assert sum(s.saliency for s in diagnosis.stages) == pytest.approx(1)


def test_a_pruned_model_is_diagnosed_as_it_is_pruned() -> None:
    model = straight()
    force_prune(model, vectors(), 0.5, method="snip", progress=False)
    masks = get_masks(model)
    with unchanged(model):
        diagnosis = diagnose(model, vectors(), "snip", sparsities=(0.9,))
    scores = saliency(model, vectors(), "snip")
    total = sum(float(score.sum()) for score in scores.values())
    assert [stage.saliency for stage in diagnosis.stages] == pytest.approx(
        [float(score.sum()) / total for score in scores.values()], rel=1e-9
    )
    assert diagnosis.emptied[0.9][0] == emptied(scores, 0.9)
    # A parameter keeps its dense name and size, and a mask is no parameter.
    assert (diagnosis.parameters, diagnosis.prunable) == (212, 188)
    assert all(torch.equal(masks[n], m) for n, m in get_masks(model).items())


def test_a_network_of_fewer_weights_than_a_percent_needs_loses_all_its_layers() -> None:
    model = straight(5, 2, 4)
    diagnosis = diagnose(model, vectors())
    # One of 18 weights stays at 90 %, and none at 95 % and 99 %.
    assert diagnosis.emptied == {0.9: (1, 1), 0.95: (2, 2), 0.99: (2, 2)}
    with pytest.raises(ValueError, match="leaves none of the 18 prunable weights"):
        force_prune(model, vectors(), 0.95, progress=False)
    single = nn.Linear(5, 4).double()
    assert diagnose(single, vectors()).emptied == {
        s: (s > 0.95,) * 2 for s in (0.9, 0.95, 0.99)
    }


def test_a_network_of_one_weight_has_one_stage_with_everything() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    batch = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1))
    diagnosis = diagnose(model, [batch], loss_fn=lambda y, t: y.sum())
    (stage,) = diagnosis.stages
    assert (stage.layers, stage.weights) == (1, 1)
    assert (stage.saliency, stage.closed) == (1, 1)
    assert set(diagnosis.emptied.values()) == {(1, 1)}
    assert str(diagnosis).startswith("1 parameters, 1 of them (100.0 %) prunable")


def test_where_no_weight_has_any_saliency_all_shares_are_0() -> None:
    model = nn.Linear(5, 1).double()
    # Of one class, every probability is 1 and the loss 0, whatever the weights.
    batch = (vectors()[0][0], torch.zeros(8, dtype=torch.long))
    diagnosis = diagnose(model, [batch])
    assert diagnosis.silent == {"weight": "the gradient ends at log softmax"}
    assert [(s.saliency, s.closed) for s in diagnosis.stages] == [(0.0, 0.0)]
    # Five weights: one of them would stay at 80 %.
    assert set(diagnosis.emptied.values()) == {(1, 1)}


def test_what_an_earlier_pruning_removed_has_no_share() -> None:
    model = straight()
    masks = {"0.weight": torch.arange(60).view(12, 5) % 7 == 0}
    amounts = [
        (layer.weight.abs() * masks.get(f"{number}.weight", 1)).sum().item()
        for number, layer in enumerate(model)
        if isinstance(layer, nn.Linear)
    ]
    apply_masks(model, masks)
    stages = diagnose(model, [], "magnitude").stages
    assert [stage.saliency for stage in stages] == pytest.approx(
        [amount / sum(amounts) for amount in amounts], rel=1e-6
    )


@pytest.mark.parametrize("method", ["magnitude", "grasp", "snip"])
@pytest.mark.parametrize(("every", "sparsity"), [(10, 0.8), (100, 0.4)])
def test_what_an_earlier_pruning_removed_counts_as_lost(
    method: str, every: int, sparsity: float
) -> None:
    # Of the first layer one weight in ten is left, or none; the others do not come
    # back, neither for the largest |θ| nor for a score of 0 among negative ones.
    mask = torch.arange(1, 61).view(12, 5) % every == 0

    def model() -> nn.Module:
        network = straight()
        with torch.no_grad():
            network[0].weight.mul_(100 * ~mask + 1e-3)
        apply_masks(network, {"0.weight": mask})
        return network

    foretold = diagnose(model(), vectors(), method, sparsities=(sparsity,))
    report = force_prune(model(), vectors(), sparsity, method=method, **ONE_SHOT)
    assert foretold.emptied[sparsity][0] == len(report.empty_layers)


def test_a_model_that_has_less_left_than_is_asked_for_loses_what_it_has_lost() -> None:
    model = straight()
    apply_masks(model, {"0.weight": torch.zeros(12, 5, dtype=torch.bool)})
    # 60 of 188 weights are pruned, and only 37 were to be.
    diagnosis = diagnose(model, vectors(), "magnitude", sparsities=(0.0, 0.2))
    assert diagnosis.emptied == {0.0: (1, 1), 0.2: (1, 1)}


# Errors


def test_a_network_without_prunable_weights_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(5), nn.ReLU()).double()
    with unchanged(model), pytest.raises(ValueError, match="nothing to prune"):
        diagnose(model, vectors())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        diagnose([], vectors())  # type: ignore[arg-type]


def test_a_loss_that_uses_no_weight_is_an_error_that_names_them() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).double()

    def only_the_norm(network: nn.Module, batch: Batch) -> Tensor:
        return network[1](network[0](batch[0]).detach()).square().sum()

    with (
        unchanged(model),
        pytest.raises(NoGradientError, match=r"^no gradient reached 0\.weight") as info,
    ):
        diagnose(model, vectors(), forward=only_the_norm)
    assert info.value.names == ("0.weight",)


def test_a_loss_that_autograd_does_not_follow_is_an_error() -> None:
    model = Crooked()
    with unchanged(model), pytest.raises(RuntimeError, match="through autograd"):
        diagnose(model, vectors(), loss_fn=lambda y, t: y.detach().sum())


@pytest.mark.parametrize("wrong", [1, 1.0, -0.1, 90, float("nan"), float("inf")])
def test_sparsities_outside_of_0_to_1_are_refused_before_a_batch_is_read(
    wrong: float,
) -> None:
    def loader() -> Iterator[Batch]:
        raise AssertionError("a batch was read")
        yield

    model = Crooked()
    message = rf"^sparsities: expected fractions, 0 <= sparsity < 1, got {wrong}$"
    with unchanged(model), pytest.raises(ValueError, match=message):
        diagnose(model, loader(), sparsities=(0.9, wrong))


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (0.9, "float"),
        (None, "NoneType"),
        ("0.9", "str among them"),
        (("a",), "str among them"),
        ([0.9, None], "NoneType among them"),
        ([False], "bool among them"),
    ],
)
def test_sparsities_that_are_no_fractions_are_refused(wrong: Any, came: str) -> None:
    message = rf"^sparsities: expected fractions such as \(0\.9, 0\.95\), got {came}$"
    model = straight()
    with unchanged(model), pytest.raises(TypeError, match=message):
        diagnose(model, vectors(), sparsities=wrong)


def test_sparsities_may_be_read_once_only() -> None:
    diagnosis = diagnose(straight(), vectors(), sparsities=(s for s in (0.9, 0.95)))
    assert list(diagnosis.emptied) == [0.9, 0.95]


def test_without_sparsities_nothing_is_counted() -> None:
    diagnosis = diagnose(straight(), vectors(), sparsities=())
    assert diagnosis.emptied == {}
    assert "%" not in str(diagnosis).split("ranked once by force")[1]


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("forse", ValueError, "did you mean 'force'"),
        (3, TypeError, "method: expected a name or a subclass of SaliencyMethod"),
        (nn.Linear, TypeError, "got Linear"),
    ],
)
def test_a_wrong_method_is_refused(
    method: Any, error: type[Exception], message: str
) -> None:
    model = Crooked()
    with unchanged(model), pytest.raises(error, match=message):
        diagnose(model, vectors(), method)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": 0}, ValueError, "batches: expected at least 1"),
        ({"loss_fn": None}, TypeError, "loss_fn: expected a callable"),
        ({"forward": 3}, TypeError, "forward: expected a callable"),
        ({"parameters": 3}, TypeError, "parameters: expected pairs"),
        ({"parameters": []}, ValueError, "nothing to prune: parameters= is empty"),
        ({"loader": []}, ValueError, "expected at least one batch"),
        ({"loader": 3}, TypeError, "expected an iterable of batches"),
        ({"loader": [torch.ones(2, 5)]}, ValueError, "expected batches"),
    ],
)
def test_other_wrong_arguments_are_refused_as_force_prune_refuses_them(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Crooked()
    with unchanged(model), pytest.raises(error, match=message):
        diagnose(model, **{"loader": vectors(), **options})


# No trace


def with_a_past(**options: Any) -> nn.Module:
    """A network with gradients, frozen parts, mixed modes and hooks."""
    model = Crooked(**options)
    model(vectors()[0][0]).sum().backward()
    model.stem.weight.requires_grad_(False)
    model.body[0].norm.weight.requires_grad_(False)
    model.head.weight.grad = None
    model.body[0].eval()
    model.head.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("method", [*WITH_FORWARD, "magnitude"])
@pytest.mark.parametrize("kind", ["fresh", "pruned", "eval"])
def test_a_diagnosis_leaves_no_trace(method: str, kind: str) -> None:
    model = with_a_past()
    if kind == "pruned":
        mask = torch.arange(36).view(6, 6) % 3 > 0
        apply_masks(model, {"dead.weight": mask, "body.2.first.weight": mask})
    elif kind == "eval":
        model.eval()
    with unchanged(model):
        diagnose(model, vectors(2), method, batches=2)


def test_random_scores_leave_no_trace_in_the_network() -> None:
    model = with_a_past()
    state = torch.get_rng_state()
    diagnosis = diagnose(model, [], "random")
    # The one method that advances the global generator: by design, and that only.
    torch.set_rng_state(state)
    with unchanged(model):
        state = torch.get_rng_state()
        assert diagnose(model, [], "random") == diagnosis
        torch.set_rng_state(state)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["force", "grasp"])
def test_an_error_at_any_pass_leaves_no_trace(
    at: int, error: type[BaseException], method: str
) -> None:
    calls = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        result = cross_entropy(network(batch[0]), batch[1])
        # From then on: a first look at the gates may fail, and is then done without.
        if len(calls) >= at:
            raise error("on the way")
        return result

    model = with_a_past()
    with unchanged(model), pytest.raises(error, match="on the way"):
        diagnose(model, vectors(), method, forward=loss)


def test_a_loader_that_fails_at_the_second_scoring_leaves_no_trace() -> None:
    class Loader:
        started = 0

        def __iter__(self) -> Iterator[Batch]:
            self.started += 1
            if self.started > 1:
                raise OSError("the disk is gone")
            return iter(vectors())

    model = with_a_past()
    with unchanged(model), pytest.raises(OSError, match="the disk is gone"):
        diagnose(model, Loader())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_have_switched_gradients_off(
    mode: type[torch.no_grad] | type[torch.inference_mode],
) -> None:
    model = with_a_past()
    expected = diagnose(model, vectors())
    with unchanged(model), mode():
        assert diagnose(model, vectors()) == expected


def test_the_batches_stay_as_they_are_when_the_network_works_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4)).double()
    batches = vectors()
    before = batches[0][0].clone()
    diagnose(model, batches)
    assert torch.equal(batches[0][0], before)


# Other forms


@pytest.mark.parametrize("method", METHODS)
def test_the_dictionary_goes_through_json(method: str) -> None:
    diagnosis = diagnose(Crooked(), vectors(), method)
    plain = diagnosis.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(
        json.dumps(
            {
                "parameters": diagnosis.parameters,
                "prunable": diagnosis.prunable,
                "method": method,
                "layers": diagnosis.layers,
                "stages": [
                    {
                        "name": stage.name,
                        "layers": stage.layers,
                        "weights": stage.weights,
                        "saliency": stage.saliency,
                        "closed": stage.closed,
                    }
                    for stage in diagnosis.stages
                ],
                "gates": [
                    {"name": gate.name, "kind": gate.kind, "largest": gate.largest}
                    for gate in diagnosis.gates
                ],
                "silent": dict(diagnosis.silent),
                "hidden": diagnosis.hidden,
                "unused": diagnosis.unused,
                "emptied": {str(key): it for key, it in diagnosis.emptied.items()},
                "small": dict(diagnosis.small),
                "passed_over": {},
                "chosen": False,
                "coverage": 1.0,
                "findings": diagnosis.findings,
            }
        )
    )


def test_the_dictionary_is_a_copy() -> None:
    diagnosis = diagnose(Crooked(), vectors())
    plain = diagnosis.to_dict()
    plain["silent"].clear()
    plain["emptied"].clear()
    plain["findings"].clear()
    assert diagnosis.silent
    assert diagnosis.emptied
    assert diagnosis.findings


def test_a_diagnosis_does_not_change() -> None:
    diagnosis = made_up()
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnosis.method = "snip"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnosis.stages[0].weights = 3  # type: ignore[misc]


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
