"""Zeros that stay 0 in other hands, and zeros that were not pruned."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations
from transformers.pytorch_utils import Conv1D
from zeros import (
    Masks,
    assert_holds_in_training,
    holds,
    images,
    network,
    permanent_network,
    prune_some,
    sgd,
    train,
)

from force_plugin import apply_masks, force_prune, get_masks, make_permanent
from force_plugin.hold import save_pruned
from force_plugin.masks import held_zeros


class OwnLinear(nn.Linear):
    """A layer of somebody's own that takes over the parameters of another."""

    @classmethod
    def of(cls, layer: Any) -> nn.Linear:
        made = cls(layer.in_features, layer.out_features)
        made.weight, made.bias = layer.weight, layer.bias
        return made


def own(model: Any) -> nn.Module:
    model[4] = OwnLinear.of(model[4])
    return model


def quantisation_aware(model: nn.Sequential) -> nn.Module:
    model.qconfig = get_default_qat_qconfig("fbgemm")
    return prepare_qat(model.train())


def fused(model: nn.Sequential) -> nn.Module:
    return fuse_modules_qat(model.train(), [["0", "1"]])


def fused_and_prepared(model: nn.Sequential) -> nn.Module:
    return quantisation_aware(fused(model))  # type: ignore[arg-type]


def normed(model: nn.Sequential) -> nn.Module:
    torch.nn.utils.weight_norm(model[4])
    return model


def parametrised(model: nn.Sequential) -> nn.Module:
    torch.nn.utils.parametrizations.weight_norm(model[4])
    return model


def spectral(model: nn.Sequential) -> nn.Module:
    torch.nn.utils.spectral_norm(model[4])
    return model


def tied_later(model: nn.Sequential) -> nn.Module:
    model.append(nn.Linear(16, 6, bias=False))
    model[7].weight = model[4].weight
    del model[4], model[4]
    return nn.Sequential(*model[:4], model[-1], nn.Tanh(), model[4])


def rewrapped(model: Any) -> nn.Module:
    old: Any = model[4]
    model[4] = nn.Linear(16, 6)
    model[4].weight = nn.Parameter(old.weight.data)
    return model


def as_convolution(model: nn.Sequential) -> nn.Module:
    old, made = model[4], nn.Conv2d(16, 6, 1)
    made.weight = nn.Parameter(old.weight.data.view(6, 16, 1, 1))
    model[4] = nn.Sequential(nn.Unflatten(1, (16, 1, 1)), made, nn.Flatten())
    return model


def divided(model: nn.Sequential) -> nn.Module:
    """As the rows of an attention's in_proj_weight become layers of their own."""
    old, parts = model[4], nn.ModuleList(nn.Linear(16, 2) for _ in range(3))
    for number, part in enumerate(parts):
        part.weight = nn.Parameter(old.weight.data[2 * number : 2 * number + 2])
    model[4] = _Beside(parts)
    return model


