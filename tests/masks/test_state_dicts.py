"""The state of a pruned model in a fresh one; or one clear error, and nothing."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import conv_network as network
from networks import tied_layers as tied
from safetensors.torch import load_file, save_file
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
    sparsity_report,
)

State = dict[str, Any]


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape: tuple[int, ...] = (8, 2, 5, 5)
    if len(model._modules) == 2:
        shape = (8, 3)
    elif hasattr(model, "num_classes"):
        shape = (8, 3, 32, 32)
    inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randint(3, (8,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    inputs, targets = batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def assert_same_state(model: nn.Module, expected: State) -> None:
    """Whether its values are these, and its parameters in this order."""
    state = model.state_dict()
    assert sorted(state) == sorted(expected)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert names == [name for name in expected if name in names]
    for name, value in state.items():
        # A mask may have another type, its values may not differ.
        assert torch.equal(value.double(), expected[name].double()), name


def assert_twins(model: nn.Module, twin: nn.Module) -> None:
    """Whether both are the same, and still are after both were trained."""
    assert_same_state(twin, model.state_dict())
    for module in twin.modules():
        for key, dense in module._parameters.items():
            if key.endswith("_orig"):
                tensor = key.removesuffix("_orig")
                mask = getattr(module, f"{tensor}_mask")
                assert torch.equal(getattr(module, tensor), dense * mask)
    for one in (model, twin):
        train(one, sgd(one))
    assert_same_state(twin, model.state_dict())


# What was pruned by anyone, by any method


def _force(model: nn.Module) -> None:
    force_prune(model, [batch(model)], 0.8, steps=3, progress=False)


def _global(model: nn.Module) -> None:
    pairs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)


def _biases(model: nn.Module) -> None:
    prune.l1_unstructured(model[3], "bias", 2)
    prune.l1_unstructured(model[1], "bias", 1)
    prune.l1_unstructured(model[1], "weight", 1)


def _twice(model: nn.Module) -> None:
    prune.ln_structured(model[0], "weight", 2, n=2, dim=0)
    prune.random_unstructured(model[0], "weight", 0.5)


def _mixed(model: nn.Module) -> None:
    apply_masks(model, {"3.weight": torch.rand(5, 36) < 0.5})
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.l1_unstructured(model[5], "weight", 0.5)


def _everything(model: nn.Module) -> None:
    apply_masks(model, {"3.weight": torch.zeros(5, 36)})


def _nothing(model: nn.Module) -> None:
    prune.identity(model[3], "weight")


PRUNINGS: dict[str, Callable[[nn.Module], None]] = {
    "force": _force,
    "global": _global,
    "biases": _biases,
    "twice": _twice,
    "mixed": _mixed,
    "everything": _everything,
    "nothing": _nothing,
}


def pruned(pruning: str = "force", seed: int = 0) -> nn.Sequential:
    """Pruned and trained for a while."""
    model = network(seed)
    PRUNINGS[pruning](model)
    train(model, sgd(model))
    return model


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_fresh_model_becomes_the_pruned_one_and_trains_as_it_does(
    pruning: str,
) -> None:
    model, fresh = pruned(pruning), network(seed=1)
    load_pruned_state_dict(fresh, model.state_dict())
    assert get_masks(fresh).keys() == get_masks(model).keys()
    assert sparsity_report(fresh) == sparsity_report(model)
    assert_twins(model, fresh)


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_result_is_what_pytorch_makes_of_a_model_pruned_in_the_same_places(
    pruning: str,
) -> None:
    state = pruned(pruning).state_dict()
    ours, theirs = network(seed=1), network(seed=2)
    load_pruned_state_dict(ours, state)
    for key in state:
        layer, _, tensor = key.partition(".")
        if tensor.endswith("_orig"):
            prune.identity(theirs[int(layer)], tensor.removesuffix("_orig"))
    theirs.load_state_dict(state)
    inputs, _ = batch(ours)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(inputs), theirs(inputs))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)
    assert get_masks(ours).keys() == get_masks(theirs).keys()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_model_goes_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = {"img_size": 32} if name == "test_vit" else {}
        return timm.create_model(name, num_classes=3, **size)

    model, fresh = make(0), make(1)
    _force(model)
    train(model, sgd(model))
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    load_pruned_state_dict(fresh, torch.load(tmp_path / "checkpoint.pt"))
    assert_twins(model, fresh)


@pytest.mark.parametrize("pruning", ["force", "global", "biases"])
def test_a_training_goes_on_from_the_state_of_model_and_optimizer(pruning: str) -> None:
    model, fresh = network(), network(seed=1)
    PRUNINGS[pruning](model)
    optimizer = sgd(model)
    train(model, optimizer)
    load_pruned_state_dict(fresh, model.state_dict())
    other = sgd(fresh)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(fresh, other)
    assert_same_state(fresh, model.state_dict())


def test_a_file_that_sorts_the_names_does_not_change_the_order_of_the_parameters(
    tmp_path: Path,
) -> None:
    model, fresh = pruned(), network(seed=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_pruned_state_dict(fresh, load_file(tmp_path / "model.safetensors"))
    assert list(dict(fresh.named_parameters())) == list(dict(model.named_parameters()))
    assert_twins(model, fresh)


def test_an_optimizer_that_was_made_before_trains_the_same_parameters() -> None:
    model, fresh = pruned(), network(seed=1)
    parameters = [*fresh.parameters()]
    optimizer = sgd(fresh)
    load_pruned_state_dict(fresh, model.state_dict())
    assert all(a is b for a, b in zip(fresh.parameters(), parameters, strict=True))
    train(model, sgd(model))
    train(fresh, optimizer)
    assert_same_state(fresh, model.state_dict())


def test_what_is_pruned_is_zero_and_what_was_loaded_can_be_copied() -> None:
    model = pruned()
    fresh = network(seed=1)
    load_pruned_state_dict(fresh, model.state_dict())
    for name, mask in get_masks(model).items():
        path, _, tensor = name.rpartition(".")
        assert not getattr(fresh.get_submodule(path), tensor)[~mask].any()
    assert_twins(copy.deepcopy(fresh), fresh)


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel])
def test_the_state_is_copied(wrap: type[nn.Module]) -> None:
    source = pruned()
    state: Any = (source if wrap is nn.Identity else wrap(source)).state_dict()
    before = copy.deepcopy(state)
    model = network(seed=1)
    load_pruned_state_dict(model, state)
    train(model, sgd(model))
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert state._metadata == before._metadata


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_values_take_the_type_of_the_model_as_with_pytorch(dtype: torch.dtype) -> None:
    state = pruned().state_dict()
    ours, theirs = network(seed=1).to(dtype), network(seed=2).to(dtype)
    load_pruned_state_dict(ours, state)
    apply_masks(
        theirs, {name: torch.ones(m.shape) for name, m in masks_in(state).items()}
    )
    theirs.load_state_dict(state)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert ours[3].weight.dtype == dtype and ours[3].weight_mask.dtype == torch.bool
    assert_same_state(ours, theirs.state_dict())


def masks_in(state: State) -> dict[str, Tensor]:
    return {
        name.removesuffix("_mask"): value
        for name, value in state.items()
        if name.endswith("_mask")
    }


def test_loading_under_inference_mode_leaves_a_model_that_can_be_trained() -> None:
    model, fresh = pruned(), network(seed=1)
    with torch.inference_mode():
        load_pruned_state_dict(fresh, model.state_dict())
    assert_twins(model, fresh)


# Shared parameters, and modules with two names


@pytest.mark.parametrize("owners", [(0,), (1,), (0, 1)], ids=str)
def test_each_owner_of_a_shared_weight_gets_its_own_mask(
    owners: tuple[int, ...],
) -> None:
    masks = [torch.eye(3), 1 - torch.eye(3)]
    model = tied()
    for owner in owners:
        prune.custom_from_mask(model[owner], "weight", masks[owner])
    fresh = tied(seed=1)
    weight = fresh[0].weight
    load_pruned_state_dict(fresh, model.state_dict())
    assert sum(p is weight for layer in fresh for p in layer.parameters()) == 2
    assert_twins(model, fresh)


def test_owners_that_share_a_mask_part_where_the_state_says_so() -> None:
    model, other = tied(), tied(seed=1)
    prune.custom_from_mask(model[0], "weight", torch.eye(3))
    prune.custom_from_mask(model[1], "weight", 1 - torch.eye(3))
    apply_masks(other, {"0.weight": torch.ones(3, 3)})
    load_pruned_state_dict(other, model.state_dict())
    assert_twins(model, other)


def test_a_module_with_two_names_is_pruned_once() -> None:
    def twice(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, layer)

    model, fresh = twice(0), twice(1)
    prune.l1_unstructured(model[0], "weight", 4)
    load_pruned_state_dict(fresh, model.state_dict())
    assert len(fresh[0]._forward_pre_hooks) == 1
    assert_twins(model, fresh)


def test_an_attention_layer_that_only_reads_its_projection_gets_its_gradient() -> None:
    def attend(model: Any) -> Tensor:
        x = torch.linspace(-1, 1, 24).view(2, 3, 4).sin()
        model.zero_grad()
        model(x, x, x)[0].square().sum().backward()
        return model.out_proj.weight_orig.grad

    torch.manual_seed(0)
    model, fresh = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
    apply_masks(model, {"out_proj.weight": torch.eye(4)})
    load_pruned_state_dict(fresh, model.state_dict())
    assert torch.equal(attend(fresh), attend(model))
    assert attend(model).any()


# Models that are pruned already


@pytest.mark.parametrize("pruning", ["force", "global", "mixed", "biases"])
def test_the_masks_of_a_pruned_model_are_replaced(pruning: str) -> None:
    model, other = pruned(pruning), pruned(pruning, seed=1)
    earlier, masks = get_masks(other), get_masks(model)
    assert any((masks[name] & ~mask).any() for name, mask in earlier.items())
    load_pruned_state_dict(other, model.state_dict())
    assert_twins(model, other)


def test_a_model_that_is_pruned_where_the_state_is_not_is_an_error() -> None:
    model, state = pruned("force", seed=1), pruned("global").state_dict()
    message = (
        r'Missing key.*: "0\.weight_orig", "0\.weight_mask"\. \n'
        r'\tUnexpected key.*: "0\.weight"\. $'
    )
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        load_pruned_state_dict(model, state)


def test_loading_twice_is_loading_the_second() -> None:
    first, second, model = pruned(), pruned(seed=1), network(seed=2)
    load_pruned_state_dict(model, first.state_dict())
    load_pruned_state_dict(model, second.state_dict())
    assert len(model[3]._forward_pre_hooks) == 1
    assert_twins(second, model)


def test_pruning_goes_on_from_the_masks_that_were_loaded() -> None:
    model = network(seed=1)
    load_pruned_state_dict(model, pruned().state_dict())
    before = get_masks(model)
    force_prune(model, [batch(model)], 0.9, steps=2, progress=False)
    for name, mask in get_masks(model).items():
        assert not (mask & ~before[name]).any()
    assert sparsity_report(model).kept == math.floor(267 * (1 - 0.9) + 1e-9)


# Names


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."],
)
def test_names_of_a_wrapped_model_are_those_of_the_model(prefix: str) -> None:
    model, fresh = pruned("global"), network(seed=1)
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    load_pruned_state_dict(fresh, state)
    assert get_masks(fresh).keys() == get_masks(model).keys()
    values = fresh.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.double(), values.pop(name).double()), name
    assert not values


def test_the_state_of_pytorchs_own_wrappers_is_loaded() -> None:
    model = pruned("biases")
    wraps: list[Any] = [nn.DataParallel(model), torch.compile(nn.DataParallel(model))]
    for wrapped in wraps:
        fresh = network(seed=1)
        load_pruned_state_dict(fresh, wrapped.state_dict())
        assert_same_state(fresh, model.state_dict())
    assert_twins(model, fresh)


def test_a_wrapped_model_takes_the_state_of_a_wrapped_model() -> None:
    model, fresh = nn.DataParallel(pruned()), nn.DataParallel(network(seed=1))
    load_pruned_state_dict(fresh, model.state_dict())
    assert_twins(model.module, fresh.module)


class Named(nn.Module):
    """Has a buffer and parameters whose names could be those of a pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("attention_mask", torch.zeros(2))
        self.fc.register_buffer("bias_mask", torch.zeros(4))
        self.scale = nn.Parameter(torch.zeros(1))
        self.scale_orig = nn.Parameter(torch.zeros(2))


