"""Masks of a model: read and applied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked import TYPES, WRONG, assert_same, pruned_thrice, random_masks
from networks import conv_network as network
from networks import tied_layers as tied
from networks import tiny_resnet
from state import unchanged
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import FORCE, Magnitude, apply_masks, get_masks, sparsity_report
from force_plugin.model.reparametrisation import Container


def the_hook(module: nn.Module) -> Any:
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


@pytest.mark.parametrize("dtype", [*TYPES, torch.int64], ids=str)
def test_applied_masks_do_what_pytorchs_custom_masks_do(dtype: torch.dtype) -> None:
    model: Any = network()
    reference: Any = network()
    masks = random_masks(model, "0.weight", "3.weight", "3.bias", "5.weight")
    apply_masks(model, {name: mask.to(dtype) for name, mask in masks.items()})
    for name, mask in masks.items():
        index, tensor = name.split(".")
        prune.custom_from_mask(reference[int(index)], tensor, mask)
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
    model: Any = tied()
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
