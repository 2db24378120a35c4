"""Names are those of the plain model, whatever it or a part of it is wrapped in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from state import assert_same
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from force_plugin import (
    apply_masks,
    diagnose,
    force_prune,
    get_masks,
    load_compact,
    load_masks,
    load_pruned_state_dict,
    make_permanent,
    reinitialise,
    saliency,
    save_compact,
    save_masks,
    sparsity_report,
)
from force_plugin.hold import save_pruned
from force_plugin.model.module_names import fitted

Wrap = Callable[[nn.Module], nn.Module]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=10)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def part(name: str, wrap: Wrap) -> Wrap:
    def wrapped(model: nn.Module) -> nn.Module:
        setattr(model, name, wrap(getattr(model, name)))
        return model

    return wrapped


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "compiled_in_place": in_place,
    "parallel": nn.DataParallel,
    "compiled_parallel": lambda model: compiled(nn.DataParallel(model)),
    "parallel_compiled": lambda model: nn.DataParallel(compiled(model)),
    "averaged": AveragedModel,
    "ema": ModelEmaV3,
    "compiled_part": part("layer1", compiled),
    "parallel_part": part("layer2", nn.DataParallel),
    "checkpointed_part": part("layer3", checkpoint_wrapper),
}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32), torch.arange(4)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", WRAPS)
def test_masks_fit_the_plain_model_and_come_from_it(wrap: str, tmp_path: Path) -> None:
    model, plain, other = WRAPS[wrap](network()), network(), WRAPS[wrap](network())
    report = force_prune(model, [], 0.9, method="random", progress=False)
    masks, path = get_masks(model), tmp_path / "masks.safetensors"
    assert list(masks) == [n for n, p in network().named_parameters() if p.ndim > 1]
    assert [layer.name for layer in report.layers] == list(masks)
    assert [layer.name for layer in sparsity_report(model).layers] == list(masks)
    save_masks(masks, path)
    apply_masks(plain, load_masks(path))
    assert_same(get_masks(plain), masks)
    apply_masks(other, load_masks(path))
    assert_same(get_masks(other), masks)


@pytest.mark.parametrize("wrap", WRAPS)
def test_masks_with_the_names_of_wrappers_still_fit(wrap: str, tmp_path: Path) -> None:
    model, plain, path = WRAPS[wrap](network()), network(), tmp_path / "masks"
    force_prune(model, [], 0.9, method="random", progress=False)
    # As they were written before.
    old = {
        f"{name}.weight": module.weight_mask
        for name, module in model.named_modules()
        if "weight_mask" in module._buffers
    }
    save_masks(old, path)
    apply_masks(plain, load_masks(path))
    assert_same(get_masks(plain), get_masks(model))


@pytest.mark.parametrize("wrap", WRAPS)
def test_scores_and_stages_have_plain_names(wrap: str) -> None:
    model, plain = WRAPS[wrap](network()).train(), network()
    scores = saliency(model, [batch()])
    expected = saliency(plain, [batch()])
    assert list(scores) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(scores[name], score)
    names = [stage.name for stage in diagnose(model, [batch()]).stages]
    assert names == [stage.name for stage in diagnose(plain, [batch()]).stages]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("wrapped", ["from", "into"])
def test_a_state_dict_goes_from_one_into_the_other(wrap: str, wrapped: str) -> None:
    model, fresh = network(), network(seed=1)
    if wrapped == "from":
        model = WRAPS[wrap](model)
    else:
        fresh = WRAPS[wrap](fresh)
    force_prune(model, [], 0.9, method="random", progress=False)
    state = {k: v for k, v in model.state_dict().items() if k != "n_averaged"}
    if isinstance(fresh, AveragedModel):
        state["n_averaged"] = torch.tensor(0)
    load_pruned_state_dict(fresh, state)
    assert_same(get_masks(fresh), get_masks(model))
    images, _ = batch()
    with torch.no_grad():
        expected = model.eval()(images) if wrap != "ema" else None
        if expected is not None:
            torch.testing.assert_close(fresh.eval()(images), expected)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(
    "wrap", ["compiled", "compiled_in_place", "compiled_part", "compiled_parallel"]
)
def test_a_compiled_model_notices_its_masks(wrap: str, called_before: bool) -> None:
    images, targets = batch()
    inner = network().eval()
    model = WRAPS[wrap](inner)
    if called_before:
        with torch.no_grad():
            model(images)
        cross_entropy(model(images), targets).backward()
        model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def assert_masked() -> None:
        """Whether it computes what a plain model with these values and masks does."""
        plain = network(seed=1).eval()
        state = {
            key.replace("_orig_mod.", ""): value
            for key, value in inner.state_dict().items()
        }
        if get_masks(plain) or any(key.endswith("_mask") for key in state):
            load_pruned_state_dict(plain, state)
        else:
            plain.load_state_dict(state)
        torch.testing.assert_close(model(images), plain(images))

    for sparsity in (0.5, 0.9):
        force_prune(
            model, [batch()], sparsity, method="snip", open_gates=False, progress=False
        )
        assert_masked()
        cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_masked()
    make_permanent(model)
    assert_masked()
    cross_entropy(model(images), targets).backward()
    optimizer.step()
    assert_masked()
    assert sparsity_report(model).sparsity == pytest.approx(0.9, abs=1e-4)


class Own(nn.Module):
    """Calls a part ``module``, and is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.module(x))


