"""A network that is pruned three times, and masks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from force_plugin import apply_masks


def random_masks(
    model: nn.Module, *names: str, seed: int = 0, density: float = 0.5
) -> dict[str, Tensor]:
    """For the named parameters, or for every weight of more than one dimension."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name.removesuffix("_orig"): parameter.shape
        for name, parameter in model.named_parameters()
    }
    return {
        name: torch.rand(shape, generator=generator) < density
        for name, shape in shapes.items()
        if (name in names if names else len(shape) > 1)
    }


def assert_same(masks: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == expected[name].shape
        assert torch.equal(mask, expected[name].bool()), name


TYPES = [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.uint8]
GOOD = {"0.weight": torch.ones(4, 2, 3, 3)}

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown_name": (
        GOOD | {"7.weight": torch.ones(5, 36), "fc": torch.ones(1)},
        ValueError,
        r"^masks: 2 of 3 names are no parameters of the model: '7\.weight', 'fc'; the "
        r"model's own begin with 0\.weight, 0\.bias, 1\.weight$",
    ),
    "name_of_pytorch": (
        GOOD | {"3.weight_mask": torch.ones(5, 36)},
        ValueError,
        r"1 of 2 names .* '3.weight_mask' \(did you mean '3.weight'\?\)",
    ),
    "names_in_another_model": (
        {f"model.{name}": torch.ones(1) for name in ("5.weight", "5.bias", "x", "y")},
        ValueError,
        r"4 of 4 names .*: 'model\.5\.weight' \(did you mean '5\.weight'\?\), "
        r"'model\.5\.bias' \(did you mean '5\.bias'\?\), 'model\.x' and 1 more; ",
    ),
    "names_of_a_wrapped_model": (
        {f"module.{name}": torch.ones(1) for name in ("5.weight", "x")},
        ValueError,
        r"^masks: 1 of 2 names are no parameters of the model: 'module\.x'; .*; 1 of 2 "
        r"masks have another shape than in the model: 5\.weight \(1,\) instead of",
    ),
    "one_name_twice": (
        GOOD | {"module.0.weight": torch.ones(4, 2, 3, 3)},
        ValueError,
        r"'module\.0\.weight' \(did you mean '0\.weight'\?\)",
    ),
    "one_name_in_two_wrappers": (
        {f"{wrapper}.0.weight": torch.ones(1) for wrapper in ("module", "_orig_mod")},
        ValueError,
        r"2 of 2 names .*: 'module\.0\.weight' \(did you mean '0\.weight'\?\), ",
    ),
    "everything_at_once": (
        {
            "0.weight": torch.ones(3, 3),
            "1.weight": torch.ones(5),
            "1.bias": torch.ones(4),
            "3.weight": torch.ones(36, 5),
            "5.weight": torch.ones(()),
            "nothing": torch.ones(3, 3),
        },
        ValueError,
        r"^masks: 1 of 6 names are no parameters of the model: 'nothing'; the model's "
        r"own begin with 0\.weight, 0\.bias, 1\.weight; 4 of 6 masks have another "
        r"shape than in the model: 0\.weight \(3, 3\) instead of \(4, 2, 3, 3\), "
        r"1\.weight \(5,\) instead of \(4,\), 3\.weight \(36, 5\) instead of "
        r"\(5, 36\) and 1 more$",
    ),
    "number_as_a_name": ({0: torch.ones(4, 2, 3, 3)}, TypeError, "names, got a int"),
    "transposed": (
        GOOD | {"3.weight": torch.ones(36, 5)},
        ValueError,
        r"^masks: 1 of 2 masks have another shape than in the model: 3.weight "
        r"\(36, 5\) instead of \(5, 36\)$",
    ),
    "scalar": (
        GOOD | {"3.weight": torch.tensor(1)},
        ValueError,
        r"3.weight \(\) instead of \(5, 36\)$",
    ),
    "flat": (
        GOOD | {"3.weight": torch.ones(180)},
        ValueError,
        r"3.weight \(180,\) instead of \(5, 36\)$",
    ),
    "half": (
        GOOD | {"3.weight": torch.full((5, 36), 0.5)},
        ValueError,
        "^masks: 3.weight holds other values than 0 and 1$",
    ),
    "two": (
        GOOD | {"3.weight": torch.ones(5, 36).int() * 2},
        ValueError,
        "3.weight holds other values than 0 and 1",
    ),
    "nan": (
        GOOD | {"5.weight": torch.full((3, 5), math.nan)},
        ValueError,
        "5.weight holds other values than 0 and 1",
    ),
    "array": (
        GOOD | {"3.weight": np.ones((5, 36), dtype=bool)},
        TypeError,
        "^masks: expected a tensor for '3.weight', got ndarray$",
    ),
    "none": (GOOD | {"3.weight": None}, TypeError, "for '3.weight', got NoneType"),
    "list": (
        [torch.ones(4, 2, 3, 3)],
        TypeError,
        "^masks: expected a mapping of parameter names to tensors, got list$",
    ),
    "no_masks": (None, TypeError, "mapping .*, got NoneType"),
    "empty": (
        {},
        ValueError,
        "^masks: expected at least one mask, got an empty mapping$",
    ),
}


def pruned_thrice(model: nn.Module) -> nn.Module:
    for seed in range(3):
        apply_masks(model, random_masks(model, seed=seed, density=0.8))
    return model
