"""Methods of one's own that fail: one clear error, and a model that is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faults import INF, NAN, network, prune_it
from state import unchanged
from torch import Tensor

from force_plugin import IterSNIP, SaliencyMethod


def method_of(score: Callable[..., Any], **attributes: Any) -> type[SaliencyMethod]:
    return type("Mine", (SaliencyMethod,), {"score": staticmethod(score), **attributes})


class LaterOn(IterSNIP):
    """Gives one weight another score, from the second step on."""

    value = 0.0
    steps_seen = 0

    @classmethod
    def measure(cls, probe: Any) -> Any:
        cls.steps_seen = probe.step
        return super().measure(probe)

    @classmethod
    def score(cls, weight: Tensor, gradient: Tensor) -> Tensor:
        score = IterSNIP.score(weight, gradient)
        if cls.steps_seen > 1 and len(score) == 4:
            score[0, 0] = cls.value
        return score


METHODS_OF_ONES_OWN: dict[str, tuple[Any, type[Exception], str]] = {
    **{
        f"a score of {value} at step 2": (
            type("Mine", (LaterOn,), {"value": value}),
            RuntimeError,
            r"^the saliency of 3\.weight is not finite at step 2: .* Mine\.score makes",
        )
        for value in (NAN, INF, -INF)
    },
    "a score that raises": (
        method_of(lambda weight, signal: 1 / 0),
        ZeroDivisionError,
        "^division by zero$",
    ),
    "a score of the weight alone": (
        method_of(lambda weight: weight),
        TypeError,
        r"^Mine\.score: expected @staticmethod score\(weight, signal\), got <lambda>\(",
    ),
    "a score that is no tensor": (
        method_of(lambda weight, signal: weight.numpy()),
        ValueError,
        r"^Mine\.score: expected a tensor of the weight's shape \(8, 6\) for 0\.weight",
    ),
    "complex scores": (
        method_of(lambda weight, signal: weight * (1 + 1j)),
        ValueError,
        r"^Mine\.score: expected real scores for 0\.weight, got torch.complex64; take",
    ),
    "no score": (
        type("Mine", (SaliencyMethod,), {}),
        TypeError,
        r"^Mine has no score: expected a subclass of SaliencyMethod with a static sc",
    ),
    "no method at all": (SaliencyMethod, TypeError, "^SaliencyMethod has no score: "),
    "another number of steps": (
        method_of(lambda weight, signal: weight, steps=2.5),
        TypeError,
        r"^Mine\.steps: expected an integer, got float$",
    ),
    "fewer than no steps of refinement": (
        method_of(lambda weight, signal: weight, refining=-1),
        ValueError,
        r"^Mine\.refining: expected at least 1, got -1$",
    ),
    "another schedule": (
        method_of(lambda weight, signal: weight, schedule="cosine"),
        ValueError,
        r"^Mine\.schedule: expected one of exponential, linear, .*, got 'cosine'$",
    ),
}


@pytest.mark.parametrize("name", METHODS_OF_ONES_OWN)
def test_a_method_of_ones_own_that_fails_changes_nothing(name: str) -> None:
    method, error, message = METHODS_OF_ONES_OWN[name]
    model = network()
    with unchanged(model), pytest.raises(error, match=message):
        prune_it(model, method=method)
