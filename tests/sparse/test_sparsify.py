"""A model that leaves its zeros out is the model: outputs, names, modes, copies."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from interpreter import python
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import (
    compact,
    densify,
    execution_report,
    force_prune,
    load_sparse,
    make_permanent,
    save_sparse,
    sparsify,
)


def resnet() -> nn.Module:
    return timm.create_model(
        "resnet18",
        layers=(1, 1, 1, 1),
        channels=(8, 16, 24, 32),
        num_classes=10,
        zero_init_last=False,
    )


def pruned(sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    """Return a pruned network whose normalisations have seen data."""
    torch.manual_seed(seed)
    model = resnet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.random_unstructured(module, "weight", sparsity)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(images(8, seed=2))
    return model.eval()


def permanent(model: nn.Module) -> nn.Module:
    make_permanent(model)
    return model


def images(batch: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(
        batch, 3, size, size, generator=torch.Generator().manual_seed(seed)
    )


def same(one: Tensor, other: Tensor) -> None:
    close = 1e-10 if other.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        one, other.detach(), rtol=0, atol=close * float(other.detach().abs().max())
    )


def how(model: nn.Module) -> set[str]:
    return {layer.runs for layer in execution_report(model).layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "made",
    [
        lambda model: model,
        permanent,
        lambda model: compact(model, images()),
    ],
    ids=["masked", "permanent", "compacted"],
)
def test_outputs_are_those_of_the_masked_model(
    made: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    model = made(pruned()).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = sparsify(model, images(), plan="sparse")
    for batch, size in ((2, 32), (5, 32), (1, 48), (2, 32)):
        x = images(batch, size).to(dtype)
        same(fast(x), model(x))
        assert how(fast) == {"sparse"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_is_a_module_of_the_same_class_with_the_dense_names() -> None:
    model = pruned()
    fast = sparsify(model, images())
    assert isinstance(fast, type(model))
    assert fast.num_classes == model.num_classes
    dense = resnet().state_dict()
    assert {*fast.state_dict()} == {*dense}
    assert not fast.training
    assert not any(one.requires_grad for one in fast.parameters())


def test_copies_pickles_and_files_run_as_it_does(tmp_path: Path) -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    expected = fast(images())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(fast)
        assert torch.equal(other(images()), expected)
        assert how(other) == {"sparse"}


def test_its_weights_go_into_files_of_the_dense_model(tmp_path: Path) -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    save_sparse(fast, tmp_path / "fast.safetensors")
    again = load_sparse(resnet(), tmp_path / "fast.safetensors").eval()
    same(again(images()), densify(fast)(images()))
    other = compact(fast, images(), progress=False)
    same(other(images()), densify(fast)(images()))


def test_compiled_traced_and_exported_it_is_the_dense_model() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    expected = densify(fast)(images())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    exported = torch.export.export(fast, (images(),)).module()
    mapped = torch.func.vmap(lambda image: fast(image[None])[0])
    for other in (compiled, exported, mapped):
        same(other(images()), expected)
    nothing = {name: 0 * value for name, value in fast.named_parameters()}
    assert not torch.func.functional_call(fast, nothing, (images(),)).any()


def test_the_way_back_is_a_plain_model() -> None:
    model = pruned()
    plain = densify(sparsify(model, images()))
    assert type(plain) is type(model)
    assert torch.equal(plain(images()), model(images()))
    pickle.loads(pickle.dumps(plain))


def changes() -> dict[str, Callable[[nn.Module], object]]:
    def head(model: nn.Module) -> None:
        model.reset_classifier(3)
        model.eval().requires_grad_(False)

    def swap(model: nn.Module) -> None:
        model.conv1.weight.data = model.conv1.weight.data * 2

    return {
        "a weight in place": lambda m: m.conv1.weight.mul_(2),
        "a weight as data": lambda m: m.conv1.weight.data.mul_(2),
        "a buffer": lambda m: m.bn1.running_mean.add_(1),
        "another tensor": swap,
        "a state dict": lambda m: m.load_state_dict(
            densify(sparsify(pruned(seed=3), images())).state_dict()
        ),
        "a new head": head,
        "another type": lambda m: m.double(),
    }


@pytest.mark.parametrize("name", changes())
def test_it_notices_changes(name: str) -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    plain, before = densify(fast), pruned()
    for model in (fast, plain):
        torch.manual_seed(0)
        changes()[name](model)
    x = images().to(next(plain.parameters()).dtype)
    assert plain(x).shape[1] == 3 or not torch.equal(plain(x), before(x.float()))
    same(fast(x), plain(x))
    assert "sparse" in how(fast)


def test_in_training_mode_it_is_the_dense_model() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    plain = densify(fast)
    for model in (fast, plain):
        model.train()
    assert torch.equal(fast(images()), plain(images()))
    assert "training mode" in execution_report(fast).why_dense
    for model in (fast, plain):
        model.eval()
    same(fast(images()), plain(images()))  # statistics have moved
    assert not execution_report(fast).why_dense


def test_gradients_autocast_and_hooks_take_the_dense_way() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    plain = densify(fast)
    x, y = (images().requires_grad_() for _ in range(2))
    fast(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(images()).dtype == torch.bfloat16
    seen: list[Tensor] = []
    handle = fast.layer1.register_forward_hook(lambda m, i, o: seen.append(o))
    fast(images())
    assert len(seen) == 1
    assert "hooks" in execution_report(fast).why_dense
    handle.remove()
    fast(images())
    assert len(seen) == 1
    fast.requires_grad_(True)
    assert fast(images()).requires_grad


def test_hooks_of_the_model_itself_run_once() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    calls: list[int] = []
    fast.register_forward_hook(lambda m, i, o: calls.append(1))
    fast(images())
    fast(images(3))
    assert len(calls) == 2
    assert how(fast) == {"sparse"}


def test_outputs_are_ordinary_tensors_of_their_own() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    first = fast(images())
    kept = first.clone()
    fast(images(seed=5))
    assert torch.equal(first, kept)
    weight = torch.ones(first.shape[1], requires_grad=True)
    (first @ weight).sum().backward()  # not possible with tensors of inference mode
    with torch.inference_mode():
        same(fast(images()), kept)


def test_threads_may_share_it() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    expected = [fast(images(seed=n)) for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(
            n for _ in range(20) if not torch.equal(fast(images(seed=n)), expected[n])
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_can_be_fixed() -> None:
    model = pruned()
    fast = sparsify(model, images(), plan="dense")
    assert how(fast) == {"dense"}
    assert torch.equal(fast(images()), densify(fast)(images()))
    some = sparsify(model, images(), plan={"conv1": "dense", "fc": "sparse"})
    runs = execution_report(some).plan
    assert (runs["conv1"], runs["fc"]) == ("dense", "sparse")
    again = sparsify(model, images(), plan=runs)
    assert execution_report(again).plan == runs


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("fast", "'fast'"),
        ({"conv1": "measure"}, "'measure'"),
        ({"nose": "dense"}, "nose"),
    ],
)
def test_other_plans_are_refused(plan: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sparsify(pruned(), images(), plan=plan)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="got str"):
        sparsify("resnet", images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor"):
        sparsify(pruned(), "images")
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(sparsify(pruned(), images()), images())
    with pytest.raises(ValueError, match="a model that sparsify returned"):
        densify(pruned())
    with pytest.raises(ValueError, match="a model that sparsify returned"):
        execution_report(pruned())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.rand_like(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) * self.calls


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Branching, "torch.export"), (Noisy, "other outputs"), (Counting, "calls")],
)
def test_models_that_no_graph_tells_run_as_before(
    kind: type[nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    model = kind()
    prune.random_unstructured(model.fc, "weight", 0.5)
    fast = sparsify(model, torch.ones(2, 4), plan="sparse")
    assert why in execution_report(fast).why_dense
    plain = densify(fast)
    for x in (torch.ones(2, 4), -torch.ones(3, 4)):
        torch.manual_seed(1)
        found = fast(x)
        torch.manual_seed(1)
        assert torch.equal(found, plain(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, a: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> Any:
        first = self.fc(a).relu()
        return {"first": first, "both": (first if b is None else first + b, scale)}


def test_arguments_and_results_may_have_any_structure() -> None:
    model = Pair()
    prune.random_unstructured(model.fc, "weight", 0.5)
    a, b = torch.randn(3, 6), torch.randn(3, 8)
    fast = sparsify(model, {"a": a, "b": b}, plan="sparse")
    for args, kwargs in (
        ((a, b), {}),
        ((a,), {}),
        ((a, b), {"scale": 2.0}),
        ((), {"b": b, "a": a}),
        ((a,), {"scale": 0.5, "b": b}),
    ):
        found, expected = fast(*args, **kwargs), model(*args, **kwargs)
        same(found["first"], expected["first"])
        same(found["both"][0], expected["both"][0])
        assert found["both"][1] == expected["both"][1]
        assert not execution_report(fast).why_dense


def test_an_empty_batch_runs_as_before() -> None:
    fast = sparsify(pruned(), images(), plan="sparse")
    assert fast(images(0)).shape == densify(fast)(images(0)).shape


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_resnet",
        "mobilenetv3_small_050",
        "levit_128s",
        "test_nfnet",
        "test_mambaout",
    ],
)
def test_networks_of_timm_run_by_their_non_zeros(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            prune.random_unstructured(module, "weight", 0.9)
    size = model.pretrained_cfg["input_size"][-1]
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(2, 3, size, size, dtype=dtype)
        fast = sparsify(model.to(dtype), x, plan="sparse")
        assert how(fast) == {"sparse"}, execution_report(fast)
        same(fast(x), model(x))


def test_the_report_is_a_table_of_80_columns() -> None:
    model = pruned(0.99)
    report = execution_report(sparsify(model, images(8)))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[0] == "conv1"
    assert report.to_dict()["layers"][0]["name"] == "conv1"
    for layer in report.layers:
        if layer.sparse_ms is not None:
            assert (layer.runs == "sparse") <= (layer.sparse_ms < layer.dense_ms)


def test_it_prunes_no_further() -> None:
    model = resnet()
    loader = [(images(4), torch.tensor([0, 1, 2, 3]))]
    force_prune(model, loader, 0.9, steps=2, progress=False)
    fast = sparsify(model.eval(), images(4), plan="sparse")
    same(fast(images(4)), model(images(4)))


def test_work_is_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("force_plugin.sparse.team._WORTH_A_THREAD", 50)
    model = pruned()
    fast = sparsify(model, images(), plan="sparse")
    one = fast(images())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fast(images()), one)  # not in another order
    finally:
        torch.set_num_threads(threads)


class Mixed(nn.Module):
    """Layer norms, gates and convolutions of one geometry, which share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(6))
        self.squeeze = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            gate = self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
            x = x + torch.nn.functional.gelu(conv(y) * gate)
        return torch.cat([x, self.convs[0](x)], 1)


