"""A pruned model goes through what people do with a model, in both of its forms.

``masks`` is the reparametrisation, ``permanent`` what ``make_permanent`` leaves. Both
are compared with a dense model whose weights are multiplied by masks by hand.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

import pytest
import timm
import torch
from masked_by_hand import assert_at_rest, sgd
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from force_plugin import FORCE, apply_masks, force_prune, get_masks, make_permanent
from force_plugin.model import reparametrisation
from force_plugin.zoo import digits, load_data

Form = Callable[[nn.Module], object]


FORMS: dict[str, Form] = {"masks": lambda model: None, "permanent": make_permanent}


NETWORKS = ["test_resnet", "test_vit"]


every_form = pytest.mark.parametrize("form", FORMS)


every_network = pytest.mark.parametrize("name", NETWORKS)


def dense(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if name == "test_vit" else {}
    model: nn.Module = timm.create_model(name, num_classes=10, **size)
    return model


@cache
def images(count: int) -> tuple[Tensor, Tensor]:
    (*found,) = load_data(dense(), digits()[0], image_size=32, batch_size=count)
    inputs, targets = found[0]
    return inputs, targets


def batch(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    inputs, targets = images(count)
    return inputs.to(next(model.parameters()).dtype, copy=True), targets


def pruned(name: str = "test_resnet", form: str = "masks") -> nn.Module:
    model = dense(name)
    options: dict[str, Any] = {"method": "snip", "progress": False}
    force_prune(model, [batch(model)], 0.7, **options)
    FORMS[form](model)
    return model


def train(
    model: nn.Module, steps: int = 3, *, run: Callable[[Tensor], Tensor] | None = None
) -> list[float]:
    inputs, targets = batch(model)
    optimizer, losses = sgd(model), []
    for _ in range(steps):
        loss = cross_entropy((model if run is None else run)(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pruned tensors as their modules show them."""
    found = {}
    for name in masks:
        path, _, tensor = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), tensor).detach().clone()
    return found


