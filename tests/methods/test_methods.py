"""The methods as pruning methods of PyTorch, and how to write one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from force_plugin import (
    FORCE,
    METHODS,
    SNIP,
    GraSP,
    IterSNIP,
    Magnitude,
    Random,
    SaliencyMethod,
    diagnose,
    force_prune,
    get_masks,
    saliency,
)
from force_plugin.errors import MethodError
from force_plugin.methods.base import elementwise

CLASSES = list(METHODS.values())
NEED_SCORES = [m for m in CLASSES if m not in (Magnitude, Random)]

by_class = pytest.mark.parametrize("method", CLASSES, ids=lambda m: m.__name__)
by_amount = pytest.mark.parametrize("amount", [0.3, 0.9, 0.0, 1.0, 0, 1, 37])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


def weights_of(model: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(model[0], "weight"), (model[3], "weight")]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.arange(8) % 5


def noise(shape: Sequence[int], seed: int = 2) -> Tensor:
    """Positive scores, all different."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def removed_of(total: int, amount: float) -> int:
    """How many weights an amount removes, by exact arithmetic."""
    if isinstance(amount, int):
        return amount
    return total - math.floor((1 - Fraction(str(amount))) * total)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask without the smallest scores."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[:count]] = False
    return mask.view(scores.shape)


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
    module = nn.Linear(8, 5)
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
    module = nn.Linear(8, 5)
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
    again = SNIP.apply(module, "weight", amount=3, importance_scores=noise((5, 8), 5))
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
    module = nn.Linear(4, 3)
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
    ours, theirs = nn.Linear(8, 5), nn.Linear(8, 5)
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
    model = network()
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


# Methods of one's own that write where they are to read.

Writer = Callable[[Tensor], object]

WRITERS: dict[str, Writer] = {
    "mul_": lambda t: t.mul_(2),
    "an item": lambda t: t.__setitem__(0, 5.0),
    "all items": lambda t: t.__setitem__(..., 5.0),
    "data": lambda t: t.data.add_(1),
    "numpy": lambda t: np.multiply(t.detach().numpy(), 2, out=t.detach().numpy()),
    "a view": lambda t: t.view(-1)[1:].neg_(),
    "a transposed view": lambda t: t.transpose(0, 1).add_(1),
    "out=": lambda t: torch.add(t, 1, out=t),
    "set_": lambda t: t.set_(torch.ones(3)),
    "resize_": lambda t: t.resize_(2),
    "other data": lambda t: setattr(t, "data", torch.zeros_like(t)),
    "zero_": lambda t: t.zero_(),
    "nan": lambda t: t.fill_(torch.nan),
    "copy_": lambda t: t.copy_(torch.randn(t.shape)),
    "a foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "clamp": lambda t: t.clamp_(min=0.01),
}
CALLS: dict[str, Callable[[nn.Module, type[SaliencyMethod]], object]] = {
    "force_prune": lambda m, c: force_prune(
        m, [batch()], 0.5, method=c, steps=3, progress=False
    ),
    "saliency": lambda m, c: saliency(m, [batch()], c),
    "diagnose": lambda m, c: diagnose(m, [batch()], c),
}


def scoring(writer: Writer, **attributes: Any) -> type[SaliencyMethod]:
    class Mine(SaliencyMethod):
        @staticmethod
        def score(weight: Tensor, signal: Any) -> Tensor:
            score = weight.abs()
            writer(weight)
            return score

    for name, value in attributes.items():
        setattr(Mine, name, value)
    return Mine


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WRITERS)
def test_a_score_that_writes_into_the_weight_is_named(way: str, call: str) -> None:
    model = network()
    message = r"^Mine\.score has written into the weight 0\.weight, .*weight\.clone\(\)"
    with unchanged(model), pytest.raises(MethodError, match=message):
        CALLS[call](model, scoring(WRITERS[way]))


@pytest.mark.parametrize("pruned", [False, True], ids=["", "pruned"])
@pytest.mark.parametrize(
    "kind",
    [
        {"looks": False, "measure": classmethod(lambda c, p: dict.fromkeys(p.weights))},
        {"steps": 1},
        {"regrows": True},
        {"score": elementwise(scoring(Tensor.zero_).score)},
    ],
    ids=["without data", "one step", "regrowing", "elementwise"],
)
def test_a_score_of_any_kind_that_writes_is_named(
    kind: dict[str, Any], pruned: bool
) -> None:
    model = network()
    if pruned:
        force_prune(model, [batch()], 0.2, method="snip", progress=False)
    if "score" in kind:
        kind = {"score": staticmethod(kind["score"])}
    with (
        unchanged(model),
        pytest.raises(MethodError, match=r"^Mine\.score has written"),
    ):
        CALLS["force_prune"](model, scoring(Tensor.zero_, **kind))


