"""Wrong arguments of force_prune, and networks that only look like a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import (
    INF,
    INPUTS,
    NAN,
    TARGETS,
    WHERE,
    Fault,
    in_inference_mode,
    network,
    prune_it,
    score_it,
    sentences,
    words,
)
from state import unchanged
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from force_plugin import FORCE, get_masks


def density(value: Any) -> Callable[[int, int, float], Any]:
    """A schedule with a wrong first density."""
    return lambda step, steps, last: value if step == 1 else last


STRANGER = nn.Linear(6, 8)
NO_NUMBER = r"sparsity: expected a number, got "
NO_INTEGER = r": expected an integer, got "
NO_METHOD = r"^method: expected a name or a subclass of SaliencyMethod, got "
COLLAPSE = r'^on_collapse: expected "raise" or "warn", got '
NO_PAIRS = r'^parameters: expected pairs \(module, "weight"\) .*, got '

ARGUMENTS: dict[str, Fault] = {
    # force_prune
    "a sparsity in a list": Fault(
        lambda m: prune_it(m, sparsity=[0.5]), TypeError, NO_NUMBER + "list$"
    ),
    "a sparsity in a tensor": Fault(
        lambda m: prune_it(m, sparsity=torch.tensor(0.5)), TypeError, NO_NUMBER + "Tens"
    ),
    "a complex sparsity": Fault(
        lambda m: prune_it(m, sparsity=0.5 + 0j), TypeError, NO_NUMBER + "complex$"
    ),
    "an infinite sparsity": Fault(
        lambda m: prune_it(m, sparsity=INF),
        ValueError,
        r"^sparsity: expected the fraction .*0 <= sparsity < 1, got inf$",
    ),
    "true steps": Fault(
        lambda m: prune_it(m, steps=True), TypeError, f"^steps{NO_INTEGER}bool$"
    ),
    "no steps": Fault(
        lambda m: prune_it(m, steps=None), TypeError, f"^steps{NO_INTEGER}NoneType$"
    ),
    "true batches": Fault(
        lambda m: prune_it(m, batches=True), TypeError, f"^batches{NO_INTEGER}bool$"
    ),
    "half a batch": Fault(
        lambda m: prune_it(m, batches=0.5), TypeError, f"^batches{NO_INTEGER}float$"
    ),
    "a schedule of nan": Fault(
        lambda m: prune_it(m, schedule=density(NAN)),
        ValueError,
        r"^schedule: densities must lie between 0 and 1 .*, got nan, 0\.5, 0\.5$",
    ),
    "a schedule of words": Fault(
        lambda m: prune_it(m, schedule=density("half")),
        TypeError,
        r"^schedule: expected a density, a number, got float, str$",
    ),
    "a schedule of densities": Fault(
        lambda m: prune_it(m, schedule=[0.9, 0.7, 0.5]),
        TypeError,
        r"^schedule: expected a name or a callable .*, got list$",
    ),
    "a method and its amount": Fault(
        lambda m: prune_it(m, method=FORCE(0.5)),
        TypeError,
        NO_METHOD + "an instance of FORCE; pass the class itself, method=FORCE$",
    ),
    "two methods": Fault(
        lambda m: prune_it(m, method=["force"]), TypeError, NO_METHOD + "list$"
    ),
    "a method of pytorch": Fault(
        lambda m: prune_it(m, method=prune.L1Unstructured),
        TypeError,
        NO_METHOD + 'L1Unstructured; method="magnitude" does the same$',
    ),
    "another on_collapse": Fault(
        lambda m: prune_it(m, on_collapse="ignore"), ValueError, COLLAPSE + "'ignore'$"
    ),
    "no on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=None), ValueError, COLLAPSE + "None$"
    ),
    "a false on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=False), ValueError, COLLAPSE + "False$"
    ),
    "a list for on_collapse": Fault(
        lambda m: prune_it(m, on_collapse=["warn"]), ValueError, COLLAPSE + r"\['warn'"
    ),
    "the model for its parameters": Fault(
        lambda m: prune_it(m, parameters=m), TypeError, NO_PAIRS + "Linear: Linear"
    ),
    "one pair for all": Fault(
        lambda m: prune_it(m, parameters=(m[0], "weight")), TypeError, NO_PAIRS
    ),
    "a dictionary of parameters": Fault(
        lambda m: prune_it(m, parameters=dict(m.named_parameters())),
        TypeError,
        NO_PAIRS + r"str: 0\.weight$",
    ),
    "weights without elements": Fault(
        lambda m: prune_it(m, parameters=[(m[0], "weight")]),
        ValueError,
        r"^nothing to prune: the weights \(0\.weight\) have no elements; name what to ",
        lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4)),
    ),
    "parameters that raise": Fault(
        lambda m: prune_it(m, parameters=(1 / 0 for _ in m)),
        ZeroDivisionError,
        "^division by zero$",
    ),
    # saliency
    "saliency of no method": Fault(
        lambda m: score_it(m, method=None), TypeError, NO_METHOD + "NoneType; leave it "
    ),
    "saliency of no batch": Fault(
        lambda m: score_it(m, batches=0), ValueError, "^batches: expected at least 1"
    ),
    "saliency by no loss": Fault(
        lambda m: score_it(m, loss_fn="mse"),
        TypeError,
        "^loss_fn: expected a callable, got str$",
    ),
    "saliency by no forward": Fault(
        lambda m: score_it(m, forward=m[0].weight),
        TypeError,
        "^forward: expected a callable, got Parameter$",
    ),
    "saliency of no parameters": Fault(
        lambda m: score_it(m, parameters=[]),
        ValueError,
        r"^nothing to prune: parameters= is empty; name what to prune with parameters=",
    ),
    "saliency of another model's parameters": Fault(
        lambda m: score_it(m, parameters=[(STRANGER, "weight")]),
        ValueError,
        "^parameters: a Linear given with 'weight' is not part of the model; take",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(name: str) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)


@pytest.mark.parametrize(
    "build",
    [lambda: network().requires_grad_(False), in_inference_mode],
    ids=["frozen", "made in inference mode"],
)
def test_a_model_without_gradients_is_pruned_as_any_other(
    build: Callable[[], nn.Module],
) -> None:
    model, usual = build(), network()
    needed = [parameter.requires_grad for parameter in model.parameters()]
    with unchanged(model):
        scores = score_it(model)
    for name, score in score_it(usual).items():
        assert torch.equal(scores[name], score)
    assert prune_it(model) == prune_it(usual)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_masks_and_keeps_his_mode(
    mode: Callable[[], Any],
) -> None:
    model, usual = network(), network()
    prune_it(usual)
    with mode():
        with unchanged(model):
            score_it(model)
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        prune_it(model)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for name, mask in get_masks(usual).items():
        assert torch.equal(get_masks(model)[name], mask)
    # None of its tensors is one that autograd refuses.
    cross_entropy(model(INPUTS), TARGETS).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_error_under_a_caller_without_gradients_leaves_him_his_mode(
    mode: Callable[[], Any],
) -> None:
    model = network()
    with mode(), unchanged(model), pytest.raises(ValueError, match=r"^loader: "):
        prune_it(model, loader=[INPUTS])


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("method", ["force", "grasp", "grasp_it"])
def test_an_embedding_with_sparse_gradients_is_scored_as_one_without(
    method: str, batches: int
) -> None:
    scores = []
    for sparse in (False, True):
        model = words(sparse)
        chosen = [(model[0], "weight"), (model[3], "weight")]
        options = {"parameters": chosen, "method": method, "batches": batches}
        scores.append(score_it(model, loader=[sentences()], **options))
    for name, score in scores[0].items():
        assert torch.equal(scores[1][name], score)


@pytest.mark.parametrize("where", WHERE)
def test_a_healthy_pruning_of_any_of_these_models_keeps_exactly_what_is_asked(
    where: str,
) -> None:
    model = WHERE[where]()
    modes = [module.training for module in model.modules()]
    result = prune_it(model)
    assert result.kept == result.total // 2
    masks = get_masks(model)
    assert sum(int(masks[layer.name].sum()) for layer in result.layers) == result.kept
    assert [module.training for module in model.modules()] == modes
