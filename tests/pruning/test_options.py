"""Options of a pruning that it cannot use: told what it takes instead."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from refusals import Taylor, network, prune_it, refused
from state import unchanged
from torch import nn

from force_plugin import reinitialise, shuffle_masks

# They are asked for by the models' own authors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported"),
]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": lambda step, steps: 0.5},
            r"schedule: .*got <lambda>\(step, steps\)",
        ),
        (
            {"schedule": lambda: 0.5},
            r"schedule: expected a callable .*got <lambda>\(\)$",
        ),
        (
            {"schedule": lambda a, b, c, d: 0.5},
            r"schedule: .*got <lambda>\(a, b, c, d\)$",
        ),
        ({"schedule": lambda *, step: 0.5}, r"schedule: .*got <lambda>\(\*, step\)$"),
        (
            {"schedule": lambda *_: None},
            "schedule: expected a density, .*, got NoneType",
        ),
        ({"schedule": lambda *_: [0.5]}, "schedule: expected a density, .*, got list$"),
        ({"schedule": lambda *_: torch.ones(2)}, "schedule: .* a number, got Tensor$"),
        (
            {"loss_fn": nn.MSELoss},
            r"loss_fn: .*got the class MSELoss; pass .*MSELoss\(\)$",
        ),
        (
            {"loss_fn": lambda o: o.sum()},
            r"loss_fn: expected .* loss, got <lambda>\(o\)$",
        ),
        ({"loss_fn": lambda a, b, c: a}, r"loss_fn: .*, got <lambda>\(a, b, c\)$"),
        ({"forward": lambda b: b}, r"forward: expected .* loss, got <lambda>\(b\)$"),
        (
            {"forward": nn.CrossEntropyLoss},
            r"forward: .*got the class CrossEntropyLoss;",
        ),
    ],
)
def test_a_function_of_other_arguments_is_told_those_it_has(
    options: dict[str, Any], message: str
) -> None:
    refused("force_prune", TypeError, f"^{message}", network(), **options)


def test_a_schedule_of_sparsities_is_recognised() -> None:
    message = r"must be 0\.2, got 0\.8, which is the sparsity; return 1 minus it$"
    options = {
        "sparsity": 0.8,
        "schedule": lambda step, steps, d: step / steps * (1 - d),
    }
    refused("force_prune", ValueError, message, network(), **options)


def cosine(step: int, steps: int, density: float) -> float:
    return 1 - (1 - density) * step / steps


@pytest.mark.parametrize(
    ("method", "schedule", "said"),
    [
        ("snip_it", "linear", "schedule='linear' was not used: snip_it has its own"),
        ("snip_it", cosine, "schedule=cosine was not used: snip_it has its own"),
        ("snip_it", "exponential", None),
        ("snip_it", "snip_it", None),
        ("snip", "linear", "schedule='linear' was not used: snip has a single step"),
        ("random", cosine, "schedule=cosine was not used: random has a single step"),
        ("force", "linear", None),
        ("force", cosine, None),
    ],
)
def test_a_schedule_that_a_method_does_not_take_is_said_not_to_be_used(
    method: str, schedule: Any, said: str | None
) -> None:
    report = prune_it(network(), method=method, schedule=schedule)
    assert [t for t in report.warnings if "schedule" in t] == ([said] if said else [])


@pytest.mark.parametrize("method", ["snip_it", "snip", "force"])
def test_a_schedule_is_checked_also_where_it_is_not_used(method: str) -> None:
    for schedule, error in (("cosine", ValueError), (3, TypeError)):
        options = {"method": method, "schedule": schedule}
        refused("force_prune", error, "^schedule: expected ", network(), **options)


@pytest.mark.parametrize(
    ("generator", "came"),
    [
        (0, r"got int; pass torch\.Generator\(\)\.manual_seed\(0\)$"),
        (7, r"got int; pass torch\.Generator\(\)\.manual_seed\(7\)$"),
        (np.random.default_rng(0), r"got Generator; pass torch\.Generator"),
        (torch.tensor(0), "got Tensor; pass"),
        ("cpu", "got str; pass"),
    ],
)
def test_what_is_no_generator_is_told_how_to_make_one(
    generator: Any, came: str
) -> None:
    masks = {"weight": torch.eye(3) == 1}
    with pytest.raises(
        TypeError, match=f"^generator: expected a torch.Generator, {came}"
    ):
        shuffle_masks(masks, generator)


@pytest.mark.parametrize("fresh", [0, None, network, {}])
def test_what_is_no_fresh_model_is_not_blamed_on_the_model(fresh: Any) -> None:
    model = network()
    prune_it(model)
    with (
        unchanged(model),
        pytest.raises(TypeError, match=r"^fresh: expected a torch\.nn"),
    ):
        reinitialise(model, fresh)


def test_nothing_of_this_warns_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_it(network(), method=Taylor, sparsity=0.2)
