"""A diagnosis as text and as a dictionary."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import torch
from diagnosed import Crooked, made_up, straight, widest
from networks import vectors
from torch import Tensor, nn

from force_plugin import METHODS, Diagnosis, StageDiagnosis, diagnose
from force_plugin.scoring.gates import NORMALISATION, SCALE, WEIGHT, Gate

# What a pruning says of its network is asserted where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*saliency of exactly 0 everywhere")


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
    assert diagnosis.gates == ()
    assert diagnosis.hidden == diagnosis.unused == ()
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
                "advice": None,
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
