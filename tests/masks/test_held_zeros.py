"""Zeros that any optimizer leaves at 0, in copies and after a restart too."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import timm.optim
import torch
from state import unchanged
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
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

from force_plugin import apply_masks, get_masks, make_permanent
from force_plugin.masks import held_zeros

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
        assert not torch.equal(model.get_parameter("4.weight"), before["4.weight"])


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
    model: Any = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4))
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
        return model.head(outputs).square().sum()

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
    remembered, held = len(held_zeros._notes), len(held_zeros._held)
    model, _ = permanent_network()
    parameter, reference = weakref.ref(model[0].weight), weakref.ref(model)
    assert len(held_zeros._notes) == remembered + 3
    del model
    gc.collect()
    assert reference() is None and parameter() is None
    assert len(held_zeros._notes) == remembered and len(held_zeros._held) == held