@pytest.mark.parametrize("size", [5, 7, 8])
def test_values_that_share_memory_do_not_meet(size: int) -> None:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    for norm in model.norms:
        norm.get_parameter(
            "bias"
        ).data.normal_()  # what lies beside the images is not 0 then
    for conv in model.convs:
        prune.random_unstructured(conv, "weight", 0.5)
    fast = sparsify(model, torch.randn(3, 6, size, size), plan="sparse")
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 6, size, size, dtype=torch.float64)
        same(fast(x), model(x))
    assert not execution_report(fast).why_dense


class Later(nn.Module):
    """A view that is read when other layers have taken memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        view = self.convs[0](x).permute(0, 2, 3, 1)
        flat = view[:, 0]
        for conv in self.convs:
            x = conv(x)
        return self.head(view).sum(1) + flat + x[:, :, 0].mT


def test_a_view_keeps_the_memory_of_its_value() -> None:
    torch.manual_seed(0)
    model = Later().eval()
    for conv in model.convs:
        prune.random_unstructured(conv, "weight", 0.5)
    fast = sparsify(model, torch.randn(2, 6, 8, 8), plan="sparse")
    for _ in range(2):
        x = torch.randn(2, 6, 8, 8)
        same(fast(x), model(x))
    assert not execution_report(fast).why_dense


class Lines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 4, padding="same", groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.second(x).transpose(1, 2))


def test_convolutions_of_lines_run_sparse() -> None:
    torch.manual_seed(0)
    model = Lines().eval()
    model.norm.running_mean.normal_()
    for layer in (model.first, model.second, model.head):
        prune.random_unstructured(layer, "weight", 0.5)
    fast = sparsify(model, torch.randn(2, 3, 21), plan="sparse")
    for batch, length in ((2, 21), (1, 8), (3, 1)):
        x = torch.randn(batch, 3, length)
        same(fast(x), model(x))
    assert [*execution_report(fast).plan] == ["first", "second", "head"]
    assert how(fast) == {"sparse"}
    dense = sparsify(model, torch.randn(2, 3, 21), plan={"second": "dense"})
    same(dense(x), model(x))
    assert execution_report(dense).plan["second"] == "dense"


def test_without_llvmlite_the_error_says_what_to_install() -> None:
    done = python(
        "-c",
        "import sys; sys.modules['llvmlite'] = None\n"
        "import force_plugin\n"
        "force_plugin.compact\n"
        "try: force_plugin.sparsify\n"
        "except ImportError as error: print(error)",
    )
    assert "pip install 'force-plugin[sparse]'" in done.stdout, done.stderr


def test_progress_is_shown_unless_it_is_turned_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sparsify(pruned(), images())
    assert "sparsify" in capsys.readouterr().err
    sparsify(pruned(), images(), progress=False)
    assert not capsys.readouterr().err
