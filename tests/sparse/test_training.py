"""A model that trains its non-zeros alone learns what the masked model learns."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from processes import launch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from force_plugin import (
    compact,
    densify,
    execution_report,
    get_masks,
    make_permanent,
    sparsify,
)
from force_plugin.structure.cut_copies import deep_copy

Steps = Callable[[nn.Module], torch.optim.Optimizer]


def pruned(name: str = "resnet18", sparsity: float = 0.8, **options: Any) -> Any:
    """Return a small network in float64 with random masks, in training mode."""
    torch.manual_seed(0)
    if name == "resnet18":
        options |= {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}
        options["zero_init_last"] = False
    model: nn.Module = timm.create_model(name, num_classes=10, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.random_unstructured(module, "weight", sparsity)
    return model


def images(batch: int = 6, size: int = 32, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=random, dtype=torch.float64)


def trained(model: nn.Module, **options: Any) -> Any:
    """Return a copy that trains its non-zeros, all layers by their non-zeros."""
    options.setdefault("plan", "sparse")
    return sparsify(model, images(), train=True, progress=False, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3, nesterov=True
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)


def steps(
    model: nn.Module, make: Steps = sgd, count: int = 20, size: int = 32
) -> Iterator[float]:
    """Train a model, and yield its losses."""
    optimizer = make(model)
    for number in range(count):
        x = images(size=size, seed=number)
        loss = cross_entropy(model(x), torch.arange(len(x)))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        yield loss.item()


def runs_sparse(model: nn.Module) -> None:
    report = execution_report(model)
    assert not report.why_dense
    assert "sparse" in {layer.runs for layer in report.layers}


def same_state(fast: nn.Module, model: nn.Module) -> None:
    """Check weights under the masks, and all buffers."""
    expected = deep_copy(model)
    make_permanent(expected, hold_zeros=False)
    found = fast.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_20_steps_are_those_of_the_masked_model(make: Steps) -> None:
    model = pruned()
    fast = trained(model)
    expected = [*steps(model, make)]
    assert [*steps(fast, make)] == pytest.approx(expected, rel=1e-9)
    runs_sparse(fast)
    same_state(fast, model)
    model.eval()
    fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(images(3)), model(images(3)))
    runs_sparse(fast)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
        ("test_efficientnet", {"drop_path_rate": 0.2}),
        ("test_convnext", {"drop_path_rate": 0.2}),
        ("test_vit", {"img_size": 32, "proj_drop_rate": 0.1}),
        ("mobilenetv3_small_050", {}),
        ("ghostnet_050", {}),
        ("regnetx_002", {}),
        ("resnext26ts", {}),
    ],
)
def test_families_learn_the_same(name: str, options: dict[str, Any]) -> None:
    model = pruned(name, **options)
    fast = trained(model)
    found = []
    for one in (model, fast):
        torch.manual_seed(7)
        found.append([*steps(one, count=3)])
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    runs_sparse(fast)


def test_a_compacted_model_trains_too() -> None:
    model = pruned(sparsity=0.95)
    with torch.no_grad():
        small = compact(model.eval(), images(), progress=False).train()
    fast = trained(small)
    make_permanent(small)
    assert [*steps(fast, count=5)] == pytest.approx([*steps(small, count=5)], rel=1e-8)


def test_gradients_and_states_are_as_small_as_the_non_zeros() -> None:
    model = pruned(sparsity=0.9)
    fast, masks = trained(model), get_masks(model)
    names = dict(fast.named_parameters())
    assert {*names} == {name for name, _ in plain().named_parameters()}
    for name, mask in masks.items():
        assert names[name].shape == (int(mask.sum()), 1)
    optimizer = sgd(fast)
    cross_entropy(fast(images()), torch.arange(6)).backward()
    optimizer.step()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    dense = fast.conv1.weight
    assert dense.shape == model.conv1.weight.shape
    assert torch.equal(dense != 0, masks["conv1.weight"])


def plain() -> nn.Module:
    return timm.create_model(
        "resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(8, 12, 16, 20)
    )


def test_the_gradient_of_the_input_is_that_of_the_model() -> None:
    model = pruned()
    fast, found = trained(model), []
    for one in (model, fast):
        x = images().requires_grad_()
        one(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


def test_frozen_parameters_stay_and_get_no_gradient() -> None:
    model = pruned()
    for one in (*model.conv1.parameters(), *model.layer2.parameters()):
        one.requires_grad_(False)
    fast = trained(model)
    before = fast.conv1.weight.clone()
    assert [*steps(fast, count=3)] == pytest.approx([*steps(model, count=3)], rel=1e-9)
    runs_sparse(fast)
    assert torch.equal(fast.conv1.weight, before)
    fast.conv1.requires_grad_(True)
    model.conv1.requires_grad_(True)
    assert [*steps(fast, count=3)] == pytest.approx([*steps(model, count=3)], rel=1e-9)
    assert not torch.equal(fast.conv1.weight, before)


def test_two_forward_passes_before_a_backward_pass() -> None:
    model = pruned()
    fast, found = trained(model), []
    for one in (model, fast):
        first, second = one(images(seed=1)), one(images(seed=2))
        (first * second).sum().backward()
        found.append([p.grad for p in one.parameters()])
    masks = [*get_masks(model).values()]
    weights = [g for g in found[0] if g.dim() > 1]
    values = [g for g in found[1] if g.dim() == 2]
    for mask, dense, one in zip(masks, weights, values, strict=True):
        torch.testing.assert_close(one[:, 0], dense[mask], rtol=1e-8, atol=1e-9)


def test_a_graph_is_kept_or_gone_as_in_pytorch() -> None:
    fast = trained(pruned())
    loss = fast(images()).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in fast.parameters()]
    fast.zero_grad()
    loss.backward()
    for one, other in zip(first, fast.parameters(), strict=True):
        assert torch.equal(one, other.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    expected = fast(images()).sum()  # and the model is as it was
    expected.backward()


def test_another_shape_mode_or_dtype_is_planned_again() -> None:
    model = pruned()
    fast = trained(model)
    for size in (48, 32):
        found, expected = ([*steps(one, count=2, size=size)] for one in (fast, model))
        assert found == pytest.approx(expected, rel=1e-8)
        runs_sparse(fast)
    fast.bn1.eval()
    model.bn1.eval()
    assert [*steps(fast, count=2)] == pytest.approx([*steps(model, count=2)], rel=1e-8)
    runs_sparse(fast)
    fast.float()
    assert next(steps_in_float32(fast)) > 0
    runs_sparse(fast)


def steps_in_float32(model: nn.Module) -> Iterator[float]:
    loss = cross_entropy(model(images().float()), torch.arange(6))
    loss.backward()
    yield loss.item()


def test_without_gradients_or_in_evaluation_mode_the_dense_model_runs() -> None:
    model = pruned()
    fast = trained(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()))
    fast.eval()
    model.eval()
    found = []
    for one in (fast, model):
        loss = one(images()).sum()
        loss.backward()
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1])
    mask = get_masks(model)["conv1.weight"]
    expected = model.conv1.weight_orig.grad[mask]
    torch.testing.assert_close(next(fast.parameters()).grad[:, 0], expected)


def test_hooks_see_what_they_saw() -> None:
    fast = trained(pruned())
    seen = []
    fast.layer1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fast(images()).sum().backward()
    assert seen == [(6, 8, 8, 8)]
    assert "hooks" in execution_report(fast).why_dense


def test_copies_pickles_and_files_train_on() -> None:
    fast = trained(pruned())
    list(steps(fast, count=2))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    others = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ]
    expected = [*steps(fast, count=3)]
    for other in others:
        assert type(other) is type(fast)
        assert [*steps(other, count=3)] == pytest.approx(expected, rel=1e-12)
        runs_sparse(other)


def test_its_state_dict_is_that_of_the_dense_model(tmp_path: Path) -> None:
    model = pruned()
    fast = trained(model)
    list(steps(fast, count=2))
    state = fast.state_dict()
    dense = plain().double()
    dense.load_state_dict(state)
    dense.eval()
    fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(dense(images()), fast(images()))
    again = trained(model)
    again.load_state_dict(state)
    for one, other in zip(again.parameters(), fast.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_with_other_masks_is_refused() -> None:
    fast, other = trained(pruned()), plain().double()
    before = [one.clone() for one in fast.parameters()]
    with pytest.raises(RuntimeError, match="expected zeros where the weight is pruned"):
        fast.load_state_dict(other.state_dict())
    assert torch.equal(before[0], next(fast.parameters()))


def test_averages_of_weights_follow() -> None:
    model = pruned()
    fast = trained(model)
    make_permanent(model)  # PyTorch does not copy a model with masks that was called
    averages = []
    for one in (model, fast):
        timms = ModelEmaV3(one, decay=0.5, use_warmup=False)
        own = AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for _ in steps(one, count=4):
            timms.update(one)
            own.update_parameters(one)
        averages.append([timms.module.eval(), own.module.eval()])
    with torch.no_grad():
        for found, expected in zip(*reversed(averages), strict=True):
            torch.testing.assert_close(found(images()), expected(images()))


def test_densify_is_the_way_back_and_holds_the_zeros() -> None:
    model = pruned()
    fast = trained(model)
    list(steps(fast, count=2))
    dense = densify(fast)
    assert type(dense) is type(model)
    assert {*dense.state_dict()} == {*plain().state_dict()}
    masks = get_masks(model)
    list(steps(dense, count=2))
    for name, parameter in dense.named_parameters():
        if name in masks:
            assert not parameter[~masks[name]].any()
    assert {*get_masks(dense)} == {*masks}


def test_zeros_of_a_permanent_model_are_its_masks() -> None:
    model = pruned()
    masks = get_masks(model)
    make_permanent(model, hold_zeros=False)
    fast = trained(model)
    assert next(fast.parameters()).shape == (int(masks["conv1.weight"].sum()), 1)


def test_shared_layers_and_tied_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1)
            self.other = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.other.weight = self.one.weight
            self.norm = nn.BatchNorm2d(3)
            self.head = nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            x = self.norm(self.other(x) + self.one(x)).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().double()
    with torch.no_grad():
        model.one.weight *= torch.rand_like(model.one.weight) < 0.5
    make_permanent(model)
    fast = trained(model)
    assert len([*fast.parameters()]) == len([*model.parameters()])
    assert [*steps(fast, count=4)] == pytest.approx([*steps(model, count=4)], rel=1e-9)
    runs_sparse(fast)


def test_a_layer_without_any_weight_left() -> None:
    model = pruned()
    prune.random_unstructured(model.layer2[0].conv1, "weight", 1.0)
    fast = trained(model)
    assert [*steps(fast, count=3)] == pytest.approx([*steps(model, count=3)], rel=1e-8)


def test_measured_plans_are_no_slower_and_say_so() -> None:
    model = pruned()
    report = execution_report(trained(model, plan="measure"))
    assert report.sparse_ms is not None
    assert report.dense_ms is not None
    faster = report.sparse_ms <= report.dense_ms
    assert faster == (not report.why_dense)
    for layer in report.layers:
        assert (layer.sparse_ms is None) == (layer.dense_ms is None)


def test_sparsify_leaves_model_buffers_and_random_numbers_alone() -> None:
    model = pruned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fast = trained(model)
    assert torch.equal(torch.rand(1), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in fast.named_buffers():
        assert torch.equal(value, before[name])


def test_two_ranks_learn_the_same(tmp_path: Path) -> None:
    for seen in launch("sparse_worker.py", tmp_path):
        assert not seen["why_dense"]
        for name, value in seen["expected"].items():
            torch.testing.assert_close(
                seen["found"][name], value, rtol=1e-8, atol=1e-10
            )
