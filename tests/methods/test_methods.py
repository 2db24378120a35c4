"""The methods as pruning methods of PyTorch: with scores, without, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scored_layers import batch, network, noise, removed_of, smallest, weights_of
from state import unchanged
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import (
    FORCE,
    METHODS,
    SNIP,
    Magnitude,
    Random,
    SaliencyMethod,
    force_prune,
    get_masks,
    saliency,
)

CLASSES = list(METHODS.values())
NEED_SCORES = [m for m in CLASSES if m not in (Magnitude, Random)]
by_class = pytest.mark.parametrize("method", CLASSES, ids=lambda m: m.__name__)
by_amount = pytest.mark.parametrize("amount", [0.3, 0.9, 0.0, 1.0, 0, 1, 37])


# In the calls of torch.nn.utils.prune.


@by_amount
@by_class
def test_global_pruning_by_scores(method: type[SaliencyMethod], amount: float) -> None:
    model = network()
    dense = [module.weight.detach().clone() for module, _ in weights_of(model)]
    scores = {
        pair: noise(pair[0].weight.shape, seed)
        for seed, pair in enumerate(weights_of(model))
    }
    prune.global_unstructured(
        weights_of(model),
        pruning_method=method,
        importance_scores=scores,
        amount=amount,
    )
    flat = torch.cat([score.flatten() for score in scores.values()])
    expected = smallest(flat, removed_of(len(flat), amount))
    masks = [mask.flatten() for mask in get_masks(model).values()]
    assert torch.equal(torch.cat(masks), expected)

    assert prune.is_pruned(model)
    model(batch()[0])
    for pair, weight, mask in zip(weights_of(model), dense, masks, strict=True):
        prune.remove(*pair)
        assert torch.equal(pair[0].weight, weight * mask.view(weight.shape))
        assert isinstance(pair[0].weight, nn.Parameter)
    assert not prune.is_pruned(model)
    assert set(model.state_dict()) == set(network().state_dict())


@by_amount
@by_class
def test_one_module_pruned_by_scores(
    method: type[SaliencyMethod], amount: float
) -> None:
    module: Any = nn.Linear(8, 5)
    parameter, dense = module.weight, module.weight.detach().clone()
    scores = noise(dense.shape)
    hook = method.apply(module, "weight", amount=amount, importance_scores=scores)
    expected = smallest(scores, removed_of(40, amount))
    assert isinstance(hook, method)
    assert hook in module._forward_pre_hooks.values()
    assert module.weight_orig is parameter
    assert module.weight_mask.dtype == torch.bool
    assert torch.equal(module.weight_mask, expected)
    assert torch.equal(module.weight, dense * expected)

    prune.remove(module, "weight")
    assert torch.equal(module.weight, dense * expected)
    assert not prune.is_pruned(module)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.3), (12, 9), (0.25, 30)])
@by_class
def test_pruning_again_only_removes_more(
    method: type[SaliencyMethod], first: float, second: float
) -> None:
    module: Any = nn.Linear(8, 5)
    method.apply(module, "weight", amount=first, importance_scores=noise((5, 8)))
    before = module.weight_mask.clone()
    left = int(before.sum())
    # Scores that would rather have back what is gone.
    scores = 2 - noise((5, 8))
    hook = method.apply(module, "weight", amount=second, importance_scores=scores)

    assert isinstance(hook, prune.PruningContainer)
    assert [type(part) for part in hook] == [method, method]
    assert module.weight_mask.dtype == torch.bool
    of_all = smallest(
        scores.masked_fill(~before, -1), 40 - left + removed_of(left, second)
    )
    assert torch.equal(module.weight_mask, of_all)
    module(torch.ones(1, 8))
    assert torch.equal(module.weight, module.weight_orig * of_all)
    prune.remove(module, "weight")
    assert not prune.is_pruned(module)


@pytest.mark.parametrize("ours_first", [True, False])
def test_methods_mix_with_those_of_pytorch(ours_first: bool) -> None:
    module = nn.Linear(8, 5)
    steps = [
        lambda: FORCE.apply(module, "weight", 0.5, importance_scores=noise((5, 8))),
        lambda: prune.l1_unstructured(module, "weight", amount=10),
    ]
    for step in steps if ours_first else reversed(steps):
        step()
    assert int(module.weight_mask.sum()) == (10 if ours_first else 15)
    again: Any = SNIP.apply(
        module, "weight", amount=3, importance_scores=noise((5, 8), 5)
    )
    assert len(again) == 3
    assert int(module.weight_mask.sum()) == (7 if ours_first else 12)


def test_exactly_as_many_go_when_the_lowest_scores_are_minus_infinity() -> None:
    module = nn.Linear(4, 4)
    SNIP.apply(module, "weight", 8, importance_scores=torch.arange(16.0).view(4, 4))
    scores = torch.full((4, 4), -torch.inf)
    SNIP.apply(module, "weight", 2, importance_scores=scores)
    assert int(module.weight_mask.sum()) == 6


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_scores_of_any_dtype(dtype: torch.dtype) -> None:
    module: Any = nn.Linear(4, 3)
    scores = torch.randperm(12).view(3, 4).to(dtype)
    SNIP.apply(module, "weight", amount=5, importance_scores=scores)
    assert torch.equal(module.weight_mask, scores >= 5)


def test_the_first_of_equal_scores_stay() -> None:
    module = nn.Linear(4, 3)
    SNIP.apply(module, "weight", amount=7, importance_scores=torch.ones(3, 4))
    assert module.weight_mask.flatten().tolist() == [True] * 5 + [False] * 7


def test_a_bias_is_pruned_like_a_weight() -> None:
    module = nn.Linear(4, 6)
    SNIP.apply(module, "bias", amount=0.5, importance_scores=torch.arange(6.0))
    assert module.bias_mask.tolist() == [False] * 3 + [True] * 3


# Without scores.


@pytest.mark.parametrize("given", [True, False], ids=["scores", "no scores"])
@pytest.mark.parametrize("amount", [0.5, 0.25, 3, 40])
def test_magnitude_is_pytorchs_l1(amount: float, given: bool) -> None:
    ours: Any = nn.Linear(8, 5)
    theirs: Any = nn.Linear(8, 5)
    theirs.load_state_dict(ours.state_dict())
    scores = noise((5, 8)) - 0.5 if given else None
    Magnitude.apply(ours, "weight", amount=amount, importance_scores=scores)
    prune.l1_unstructured(theirs, "weight", amount, importance_scores=scores)
    assert torch.equal(ours.weight_mask, theirs.weight_mask.bool())


@pytest.mark.parametrize("amount", [0.5, 57])
def test_magnitude_is_pytorchs_l1_over_a_whole_network(amount: float) -> None:
    ours, theirs, scored = network(), network(), network()
    for model, method in ((ours, Magnitude), (theirs, prune.L1Unstructured)):
        prune.global_unstructured(weights_of(model), method, amount=amount)
    sparsity = amount if isinstance(amount, float) else amount / 114
    force_prune(scored, [], sparsity, method="magnitude", progress=False)
    for masks in (get_masks(ours), get_masks(scored)):
        for name, mask in get_masks(theirs).items():
            assert torch.equal(masks[name], mask)


def random_mask(seed: int, globally: bool) -> Tensor:
    torch.manual_seed(seed)
    module = nn.Linear(8, 5)
    torch.manual_seed(seed)
    if globally:
        prune.global_unstructured([(module, "weight")], Random, amount=0.5)
    else:
        Random.apply(module, "weight", amount=0.5)
    return module.weight_mask.bool()


@pytest.mark.parametrize("globally", [False, True], ids=["apply", "global"])
def test_random_without_scores_follows_the_seed(globally: bool) -> None:
    first, again, other = (random_mask(seed, globally) for seed in (0, 0, 1))
    assert int(first.sum()) == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_is_uniform_noise_that_advances_the_global_generator() -> None:
    model: Any = network()
    torch.manual_seed(4)
    scores = saliency(model, [], Random)
    torch.manual_seed(4)
    expected = [torch.rand(module.weight.shape) for module, _ in weights_of(model)]
    after = torch.rand(1)
    assert all(map(torch.equal, scores.values(), expected))
    torch.manual_seed(4)
    force_prune(model, [], 0.5, method="random", progress=False)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@pytest.mark.parametrize("method", NEED_SCORES, ids=lambda m: m.__name__)
def test_methods_that_need_scores_say_so(
    method: type[SaliencyMethod], pruned: bool, frozen: bool
) -> None:
    module = nn.Linear(8, 5).requires_grad_(not frozen)
    if pruned:
        prune.l1_unstructured(module, "weight", 5)
    message = rf"^{method.__name__} ranks .* importance_scores=.*saliency\("
    with unchanged(module), pytest.raises(ValueError, match=message):
        method.apply(module, "weight", amount=0.5)


@pytest.mark.parametrize("method", NEED_SCORES, ids=lambda m: m.__name__)
def test_methods_that_need_scores_say_so_for_a_whole_network(
    method: type[SaliencyMethod],
) -> None:
    model = network()
    message = rf"^{method.__name__} ranks .* importance_scores="
    with unchanged(model), pytest.raises(ValueError, match=message):
        prune.global_unstructured(weights_of(model), method, amount=0.5)


def test_the_scores_of_saliency_prune_as_force_prune_does() -> None:
    by_hand, by_plugin = network(), network()
    scores = saliency(by_hand, [batch()], "snip")
    prune.global_unstructured(
        weights_of(by_hand),
        SNIP,
        importance_scores=dict(zip(weights_of(by_hand), scores.values(), strict=True)),
        amount=0.9,
    )
    force_prune(by_plugin, [batch()], 0.9, method=SNIP, progress=False)
    expected = get_masks(by_plugin)
    assert all(torch.equal(m, expected[n]) for n, m in get_masks(by_hand).items())


# What is refused.


@pytest.mark.parametrize(
    ("amount", "error", "message"),
    [
        (1.5, ValueError, r"amount: expected a fraction in \[0, 1\].*got 1\.5"),
        (-0.1, ValueError, r"amount: .*got -0\.1"),
        (-1, ValueError, r"amount: .*got -1"),
        (41, ValueError, r"amount: 41 weights to remove, but only \d+ are left"),
        (True, TypeError, r"amount: expected a float or an int, got bool"),
        ("x", TypeError, r"amount: expected a float or an int, got str"),
        (None, TypeError, r"amount: expected a float or an int, got NoneType"),
    ],
)
@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@by_class
def test_a_wrong_amount_leaves_the_module_as_it_was(
    method: type[SaliencyMethod],
    pruned: bool,
    amount: Any,
    error: type[Exception],
    message: str,
) -> None:
    module = nn.Linear(8, 5)
    if pruned:
        method.apply(module, "weight", amount=9, importance_scores=noise((5, 8)))
    with unchanged(module), pytest.raises(error, match=message):
        method.apply(module, "weight", amount, importance_scores=noise((5, 8)))
    pairs: list[tuple[nn.Module, str]] = [(module, "weight")]
    scores = {pairs[0]: noise((5, 8))}
    with unchanged(module), pytest.raises(error, match=message):
        prune.global_unstructured(pairs, method, scores, amount=amount)


def test_an_amount_of_nan_is_refused_by_name() -> None:
    module = nn.Linear(8, 5)
    with unchanged(module), pytest.raises(ValueError, match=r"amount: .*got nan"):
        SNIP.apply(module, "weight", float("nan"), importance_scores=noise((5, 8)))


def with_nan() -> Tensor:
    scores = noise((5, 8))
    scores[2, 3] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (with_nan(), ValueError, r"importance_scores: expected numbers, got NaN"),
        (
            noise((5, 7)),
            ValueError,
            r"importance_scores: expected the shape of weight, \(5, 8\), got \(5, 7\)",
        ),
        (noise((1, 8)), ValueError, r"importance_scores: .*got \(1, 8\)"),
    ],
    ids=["NaN", "shape", "broadcast"],
)
@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@pytest.mark.parametrize("method", [FORCE, Magnitude, Random])
def test_wrong_scores_leave_the_module_as_it_was(
    method: type[SaliencyMethod],
    pruned: bool,
    scores: Any,
    error: type[Exception],
    message: str,
) -> None:
    module = nn.Linear(8, 5)
    if pruned:
        method.apply(module, "weight", amount=9, importance_scores=noise((5, 8)))
        mask = module.weight_mask.clone()
    with unchanged(module), pytest.raises(error, match=message):
        method.apply(module, "weight", 0.5, importance_scores=scores)
    if pruned:
        with torch.no_grad():
            module.weight_orig.fill_(1.0)
        module(torch.ones(1, 8))
        assert torch.equal(module.weight, mask.float())


def test_scores_that_are_no_tensor_are_refused() -> None:
    module = nn.Linear(2, 2)
    message = r"importance_scores: expected .*got list"
    with unchanged(module), pytest.raises(TypeError, match=message):
        SNIP.apply(module, "weight", 0.5, importance_scores=[[1.0, 2.0], [3.0, 4.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["wieght", "running_mean", "num_features"])
def test_a_name_of_no_parameter_is_refused(name: str) -> None:
    module = nn.BatchNorm1d(4)
    message = rf"BatchNorm1d has no parameter '{name}'"
    with unchanged(module), pytest.raises(ValueError, match=message):
        SNIP.apply(module, name, 0.5, importance_scores=noise((4,)))