def test_names_that_only_look_like_a_pruning_are_left_alone() -> None:
    model, fresh = Named(), Named()
    prune.l1_unstructured(model.fc, "weight", 3)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.attention_mask, model.fc.bias_mask):
            tensor.add_(1)
    load_pruned_state_dict(fresh, model.state_dict())
    assert list(get_masks(fresh)) == ["fc.weight"]
    assert_same_state(fresh, model.state_dict())


def test_a_model_that_is_one_layer_is_loaded() -> None:
    model, fresh = nn.Linear(3, 4), nn.Linear(3, 4)
    prune.l1_unstructured(model, "weight", 5)
    load_pruned_state_dict(fresh, model.state_dict())
    assert_same_state(fresh, model.state_dict())


# What does not fit


def changed(**changes: Any) -> Callable[[State], State]:
    """A state in which values are replaced, or left out where they are ``None``."""

    def change(state: State) -> State:
        names = {name.replace("__", "."): value for name, value in changes.items()}
        whole = {**state, **names}
        return {name: value for name, value in whole.items() if value is not None}

    return change


def permanent(state: State) -> State:
    model = network()
    load_pruned_state_dict(model, state)
    make_permanent(model)
    return model.state_dict()


NOT_PRUNED = (
    r"^state_dict: expected that of a pruned model, with X_orig and X_mask for each "
    r"pruned parameter X, got "
)
DENSE = NOT_PRUNED + r"0\.weight, 0\.bias, 1\.weight and .* more; a model without masks"
SIZE = r"\n\tsize mismatch for {}: .*\[{}\]\) from checkpoint, .* model is .*\[{}\]\)\."
WRONG: dict[str, tuple[Callable[[State], Any], type[Exception], str]] = {
    "missing": (
        changed(**{"3__bias": None, "1__running_var": None}),
        RuntimeError,
        r'^Error\(s\) .*\n\tMissing key.* in state_dict: "1\.running_var", "3\.bias"',
    ),
    "missing_mask": (
        changed(**{"3__weight_mask": None}),
        RuntimeError,
        r'Missing key\(s\) in state_dict: "3\.weight(_mask)?"\. ',
    ),
    "unexpected": (
        changed(**{"7__weight": torch.ones(3), "3__scale_orig": torch.ones(3)}),
        RuntimeError,
        r'^Error\(s\) .*\n\tUnexpected key\(s\) in .*: "(7\.weight|3\.scale_orig)", "',
    ),
    "unexpected_mask": (
        changed(**{"3__gain_orig": torch.ones(3), "3__gain_mask": torch.ones(3)}),
        RuntimeError,
        r'Unexpected key\(s\) in state_dict: "3\.gain_orig", "3\.gain_mask"',
    ),
    "shape": (
        changed(**{"5__bias": torch.ones(4), "0__weight_orig": torch.ones(2, 2)}),
        RuntimeError,
        SIZE.format("0.weight_orig", "2, 2", "4, 2, 3, 3")
        + SIZE.format("5.bias", "4", "3"),
    ),
    "shape_of_a_mask": (
        changed(**{"3__weight_mask": torch.ones(36, 5)}),
        RuntimeError,
        SIZE.format("3.weight_mask", "36, 5", "5, 36"),
    ),
    "everything": (
        changed(
            **{
                "0__bias": None,
                "nothing": torch.ones(1),
                "3__weight_orig": torch.ones(5),
                "3__weight_mask": torch.ones(5),
            }
        ),
        RuntimeError,
        r'Missing key.*"0\.bias"\. \n\tUnexpected key.*"nothing"\. '
        + SIZE.format("3.weight_orig", "5", "5, 36")
        + SIZE.format("3.weight_mask", "5", "5, 36"),
    ),
    "another_models_names": (
        lambda state: {f"net.{name}": value for name, value in state.items()},
        RuntimeError,
        r'Missing key.*: "0\..*\n\tUnexpected key.*"net\.0\.weight_orig"',
    ),
    "dense": (lambda state: network().state_dict(), ValueError, DENSE),
    "permanent": (permanent, ValueError, DENSE),
    "parameters_only": (
        lambda state: {n: v for n, v in state.items() if not n.endswith("_mask")},
        ValueError,
        NOT_PRUNED + r"0\.weight_orig, 0\.bias, ",
    ),
    "empty": (lambda state: {}, ValueError, NOT_PRUNED + "an empty one;"),
    "checkpoint": (
        lambda state: {"model": state, "optimizer": {}},
        ValueError,
        NOT_PRUNED + "model, optimizer; ",
    ),
    "checkpoint_of_a_wrapper": (
        lambda state: {"module": state},
        ValueError,
        NOT_PRUNED + "module; ",
    ),
    "soft_mask": (
        changed(**{"3__weight_mask": torch.full((5, 36), 0.5)}),
        ValueError,
        r"^state_dict: 3\.weight_mask holds other values than 0 and 1$",
    ),
    "no_tensor_for_a_mask": (
        changed(**{"3__weight_mask": [[True]]}),
        TypeError,
        r"^state_dict: expected a tensor for '3\.weight_mask', got list$",
    ),
    "no_tensor": (
        changed(**{"3__bias": "bias"}),
        RuntimeError,
        r'parameter named "3\.bias", expected torch\.Tensor',
    ),
    "values_on_meta": (
        changed(**{"5__bias": torch.ones(3, device="meta")}),
        RuntimeError,
        r'While copying the parameter named "5\.bias"',
    ),
    "mask_on_meta": (
        changed(**{"3__weight_mask": torch.ones(5, 36, device="meta")}),
        ValueError,
        r"^state_dict: 3\.weight_mask has layout torch\.strided on device meta; ",
    ),
    "number_for_a_name": (
        lambda state: {**state, 0: torch.ones(1)},
        TypeError,
        "^state_dict: expected names, got a int$",
    ),
    "path": (
        lambda state: "model.pt",
        TypeError,
        r"^state_dict: expected a mapping as model\.state_dict.. returns it, got str$",
    ),
    "model": (lambda state: network(), TypeError, "^state_dict: .*, got Sequential$"),
}


