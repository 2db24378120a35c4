"""A pruning made permanent: plain parameters, whose zeros any optimizer leaves at 0."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import timm.optim
import torch
from networks import tiny_resnet
from state import differences, state_of, unchanged
from timm.models.beit import Attention
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.ao.quantization import (
    fuse_modules_qat,
    get_default_qat_qconfig,
    prepare_qat,
)
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from transformers.pytorch_utils import Conv1D

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    make_permanent,
)
from force_plugin.hold import save_pruned
from force_plugin.masks import permanent

Masks = dict[str, Tensor]


def network() -> nn.Sequential:
    """Every weight that is kept has a gradient: no unit is dead or cut off."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 9),
    )


def images() -> Tensor:
    return torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def prune_some(model: nn.Module, *names: str) -> Masks:
    """Prune half of the named parameters, or of every one with two dimensions."""
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(parameter.shape, generator=generator) < 0.5
        for name, parameter in model.named_parameters()
        if (name in names if names else parameter.ndim > 1)
    }
    apply_masks(model, masks)
    return masks


def permanent_network() -> tuple[nn.Sequential, Masks]:
    model = network()
    masks = prune_some(model)
    make_permanent(model)
    return model, masks


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    x, second_order = images(), getattr(optimizer, "is_second_order", False)
    x = x.to(next(model.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward(create_graph=second_order)
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def values(model: nn.Module, names: Masks) -> Masks:
    """Of the named parameters, pruned or not."""
    return {
        name.removesuffix("_orig"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.removesuffix("_orig") in names
    }


def holds(model: nn.Module, masks: Masks) -> bool:
    """Whether what the masks prune is 0, and not -0."""
    return all(
        not value[~masks[name]].any() and not value[~masks[name]].signbit().any()
        for name, value in values(model, masks).items()
    )


def assert_holds_in_training(model: nn.Module, masks: Masks) -> None:
    optimizer, before = sgd(model), values(model, masks)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert holds(model, masks)
    for name, value in values(model, masks).items():
        assert (value != before[name])[masks[name]].all(), name


# What is left behind: the dense model with zeros.


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
    model, x = READERS["encoder"](), torch.randn(2, 5, 8)
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


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32) for _ in range(2)))
    model[2].weight = model[1].weight
    return model


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
    model, kept = tied(), torch.ones(32, 32, dtype=torch.bool)
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


# Zeros stay zeros, whatever the optimizer.

Factory = Callable[[nn.Module], Optimizer]


def _of(name: str, **options: Any) -> Factory:
    # Muon, which older versions of torch lack, takes nothing but matrices.
    return lambda model: getattr(torch.optim, name)(
        [p for p in model.parameters() if name != "Muon" or p.ndim == 2], **options
    )


