"""What is no method, or fails as one: who has failed, what came, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import waves
from refusals import Taylor, by_call, network, prune_it, refused, scoring, taylor
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import FORCE, SaliencyMethod, saliency
from force_plugin.errors import MethodError

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]


class Own(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"


NO_METHOD: dict[str, tuple[Any, str]] = {
    "an instance": (
        Taylor(0.5),
        "an instance of Taylor; pass the class itself, method",
    ),
    "an instance of ours": (FORCE(3), "an instance of FORCE; pass the class itself"),
    "pytorch's magnitude": (prune.L1Unstructured, 'L1.*; method="magnitude" does the'),
    "an instance of it": (prune.L1Unstructured(0.5), 'L1U.*; method="magnitude" does'),
    "pytorch's random": (prune.RandomUnstructured, 'Ran.*; method="random" does the'),
    "pytorch's structured": (
        prune.LnStructured,
        "LnStructured; it is for the calls of torch.nn.utils.prune$",
    ),
    "a method for pytorch": (
        Own,
        "Own; derive it from SaliencyMethod and give it a sc",
    ),
    "a function": (
        taylor,
        r"a function; derive a class from SaliencyMethod, and make it its score, "
        r"score = staticmethod\(taylor\)$",
    ),
    "a lambda": (lambda w, g: w * g, "a function; derive a class from SaliencyMethod"),
    "a function of torch": (torch.mul, r"a function; .*staticmethod\(mul\)$"),
    "a module": (nn.Linear(2, 2), "Linear$"),
    "none": (None, "NoneType; leave it out for FORCE$"),
    "a list": (["force"], "list$"),
}


@by_call
@pytest.mark.parametrize("name", NO_METHOD)
def test_what_is_no_method_is_told_what_it_is(name: str, call: str) -> None:
    method, came = NO_METHOD[name]
    message = rf"^method: expected a name or a subclass of SaliencyMethod, got {came}"
    refused(call, TypeError, message, network(), method=method)


class ByItself(SaliencyMethod):
    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class Bound(SaliencyMethod):
    # Called on the class, ``self`` would be the weight.
    def score(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        return weight.abs()


class OfTheClass(SaliencyMethod):
    @classmethod
    def score(cls, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfThree(SaliencyMethod):
    @staticmethod
    def score(weight: Tensor, gradient: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfOne(SaliencyMethod):
    @staticmethod
    def score(gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class OfNames(SaliencyMethod):
    @staticmethod
    def score(*, weight: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


class NoFunction(SaliencyMethod):
    score = torch.ones(3)  # type: ignore[assignment]


class Measured(SaliencyMethod):
    def measure(self, probe: Any) -> Any:  # type: ignore[override]
        return probe.gradients()

    score = staticmethod(taylor)


class MeasuredStatically(SaliencyMethod):
    @staticmethod
    def measure(cls: Any, probe: Any) -> Any:  # type: ignore[override]
        return probe.gradients()

    score = staticmethod(taylor)


class MeasuresNothing(SaliencyMethod):
    @classmethod
    def measure(cls) -> Any:  # type: ignore[override]
        return {}

    score = staticmethod(taylor)


STATIC = r"score: expected @staticmethod score\(weight, signal\), got "
CLASS = r"measure: expected @classmethod measure\(cls, probe\), got "

WRONG_METHODS: dict[str, tuple[type[SaliencyMethod], str]] = {
    "self": (
        ByItself,
        rf"ByItself\.{STATIC}score\(self, weight, gradient\) without @staticmethod$",
    ),
    "self for the weight": (
        Bound,
        rf"Bound\.{STATIC}score\(self, weight\) without @static",
    ),
    "too few of a class": (OfTheClass, rf"OfTheClass\.{STATIC}score\(gradient\)$"),
    "three": (OfThree, rf"OfThree\.{STATIC}score\(weight, gradient, more\)$"),
    "one": (OfOne, rf"OfOne\.{STATIC}score\(gradient\)$"),
    "names": (OfNames, rf"OfNames\.{STATIC}score\(\*, weight, gradient\)$"),
    "a tensor": (NoFunction, rf"NoFunction\.{STATIC}Tensor$"),
    "a measure of self": (
        Measured,
        rf"Measured\.{CLASS}measure\(self, probe\) without @classmethod$",
    ),
    "a static measure": (
        MeasuredStatically,
        rf"MeasuredStatically\.{CLASS}measure\(cls, probe\)$",
    ),
    "a measure of nothing": (MeasuresNothing, rf"MeasuresNothing\.{CLASS}measure\(\)$"),
}


@by_call
@pytest.mark.parametrize("name", WRONG_METHODS)
def test_a_function_of_a_method_that_cannot_be_called_is_named(
    name: str, call: str
) -> None:
    method, message = WRONG_METHODS[name]
    never = iter([pytest.fail] * 0)  # no batch is read
    refused(call, TypeError, f"^{message}", network(), method=method, loader=never)


def test_a_function_that_can_be_called_may_be_written_in_any_way() -> None:
    class Undecorated(SaliencyMethod):
        def score(  # type: ignore[misc, override]
            weight: Tensor, gradient: Tensor
        ) -> Tensor:
            return taylor(weight, gradient)

    class WithMore(SaliencyMethod):
        @classmethod
        def score(cls, weight: Tensor, signal: Tensor, power: int = 2) -> Tensor:
            return (weight * signal) ** power

    class Free(SaliencyMethod):
        score = staticmethod(lambda *both: taylor(*both))

    class Static(SaliencyMethod):
        score = staticmethod(taylor)

        @staticmethod
        def measure(probe: Any) -> Any:
            return probe.gradients()

    expected = saliency(network(), [waves()], Taylor)
    for method in (Undecorated, WithMore, Free, Static):
        scores = saliency(network(), [waves()], method)
        assert all(torch.equal(scores[n], s) for n, s in expected.items())


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "nothing": (lambda w, g: None, r"got a NoneType$"),
    "a float": (lambda w, g: 1.0, r"got a float$"),
    "an array": (lambda w, g: np.ones(w.shape), r"got a ndarray$"),
    "a pair": (lambda w, g: (w, g), r"got a tuple of 2$"),
    "a sum": (lambda w, g: g.sum(), r"for 0\.weight, got \(\)$"),
    "a score a channel": (lambda w, g: g.sum(1), r"got \(8,\)$"),
    "the other way round": (lambda w, g: g.T, r"got \(6, 8\)$"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_score_that_is_no_tensor_of_the_shape_is_told_what_it_is(name: str) -> None:
    score, came = RETURNED[name]
    message = rf"^Mine\.score: expected a tensor of the weight's shape \(8, 6\).*{came}"
    refused("force_prune", MethodError, message, network(), method=scoring(score))


def test_scores_of_other_kinds_are_refused_or_taken_as_they_are() -> None:
    for score, message in (
        (lambda w, g: g.to("meta"), "meta device, which has no values$"),
        (lambda w, g: g + 1j, "expected real scores .*; take their .abs"),
    ):
        refused("saliency", MethodError, message, network(), method=scoring(score))
    plain = saliency(network(), [waves()], scoring(lambda w, g: g.abs()))
    for score in (
        lambda w, g: g.abs().to_sparse(),
        lambda w, g: nn.Parameter(g.abs()),
        lambda w, g: g.abs().T.contiguous().T,
    ):
        found = saliency(network(), [waves()], scoring(score))
        assert all(torch.equal(found[n], s) for n, s in plain.items())
        assert not any(s.requires_grad for s in found.values())
    by_eights = scoring(lambda w, g: g.abs().to(torch.float8_e4m3fn))
    assert prune_it(network(), method=by_eights).sparsity == 0.5


@pytest.mark.parametrize("signal", [None, 3.0, [1, 2], torch.ones(2)])
def test_a_measure_that_returns_no_mapping_is_named(signal: Any) -> None:
    measure = classmethod(lambda cls, probe: signal)
    message = (
        r"^Mine\.measure: expected a mapping of parameter names to signals, .*got "
    )
    method = scoring(taylor, measure=measure)
    refused("force_prune", TypeError, message, network(), method=method)