def assert_holds(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, weight in weights_of(model, masks).items():
        assert not weight[~masks[name]].any(), name
        assert weight[masks[name]].count_nonzero() > 0.9 * masks[name].sum(), name


# The same losses.


def losses_by_hand(model: nn.Module, masks: dict[str, Tensor], steps: int) -> Any:
    """Train a dense model whose weights are multiplied by masks in every forward."""
    inputs, targets = batch(model)
    parameters = dict(model.named_parameters())
    optimizer, losses = sgd(model), []
    for _ in range(steps):
        masked = {n: p * masks[n] if n in masks else p for n, p in parameters.items()}
        loss = cross_entropy(functional_call(model, masked, (inputs,)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_network
def test_both_forms_train_as_a_model_that_is_masked_by_hand(name: str) -> None:
    by_hand, masked, permanent = (dense(name).double() for _ in range(3))
    force_prune(masked, [batch(masked)], 0.8, steps=5, progress=False)
    masks = get_masks(masked)
    apply_masks(permanent, masks)
    make_permanent(permanent)
    expected = losses_by_hand(by_hand, masks, 20)
    assert expected[-1] < expected[0] / 2
    for model in (masked, permanent):
        torch.testing.assert_close(train(model, 20), expected, rtol=0, atol=1e-12)


# Copies.


def _saved(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@every_form
@pytest.mark.parametrize("age", ["fresh", "trained", "after an error", "under no_grad"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_as_the_original_and_leaves_it_alone(
    how: str, age: str, form: str
) -> None:
    model = pruned(form=form)
    masks = get_masks(model)
    if age == "trained":
        train(model)
    elif age == "after an error":
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 32, 32))
    elif age == "under no_grad":
        with torch.no_grad():
            model(batch(model)[0])
    assert_at_rest(model)
    copied = COPIES[how](model)
    before = copy.deepcopy(model.state_dict())
    losses = train(copied)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert losses == train(model)
    assert_at_rest(copied)
    for one in (model, copied):
        assert_holds(one, masks)
        assert get_masks(one).keys() == masks.keys()


def test_hooks_to_come_do_not_take_the_numbers_of_those_in_a_pickle() -> None:
    data, counter = pickle.dumps(pruned()), torch.utils.hooks.RemovableHandle
    before, counter.next_id = counter.next_id, 0  # as in another process
    try:
        numbers = [
            number
            for module in pickle.loads(data).modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
            for number in hooks
        ]
        assert counter.next_id > max(numbers) > 0
    finally:
        counter.next_id = max(counter.next_id, before)


@every_form
@every_network
def test_a_state_dict_alone_is_enough(name: str, form: str) -> None:
    model, again = pruned(name, form), pruned(name, form)
    train(model)
    file = BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert train(again) == train(model)


AVERAGES: dict[str, Callable[[nn.Module], tuple[nn.Module, Callable[..., None]]]] = {
    "ModelEmaV3": lambda m: (e := ModelEmaV3(m, decay=0.5), e.update),
    "ModelEmaV2": lambda m: (e := ModelEmaV2(m, decay=0.9998), e.update),
    "AveragedModel": lambda m: (a := AveragedModel(m), a.update_parameters),
}


@every_form
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_of_the_weights_has_their_zeros(average: str, form: str) -> None:
    model, reference = pruned(form=form), pruned(form=form)
    masks = get_masks(pruned())
    averaged, update = AVERAGES[average](model)
    for _ in range(3):
        train(model, 1)
        update(model)
    inner: Any = averaged.module
    inner.eval()(batch(model)[0])
    assert_holds(inner, masks)
    if average == "AveragedModel":
        # It takes the first update for its start.
        states = []
        for _ in range(3):
            train(reference, 1)
            now = copy.deepcopy(reference)
            now(batch(now)[0])  # weights are shown as they are in a forward
            states.append(weights_of(now, masks))
        for name, weight in weights_of(inner, masks).items():
            expected = torch.stack([state[name] for state in states]).mean(0)
            torch.testing.assert_close(weight, expected)


# What a forward goes through.


def _checkpointed(model: nn.Module, x: Tensor) -> Any:
    return checkpoint(model, x, use_reentrant=False)


def _checkpointed_blocks(model: nn.Module, x: Tensor) -> Any:
    model.set_grad_checkpointing(True)
    return model(x)


def _data_parallel(model: nn.Module, x: Tensor) -> Any:
    return nn.DataParallel(model)(x)


def _called_with_its_own(model: nn.Module, x: Tensor) -> Any:
    return functional_call(model, dict(model.named_parameters()), (x,))


WAYS = {
    "checkpoint": _checkpointed,
    "set_grad_checkpointing": _checkpointed_blocks,
    "DataParallel": _data_parallel,
    "functional_call": _called_with_its_own,
}


@every_form
@every_network
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_a_plain_call(way: str, name: str, form: str) -> None:
    model, plain = pruned(name, form), pruned(name, form)
    losses = train(model, run=lambda x: WAYS[way](model, x))
    assert losses == train(plain)
    assert_at_rest(model)
    copy.deepcopy(model)


@every_form
@every_network
def test_it_compiles_to_one_graph_with_the_same_losses(name: str, form: str) -> None:
    torch._dynamo.reset()
    model, plain = pruned(name, form), pruned(name, form)
    # fullgraph: a graph break is an error.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = train(model, run=compiled)
    torch.testing.assert_close(losses, train(plain))
    assert_holds(model, get_masks(pruned(name)))
    assert_at_rest(model)
    copy.deepcopy(model)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler_keep_the_zeros(dtype: torch.dtype, form: str) -> None:
    model = pruned(form=form)
    masks, (inputs, targets) = get_masks(pruned()), batch(model)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    before = weights_of(model, masks)
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    model(inputs)
    assert_holds(model, masks)
    for name, weight in weights_of(model, masks).items():
        assert not torch.equal(weight, before[name]), f"{name} is not trained"
    copy.deepcopy(model)


@every_form
@every_network
def test_other_types_layouts_and_devices_are_followed(name: str, form: str) -> None:
    model, masks = pruned(name, form), get_masks(pruned(name))
    for change in (
        lambda m: m.double(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.bfloat16(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ):
        change(model)
    model.load_state_dict(pruned(name, form).state_dict())
    model.float()
    losses = train(model)
    assert all(loss == loss for loss in losses)
    assert_holds(model, masks)
    copy.deepcopy(model)


def test_gradients_that_are_accumulated_are_those_of_a_bigger_batch() -> None:
    for form in FORMS:
        model, whole = (pruned("test_vit", form).double() for _ in range(2))
        inputs, targets = batch(model, 8)
        for half in (slice(0, 4), slice(4, 8)):
            (cross_entropy(model(inputs[half]), targets[half]) / 2).backward()
        cross_entropy(whole(inputs), targets).backward()
        pairs: Any = zip(model.parameters(), whole.parameters(), strict=True)
        assert all(torch.allclose(p.grad, q.grad, atol=1e-12) for p, q in pairs)


@every_form
def test_it_can_be_frozen_but_for_its_head(form: str) -> None:
    model = pruned(form=form)
    model.requires_grad_(False)
    head = model.get_classifier()
    head.requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    assert_holds(model, get_masks(pruned()))
    assert_at_rest(model)


@every_form
def test_a_classifier_that_is_reset_before_is_pruned(form: str) -> None:
    model = dense()
    model.reset_classifier(7)
    inputs, targets = batch(model)
    force_prune(model, [(inputs, targets % 7)], 0.7, method="snip", progress=False)
    masks = get_masks(model)
    FORMS[form](model)
    assert len(masks["fc.weight"]) == 7
    loss = cross_entropy(model(inputs), targets % 7)
    loss.backward()
    sgd(model).step()
    model(inputs)
    assert_holds(model, masks)


# Ways out of PyTorch.


@pytest.mark.filterwarnings("ignore")
@every_form
@every_network
@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported(strict: bool, name: str, form: str) -> None:
    model = pruned(name, form).eval()
    inputs, _ = batch(model)
    expected = model(inputs)
    exported = torch.export.export(model, (inputs,), strict=strict)
    torch.testing.assert_close(exported.module()(inputs), expected)
    assert_at_rest(model)


@pytest.mark.filterwarnings("ignore")
@every_form
@every_network
def test_it_is_traced(name: str, form: str) -> None:
    model = pruned(name, form).eval()
    inputs, _ = batch(model)
    traced = torch.jit.trace(model, inputs)
    torch.testing.assert_close(traced(inputs), model(inputs))


@pytest.mark.filterwarnings("ignore")
@every_form
@every_network
def test_it_becomes_onnx(name: str, form: str, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = pruned(name, form).eval()
    inputs, _ = batch(model, 2)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(path)
    (outputs,) = session.run(None, {session.input_names[0]: inputs.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(outputs), model(inputs), atol=1e-3, rtol=1e-3
    )


# Other values than a model's own.


@every_form
@every_network
def test_what_functional_call_lends_leaves_no_trace(name: str, form: str) -> None:
    model = pruned(name, form).eval()
    masks, (inputs, targets) = get_masks(pruned(name)), batch(model)
    own = weights_of(model, masks)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(lent: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, lent, (inputs,)), targets)

    loss({n: 2 * p for n, p in parameters.items()})
    gradients = grad(loss)(parameters)
    assert_at_rest(model)
    for name_, weight in weights_of(model, masks).items():
        assert torch.equal(weight, own[name_])
    if form == "masks":
        own_gradients = {n: gradients[f"{n}_orig"] for n in masks}
        assert not any(g[~masks[n]].any() for n, g in own_gradients.items())
        assert own_gradients[
            "fc.weight" if "fc.weight" in masks else "head.weight"
        ].any()
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore")
@every_form
def test_an_ensemble_runs_as_one(form: str) -> None:
    models = [pruned("test_vit", form).eval() for _ in range(3)]
    inputs, _ = batch(models[0])
    for factor, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + factor / 10)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def run(parameters: Any, buffers: Any) -> Any:
        return functional_call(base, (parameters, buffers), (inputs,))

    outputs = vmap(run, randomness="different")(parameters, buffers)
    for model, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(output, model(inputs), atol=1e-4, rtol=1e-4)
    assert_at_rest(base)
    copy.deepcopy(base)(inputs)


# One mask, one byte, one place.


def in_memory(tensor: Tensor) -> int:
    """How many numbers a tensor has in memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().nbytes() // tensor.element_size()


def test_a_mask_is_a_byte_a_weight_and_there_is_one_of_it() -> None:
    model = pruned()
    masks = {n: b for n, b in model.named_buffers() if n.endswith("_mask")}
    own = sum(mask.untyped_storage().nbytes() for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert own == total and total > 100_000
    # Anything else of a mask's size in what is not a parameter, buffer or weight?
    seen = {mask.untyped_storage().data_ptr() for mask in masks.values()}
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for hook in hooks:
            for value in vars(hook).values():
                assert not isinstance(value, Tensor) or in_memory(value) == 1
    assert len(seen) == len(masks)


def test_owners_of_one_weight_share_its_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    given = torch.rand(4, 4) < 0.5
    apply_masks(model, {"0.weight": given})
    assert model[0].weight_mask is model[1].weight_mask
    assert model[0].weight_mask is not given
    copied = copy.deepcopy(model)
    assert copied[0].weight_mask is copied[1].weight_mask


def test_parameters_keep_their_order_there_and_back() -> None:
    # An optimizer's state goes by it, and a checkpoint of one would no longer fit.
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 3))
    order = [name for name, _ in model.named_parameters()]
    apply_masks(model, {"0.weight": torch.ones(3, 2, 3, 3), "1.bias": torch.ones(3)})
    names = [name.removesuffix("_orig") for name, _ in model.named_parameters()]
    assert names == order
    FORCE.apply(model[1], "weight", 0.5, importance_scores=torch.rand(3, 3))
    for module, name in (
        (model[0], "weight"),
        (model[1], "bias"),
        (model[1], "weight"),
    ):
        prune.remove(module, name)
    assert [name for name, _ in model.named_parameters()] == order
    assert list(model.state_dict()) == order
    assert not any(module._forward_hooks for module in model.modules())


# Beside PyTorch's own.


def test_prunings_of_both_kinds_can_follow_each_other() -> None:
    model: Any = pruned()
    first = get_masks(model)
    prune.l1_unstructured(model.fc, "weight", 0.5)
    prune.random_unstructured(model.conv1[0], "weight", 0.2)
    FORCE.apply(model.fc, "weight", 0.5, importance_scores=torch.rand(10, 96))
    hook = reparametrisation.find_hook(model.fc, "weight")
    assert isinstance(hook, prune.PruningContainer) and len(hook) == 3
    masks = get_masks(model)
    for name, mask in masks.items():
        assert not (mask & ~first[name]).any()
    train(model)  # PyTorch's own leave a graph until then
    copied = copy.deepcopy(model)
    assert train(copied) == train(model)
    assert_holds(model, masks)
    make_permanent(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_pytorchs_remove_after_pytorchs_pruning_leaves_a_plain_parameter() -> None:
    model = nn.Linear(4, 4)
    apply_masks(model, {"weight": torch.rand(4, 4) < 0.5})
    prune.l1_unstructured(model, "weight", 0.5)
    prune.remove(model, "weight")
    parameter = model.weight
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        assert model.weight is parameter and isinstance(parameter, nn.Parameter)
    copy.deepcopy(model)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_it_goes_to_the_workers_of_a_pool() -> None:
    model = pruned("test_vit")
    train(model)
    model.share_memory()
    with torch.multiprocessing.get_context("fork").Pool(1) as pool:
        (count,) = pool.map(_count, [model])
    assert count == sum(int(mask.sum()) for mask in get_masks(model).values())


def _count(model: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in get_masks(model).values())