OPTIMIZERS: dict[str, Factory] = {
    "SGD": _of("SGD", lr=0.1),
    "SGD momentum": _of("SGD", lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": _of("SGD", lr=0.1, momentum=0.9, nesterov=True),
    "SGD maximize": _of("SGD", lr=0.01, weight_decay=0.1, maximize=True),
    "Adam": _of("Adam", weight_decay=0.1),
    "Adam amsgrad": _of("Adam", amsgrad=True),
    "AdamW": _of("AdamW", weight_decay=0.1),
    "NAdam": _of("NAdam"),
    "RAdam": _of("RAdam"),
    "Adagrad": _of("Adagrad"),
    "Adadelta": _of("Adadelta"),
    "Adamax": _of("Adamax"),
    "ASGD": _of("ASGD"),
    "RMSprop": _of("RMSprop", momentum=0.9, centered=True),
    "Rprop": _of("Rprop"),
    "LBFGS": _of("LBFGS"),
    "LBFGS line search": _of("LBFGS", line_search_fn="strong_wolfe"),
    "Adafactor": _of("Adafactor", lr=0.1),
    "Muon": _of("Muon", lr=0.1),
    **{
        f"{name} {how}": _of(name, lr=0.1, **{how: True})
        for name in ("SGD", "Adam", "AdamW", "Adagrad")
        for how in ("foreach", "fused")
    },
}


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    classes = {name for name, it in vars(torch.optim).items() if isinstance(it, type)}
    # SparseAdam takes sparse gradients only.
    assert classes - {"Optimizer", "SparseAdam"} <= {n.split()[0] for n in OPTIMIZERS}


def assert_held_by(factory: Factory, made: str) -> None:
    """The optimizer is made, and has a momentum, before the pruning or after."""
    model = network()
    if made == "before":
        optimizer = factory(model)
        train(model, optimizer)
    masks = prune_some(model)
    if made == "before":
        train(model, optimizer)
    make_permanent(model)
    if made == "after":
        optimizer = factory(model)
    before = values(model, masks)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert holds(model, masks)
    for name, parameter in model.named_parameters():
        if name in masks and parameter in trained:
            changed = (parameter != before[name])[masks[name]]
            assert changed.float().mean() > 0.5, f"{name} is not trained"


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_0_after_every_step_of_torchs(name: str, made: str) -> None:
    if not hasattr(torch.optim, name.split()[0]):
        pytest.skip(f"torch {torch.__version__} has none")
    assert_held_by(OPTIMIZERS[name], made)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", timm.optim.list_optimizers())
def test_pruned_weights_are_0_after_every_step_of_timms(name: str, made: str) -> None:
    kind = timm.optim.get_optimizer_info(name).opt_class
    if isinstance(kind, str):
        pytest.skip(f"{kind} is on GPUs only and in another package")
    # Kron compiles itself, which takes longer than all that is tested here.
    with torch.compiler.set_stance("force_eager"):
        assert_held_by(
            lambda m: timm.optim.create_optimizer_v2(m, name, 0.01, 0.1, 0.9), made
        )


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_lookahead_holds_them_too(steps: int) -> None:
    # Every other step it writes values that it keeps on the side, from the first on.
    model = network()
    optimizer = Lookahead(sgd(model), k=2)
    train(model, optimizer, steps=steps)
    masks = prune_some(model)
    make_permanent(model)
    for _ in range(5):
        train(model, optimizer, steps=1)
        assert holds(model, masks)


def test_a_scaler_and_a_scheduler_are_no_way_around() -> None:
    model, masks = permanent_network()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for _ in range(3):
        before = values(model, masks)
        optimizer.zero_grad()
        scaler.scale(model(images()).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert holds(model, masks)
        assert not torch.equal(model[4].weight, before["4.weight"])


@pytest.mark.parametrize("name", ["SGD momentum", "SGD nesterov", "Adam", "AdamW"])
def test_kept_weights_train_as_they_do_under_masks(name: str) -> None:
    masked, plain = network(), network()
    masks = prune_some(masked)
    prune_some(plain)
    make_permanent(plain)
    for model in (masked, plain):
        train(model, OPTIMIZERS[name](model), steps=5)
    theirs, ours = values(masked, masks), values(plain, masks)
    for name, mask in masks.items():
        assert torch.equal(ours[name], theirs[name] * mask)
    masked.eval(), plain.eval()
    assert torch.equal(plain(images()), masked(images()))


def test_clipped_gradients_are_those_under_masks() -> None:
    masked, plain = network(), network()
    masks = prune_some(masked)
    prune_some(plain)
    make_permanent(plain)
    for model in (masked, plain):
        optimizer = sgd(model)
        for _ in range(5):
            optimizer.zero_grad()
            model(images()).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
    theirs, ours = values(masked, masks), values(plain, masks)
    for name, mask in masks.items():
        assert torch.equal(ours[name], theirs[name] * mask)


@pytest.mark.parametrize("how", ["copied", "unfrozen", "assigned"])
def test_gradients_are_masked_from_the_first_step_of_another_parameter(
    how: str,
) -> None:
    model, masks = permanent_network()
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "assigned":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model = network()
        prune_some(model)
        model.requires_grad_(False)
        make_permanent(model)
        model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, steps=1)
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert not parameter.grad[~mask].any() and parameter.grad[mask].all()
        assert not optimizer.state[parameter]["momentum_buffer"][~mask].any()
    model(images()).square().sum().backward()
    for name, mask in masks.items():
        assert not model.get_parameter(name).grad[~mask].any()


@pytest.mark.filterwarnings("error")
def test_what_masks_the_gradients_is_no_trouble_to_copies() -> None:
    model, masks = permanent_network()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_holds_in_training(copied, masks)
    torch.save(model, BytesIO())


def test_without_holding_them_zeros_are_trained() -> None:
    model = network()
    masks = prune_some(model)
    make_permanent(model, hold_zeros=False)
    assert holds(model, masks)
    train(model, sgd(model), steps=1)
    assert all(value.all() for value in values(model, masks).values())


def test_what_is_written_between_two_steps_is_0_after_the_next() -> None:
    model, masks = permanent_network()
    optimizer = sgd(model)
    model.load_state_dict(network().state_dict())
    assert not holds(model, masks)
    train(model, optimizer, steps=1)
    assert holds(model, masks)


# Copies, restarts, conversions.


def _saved(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    train(model, sgd(model))
    average.update_parameters(model)
    return average.module


def _moving(model: nn.Module) -> nn.Module:
    average = ModelEmaV3(model, decay=0.5)
    train(model, sgd(model))
    average.update(model)
    return average.module


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
    "AveragedModel": _averaged,
    "ModelEmaV3": _moving,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_holds_its_own_zeros_and_leaves_the_original_alone(how: str) -> None:
    model, masks = permanent_network()
    twin = COPIES[how](model)
    assert holds(twin, masks)
    with unchanged(model):
        assert_holds_in_training(twin, masks)
    with unchanged(twin):
        assert_holds_in_training(model, masks)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_outlives_the_original(how: str) -> None:
    model, masks = permanent_network()
    twin = COPIES[how](model)
    del model
    gc.collect()
    assert_holds_in_training(twin, masks)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_shares_its_own_weights(how: str) -> None:
    model = tied()
    masks = prune_some(model)
    make_permanent(model)
    twin = COPIES[how](model)
    assert twin[1].weight is twin[2].weight is not model[1].weight
    assert_holds_in_training(twin, masks)


def test_a_restart_goes_on_holding() -> None:
    model, masks = permanent_network()
    optimizer = sgd(model)
    train(model, optimizer)
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer)
    expected = copy.deepcopy(model.state_dict())

    again, plain = network(), network()
    apply_masks(again, masks)
    make_permanent(again)
    for restarted in (model, again, plain):
        resumed = sgd(restarted)
        # An optimizer goes on in the tensors that it loads.
        state, momentum = pickle.loads(saved)
        restarted.load_state_dict(state)
        if restarted is plain:
            make_permanent(plain)
        resumed.load_state_dict(momentum)
        train(restarted, resumed)
        assert holds(restarted, masks)
        state = restarted.state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_only_what_a_pruning_leaves_is_taken_for_one() -> None:
    # A head that starts at 0, an embedding with a row for padding, a norm.
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4))
    model.append(nn.LayerNorm(4)).append(nn.Linear(4, 3))
    nn.init.zeros_(model[3].weight)
    with unchanged(model), pytest.raises(ValueError, match="without any mask or zero"):
        make_permanent(model)
    with torch.no_grad():
        model[1].weight[0, 2] = 0
        model[2].bias[1] = 1
    make_permanent(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.arange(5)).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert model[1].weight.count_nonzero() == 15 and not model[1].weight[0, 2]
    assert not model[3].weight.any()  # it may have been pruned
    assert model[0].weight[0].all() and model[2].bias.all()


