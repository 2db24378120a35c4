"""Calls that are refused, and what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from networks import perceptron, waves
from state import unchanged
from torch import Tensor, nn

from force_plugin import SaliencyMethod, diagnose, force_prune, saliency
from force_plugin.errors import PruningError


def network() -> nn.Sequential:
    return perceptron()


def prune_it(model: nn.Module, **options: Any) -> Any:
    usual = {"loader": [waves()], "sparsity": 0.5, "steps": 2, "progress": False}
    return force_prune(model, **{**usual, **options})


CALLS: dict[str, Callable[..., object]] = {
    "force_prune": prune_it,
    "saliency": lambda m, **o: saliency(m, **{"loader": [waves()], **o}),
    "diagnose": lambda m, **o: diagnose(m, **{"loader": [waves()], **o}),
}

by_call = pytest.mark.parametrize("call", CALLS)


def refused(
    call: str, error: type[Exception], message: str, model: nn.Module, **options: Any
) -> None:
    """Assert that a call says this, and that the model is what it was."""
    with unchanged(model), pytest.raises(error, match=message) as raised:
        CALLS[call](model, **options)
    if isinstance(raised.value, PruningError):
        assert raised.value.problem in str(raised.value)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient) ** 2


class Taylor(SaliencyMethod):
    score = staticmethod(taylor)


def scoring(score: Callable[..., Any], **more: Any) -> type[SaliencyMethod]:
    return type("Mine", (SaliencyMethod,), {"score": staticmethod(score), **more})


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)  # type: ignore[no-any-return]


X, Y = waves()
