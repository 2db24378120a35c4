"""Wrong arguments of the methods as PyTorch calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import INF, NAN, Fault, pruned
from state import unchanged
from torch import nn

from force_plugin import FORCE, SNIP


def scored(layer: nn.Module, **options: Any) -> object:
    """``FORCE.apply`` with scores."""
    usual = {
        "name": "weight",
        "amount": 0.5,
        "importance_scores": torch.linspace(0, 1, 48).view(8, 6),
    }
    return FORCE.apply(layer, **{**usual, **options})


ARGUMENTS: dict[str, Fault] = {
    "a pruning of a module's name": Fault(
        lambda m: scored(m[0], name=None),
        ValueError,
        "^Linear has no parameter None; it has w",
    ),
    "a pruning of a layer without weight": Fault(
        lambda m: scored(m[2]), ValueError, "^Tanh has no parameter 'weight'; it has"
    ),
    "a pruning by a tensor": Fault(
        lambda m: scored(m[0], amount=torch.tensor(0.5)),
        TypeError,
        "^amount: expected a float or an int, got Tensor$",
        pruned,
    ),
    "a pruning of all and more": Fault(
        lambda m: scored(m[0], amount=INF),
        ValueError,
        r"^amount: expected a fraction in \[0, 1\] .*, got inf$",
        pruned,
    ),
    "a pruning by other scores": Fault(
        lambda m: scored(m[0], importance_scores=torch.ones(6, 8)),
        ValueError,
        r"^importance_scores: expected the shape of weight, \(8, 6\), got \(6, 8\)$",
        pruned,
    ),
    "a pruning by complex scores": Fault(
        lambda m: scored(m[0], importance_scores=torch.ones(8, 6) * 1j),
        ValueError,
        "^importance_scores: expected real numbers, got torch.complex64; take their",
        pruned,
    ),
    "a mask of nan scores": Fault(
        lambda m: SNIP(0.5).compute_mask(torch.full((3,), NAN), torch.ones(3)),
        ValueError,
        "^importance_scores: expected numbers, got NaN$",
    ),
    "a mask of more than there are": Fault(
        lambda m: SNIP(4).compute_mask(torch.ones(3), torch.ones(3)),
        ValueError,
        "^amount: 4 weights to remove, but only 3 are left$",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(
    name: str,
) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)