@pytest.mark.parametrize("padding", [None, 0])
def test_tensors_that_were_pruned_by_name_are_held_after_a_restart(
    padding: int | None,
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.table = nn.Embedding(5, 4, padding_idx=padding)
        model.cell = nn.LSTM(4, 3, batch_first=True)
        model.head = nn.Linear(3, 2)
        model.places = nn.Parameter(torch.zeros(3, 4))
        return model

    def loss(model: Any) -> Tensor:
        tokens = torch.tensor([[0, 1, 2], [3, 4, 1]])
        outputs, _ = model.cell(model.table(tokens) + model.places)
        return model.head(outputs).square().sum()  # type: ignore[no-any-return]

    model: Any = make()
    prune.l1_unstructured(model.table, "weight", 0.5)
    prune.l1_unstructured(model.cell, "weight_ih_l0", 0.5)
    for held in (model, make()):
        if held is not model:
            held.load_state_dict(model.state_dict())
            with pytest.warns(
                UserWarning, match="table.weight, cell.weight_ih_l0 hold"
            ):
                make_permanent(held)
        else:
            make_permanent(held)
        masks = get_masks(held)
        assert masks.keys() == {"table.weight", "cell.weight_ih_l0"}
        optimizer = torch.optim.AdamW(held.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss(held).backward()
            optimizer.step()
        for name, mask in masks.items():
            assert not held.get_parameter(name)[~mask].any()
        assert held.places.all()


def test_the_state_dict_alone_fits_the_dense_model() -> None:
    model, _ = permanent_network()
    dense = network()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(images()), model(images()))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_another_precision_holds_its_zeros(
    when: str, dtype: torch.dtype
) -> None:
    model = network().to(dtype if when == "before" else torch.float32)
    masks = prune_some(model)
    make_permanent(model)
    model.to(dtype)
    optimizer = sgd(model)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert holds(model, masks)


def test_a_model_without_values_can_be_stepped() -> None:
    model, _ = permanent_network()
    model.to("meta")
    train(model, sgd(model))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_zeros_move_with_their_model() -> None:
    model, masks = permanent_network()
    for device in ("cuda", "cpu"):
        model.to(device)
        assert_holds_in_training(model, masks)
    _again_by_pytorch(model.cuda())
    more = get_masks(model)
    make_permanent(model)
    both = {name: mask & more[name].cpu() for name, mask in masks.items()}
    assert_holds_in_training(model, both)


def test_a_layer_that_is_replaced_is_free() -> None:
    model, masks = permanent_network()
    model[4].weight = nn.Parameter(torch.randn(7, 16))
    model[4].bias = nn.Parameter(torch.randn(7))
    model[6] = nn.Linear(7, 9)
    train(model, sgd(model))
    assert model[6].weight.all() and model[4].weight.all()
    assert holds(model[0], {"weight": masks["0.weight"]})


def test_a_parameter_that_takes_the_place_of_a_pruned_one_is_held() -> None:
    model, masks = permanent_network()
    model.load_state_dict(network().state_dict(), assign=True)
    train(model, sgd(model), steps=1)
    assert holds(model, masks)
    assert_holds_in_training(model, masks)


def test_a_model_that_is_gone_is_not_remembered() -> None:
    gc.collect()
    remembered, held = len(permanent._notes), len(permanent._held)
    model, _ = permanent_network()
    parameter, reference = weakref.ref(model[0].weight), weakref.ref(model)
    assert len(permanent._notes) == remembered + 3
    del model
    gc.collect()
    assert reference() is None and parameter() is None
    assert len(permanent._notes) == remembered and len(permanent._held) == held


# Twice.


def test_a_second_call_has_nothing_to_do() -> None:
    model, masks = permanent_network()
    with unchanged(model), pytest.raises(ValueError, match="without any mask"):
        make_permanent(model, hold_zeros=False)
    make_permanent(model)
    assert_holds_in_training(model, masks)


def _again_by_pytorch(model: nn.Module) -> None:
    for index in (0, 4, 6):
        prune.random_unstructured(model[index], "weight", 0.3)


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
    """Ctrl-C before the nth line that make_permanent and prune.remove run."""
    files = permanent.__file__, prune.__file__
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
    return [sorted(map(id, permanent._held_of(one))) for one in model.parameters()]


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


# The parameter in other hands: what is held is the parameter, whoever owns it.


class OwnLinear(nn.Linear):
    """A layer of somebody's own that takes over the parameters of another."""

    @classmethod
    def of(cls, layer: nn.Linear) -> nn.Linear:
        made = cls(layer.in_features, layer.out_features)
        made.weight, made.bias = layer.weight, layer.bias
        return made


def own(model: nn.Sequential) -> nn.Module:
    model[4] = OwnLinear.of(model[4])
    return model


def quantisation_aware(model: nn.Sequential) -> nn.Module:
    model.qconfig = get_default_qat_qconfig("fbgemm")
    return prepare_qat(model.train())  # type: ignore[no-any-return]


def fused(model: nn.Sequential) -> nn.Module:
    return fuse_modules_qat(model.train(), [["0", "1"]])  # type: ignore[no-any-return]


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
    del model[4], model[4]  # type: ignore[arg-type]
    return nn.Sequential(*model[:4], model[-1], nn.Tanh(), model[4])


def rewrapped(model: nn.Sequential) -> nn.Module:
    old = model[4]
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
    other = network()
    del model[4].weight  # its zeros are nobody's now
    for shape in ((6, 16), (16, 6), (96,)):
        for values in (torch.zeros(shape), torch.eye(96)[0].view(shape)):
            parameter = other.register_parameter  # of a module that lost nothing
            parameter("made", nn.Parameter(values))
            assert not permanent._held_of(other.made)
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
    assert id(layer.weight) in permanent._held
    held = len(permanent._held)
    del model, layer
    gc.collect()
    assert parameter() is None and len(permanent._held) == held - 3


# Zeros that were not pruned.


def zero_head() -> nn.Sequential:
    model = network()
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


SAVED: dict[str, Callable[[nn.Module, Path], Masks]] = {
    "state dict": lambda model, path: model.state_dict(),
    "clones": lambda model, path: {
        name: value.clone() for name, value in model.state_dict().items()
    },
    "torch.save": lambda model, path: (
        torch.save(model.state_dict(), path),
        torch.load(path),
    )[1],
    "safetensors": lambda model, path: (
        safetensors.torch.save_file(model.state_dict(), path),
        safetensors.torch.load_file(path),
    )[1],
    "bfloat16": lambda model, path: {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    },
    "save_pruned": lambda model, path: (
        save_pruned(model, path),
        safetensors.torch.load_file(path),
    )[1],
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
    model = zero_head()
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
    subprocess.run([sys.executable, "-c", script], check=True)
