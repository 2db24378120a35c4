"""Masks of a model: read, apply, save, load; and the report that counts them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import conv_network as network
from networks import tied_layers as tied
from networks import tiny_resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from state import unchanged
from torch import Tensor, nn
from torch.nn.utils import prune

import force_plugin
from force_plugin import (
    FORCE,
    Magnitude,
    apply_masks,
    get_masks,
    load_masks,
    load_metadata,
    save_masks,
    sparsity_report,
)
from force_plugin.model.reparametrisation import Container


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


def the_hook(module: nn.Module) -> prune.BasePruningMethod:
    (hook,) = module._forward_pre_hooks.values()
    return hook


# Reading


def _global(model: nn.Module) -> None:
    pairs = [(model[0], "weight"), (model[3], "weight"), (model[5], "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=100)


def _global_by_ours(model: nn.Module) -> None:
    pairs = [(model[0], "weight"), (model[3], "weight"), (model[5], "weight")]
    prune.global_unstructured(pairs, Magnitude, amount=0.7)


def _twice(model: nn.Module) -> None:
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.random_unstructured(model[3], "weight", 0.5)


def _ours_then_theirs(model: nn.Module) -> None:
    FORCE.apply(model[3], "weight", 0.5, importance_scores=torch.rand(5, 36))
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.ln_structured(model[3], "weight", 1, n=2, dim=0)


def _theirs_then_ours(model: nn.Module) -> None:
    prune.ln_structured(model[3], "weight", 2, n=1, dim=0)
    FORCE.apply(model[3], "weight", 20, importance_scores=torch.rand(5, 36))


PRUNINGS: dict[str, Callable[[nn.Module], Any]] = {
    "l1": lambda model: prune.l1_unstructured(model[0], "weight", 0.3),
    "random": lambda model: prune.random_unstructured(model[3], "weight", 7),
    "random_structured": lambda m: prune.random_structured(m[0], "weight", 1, dim=1),
    "ln_structured": lambda m: prune.ln_structured(m[5], "weight", 2, n=2, dim=1),
    "identity": lambda model: prune.identity(model[3], "weight"),
    "custom": lambda m: prune.custom_from_mask(m[5], "weight", torch.eye(3, 5)),
    "bias": lambda model: prune.l1_unstructured(model[3], "bias", 2),
    "norm": lambda model: prune.l1_unstructured(model[1], "weight", 1),
    "global": _global,
    "global_by_ours": _global_by_ours,
    "twice": _twice,
    "ours_then_theirs": _ours_then_theirs,
    "theirs_then_ours": _theirs_then_ours,
}


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_masks_are_the_buffers_that_pytorch_put_on_the_modules(pruning: str) -> None:
    model = network()
    PRUNINGS[pruning](model)
    expected = {
        key.removesuffix("_mask"): buffer
        for key, buffer in model.named_buffers()
        if key.endswith("_mask")
    }
    assert expected
    with unchanged(model):
        assert_same(get_masks(model), expected)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_model_that_is_one_layer_names_its_parameter_without_a_dot(
    tensor: str,
) -> None:
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, tensor, 1)
    assert_same(get_masks(layer), {tensor: getattr(layer, f"{tensor}_mask")})


def test_nothing_pruned_gives_no_masks() -> None:
    model = network()
    assert get_masks(model) == {}
    assert get_masks(nn.ReLU()) == {}
    prune.l1_unstructured(model[0], "weight", 3)
    prune.remove(model[0], "weight")
    assert get_masks(model) == {}


def test_a_buffer_that_is_only_called_a_mask_is_none() -> None:
    model = network()
    model[3].register_buffer("weight_mask", torch.ones(5, 36))
    assert get_masks(model) == {}


def test_unpruned_layers_are_left_out() -> None:
    model = tiny_resnet()
    prune.l1_unstructured(model[3].conv2, "weight", 0.5)
    prune.l1_unstructured(model[10], "weight", 0.5)
    assert list(get_masks(model)) == ["3.conv2.weight", "10.weight"]


def test_a_shared_parameter_comes_once_by_its_first_name() -> None:
    model = tied()
    mask = torch.eye(3)
    for layer in model:
        prune.custom_from_mask(layer, "weight", mask)
    assert_same(get_masks(model), {"0.weight": mask})


@pytest.mark.parametrize("pruned", [0, 1])
def test_a_shared_parameter_that_one_owner_prunes_is_found(pruned: int) -> None:
    model = tied()
    prune.custom_from_mask(model[pruned], "weight", torch.eye(3))
    assert_same(get_masks(model), {"0.weight": torch.eye(3)})


def test_changing_the_masks_that_were_read_changes_no_model() -> None:
    model = network()
    apply_masks(model, random_masks(model))
    with unchanged(model):
        for mask in get_masks(model).values():
            mask.logical_not_()


def _apply(model: nn.Module) -> None:
    apply_masks(model, {"weight": torch.ones(3)})


@pytest.mark.parametrize("call", [get_masks, sparsity_report, _apply])
@pytest.mark.parametrize("wrong", [None, {}, nn.Linear], ids=str)
def test_what_is_no_module_is_refused(
    wrong: Any, call: Callable[[nn.Module], object]
) -> None:
    message = rf"^model: expected a torch.nn.Module, got {type(wrong).__name__}$"
    with pytest.raises(TypeError, match=message):
        call(wrong)


# Applying

TYPES = [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.uint8]


@pytest.mark.parametrize("dtype", [*TYPES, torch.int64], ids=str)
def test_applied_masks_do_what_pytorchs_custom_masks_do(dtype: torch.dtype) -> None:
    model, reference = network(), network()
    masks = random_masks(model, "0.weight", "3.weight", "3.bias", "5.weight")
    apply_masks(model, {name: mask.to(dtype) for name, mask in masks.items()})
    for name, mask in masks.items():
        layer, tensor = name.split(".")
        prune.custom_from_mask(reference[int(layer)], tensor, mask)
    assert_same(get_masks(model), masks)
    assert sorted(model.state_dict()) == sorted(reference.state_dict())
    x = torch.randn(4, 2, 5, 5)
    ours, theirs = model(x), reference(x)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)
    for layer in (model[0], model[3], model[5]):
        prune.remove(layer, "weight")
        assert torch.equal(layer.weight != 0, masks[_name(model, layer)])


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(f"{name}.weight" for name, m in model.named_modules() if m is layer)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_a_model_of_any_precision_keeps_it(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    masks = random_masks(model)
    apply_masks(model, masks)
    assert_same(get_masks(model), masks)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model[3].weight.dtype == dtype


def test_a_mask_costs_a_byte_a_weight() -> None:
    model = network()
    apply_masks(model, random_masks(model))
    assert model[3].weight_mask.dtype == torch.bool


def test_masks_fit_weights_in_channels_last_order() -> None:
    model = network().to(memory_format=torch.channels_last)
    masks = random_masks(model)
    apply_masks(model, masks)
    assert_same(get_masks(model), masks)
    assert model[0].weight_orig.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3, 1, 2)], ids=str)
def test_any_parameter_can_be_masked(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(shape))
    for kept in (True, False):
        apply_masks(model, {"scale": torch.full(shape, kept)})
        assert_same(get_masks(model), {"scale": torch.full(shape, kept)})


def test_only_the_named_parameters_are_pruned_and_they_stay_the_same_objects() -> None:
    model = network()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    model[3].weight.requires_grad_(False)
    apply_masks(model, random_masks(model, "3.weight", "5.bias"))
    after = {name.removesuffix("_orig"): p for name, p in model.named_parameters()}
    assert set(after) == set(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(before[name], value) for name, value in values.items())
    assert not model[3].weight_orig.requires_grad
    assert not prune.is_pruned(model[0]) and prune.is_pruned(model[3])
    assert "weight" in model[5]._parameters


def _by_pytorch(layer: nn.Module, mask: Tensor) -> None:
    prune.custom_from_mask(layer, "weight", mask)


def _by_ours(layer: nn.Module, mask: Tensor) -> None:
    apply_masks(layer, {"weight": mask})


@pytest.mark.parametrize("first", [_by_pytorch, _by_ours])
@pytest.mark.parametrize("times", [1, 2])
def test_on_a_pruned_model_masks_only_remove_more(
    first: Callable[[nn.Module, Tensor], None], times: int
) -> None:
    layer, reference = nn.Linear(9, 7), nn.Linear(9, 7)
    reference.load_state_dict(layer.state_dict())
    masks = [torch.rand(7, 9) < 0.7 for _ in range(times + 1)]
    for mask in masks[:-1]:
        first(layer, mask)
    apply_masks(layer, {"weight": masks[-1].float()})
    for mask in masks:
        prune.custom_from_mask(reference, "weight", mask)
    assert_same(get_masks(layer), {"weight": torch.stack(masks).all(0)})
    assert isinstance(the_hook(layer), prune.PruningContainer)
    assert len(the_hook(layer)) == times + 1
    x = torch.randn(3, 9)
    assert torch.equal(layer(x), reference(x))


def test_a_mask_that_keeps_everything_brings_nothing_back() -> None:
    model = network()
    masks = random_masks(model)
    apply_masks(model, masks)
    apply_masks(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    assert_same(get_masks(model), masks)


def test_a_model_may_be_emptied() -> None:
    model = network()
    masks = random_masks(model, density=0)
    apply_masks(model, masks)
    assert_same(get_masks(model), masks)


def test_pytorchs_own_pruning_goes_on_from_applied_masks() -> None:
    layer = nn.Linear(6, 6)
    mask = torch.rand(6, 6) < 0.5
    mask[0, 0] = True
    apply_masks(layer, {"weight": mask})
    left = (layer.weight_orig.abs() * mask).detach()
    prune.l1_unstructured(layer, "weight", int(mask.sum()) - 1)
    (after,) = get_masks(layer).values()
    assert after.nonzero().tolist() == (left == left.max()).nonzero().tolist()


def test_both_owners_of_a_shared_weight_are_pruned_and_go_on_sharing_it() -> None:
    model = tied()
    mask = torch.rand(3, 3) < 0.5
    apply_masks(model, {"0.weight": mask})
    assert model[0].weight_orig is model[1].weight_orig
    for layer in model:
        assert torch.equal(layer.weight_mask, mask)
    assert_same(get_masks(model), {"0.weight": mask})


@pytest.mark.parametrize("pruned", [(0,), (1,), (0, 1)], ids=str)
def test_a_mask_on_a_shared_weight_leaves_each_owner_what_both_masks_keep(
    pruned: tuple[int, ...],
) -> None:
    model = tied()
    earlier = {
        0: torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 1]]).bool(),
        1: torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]]).bool(),
    }
    for index in pruned:
        prune.custom_from_mask(model[index], "weight", earlier[index])
    given = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0]]).bool()
    apply_masks(model, {"0.weight": given})
    everyone = torch.stack([given, *(earlier[index] for index in pruned)]).all(0)
    for index, layer in enumerate(model):
        own = given & earlier[index] if index in pruned else given
        mask = layer.weight_mask.bool()
        # Whether an owner also obeys what pruned the other one is left open.
        assert (mask <= own).all() and (mask >= everyone).all()


def test_the_callers_masks_stay_his_own() -> None:
    model = network()
    masks: dict[str, Tensor] = {
        "0.weight": random_masks(model)["0.weight"],
        "3.weight": random_masks(model)["3.weight"].float(),
    }
    before = {name: mask.clone() for name, mask in masks.items()}
    apply_masks(model, random_masks(model, seed=1))
    apply_masks(model, masks)
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())
    with unchanged(model):
        for mask in masks.values():
            mask.zero_()


def test_masks_of_one_model_make_another_the_same() -> None:
    model, twin = tiny_resnet(), tiny_resnet()
    twin.load_state_dict(model.state_dict())
    apply_masks(model, random_masks(model))
    apply_masks(twin, get_masks(model))
    state = twin.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), twin(x))


# Applying what does not fit

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


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("encoder.fc.weight", "fc.weight"),
        ("_orig_mod.net.10.weight", "10.weight"),
        ("model.weight", "weight"),
        ("20.weight", "weight"),
        ("bias", "fc.bias"),
        ("10.weight_orig", "10.weight"),
        ("module.10.weight_mask", "10.weight"),
    ],
)
def test_a_name_with_another_prefix_gets_the_models_own(name: str, own: str) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3))
    model.fc = nn.Linear(2, 2)
    for index in ("0", "10"):
        model.register_module(index, nn.Linear(2, 2, bias=False))
    message = rf"model: '{name}' \(did you mean '{own}'\?\); the model's own begin"
    with unchanged(model), pytest.raises(ValueError, match=message):
        apply_masks(model, {name: torch.ones(3)})


def pruned_thrice(model: nn.Module) -> nn.Module:
    for seed in range(3):
        apply_masks(model, random_masks(model, seed=seed, density=0.8))
    return model


STATES: dict[str, Callable[[], nn.Module]] = {
    "fresh": network,
    "pruned": lambda: pruned_thrice(network()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", WRONG)
def test_masks_that_do_not_fit_get_one_clear_error_and_change_nothing(
    case: str, state: str
) -> None:
    masks, error, message = WRONG[case]
    model = STATES[state]()
    with unchanged(model), pytest.raises(error, match=message):
        apply_masks(model, masks)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("place", "method"),
    [
        (Container, "add_pruning_method"),
        (nn.Module, "register_buffer"),
        (nn.Module, "register_forward_pre_hook"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_half_way_leaves_the_model_as_it_was(
    state: str,
    place: type,
    method: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (place is Container) == (state == "fresh") and method != "register_buffer":
        pytest.skip("not called there")
    model = STATES[state]()
    original = getattr(place, method)
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("by the user")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(place, method, interrupted)
        with pytest.raises(error, match="by the user"):
            apply_masks(model, random_masks(model, seed=9))
    assert calls == 3
    # And the next attempt finds nothing in its way.
    expected = copy.deepcopy(model.state_dict())
    apply_masks(model, random_masks(model, seed=9))
    for name, mask in get_masks(model).items():
        earlier = expected.get(f"{name}_mask", torch.ones_like(mask))
        assert torch.equal(mask, random_masks(network(), seed=9)[name] & earlier)


# Saving and loading

SHAPES = [
    (),
    (1,),
    (7,),
    (8,),
    (9,),
    (3, 5),
    (2, 3, 1, 5, 3),
    (1, 1, 1),
    (0,),
    (4, 0, 3),
    (1_000_003,),
    (257, 63, 3, 3),
]


def test_saved_masks_come_back_with_their_names_shapes_and_order(
    tmp_path: Path,
) -> None:
    masks = {f"layers.{len(SHAPES) - i}": _random(s, i) for i, s in enumerate(SHAPES)}
    save_masks(masks, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert_same(loaded, masks)
    assert {mask.device.type for mask in loaded.values()} == {"cpu"}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 4), max_size=5).map(tuple),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_masks_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[int, ...]],
    seed: int,
) -> None:
    path = str(tmp_path_factory.getbasetemp() / "any.safetensors")
    masks = {name: _random(s, seed + i) for i, (name, s) in enumerate(shapes.items())}
    save_masks(masks, path)
    assert_same(load_masks(path), masks)


def test_masks_of_a_model_go_through_a_file_onto_another(tmp_path: Path) -> None:
    model, twin = tiny_resnet(), tiny_resnet()
    apply_masks(model, random_masks(model))
    save_masks(get_masks(model), tmp_path / "masks")
    apply_masks(twin, load_masks(tmp_path / "masks"))
    assert_same(get_masks(twin), get_masks(model))


def test_a_loaded_mask_can_be_written_to(tmp_path: Path) -> None:
    save_masks({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "masks")
    loaded = load_masks(tmp_path / "masks")
    loaded["a"].zero_()
    assert loaded["b"].all()


def test_a_file_takes_a_bit_a_weight(tmp_path: Path) -> None:
    masks = {"a": _random((1_000_001,), 0), "b": _random((100, 101), 1)}
    save_masks(masks, tmp_path / "masks")
    bits = math.ceil(1_000_001 / 8) + math.ceil(10_100 / 8)
    assert bits <= (tmp_path / "masks").stat().st_size <= bits + 500


def test_the_bits_of_a_file_are_in_row_major_order(tmp_path: Path) -> None:
    mask = _random((3, 4, 5, 2), 0)
    masks = {"a": mask.to(memory_format=torch.channels_last), "b": mask.mT}
    save_masks(masks, tmp_path / "masks")
    stored = load_file(tmp_path / "masks")
    for name, expected in {"a": mask, "b": mask.mT}.items():
        bits = [int(bit) for byte in stored[name].tolist() for bit in f"{byte:08b}"]
        assert bits == expected.int().flatten().tolist()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_masks_of_any_type_are_saved_as_bits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    mask = _random((3, 7), 0)
    save_masks({"a": mask.to(dtype)}, tmp_path / "masks")
    assert_same(load_masks(tmp_path / "masks"), {"a": mask})


@pytest.mark.parametrize("case", ["half", "nan", "array", "none", "list", "empty"])
def test_what_cannot_be_saved_leaves_an_earlier_file_alone(
    case: str, tmp_path: Path
) -> None:
    masks, error, message = WRONG[case]
    save_masks(GOOD, tmp_path / "masks")
    before = (tmp_path / "masks").read_bytes()
    with pytest.raises(error, match=message):
        save_masks(masks, tmp_path / "masks")
    assert (tmp_path / "masks").read_bytes() == before


def test_saving_replaces_an_earlier_file(tmp_path: Path) -> None:
    save_masks({"a": torch.ones(100)}, tmp_path / "masks")
    save_masks({"b": torch.zeros(3)}, tmp_path / "masks")
    assert_same(load_masks(tmp_path / "masks"), {"b": torch.zeros(3)})


def test_saving_into_a_folder_that_does_not_exist_says_so(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "masks"
    message = f"existing folder, got '{path}'; create the folder first"
    with pytest.raises(FileNotFoundError, match=message):
        save_masks(GOOD, path)


def test_saving_over_a_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        save_masks(GOOD, tmp_path)


def test_a_name_that_is_no_string_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^masks: .*int"):
        save_masks({0: torch.ones(3)}, tmp_path / "masks")  # type: ignore[dict-item]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "masks", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
            load_masks(path)


NO_MASKS = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"0.weight 1 0 1 1\n" * 20,
    "huge_header": b"\xff" * 64,
    **{f"random_{seed}": random.Random(seed).randbytes(300) for seed in range(5)},
}


@pytest.mark.parametrize("content", NO_MASKS)
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "masks").write_bytes(NO_MASKS[content])
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: not a masks file"):
        load_masks(tmp_path / "masks")


def test_a_checkpoint_of_pytorch_is_refused(tmp_path: Path) -> None:
    torch.save(get_masks(pruned_thrice(network())), tmp_path / "masks")
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: not a masks file"):
        load_masks(tmp_path / "masks")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"shapes": "{}"}], ids=str
)
def test_a_safetensors_file_of_something_else_is_told_apart(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(3, dtype=torch.uint8)}, tmp_path / "masks", metadata)
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: .* save_masks wrote"):
        load_masks(tmp_path / "masks")


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    save_masks(random_masks(network()), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "short"
    for length in {*range(12), *range(12, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{path}: not a masks file, .*cut short"):
            load_masks(path)


@pytest.mark.parametrize(
    "shapes",
    [None, "[", "[3]", '{"a": 3}', '{"a": [9]}', '{"b": [3]}', '{"a": [-3]}'],
)
def test_a_file_whose_shapes_do_not_fit_its_bits_is_refused(
    shapes: str | None, tmp_path: Path
) -> None:
    metadata = {"format": "force_plugin masks"}
    if shapes is not None:
        metadata["shapes"] = shapes
    save_file({"a": torch.ones(1, dtype=torch.uint8)}, tmp_path / "masks", metadata)
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: "):
        load_masks(tmp_path / "masks")


# What a file says of its making


def test_what_was_said_of_the_making_comes_back_with_versions_and_date(
    tmp_path: Path,
) -> None:
    told = {"method": "force", "sparsity": 0.99, "batches": None, "θ": [1, {"a": "b"}]}
    before = datetime.now(timezone.utc).replace(microsecond=0)
    save_masks(GOOD, tmp_path / "masks", told)
    metadata = load_metadata(tmp_path / "masks")
    created = datetime.fromisoformat(metadata.pop("created"))
    assert before <= created <= datetime.now(timezone.utc)
    assert metadata.pop("versions") == {
        "force_plugin": force_plugin.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    assert metadata == told
    assert_same(load_masks(tmp_path / "masks"), GOOD)


def test_other_readers_of_safetensors_find_it_as_json(tmp_path: Path) -> None:
    save_masks(GOOD, tmp_path / "masks", {"seed": 3})
    with safe_open(tmp_path / "masks", framework="np") as file:
        assert json.loads(file.metadata()["metadata"])["seed"] == 3


def test_masks_that_are_saved_again_keep_date_and_versions(tmp_path: Path) -> None:
    first = {"created": "1843-10-01", "versions": {"torch": "0.1"}, "seed": 1}
    save_masks(GOOD, tmp_path / "a", first)
    save_masks(GOOD, tmp_path / "b", load_metadata(tmp_path / "a"))
    assert load_metadata(tmp_path / "b") == first


def test_a_file_says_when_it_was_made_even_if_nothing_was_said(tmp_path: Path) -> None:
    save_masks(GOOD, tmp_path / "masks")
    assert list(load_metadata(tmp_path / "masks")) == ["created", "versions"]


def test_a_file_of_before_there_was_metadata_is_read(tmp_path: Path) -> None:
    shapes = '{"a": [9]}'
    bits = torch.tensor([255, 0], dtype=torch.uint8)
    checksum = hashlib.sha256(shapes.encode() + bytes([255, 0])).hexdigest()
    header = {"format": "force_plugin masks", "shapes": shapes, "sha256": checksum}
    save_file({"a": bits}, tmp_path / "masks", header)
    assert load_metadata(tmp_path / "masks") == {}
    assert_same(load_masks(tmp_path / "masks"), {"a": torch.arange(9) < 8})


@pytest.mark.parametrize("read", [load_masks, load_metadata])
@pytest.mark.parametrize("change", [None, "{}", '{"seed": 4}', "[", ""])
def test_metadata_that_was_changed_is_refused(
    read: Callable[[Path], object], change: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    save_masks(GOOD, path, {"seed": 3})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    header.pop("metadata")
    if change is not None:
        header["metadata"] = change
    save_file(load_file(path), path, header)
    with pytest.raises(ValueError, match=f"^{path}: not a masks file, .*checksum"):
        read(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": nn.functional.cross_entropy},
        {"out": Path("out")},
        {"scores": torch.ones(3)},
        {("a", "b"): 1},
        ["method"],
        "force",
    ],
)
def test_metadata_that_json_does_not_hold_is_refused(
    wrong: Any, tmp_path: Path
) -> None:
    message = "^metadata: expected a mapping of names to what JSON holds .*: .+"
    with pytest.raises(TypeError, match=message):
        save_masks(GOOD, tmp_path / "masks", wrong)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("content", ["empty", "text", "random_0"])
def test_there_is_no_metadata_in_a_file_of_something_else(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
        load_metadata(path)
    path.write_bytes(NO_MASKS[content])
    with pytest.raises(ValueError, match=f"^{path}: not a masks file"):
        load_metadata(path)


# The report of a model


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        layer.name: (layer.kept, layer.total) for layer in sparsity_report(model).layers
    }


DENSE = {"0.weight": (72, 72), "3.weight": (180, 180), "5.weight": (15, 15)}


def test_the_report_of_a_dense_model_counts_its_convolutions_and_linear_layers() -> (
    None
):
    model = network()
    assert counts(model) == DENSE
    report = sparsity_report(model)
    assert (report.kept, report.total, report.sparsity) == (267, 267, 0)
    assert [layer.shape for layer in report.layers] == [(4, 2, 3, 3), (5, 36), (3, 5)]
    assert report.warnings == () and report.method is None


def test_the_report_is_the_same_before_and_after_pruning_is_made_permanent() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 12)
    apply_masks(model, {"5.weight": torch.eye(3, 5)})
    pruned = DENSE | {"0.weight": (60, 72), "5.weight": (3, 15)}
    assert counts(model) == pruned
    report = sparsity_report(model)
    assert report.kept == 60 + 180 + 3
    assert report.sparsity == (12 + 12) / 267
    for layer in (model[0], model[5]):
        prune.remove(layer, "weight")
    assert counts(model) == pruned
    assert sparsity_report(model) == report


def test_weights_that_are_zero_without_a_mask_count_as_removed() -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[0] = 0
    assert counts(model)["5.weight"] == (10, 15)
    apply_masks(model, {"5.weight": torch.ones(3, 5)})
    assert counts(model)["5.weight"] == (15, 15)


def test_a_pruned_bias_is_counted_while_it_is_pruned() -> None:
    model = network()
    prune.l1_unstructured(model[3], "bias", 2)
    prune.l1_unstructured(model[1], "weight", 1)
    prune.l1_unstructured(model[3], "weight", 80)
    biased = {"1.weight": (3, 4), "3.bias": (3, 5), "3.weight": (100, 180)}
    assert counts(model) == DENSE | biased
    for module, name in (
        (model[3], "bias"),
        (model[1], "weight"),
        (model[3], "weight"),
    ):
        prune.remove(module, name)
    assert counts(model) == DENSE | {"3.weight": (100, 180)}


def test_a_shared_weight_is_counted_once() -> None:
    model = tied()
    assert counts(model) == {"0.weight": (9, 9)}
    apply_masks(model, {"0.weight": torch.eye(3)})
    assert counts(model) == {"0.weight": (3, 9)}


def test_a_layer_without_any_weight_is_left_out_pruned_or_not() -> None:
    model = network()
    model[5].weight = nn.Parameter(torch.empty(3, 0))
    expected = {name: count for name, count in DENSE.items() if name != "5.weight"}
    assert counts(model) == expected
    apply_masks(model, {"5.weight": torch.ones(3, 0)})
    assert counts(model) == expected


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Sequential(), nn.BatchNorm2d(3), nn.Embedding(3, 3)],
    ids=str,
)
def test_a_model_without_anything_to_prune_has_no_report(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^model: .*no convolution or linear weight"):
        sparsity_report(model)


def test_a_report_changes_nothing() -> None:
    model = pruned_thrice(network())
    with unchanged(model):
        sparsity_report(model)