@pytest.mark.parametrize("wrap", ["compiled", "parallel", "compiled_parallel"])
def test_a_part_that_is_called_module_keeps_its_name(wrap: str) -> None:
    model = WRAPS[wrap](Own())
    force_prune(model, [], 0.5, method="random", progress=False)
    assert list(get_masks(model)) == ["module.0.weight", "fc.weight"]
    plain = Own()
    apply_masks(plain, get_masks(model))
    assert_same(get_masks(plain), get_masks(model))
    other = WRAPS[wrap](Own())
    load_pruned_state_dict(other, plain.state_dict())
    assert_same(get_masks(other), get_masks(model))


@pytest.mark.parametrize("wrap", WRAPS)
def test_new_values_come_from_one_into_the_other(wrap: str) -> None:
    for model, fresh in (
        (WRAPS[wrap](network()), network(seed=1)),
        (network(), WRAPS[wrap](network(seed=1))),
    ):
        force_prune(model, [], 0.9, method="random", progress=False)
        reinitialise(model, fresh)
        images, _ = batch()
        plain = network(seed=1)
        apply_masks(plain, get_masks(model))
        inner = model.module if isinstance(model, ModelEmaV3) else model
        torch.testing.assert_close(inner.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("permanent", [False, True])
def test_files_of_weights_have_plain_names(
    wrap: str, permanent: bool, tmp_path: Path
) -> None:
    model, plain = WRAPS[wrap](network()), network(seed=1)
    force_prune(model, [], 0.9, method="random", progress=False)
    masks = get_masks(model)
    if permanent:
        make_permanent(model)
    save_pruned(model, tmp_path / "pruned")
    state = load_file(tmp_path / "pruned")
    plain.load_state_dict(state)
    for name, mask in masks.items():
        assert torch.equal(state[name] != 0, mask)
    small = network(seed=1)
    save_compact(model, tmp_path / "small")
    load_compact(small, tmp_path / "small")
    assert_same(get_masks(small), masks)
    other = WRAPS[wrap](network(seed=1))
    load_compact(other, tmp_path / "small")
    assert_same(get_masks(other), masks)


def test_an_error_has_plain_names() -> None:
    class Unused(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = compiled(nn.DataParallel(Unused()))
    with pytest.raises(RuntimeError, match=r"^no gradient reached fc\.weight at"):
        force_prune(model, [(torch.ones(2, 4), torch.arange(2))], 0.5, progress=False)


@pytest.mark.parametrize(
    ("own", "given", "found"),
    [
        ("a.b", "module.a.b", "a.b"),
        ("a.b", "_orig_mod.module.a.b", "a.b"),
        ("a.b", "a._orig_mod.b", "a.b"),
        ("module.a", "a", "module.a"),
        ("a.module.b", "a.module.b", "a.module.b"),
        ("module.a a", "_orig_mod.module.a", "module.a"),
        ("module.a a", "_orig_mod.a", "a"),
        ("a.b", "c.b", "c.b"),
        ("a.module.b a.b", "_orig_mod.a._orig_mod.b", "_orig_mod.a._orig_mod.b"),
        ("a", "module.a a", "module.a a"),
        ("a", "module.a _orig_mod.a", "module.a _orig_mod.a"),
        ("module.a b", "module.module.a module.b", "module.a b"),
    ],
)
def test_names_fit_where_only_wrappers_differ(own: str, given: str, found: str) -> None:
    names = fitted(given.split(), own.split())
    assert list(names) == given.split()
    assert list(names.values()) == found.split()
