"""The method and the number of steps that diagnose advises for a sparsity."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from state import unchanged
from torch import Tensor, nn

from force_plugin import diagnose, force_prune, sparsity_report

Batch = tuple[Tensor, Tensor]


def wide(inputs: int = 40, between: int = 30) -> nn.Module:
    """A network of 41 channels, and 51 weights for each with 40 inputs."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(between)
    return nn.Sequential(
        nn.Linear(inputs, between), norm, nn.ReLU(), nn.Linear(between, 11)
    )


def loader(inputs: int = 40) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(33, inputs, generator=generator), torch.arange(33) % 11)]


# 1530 weights and 41 channels.
@pytest.mark.parametrize(
    ("sparsity", "kept", "method", "steps"),
    [
        (0.0, 1530, "snip", 1),
        (0.59, 627, "snip", 1),  # 15.3 a channel
        (0.6, 612, "steady_force", 60),  # 14.9
        (0.9, 153, "steady_force", 60),
        (0.99, 15, "steady_force", 60),
    ],
)
def test_the_advice_depends_on_the_weights_for_each_channel(
    sparsity: float, kept: int, method: str, steps: int
) -> None:
    advice = diagnose(wide(), loader(), sparsity=sparsity).advice
    assert advice is not None
    assert advice.sparsity == sparsity and advice.channels == 41
    assert (advice.kept, advice.method, advice.steps) == (kept, method, steps)
    assert advice.reasons


def test_the_call_that_is_advised_prunes_the_model() -> None:
    for sparsity in (0.5, 0.9):
        model = wide()
        text = str(diagnose(model, loader(), sparsity=sparsity).advice)
        names = {"force_prune": force_prune, "model": model, "loader": loader()}
        exec(text[text.index("force_prune(") :], names)
        assert sparsity_report(model).sparsity == pytest.approx(sparsity, abs=1e-3)


class Faint(nn.Module):
    """Two layers side by side, one of which hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.faint = nn.Linear(40, 11), nn.Linear(40, 11)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.loud(x) + 0.02 * self.faint(x)
        return found


def test_a_single_step_that_empties_a_layer_is_not_advised() -> None:
    advice = diagnose(Faint(), loader(), sparsity=0.6).advice
    assert advice is not None and advice.method == "steady_force"
    assert advice.reasons[0] == "a single step would empty 1 of 2 layers"


@pytest.mark.parametrize("method", ["snip", "grasp", "magnitude", "random", "synflow"])
def test_the_advice_does_not_depend_on_the_method_of_the_diagnosis(method: str) -> None:
    advice = diagnose(Faint(), loader(), method, sparsity=0.6).advice
    assert advice == diagnose(Faint(), loader(), sparsity=0.6).advice


def test_the_channels_of_a_transposed_convolution_are_its_outputs() -> None:
    model = nn.Sequential(
        nn.ConvTranspose1d(16, 2, 3),
        nn.ReLU(),
        nn.ConvTranspose1d(2, 64, 3, groups=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    batch = torch.randn(8, 16, 5), torch.arange(8) % 3
    advice = diagnose(model, [batch], sparsity=0.5).advice
    assert advice is not None and advice.channels == 2 + 64 + 3


@pytest.mark.parametrize("method", ["force", "magnitude"])
def test_a_layer_that_the_loss_does_not_use_is_no_error(method: str) -> None:
    model = wide()
    model.append(nn.Identity())
    model[-1].unused = nn.Linear(3, 3)
    advice = diagnose(model, loader(), method, sparsity=0.5).advice
    assert advice is not None and advice.method == "snip"


def test_a_model_that_is_pruned_already_gets_the_error_of_the_call() -> None:
    model = wide()
    force_prune(model, loader(), 0.9, progress=False)
    message = r"^sparsity: the model is pruned to 0\.9 already"
    with unchanged(model), pytest.raises(ValueError, match=message):
        diagnose(model, loader(), sparsity=0.5)
    advice = diagnose(model, loader(), sparsity=0.95).advice
    assert advice is not None and advice.kept == 76


@pytest.mark.parametrize(("training", "told"), [(True, True), (False, False)])
def test_a_normalisation_is_told_where_it_matters(training: bool, told: bool) -> None:
    model = wide().train(training)
    advice = diagnose(model, loader(), sparsity=0.9).advice
    assert advice is not None
    start = "a normalisation follows 78 % of the weights"  # 1200 of 1530
    assert any(reason.startswith(start) for reason in advice.reasons) == told


def test_the_network_is_unchanged_and_one_more_measurement_is_made() -> None:
    passes = []
    model = wide()
    batches = loader()

    def loss(out: Tensor, targets: Tensor) -> Tensor:
        passes.append(1)
        return nn.functional.cross_entropy(out, targets)

    with unchanged(model):
        assert diagnose(model, batches, loss_fn=loss).advice is None
        before = len(passes)
        diagnose(model, batches, loss_fn=loss, sparsity=0.9)
    assert len(passes) - before == before + 1


def test_it_is_printed_in_80_columns_and_is_plain_types() -> None:
    diagnosis = diagnose(wide(), loader(), sparsity=0.975)
    text = str(diagnosis)
    assert max(map(len, text.splitlines())) <= 80
    assert "at 97.5 % 38 weights stay, 0.927 for each output channel" in text
    assert "at 97.5 %   " in text  # the emptied layers
    plain = json.loads(json.dumps(diagnosis.to_dict()))
    assert plain["advice"]["method"] == "steady_force"
    assert plain["advice"]["steps"] == 60
    assert (
        json.loads(json.dumps(diagnose(wide(), loader()).to_dict()))["advice"] is None
    )


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (95, ValueError, r"^sparsity: expected the .* got 95; 95 % is 0\.95$"),
        (1.0, ValueError, r"^sparsity: expected the fraction to remove, .* got 1\.0$"),
        (0.9999, ValueError, r"^sparsity: 0\.9999 leaves none of the 1530 "),
        ("0.9", TypeError, r"^sparsity: expected a number, got str$"),
        (True, TypeError, r"^sparsity: expected a number, got bool$"),
    ],
)
def test_a_wrong_sparsity_is_an_error_before_a_batch_is_read(
    wrong: Any, kind: type[Exception], message: str
) -> None:
    def never() -> Any:
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(kind, match=message):
        diagnose(wide(), never(), sparsity=wrong)
