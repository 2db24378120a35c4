"""A pruning made permanent: plain parameters, in whatever model."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import timm.optim
import torch
from interpreter import python
from networks import tiny_resnet
from state import differences, state_of, unchanged
from timm.models.beit import Attention
from torch import nn
from torch.nn.utils import prune
from zeros import (
    _again_by_pytorch,
    assert_holds_in_training,
    holds,
    images,
    network,
    permanent_network,
    prune_some,
    sgd,
    tied,
    train,
    values,
)

from force_plugin import apply_masks, force_prune, get_masks, make_permanent
from force_plugin.masks import held_zeros, permanent


def _weight_and_bias(model: nn.Module) -> None:
    prune.l1_unstructured(model[4], "weight", 0.5)
    prune.random_unstructured(model[4], "bias", 2)


def _container(model: nn.Module) -> None:
    prune.l1_unstructured(model[4], "weight", 0.3)
    prune.ln_structured(model[4], "weight", 1, n=2, dim=0)
    apply_masks(
        model, {"4.weight": torch.eye(6, 16), "0.weight": torch.ones(4, 2, 3, 3)}
    )


def _global(model: nn.Module) -> None:
    pairs = [(model[0], "weight"), (model[4], "weight"), (model[6], "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.8)


def _by_force(model: nn.Module) -> None:
    batch = (images(), torch.arange(8) % 3)
    force_prune(model, [batch], sparsity=0.5, steps=2, progress=False)


PRUNINGS: dict[str, Callable[[nn.Module], object]] = {
    "force": _by_force,
    "masks": prune_some,
    "l1": lambda model: prune.l1_unstructured(model[0], "weight", 0.3),
    "random_structured": lambda m: prune.random_structured(m[4], "weight", 2, dim=1),
    "norm": lambda model: prune.l1_unstructured(model[1], "weight", 1),
    "identity": lambda model: prune.identity(model[6], "weight"),
    "weight_and_bias": _weight_and_bias,
    "container": _container,
    "global": _global,
}


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_state_dict_is_the_dense_one_with_zeros(pruning: str) -> None:
    model, dense = network(), network().state_dict()
    PRUNINGS[pruning](model)
    masks = get_masks(model)
    make_permanent(model)
    state = model.state_dict()
    assert set(state) == set(dense)
    for name, value in state.items():
        kept = masks.get(name, torch.ones(value.shape, dtype=torch.bool))
        bits = value.contiguous().view(-1).view(torch.uint8)
        expected = torch.where(kept, dense[name], torch.zeros_like(value))
        assert torch.equal(bits, expected.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_nothing_of_the_pruning_is_left_on_the_modules(pruning: str) -> None:
    model, dense = network(), network()
    PRUNINGS[pruning](model)
    make_permanent(model, hold_zeros=False)
    assert not prune.is_pruned(model) and get_masks(model) == {}
    for module, like in zip(model.modules(), dense.modules(), strict=True):
        assert set(vars(module)) == set(vars(like))
        for key, entries in vars(like).items():
            if isinstance(entries, dict):
                assert set(vars(module)[key]) == set(entries)


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("training", [True, False])
def test_the_outputs_stay_what_they_were(training: bool, pruning: str) -> None:
    model = network()
    PRUNINGS[pruning](model)
    model.train(training)
    before = model(images())
    make_permanent(model)
    assert torch.equal(model(images()), before)
    assert all(module.training is training for module in model.modules())


def test_zeros_have_no_sign_and_swallow_what_is_not_finite() -> None:
    # prune.remove multiplies: -1 * 0 is -0, and inf * 0 is not a number.
    layers = nn.Linear(4, 1), nn.Linear(4, 1)
    for layer in layers:
        layer.weight.data = torch.tensor([[-1.0, float("inf"), -2.0, float("nan")]])
        prune.custom_from_mask(layer, "weight", torch.tensor([[0.0, 0, 1, 0]]))
    prune.remove(layers[0], "weight")
    make_permanent(layers[1])
    assert str(layers[0].weight.tolist()) == "[[-0.0, nan, -2.0, nan]]"
    assert str(layers[1].weight.tolist()) == "[[0.0, 0.0, -2.0, 0.0]]"


def test_a_mask_that_weakens_weights_does_so_for_good() -> None:
    layer = nn.Linear(3, 1)
    dense, soft = layer.weight.detach().clone(), torch.tensor([[1.0, 0.5, 0.0]])
    prune.custom_from_mask(layer, "weight", soft)
    make_permanent(layer)
    assert torch.equal(layer.weight, dense * soft)


def test_parameters_stay_the_same_objects_with_their_gradients() -> None:
    model = network()
    before = dict(model.named_parameters())
    prune_some(model)
    model(images()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in before.items()}
    model[4].weight_orig.requires_grad_(False)
    order = [*model.parameters()]
    make_permanent(model)
    after = dict(model.named_parameters())
    # An optimizer's state goes by the order.
    assert [*map(id, after.values())] == [*map(id, order)]
    assert set(after) == set(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(after[name].grad is grad for name, grad in gradients.items())
    assert [n for n, p in after.items() if not p.requires_grad] == ["4.weight"]


def test_parameters_stay_where_they_were_in_memory() -> None:
    model = network().to(memory_format=torch.channels_last).share_memory()
    flat = torch.randn(96)
    model[4].weight.data = flat.view(6, 16)
    before = {p: (p.data_ptr(), p.stride()) for p in model.parameters()}
    masks = prune_some(model)
    make_permanent(model)
    assert {p: (p.data_ptr(), p.stride()) for p in model.parameters()} == before
    assert model[0].weight.is_shared()
    assert torch.equal(flat != 0, masks["4.weight"].flatten())


@pytest.mark.parametrize("make", [torch.no_grad, torch.inference_mode])
def test_it_can_be_called_where_gradients_are_off(make: Callable[[], Any]) -> None:
    model = network()
    masks = prune_some(model)
    with make():
        make_permanent(model)
    assert not any(p.is_inference() for p in model.parameters())
    assert_holds_in_training(model, masks)


# Readers, shared weights, parts of models.


def pre_hooks(model: nn.Module) -> list[object]:
    return [
        hook
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
        )
        for hook in hooks
    ]


READERS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0, batch_first=True),
    "beit": lambda: Attention(8, num_heads=2, qkv_bias=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_a_module_that_only_reads_a_weight_computes_as_before(
    reader: str, training: bool
) -> None:
    torch.manual_seed(0)
    model, x = READERS[reader]().train(training), torch.randn(2, 5, 8)
    prune_some(model)
    before = model(x)
    make_permanent(model)
    assert pre_hooks(model) == []
    # Without hooks, PyTorch's encoder takes its fast path in eval mode.
    torch.testing.assert_close(model(x), before)


def test_hooks_of_others_stay() -> None:
    model, called = network(), []
    for module in (model, model[4]):
        module.register_forward_pre_hook(lambda *_: called.append(1))
        module.register_forward_pre_hook(lambda *_: called.append(2), with_kwargs=True)
    prune_some(model)
    make_permanent(model)
    model(images())
    assert called == [1, 2, 1, 2]


def test_the_rest_of_a_model_stays_pruned_when_a_part_is_made_permanent() -> None:
    torch.manual_seed(0)
    model: Any = READERS["encoder"]()
    x = torch.randn(2, 5, 8)
    masks = prune_some(model)
    before = model(x)
    make_permanent(model.self_attn.out_proj)
    assert [n for n, _ in model.named_parameters() if n.endswith("_orig")] == [
        f"{name}_orig" for name in masks if "out_proj" not in name
    ]
    assert torch.equal(model(x), before)
    make_permanent(model.self_attn)
    assert not prune.is_pruned(model.self_attn) and prune.is_pruned(model)
    assert torch.equal(model(x), before)
    make_permanent(model)
    assert pre_hooks(model) == [] and holds(model, masks)
    assert torch.equal(model(x), before)


def test_what_is_not_pruned_is_not_touched() -> None:
    model, dense = network(), network().state_dict()
    masks = prune_some(model, "4.weight")
    # A zero that nobody pruned is no pruned weight, and what is saved says so.
    least = torch.finfo(torch.float32).smallest_normal * torch.finfo().eps
    with torch.no_grad():
        model[6].weight[0], dense["6.weight"][0] = 0, least
    make_permanent(model)
    state = model.state_dict()
    assert [n for n in dense if not torch.equal(state[n], dense[n])] == ["4.weight"]
    train(model, sgd(model))
    assert model[6].weight.all() and holds(model, masks)


def test_a_shared_weight_goes_on_being_shared() -> None:
    model = tied()
    masks, before = prune_some(model), model(images())
    make_permanent(model)
    assert model[1].weight is model[2].weight
    assert torch.equal(model(images()), before)
    assert_holds_in_training(model, masks)


@pytest.mark.parametrize("pruned", [(1,), (2,), (1, 2)], ids=str)
def test_a_shared_weight_loses_what_any_owner_has_pruned(
    pruned: tuple[int, ...],
) -> None:
    model: Any = tied()
    kept = torch.ones(32, 32, dtype=torch.bool)
    for index in pruned:
        mask = torch.rand(32, 32) < 0.7
        prune.custom_from_mask(model[index], "weight", mask)
        kept &= mask
    make_permanent(model)
    assert torch.equal(model[1].weight != 0, kept)
    assert_holds_in_training(model, {"1.weight": kept})


@pytest.mark.parametrize("gone", [1, 2])
def test_a_shared_weight_is_held_as_long_as_one_owner_lives(gone: int) -> None:
    model = tied()
    (mask,) = prune_some(model).values()
    make_permanent(model)
    model[gone] = nn.Identity()
    assert_holds_in_training(model, {f"{3 - gone}.weight": mask})


def test_a_recurrent_layer_uses_its_own_parameters_again() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(4, 6, num_layers=2), torch.randn(3, 2, 4)
    masks = prune_some(model)
    before = model(x)[0]
    make_permanent(model)
    assert torch.equal(model(x)[0], before)
    assert set(model._flat_weights) == set(model.parameters())
    optimizer = sgd(model)
    model(x)[0].square().sum().backward()
    optimizer.step()
    assert holds(model, masks)


# Twice.


def test_a_second_call_has_nothing_to_do() -> None:
    model, masks = permanent_network()
    with unchanged(model), pytest.raises(ValueError, match="without any mask"):
        make_permanent(model, hold_zeros=False)
    make_permanent(model)
    assert_holds_in_training(model, masks)


@pytest.mark.parametrize("again", [_by_force, _global, _again_by_pytorch])
def test_a_permanent_model_can_be_pruned_and_made_permanent_again(
    again: Callable[[nn.Module], None],
) -> None:
    model, masks = permanent_network()
    optimizer = sgd(model)
    train(model, optimizer)
    again(model)
    more = get_masks(model)
    train(model, optimizer)
    make_permanent(model)
    both = {name: mask & more[name] for name, mask in masks.items()}
    for _ in range(3):
        assert holds(model, both)
        train(model, optimizer, steps=1)
    assert_holds_in_training(copy.deepcopy(model), both)


def test_masks_of_a_permanent_model_are_those_that_are_held() -> None:
    model, masks = permanent_network()
    found = get_masks(model)
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    model[4].weight = nn.Parameter(torch.randn(6, 16))  # the same shape: it is held too
    model[6].weight = nn.Parameter(torch.randn(9, 7))
    assert list(get_masks(model)) == ["0.weight", "4.weight"]
    make_permanent(model, hold_zeros=True)
    assert torch.equal(model[4].weight != 0, masks["4.weight"])


# GraSP-It scores by the gradient alone, which a weight of 0 has as well.
@pytest.mark.parametrize(
    "method", ["force", "grasp_it", "grasp", "magnitude", "random"]
)
def test_what_a_permanent_model_has_pruned_does_not_return(method: str) -> None:
    model, masks = permanent_network()
    train(model, sgd(model))
    batch = (images(), torch.arange(8) % 3)
    force_prune(model, [batch], 0.8, method=method, steps=3, progress=False)
    more = get_masks(model)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in more.values()) == math.floor(0.2 * total)
    assert not any((more[name] & ~masks[name]).any() for name in masks)
    with pytest.raises(ValueError, match=r"pruned to 0\.8.* already"):
        force_prune(model, [batch], 0.3, method=method, steps=3, progress=False)
    make_permanent(model)
    train(model, sgd(model))
    assert holds(model, more)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_zeros_are_held_under_a_mask_that_knows_nothing_of_them(name: str) -> None:
    model, masks = permanent_network()
    weights = [(module, "weight") for module in (model[0], model[4], model[6])]
    # Fewer than are 0 already: the others count as kept.
    prune.global_unstructured(weights, prune.RandomUnstructured, amount=0.2)
    found = get_masks(model)
    assert not any((found[n] & ~mask).any() for n, mask in masks.items())
    train(model, timm.optim.create_optimizer_v2(model, name, lr=0.01), steps=3)
    assert holds(model, masks)


def test_what_an_earlier_call_holds_stays_held() -> None:
    model, masks = permanent_network()
    _again_by_pytorch(model)
    more = get_masks(model)
    make_permanent(model, hold_zeros=False)
    train(model, sgd(model))
    for name, value in values(model, masks).items():
        assert torch.equal(value != 0, masks[name])
        assert (masks[name] & ~more[name]).any()


# Errors, and interruptions at any point.


@pytest.mark.parametrize("wrong", [None, {}, nn.Linear], ids=str)
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    message = rf"^model: expected a torch.nn.Module, got {type(wrong).__name__}$"
    with pytest.raises(TypeError, match=message):
        make_permanent(wrong)


@pytest.mark.parametrize("make", [network, nn.ReLU, tiny_resnet])
def test_a_model_that_is_not_pruned_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    message = (
        r"^make_permanent: expected .* pruned .*, got one without any mask or zero$"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        make_permanent(model)


@contextmanager
def interrupted(line: int) -> Iterator[None]:
    """Ctrl-C before the nth line of making permanent and of prune.remove."""
    files = permanent.__file__, held_zeros.__file__, prune.__file__
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def _pruned_once() -> nn.Module:
    model = network()
    prune_some(model)
    return model


def _pruned_again() -> nn.Module:
    model, _ = permanent_network()
    _again_by_pytorch(model)
    return model


def _pruned_and_shared() -> nn.Module:
    model = tied()
    prune_some(model)
    return model


def held_now(model: nn.Module) -> list[list[int]]:
    return [sorted(map(id, held_zeros.held_of(one))) for one in model.parameters()]


@pytest.mark.parametrize("make", [_pruned_once, _pruned_again, _pruned_and_shared])
def test_interrupted_at_any_line_all_is_done_or_nothing(
    make: Callable[[], nn.Module],
) -> None:
    expected = make()
    make_permanent(expected)
    train(expected, sgd(expected))
    undone, line = 0, 0
    while True:
        line += 1
        model = make()
        before, held = state_of(model), held_now(model)
        # Who catches an error keeps its traceback, and what its frames hold.
        caught = None
        try:
            with interrupted(line):
                make_permanent(model)
        except KeyboardInterrupt as error:
            caught = error
        if prune.is_pruned(model):
            assert differences(before, state_of(model)) == []
            assert held_now(model) == held
            make_permanent(model)
            undone += 1
        train(model, sgd(model))
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items())
        if caught is None:
            break
    assert line > undone > 30


def test_importing_the_package_registers_no_hook() -> None:
    script = """
import force_plugin, torch
from torch.nn.modules import module
from torch.optim import optimizer

places = (
    optimizer._global_optimizer_pre_hooks,
    optimizer._global_optimizer_post_hooks,
    module._global_parameter_registration_hooks,
    module._global_forward_pre_hooks,
)
assert not any(places), places
layer = torch.nn.Linear(3, 3)
force_plugin.apply_masks(layer, {"weight": torch.eye(3)})
assert not any(places), places
force_plugin.make_permanent(layer)
assert [len(place) for place in places] == [1, 1, 1, 0], places
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
