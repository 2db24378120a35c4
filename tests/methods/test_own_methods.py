"""Methods of one's own: how they are written, and what they may not write to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scored_layers import batch, network, noise, removed_of, smallest, weights_of
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from force_plugin import (
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

Writer = Callable[[Any], object]


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
    "a gradient": lambda w, b: w.grad.add_(1),
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

    model: Any = network()
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

    model: Any = network()
    plain: Any = network()
    dense = model[3].weight.detach().clone()
    scores: Any = noise(dense.shape) - 0.5 if scored else None
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

    model: Any = nn.Linear(6, 4)
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
