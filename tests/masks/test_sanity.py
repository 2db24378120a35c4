"""Masks shuffled within layers, and new initial values under the same masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from networks import conv_network as network
from networks import tied_layers as tied
from state import unchanged
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    make_permanent,
    reinitialise,
    shuffle_masks,
    sparsity_report,
)


def made(seed: int, build: Callable[[], nn.Module] = network) -> nn.Module:
    model = build()
    torch.manual_seed(seed)  # some of these networks are always the same
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def pruned(build: Callable[[], nn.Module] = network, seed: int = 0) -> nn.Module:
    model = made(seed, build)
    force_prune(model, [], 0.7, method="magnitude", progress=False)
    return model


# Shuffled masks.


def test_each_layer_keeps_as_many_of_its_weights_in_other_places() -> None:
    masks = get_masks(pruned(lambda: timm.create_model("test_resnet", num_classes=10)))
    shuffled = shuffle_masks(masks)
    assert list(shuffled) == list(masks)
    for name, mask in masks.items():
        other = shuffled[name]
        assert other.dtype == torch.bool and other.shape == mask.shape
        assert other.sum() == mask.sum()
    assert any(not torch.equal(shuffled[name], masks[name]) for name in masks)


def test_every_place_is_as_likely() -> None:
    masks = {"weight": torch.arange(12).view(3, 4) < 4}
    generator = torch.Generator().manual_seed(0)
    counts = sum(shuffle_masks(masks, generator)["weight"].int() for _ in range(3000))
    expected, deviation = 1000, (3000 / 3 * 2 / 3) ** 0.5
    assert ((counts - expected).abs() < 4.5 * deviation).all()


def test_masks_that_are_given_stay_as_they_are() -> None:
    masks = {"weight": torch.arange(100) < 50}
    shuffle_masks(masks)
    assert torch.equal(masks["weight"], torch.arange(100) < 50)


def test_a_generator_decides_or_the_global_one() -> None:
    masks = {"a": torch.arange(100) < 50, "b": torch.arange(100) < 50}

    def of(seed: int) -> dict[str, Tensor]:
        return shuffle_masks(masks, torch.Generator().manual_seed(seed))

    assert torch.equal(of(1)["a"], of(1)["a"])
    assert not torch.equal(of(1)["a"], of(2)["a"])
    assert not torch.equal(of(1)["a"], of(1)["b"])
    before = torch.get_rng_state()
    of(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    one = shuffle_masks(masks)
    torch.manual_seed(3)
    assert torch.equal(shuffle_masks(masks)["b"], one["b"])


def test_masks_of_0_and_1_become_bool() -> None:
    shuffled = shuffle_masks({"weight": torch.tensor([[0.0, 1.0, 1.0]])})
    assert shuffled["weight"].dtype == torch.bool and shuffled["weight"].sum() == 2


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([torch.ones(3)], TypeError, "masks: expected a mapping"),
        ({}, ValueError, "masks: expected at least one mask"),
        ({"weight": torch.tensor([0.5])}, ValueError, "0 and 1"),
    ],
)
def test_what_is_no_mask_is_an_error(
    masks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shuffle_masks(masks)


# New initial values.


@pytest.mark.parametrize("permanent", [False, True])
def test_values_are_those_of_the_fresh_model_where_the_mask_keeps_them(
    permanent: bool,
) -> None:
    def build() -> nn.Module:
        return timm.create_model("test_resnet", num_classes=10)

    model = pruned(build)
    fresh: Any = made(1, build)
    fresh.train()(torch.randn(4, 3, 32, 32))  # other running statistics
    masks, wanted = get_masks(model), copy.deepcopy(fresh)
    if permanent:
        make_permanent(model)
    with unchanged(fresh):
        reinitialise(model, fresh)
    apply_masks(wanted, masks)
    if not permanent:
        assert get_masks(model).keys() == masks.keys()
        assert all(torch.equal(get_masks(model)[name], masks[name]) for name in masks)
    make_permanent(wanted)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.eval()(x), wanted.eval()(x))
    if not permanent:
        assert all(
            torch.equal(module.weight_orig, fresh.get_submodule(name).weight)
            and torch.equal(
                module.weight, module.weight_orig.detach() * module.weight_mask
            )
            for name, module in model.named_modules()
            if prune.is_pruned(module) and not list(module.children())
        )
        make_permanent(model)
    state = model.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(state[name], value), name


def test_parameters_are_the_same_objects_so_that_an_optimizer_goes_on() -> None:
    model = pruned()
    before = [*model.parameters(), *model.buffers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reinitialise(model, made(1))
    after = [*model.parameters(), *model.buffers()]
    assert all(one is other for one, other in zip(before, after, strict=True))
    values = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert any(
        not torch.equal(p, value)
        for p, value in zip(model.parameters(), values, strict=True)
    )


def test_pruned_weights_stay_0_when_a_permanent_model_trains_on() -> None:
    model = pruned()
    make_permanent(model)
    sparsity = sparsity_report(model).sparsity
    reinitialise(model, made(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(4, 2, 5, 5)).square().mean().backward()
        optimizer.step()
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert sparsity_report(model).sparsity == sparsity > 0.69
    assert zeros == sparsity_report(model).total - sparsity_report(model).kept


def test_weights_that_two_layers_share_stay_shared() -> None:
    model = pruned(tied)
    reinitialise(model, made(1, tied))
    assert len(list(model.parameters())) == len(list(made(1, tied).parameters()))
    wanted = made(1, tied)
    apply_masks(wanted, get_masks(model))
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_values_take_the_type_of_the_model() -> None:
    model = pruned().double()
    reinitialise(model, made(1))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_zeros_that_are_held_stay_0_under_a_later_mask() -> None:
    model = pruned()
    make_permanent(model)
    prune.random_unstructured(model[0], "weight", amount=0.1)
    masks = get_masks(model)
    reinitialise(model, made(1))
    model(torch.randn(4, 2, 5, 5))
    for name, mask in masks.items():
        module, _, tensor = name.rpartition(".")
        assert not getattr(model.get_submodule(module), tensor)[~mask].any()


def test_a_weight_that_pytorchs_own_pruning_shows_keeps_its_graph() -> None:
    def build() -> nn.Module:
        return nn.MultiheadAttention(8, 2, batch_first=True)

    model, fresh = made(0, build), made(1, build)
    prune.random_unstructured(model.out_proj, "weight", amount=0.5)
    reinitialise(model, fresh)
    x = torch.randn(2, 3, 8)
    model(x, x, x)[0].sum().backward()
    assert model.out_proj.weight_orig.grad.any()  # it is read, and never called


def test_a_network_in_distributed_data_parallel(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, fresh = pruned(), made(1)
        reinitialise(DistributedDataParallel(model), fresh)
    finally:
        dist.destroy_process_group()
    assert torch.equal(model[0].weight_orig, fresh[0].weight)


def with_constant(value: float = 1.0) -> nn.Module:
    model = network()
    model.register_buffer("scale", torch.full((1,), value).expand(6))
    return model


def test_a_buffer_that_is_expanded_stays_or_is_an_error() -> None:
    model = pruned(with_constant)
    reinitialise(model, made(1, with_constant))
    assert torch.equal(model[0].weight_orig, made(1)[0].weight)
    other = with_constant(2.0)
    with unchanged(model), pytest.raises(ValueError, match="scale is expanded"):
        reinitialise(model, other)


def test_nothing_is_changed_where_something_fails_half_way() -> None:
    model = pruned()
    fresh = made(1)
    fresh[1].running_var = fresh[1].running_var.to_sparse()
    with unchanged(model), pytest.raises(RuntimeError, match="copy_"):
        reinitialise(model, fresh)


def wider() -> nn.Module:
    model = network()
    model[0] = nn.Conv2d(2, 9, 3)
    return model


def longer() -> nn.Module:
    return nn.Sequential(*network(), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("model", "fresh", "message"),
    [
        (network, network, "model: expected one that is pruned"),
        (pruned, pruned, "fresh: expected a model that is not pruned"),
        (pruned, wider, "instead of"),
        (pruned, longer, "only one of the two has"),
        (
            pruned,
            lambda: network().to("meta"),
            "fresh: .* has no values yet",
        ),
    ],
)
def test_models_that_do_not_fit_are_an_error(
    model: Callable[[], nn.Module], fresh: Callable[[], nn.Module], message: str
) -> None:
    one, other = model(), fresh()
    with unchanged(one), pytest.raises(ValueError, match=message):
        reinitialise(one, other)


def test_what_is_no_model_is_an_error() -> None:
    with pytest.raises(TypeError):
        reinitialise(pruned(), timm.create_model)