# What a reference to a weight and to a buffer of the model can be used for.
ELSEWHERE: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "a parameter": lambda w, b: w.data.mul_(2),
    "other data": lambda w, b: setattr(w, "data", w.data.double()),
    "a buffer": lambda w, b: b.add_(1),
    "a gradient": lambda w, b: w.grad.add_(1),  # type: ignore[union-attr]
    "no gradient": lambda w, b: setattr(w, "grad", None),
    "a new gradient": lambda w, b: setattr(w, "grad", torch.zeros_like(w)),
    "frozen": lambda w, b: w.requires_grad_(False),
}


@pytest.mark.parametrize("by", ["score", "measure"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_method_that_writes_elsewhere_into_the_model_is_named(
    way: str, call: str, by: str
) -> None:
    model: Any = network()
    model.register_buffer("counter", torch.zeros(2))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    # While it is measured the model itself has stand-ins, which are there for that.
    weight, buffer = model[0].weight, model.counter

    def write(anything: Any) -> None:
        with torch.no_grad():
            ELSEWHERE[way](weight, buffer)

    method = scoring(write) if by == "score" else measuring(write)
    with (
        unchanged(model),
        pytest.raises(MethodError, match=rf"^Mine\.{by} has written into "),
    ):
        CALLS[call](model, method)


def test_a_measure_that_leaves_a_weight_out_is_named() -> None:
    class Mine(SaliencyMethod):
        @classmethod
        def measure(cls, probe: Any) -> Mapping[str, Tensor]:
            signal = probe.gradients()
            return {f"module.{name}": value for name, value in signal.items()}

        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return signal.abs()

    for call in CALLS.values():
        model = network()
        message = (
            r"^Mine\.measure: expected a signal for each .* none for 0\.weight, 3\."
        )
        with unchanged(model), pytest.raises(MethodError, match=message):
            call(model, Mine)


@pytest.mark.parametrize("error", [ArithmeticError("mine"), KeyboardInterrupt()])
def test_a_score_that_writes_and_fails_leaves_the_model_as_it_was(
    error: BaseException,
) -> None:
    def fail(weight: Tensor) -> None:
        weight.data.mul_(2)
        raise error

    model = network()
    for call in CALLS.values():
        with unchanged(model), pytest.raises(type(error)) as caught:
            call(model, scoring(fail))
        assert caught.value is error


def test_a_score_may_overwrite_its_signal_and_return_what_it_likes() -> None:
    class Taylor(SaliencyMethod):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return gradient.mul_(weight.requires_grad_()).abs()

    plain = saliency(network(), [batch()], "snip")
    model = network()
    with unchanged(model):
        for name, score in saliency(model, [batch()], Taylor).items():
            assert torch.equal(score, plain[name]) and not score.requires_grad


def measuring(before: Any, after: Any = None) -> type[SaliencyMethod]:
    """A method that does something to a probe before, or after, it measures."""

    class Mine(SaliencyMethod):
        @classmethod
        def measure(cls, probe: Any) -> Mapping[str, Tensor]:
            before(probe)
            signal = probe.gradients()
            if after is not None:
                after(probe)
            return signal

        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return signal.abs()

    return Mine


def nothing(probe: Any) -> None:
    pass


TARGETS: dict[str, Callable[[Any], Any]] = {
    "weights": lambda probe: probe.weights["0.weight"],
    "parameters": lambda probe: probe.parameters["3.bias"].dense.data,
    "a parameter": lambda probe: probe.parameters["0.weight"].dense.data,
    "a mask": lambda probe: (probe.masks or probe.weights)["3.weight"],
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "way", ["mul_", "an item", "data", "numpy", "a view", "set_", "resize_", "copy_"]
)
def test_a_measure_that_writes_is_named(way: str, target: str, late: bool) -> None:
    if target != "weights" and way in ("set_", "resize_"):
        pytest.skip("it is a tensor of the method's own")

    def write(probe: Any) -> None:
        WRITERS[way](TARGETS[target](probe))

    method = measuring(nothing, write) if late else measuring(write)
    for call in CALLS.values():
        model = network()
        with unchanged(model), pytest.raises(MethodError, match=r"^Mine\.measure has "):
            call(model, method)


def test_scores_of_ones_own_that_write_are_named() -> None:
    class Mine(Magnitude):
        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            scores = super().scores(probe)
            probe.weights["3.weight"].abs_()
            return scores

    for call in CALLS.values():
        model = network()
        message = r"^Mine\.scores has written into 3\.weight, "
        with unchanged(model), pytest.raises(MethodError, match=message):
            call(model, Mine)


def test_a_measure_that_writes_into_masks_is_named() -> None:
    def write(probe: Any) -> None:
        if probe.step == 2:
            probe.masks["3.weight"].logical_not_()

    model = network()
    message = r"^Mine\.measure has written into the mask of 3\.weight, "
    with unchanged(model), pytest.raises(MethodError, match=message):
        CALLS["force_prune"](model, measuring(write))


@pytest.mark.parametrize(
    "write",
    [
        lambda probe: probe.weights.update({"0.weight": torch.ones(3, 2, 3, 3)}),
        lambda probe: setattr(probe.parameters["3.bias"].dense, "data", torch.ones(5)),
        lambda probe: probe.parameters["3.bias"].dense.data.zero_(),
    ],
    ids=["another tensor", "other memory", "a bias"],
)
def test_a_measure_that_replaces_values_is_named(write: Any) -> None:
    model = network()
    with unchanged(model), pytest.raises(MethodError, match=r"^Mine\.measure has "):
        CALLS["force_prune"](model, measuring(write))


def test_a_measure_may_write_into_what_it_measures() -> None:
    # SynFlow's network, by hand.
    def positive(probe: Any) -> None:
        probe.model.eval()
        with torch.no_grad():
            for parameter in probe.model.parameters():
                parameter.abs_()

    model = network()
    scores = {}
    with unchanged(model):
        scores["written"] = saliency(model, [batch()], measuring(positive))
    by_hand = network()
    positive(SimpleNamespace(model=by_hand))
    scores["by hand"] = saliency(by_hand, [batch()], measuring(nothing))
    for one, other in zip(*(found.values() for found in scores.values()), strict=True):
        assert torch.equal(one, other)
    # At the next step it is the network that it was.
    biases = []

    def note(probe: Any) -> None:
        biases.append(probe.model[0].bias.detach().clone())
        positive(probe)

    CALLS["force_prune"](model, measuring(note))
    assert len(biases) == 3 and all(torch.equal(b, model[0].bias) for b in biases)
    assert model[0].bias.min() < 0


@pytest.mark.parametrize("scored", [False, True], ids=["", "scores"])
@pytest.mark.parametrize("globally", [False, True], ids=["apply", "global"])
@pytest.mark.parametrize("where", ["ranking", "compute_mask"])
def test_a_ranking_that_works_in_place_does_not_change_the_model(
    where: str, globally: bool, scored: bool
) -> None:
    class Mine(Magnitude):
        def ranking(self, t: Tensor) -> Tensor:
            return t.data.abs_() if where == "ranking" else t.abs()

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            mask = super().compute_mask(t, default_mask)
            if where == "compute_mask":
                t.data.zero_()
                default_mask.zero_()
            return mask

    model, plain = network(), network()
    dense = model[3].weight.detach().clone()
    scores = noise(dense.shape) - 0.5 if scored else None
    kept = scores.clone() if scores is not None else None
    for one, method in ((model, Mine), (plain, Magnitude)):
        pair = (one[3], "weight")
        if globally:
            given = {pair: scores} if scored else None
            prune.global_unstructured([pair], method, given, amount=0.5)
        else:
            for amount in (0.25, 0.5):  # the second time there is a mask
                method.apply(*pair, amount=amount, importance_scores=scores)
    assert torch.equal(model[3].weight_orig, dense)
    assert torch.equal(model[3].weight_mask, plain[3].weight_mask)
    if kept is not None:
        assert torch.equal(scores, kept)


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


# Methods of one's own.


class GradientMagnitude(SaliencyMethod):
    @staticmethod
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs()


def test_a_method_of_ones_own_scores_and_prunes() -> None:
    model = network()
    inputs, targets = batch()
    scores = saliency(model, [batch()], GradientMagnitude)
    report = force_prune(
        model, [batch()], 0.75, method=GradientMagnitude, steps=1, progress=False
    )
    naive = network()
    cross_entropy(naive(inputs), targets).backward()
    gradients = [module.weight.grad.abs() for module, _ in weights_of(naive)]
    assert all(map(torch.allclose, scores.values(), gradients))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    kept = torch.cat([mask.flatten() for mask in get_masks(model).values()])
    assert torch.equal(kept, smallest(flat, removed_of(len(flat), 0.75)))
    assert report.method == "GradientMagnitude"
    assert isinstance(model[0]._forward_pre_hooks.popitem()[1], GradientMagnitude)


def test_the_attributes_of_a_method_of_ones_own_are_followed() -> None:
    densities = []

    class Recording(GradientMagnitude):
        steps: ClassVar[int | None] = 3
        schedule: ClassVar[str | None] = "linear"

        @classmethod
        def measure(cls, probe: Any) -> Mapping[str, Tensor | None]:
            masks = probe.masks or {}
            densities.append(sum(int(mask.sum()) for mask in masks.values()))
            return super().measure(probe)

    report = force_prune(
        network(), [batch()], 0.75, method=Recording, steps=60, progress=False
    )
    # 114 weights: 3/4, 2/4 and 1/4 of them after the three steps.
    assert densities == [0, 85, 57]
    assert report.kept == 28


def test_regrowing_is_a_choice_of_the_method() -> None:
    def pruned_by(regrow: bool) -> list[Tensor]:
        """Masks of a method that wants other weights at each step."""
        seen = []

        class Restless(SaliencyMethod):
            regrows = regrow

            @classmethod
            def measure(cls, probe: Any) -> Mapping[str, Tensor | None]:
                seen.append(probe.masks and probe.masks["weight"].clone())
                return {"weight": noise((5, 8), seed=len(seen))}

            @staticmethod
            def score(weight: Tensor, signal: Tensor) -> Tensor:
                return signal

        model = nn.Linear(8, 5)
        force_prune(model, [], 0.8, method=Restless, steps=4, progress=False)
        return [*seen[1:], model.weight_mask]

    for regrow in (True, False):
        masks = pruned_by(regrow)
        returned = [int((after & ~before).sum()) for before, after in pairwise(masks)]
        assert any(returned) == regrow


@pytest.mark.parametrize(
    "view",
    [
        lambda weight: weight,
        lambda weight: weight[:],
        lambda weight: weight.view_as(weight),
        lambda weight: weight.detach(),
        lambda weight: weight.data.flatten().view(weight.shape),
    ],
)
@pytest.mark.parametrize("regrow", [False, True])
def test_a_score_that_is_the_weight_itself_does_not_change_the_model(
    view: Callable[[Tensor], Tensor], regrow: bool
) -> None:
    class Signed(SaliencyMethod):
        regrows = regrow

        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return view(weight)

    model = network()
    with unchanged(model):
        scores = saliency(model, [batch()], Signed)
    dense = [module.weight.detach().clone() for module, _ in weights_of(model)]
    for score in scores.values():
        score.zero_()
    force_prune(model, [batch()], 0.8, method=Signed, steps=3, progress=False)
    for (module, _), weight in zip(weights_of(model), dense, strict=True):
        assert torch.equal(module.weight_orig, weight)
    kept = torch.cat([mask.flatten() for mask in get_masks(model).values()])
    flat = torch.cat([weight.flatten() for weight in dense])
    assert torch.equal(kept, smallest(flat, removed_of(len(flat), 0.8)))


def test_scores_of_integers_and_of_truth_values_rank_too() -> None:
    class Positive(SaliencyMethod):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return weight > 0

    model = nn.Linear(6, 4)
    positive = model.weight > 0
    count = int(positive.sum())
    force_prune(
        model,
        [(torch.randn(3, 6), torch.arange(3))],
        1 - count / 24,
        method=Positive,
        steps=1,
        progress=False,
    )
    assert torch.equal(model.weight_mask, positive)


def test_a_method_that_needs_no_data_does_not_read_any() -> None:
    for method in ("magnitude", "random"):
        report = force_prune(network(), None, 0.5, method=method, progress=False)  # type: ignore[arg-type]
        assert report.kept == 57


def test_one_shot_methods_take_one_step_whatever_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for method in (SNIP, GraSP, Magnitude, Random, IterSNIP):
        force_prune(network(), [batch()], 0.5, method=method, steps=4)
        shown = capsys.readouterr().err
        assert ("4/4" if method is IterSNIP else "1/1") in shown