class _Beside(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


def transposed(model: nn.Sequential) -> nn.Module:
    old, made = model[4], Conv1D(6, 16)
    made.weight = nn.Parameter(old.weight.data.t())
    model[4] = made
    return model


def torchaos(model: nn.Sequential) -> nn.Module:
    qat = pytest.importorskip("torchao.quantization.qat")
    model[4] = qat.FakeQuantizedLinear.from_linear(model[4])
    return model


TAKEN_OVER = [own, quantisation_aware, fused, fused_and_prepared, normed, parametrised]


TAKEN_OVER += [spectral, tied_later, rewrapped, as_convolution, divided, transposed]


TAKEN_OVER += [torchaos]


def zeros_in(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("take", TAKEN_OVER)
@pytest.mark.parametrize("copied", ["not", "before", "after", "pickled"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:.*torch.ao")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range")
def test_zeros_stay_in_modules_that_take_the_parameter_over(
    copied: str, take: Callable[[Any], nn.Module]
) -> None:
    if (copied, take) == ("after", normed):
        pytest.skip("weight_norm itself leaves what cannot be copied")
    model, masks = permanent_network()
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if copied == "before":
        model = copy.deepcopy(model)
    taken = take(model)
    del model
    if copied == "after":
        taken = copy.deepcopy(taken)
    elif copied == "pickled":
        taken = pickle.loads(pickle.dumps(taken)) if take is own else taken
    gc.collect()
    assert zeros_in(taken) == pruned
    if take not in (quantisation_aware, fused_and_prepared):
        train(taken, sgd(taken))
        assert zeros_in(taken) == pruned
        return
    optimizer = sgd(taken)
    for _ in range(3):
        taken(images()).square().mean().backward()
        optimizer.step()
    assert zeros_in(taken) == pruned


NORMS: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    # What computes a weight, from which parameter, and how it ends.
    "old weight_norm": (
        torch.nn.utils.weight_norm,
        "weight_v",
        torch.nn.utils.remove_weight_norm,
    ),
    "old spectral_norm": (
        torch.nn.utils.spectral_norm,
        "weight_orig",
        torch.nn.utils.remove_spectral_norm,
    ),
    "weight_norm": (
        parametrizations.weight_norm,
        "parametrizations.weight.original1",
        lambda layer: remove_parametrizations(layer, "weight"),
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        "parametrizations.weight.original",
        lambda layer: remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_zeros_stay_when_what_computes_a_weight_ends(norm: str, copied: bool) -> None:
    begin, name, end = NORMS[norm]
    model = network()
    begin(model[4])
    owner, _, key = name.rpartition(".")
    mask = torch.rand(6, 16) < 0.5
    mask[:, 0] = True  # a norm of 0 has no direction
    module = model[4].get_submodule(owner)
    force_prune(
        model,
        [],
        0.5,
        method="random",
        parameters=[(module, key), (model[0], "weight")],
        progress=False,
    )
    make_permanent(model)
    model(images())
    if copied and norm.startswith("old"):
        pytest.skip("PyTorch's own hooks leave what cannot be copied")
    if copied:
        model = copy.deepcopy(model)
    end(model[4])
    zeros = model[4].weight == 0
    assert 20 < zeros.sum() < 80
    train(model, sgd(model))
    assert not model[4].weight[zeros].any() and model[4].weight[~zeros].all()


def test_a_new_parameter_with_zeros_of_its_own_is_not_held() -> None:
    model, _ = permanent_network()
    other: Any = network()
    del model[4].weight  # its zeros are nobody's now
    for shape in ((6, 16), (16, 6), (96,)):
        for values in (torch.zeros(shape), torch.eye(96)[0].view(shape)):
            parameter = other.register_parameter  # of a module that lost nothing
            parameter("made", nn.Parameter(values))
            assert not held_zeros.held_of(other.made)
            del other.made


@pytest.mark.parametrize("frozen", [False, True])
def test_zeros_stay_where_parameters_are_swapped(frozen: bool) -> None:
    model, masks = permanent_network()
    model.requires_grad_(not frozen)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.load_state_dict({k: v + 0 for k, v in model.state_dict().items()})
        twin = copy.deepcopy(model)
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.requires_grad_()
    twin.requires_grad_().float()
    for one in (model, twin):
        train(one, sgd(one))
        for name, mask in masks.items():
            weight = one.get_parameter(name)
            assert not weight[~mask].any() and not weight.grad[~mask].any()


def test_parameters_without_values_can_be_made_while_others_are_held() -> None:
    model, masks = permanent_network()
    lazy = nn.LazyLinear(3)
    assert lazy(torch.ones(2, 4)).shape == (2, 3)
    with torch.device("meta"):
        assert nn.Linear(3, 3).weight.is_meta
    with FakeTensorMode():
        assert nn.Linear(3, 3)(torch.ones(2, 3)).shape == (2, 3)
    assert_holds_in_training(model, masks)


def test_the_zeros_of_a_parameter_end_with_it() -> None:
    gc.collect()
    model, _ = permanent_network()
    layer = OwnLinear.of(model[4])
    parameter = weakref.ref(layer.weight)
    assert id(layer.weight) in held_zeros._held
    held = len(held_zeros._held)
    del model, layer
    gc.collect()
    assert parameter() is None and len(held_zeros._held) == held - 3


# Zeros that were not pruned.


def zero_head() -> nn.Sequential:
    model: Any = network()
    nn.init.zeros_(model[6].weight)
    return model


def assert_head_trains(model: nn.Module, masks: Masks) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(images()), torch.arange(8)).backward()
        optimizer.step()
    assert holds(model, masks)
    head = model.get_parameter("6.weight")
    kept = masks.get("6.weight", torch.ones_like(head, dtype=torch.bool))
    assert head[kept].count_nonzero() == kept.sum()


def by_torch(model: nn.Module, path: Path) -> Masks:
    torch.save(model.state_dict(), path)
    return torch.load(path)


def by_safetensors(model: nn.Module, path: Path) -> Masks:
    safetensors.torch.save_file(model.state_dict(), path)
    return safetensors.torch.load_file(path)


def by_save_pruned(model: nn.Module, path: Path) -> Masks:
    save_pruned(model, path)
    return safetensors.torch.load_file(path)


SAVED: dict[str, Callable[[nn.Module, Path], Masks]] = {
    "state dict": lambda model, path: model.state_dict(),
    "clones": lambda model, path: {
        name: value.clone() for name, value in model.state_dict().items()
    },
    "torch.save": by_torch,
    "safetensors": by_safetensors,
    "bfloat16": lambda model, path: {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    },
    "save_pruned": by_save_pruned,
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("pruned", ["head too", "not the head"])
@pytest.mark.parametrize("hold", [True, False])
def test_a_layer_that_starts_at_0_trains_after_a_restart(
    hold: bool, pruned: str, saved: str, tmp_path: Path
) -> None:
    if saved == "bfloat16":
        pytest.skip("the smallest number of float32 is 0 in bfloat16")
    model, fresh = zero_head(), zero_head()
    names = ("0.weight", "4.weight", "6.weight")[: 3 if pruned == "head too" else 2]
    masks = prune_some(model, *names)
    make_permanent(model, hold_zeros=hold or saved == "save_pruned")
    fresh.load_state_dict(SAVED[saved](model, tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_permanent(fresh)
    assert {name: int(m.sum()) for name, m in get_masks(fresh).items()} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert_head_trains(fresh, masks)
    if hold:
        assert_head_trains(model, masks)


@pytest.mark.parametrize("called", [False, True])
def test_save_pruned_takes_what_pytorch_has_pruned(
    called: bool, tmp_path: Path
) -> None:
    model: Any = zero_head()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    if called:
        model(images()).sum().backward()
    weight, gradient = model[0].weight, model[0].weight_orig.grad
    save_pruned(model, tmp_path / "file")
    saved = safetensors.torch.load_file(tmp_path / "file")
    assert torch.equal(saved["0.weight"], weight)
    assert saved.keys() == zero_head().state_dict().keys()
    assert model[0].weight is weight and model[0].weight_orig.grad is gradient


def test_a_zero_that_is_no_pruned_weight_changes_no_output_and_no_gradient() -> None:
    dense, model = zero_head(), zero_head()
    masks = prune_some(model, "0.weight", "6.weight")
    apply_masks(dense, masks)
    make_permanent(model)
    for one in (dense, model):
        cross_entropy(one(images()), torch.arange(8)).backward()
    assert torch.equal(model(images()), dense(images()))
    for own, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


def test_layers_of_nothing_but_zeros_are_announced_where_no_mask_tells() -> None:
    model = zero_head()
    with torch.no_grad():
        model[4].weight[:, 3] = 0
    with pytest.warns(UserWarning, match=r"6\.weight hold nothing but zeros.* no mask"):
        make_permanent(model)
