"""What diagnose takes, what it refuses, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from diagnosed import ONE_SHOT, Batch, Crooked, emptied, straight
from kinds_of_methods import WITH_PASSES
from networks import vectors
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import apply_masks, diagnose, force_prune, get_masks, saliency
from force_plugin.errors import NoGradientError

# What a pruning says of its network is asserted where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*saliency of exactly 0 everywhere")


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
    model: Any = Crooked()
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
    model: Any = Crooked(unused=False)
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


@pytest.mark.parametrize("method", [*WITH_PASSES, "magnitude"])
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