@pytest.mark.parametrize("state", ["fresh", "pruned"])
@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_is_one_clear_error_and_changes_nothing(
    case: str, state: str
) -> None:
    change, error, message = WRONG[case]
    wrong = change(pruned().state_dict())
    model = network(seed=1) if state == "fresh" else pruned(seed=1)
    train(model, sgd(model))
    with unchanged(model), pytest.raises(error, match=message):
        load_pruned_state_dict(model, wrong)


@pytest.mark.parametrize("wrong", [None, {}, nn.Linear], ids=str)
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    message = rf"^model: expected a torch.nn.Module, got {type(wrong).__name__}$"
    with pytest.raises(TypeError, match=message):
        load_pruned_state_dict(wrong, pruned().state_dict())


@pytest.mark.parametrize("kind", ["lazy", "meta"])
def test_a_model_without_values_is_refused(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    if kind == "meta":
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).to("meta"))
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prune.l1_unstructured(source[1], "weight", 3)
    message = (
        r"^model: 1\.weight has no values yet .*; run one batch .*, or materialise"
    )
    with pytest.raises(ValueError, match=message):
        load_pruned_state_dict(model, source.state_dict())
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("state", ["fresh", "pruned"])
@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupt_half_way_leaves_the_model_as_it_was(
    state: str, error: type[BaseException], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(seed=1) if state == "fresh" else pruned(seed=1)
    source = pruned()
    original = nn.Module._load_from_state_dict
    calls = 0

    def interrupted(self: nn.Module, *args: Any) -> None:
        nonlocal calls
        calls += 1
        original(self, *args)
        if calls == call:
            raise error("by the user")

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(nn.Module, "_load_from_state_dict", interrupted)
        with pytest.raises(error, match="by the user"):
            load_pruned_state_dict(model, source.state_dict())
    assert calls == call
    # And the next attempt finds nothing in its way.
    load_pruned_state_dict(model, source.state_dict())
    assert_twins(source, model)


def test_a_plain_dictionary_will_do() -> None:
    model, fresh = pruned(), network(seed=1)
    state = model.state_dict()
    load_pruned_state_dict(fresh, OrderedDict(state))
    assert_twins(model, fresh)


def test_a_recurrent_layer_goes_on_as_it_was() -> None:
    def layer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.LSTM(3, 4, batch_first=True)

    model, fresh = layer(0), layer(1)
    mask = torch.rand(16, 4) < 0.5
    apply_masks(model, {"weight_hh_l0": mask, "bias_ih_l0": mask[:, 0]})
    load_pruned_state_dict(fresh, model.state_dict())
    x = torch.linspace(-1, 1, 30).view(2, 5, 3).sin()
    for _ in range(2):
        for one in (model, fresh):
            optimizer = sgd(one)
            optimizer.zero_grad()
            one(x)[0].square().sum().backward()
            optimizer.step()
        assert_same_state(fresh, model.state_dict())
    assert torch.equal(fresh(x)[0], model(x)[0])


def test_the_hook_counts_what_its_mask_removes() -> None:
    fresh: Any = network(seed=1)
    load_pruned_state_dict(fresh, pruned().state_dict())
    (hook,) = fresh[3]._forward_pre_hooks.values()
    assert hook.amount == (~fresh[3].weight_mask).count_nonzero()
