"""Networks without skip connections, which one empty layer disconnects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import faults
import numpy as np
import pytest
import timm
import torch
from faults import (
    ADVICE,
    ONCE,
    Batch,
    emptying,
    images,
    layers_of,
    prune_it,
    sentences,
    share_of,
    vgg,
    words,
)
from state import unchanged
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import IterSNIP, SaliencyMethod, get_masks, sparsity_report


def timms_vgg(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm2d if norm else None
    config = [4, "M", 2, "M"]
    return VGG(config, num_classes=10, mlp_ratio=0.002, norm_layer=norm_layer)


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: vgg(norm=False, bias=False),
    "with biases": lambda: vgg(norm=False, bias=True),
    "with batch norm": lambda: vgg(norm=True, bias=False),
    "with batch norm and biases": lambda: vgg(norm=True, bias=True),
    "timm's": lambda: timms_vgg(norm=False),
    "timm's with batch norm": lambda: timms_vgg(norm=True),
    **{
        name: partial(timm.create_model, name, num_classes=10)
        for name in timm.list_models("test_vgg*")
    },
}

EACH_LAYER = [(name, layer) for name in CHAINS for layer in layers_of(CHAINS[name]())]


@pytest.mark.parametrize(("chain", "layer"), EACH_LAYER)
def test_a_layer_that_is_emptied_in_a_chain_is_an_error_that_names_it(
    chain: str, layer: str
) -> None:
    model = CHAINS[chain]()
    message = (
        "^the pruned network is disconnected: its outputs do not depend on its inputs;"
        rf" 1 of {len(layers_of(model))} layers \({layer}\) lost every weight"
        r"(; small initial weights in 1 of them: 0\.11 times [\w' ]*)?; t"
        f'{ONCE}, or on_collapse="warn" to prune all the same$'
    )
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
        )


@pytest.mark.parametrize(("chain", "layer"), EACH_LAYER)
def test_on_collapse_warn_prunes_it_and_its_outputs_are_the_same_for_any_inputs(
    chain: str, layer: str
) -> None:
    model = CHAINS[chain]()
    sizes = layers_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
            on_collapse="warn",
        )
    said = (
        "the pruned network is disconnected: its outputs do not depend on its inputs. "
        f"T{ONCE}"
    )
    # Each of them once; it is the caller that they point at.
    where = [(w.category, w.filename) for w in caught]
    assert where == 2 * [(UserWarning, faults.__file__)]
    lost = f"1 of {len(sizes)} layers ({layer}) lost every weight"
    assert result.warnings[:2] == (said, lost)
    assert str(caught[0].message) == said
    assert str(caught[1].message).startswith(lost)
    assert result.kept == result.total - sizes[layer]
    assert [empty.name for empty in result.empty_layers] == [layer]
    assert not get_masks(model)[layer].any()
    model.eval()
    assert torch.equal(model(images(1)[0]), model(100 * images(2)[0]))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_model_unpruned() -> None:
    model = vgg(norm=True, bias=False)
    options = {
        "loader": [images()],
        "sparsity": share_of("4.weight", model),
        "method": emptying("4.weight"),
        "on_collapse": "warn",
    }
    with unchanged(model), pytest.raises(UserWarning, match="disconnected"):
        prune_it(model, **options)


def test_a_network_that_is_disconnected_on_the_way_is_an_error_with_the_step() -> None:
    class Second(IterSNIP):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            lowest = weight.shape == (12, 8, 3, 3)
            return IterSNIP.score(weight, gradient).sub_(float(lowest))

    model = vgg(norm=False, bias=False)
    message = (
        r"^the network was disconnected at step 1 of 3: no gradient reaches any weight "
        r"through the mask; \d of 4 layers \(3\.weight.*\) lost every weight, the "
        r"first at step 1; a single step would have left weights in \d of them"
        rf"; t{ADVICE}, or on_collapse="
    )
    options = {
        "loader": [images()],
        "method": Second,
        "guard": False,
        "sparsity": 0.8,
        "schedule": lambda step, steps, last: [0.6, 0.4, last][step - 1],
    }
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, **options)
    with pytest.warns(UserWarning, match=r"^the network was disconnected at step 1 of"):
        result = prune_it(model, **options, on_collapse="warn")
    assert result.kept == result.total // 5


def all_kept(model: nn.Module) -> dict[str, Tensor]:
    layers = sparsity_report(model).layers
    return {ly.name: torch.ones(ly.shape, dtype=torch.bool) for ly in layers}


def keeping(
    masks: dict[str, Tensor], measure_by: str = "gradients"
) -> type[SaliencyMethod]:
    """A method that has chosen already; it reads a batch as all others."""

    class Keeping(SaliencyMethod):
        steps = 1

        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            getattr(probe, measure_by)()
            return masks

        @staticmethod
        def score(weight: Tensor, mask: Tensor) -> Tensor:
            return mask.double()

    return Keeping


def as_chosen(model: nn.Module, masks: dict[str, Tensor], **options: Any) -> Any:
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return prune_it(
        model,
        loader=[images()],
        sparsity=1 - kept / total,
        method=keeping(masks),
        **options,
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_layers_that_do_not_meet_are_an_error_though_none_of_them_is_empty(
    chain: str,
) -> None:
    model = CHAINS[chain]()
    masks = all_kept(model)
    first, second, *_ = masks.values()
    # The first layer writes channel 0 alone, the second one reads all others.
    first[1:] = False
    second[:, 0] = False
    message = rf"^the pruned network is disconnected: .* its inputs; t{ONCE}, or"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        as_chosen(model, masks)
    with pytest.warns(UserWarning, match="^the pruned network is disconnected: "):
        result = as_chosen(model, masks, on_collapse="warn")
    assert result.empty_layers == ()
    for name, mask in get_masks(model).items():
        assert torch.equal(mask, masks[name])
    model.eval()
    assert torch.equal(model(images(1)[0]), model(100 * images(2)[0]))
    # One weight that is read again, and they meet.
    model = CHAINS[chain]()
    second[0, 0] = True
    said = "\n".join(as_chosen(model, masks).warnings)
    assert "disconnected" not in said
    if chain in ("plain", "with batch norm"):  # no bias gets past an empty channel
        # Units that nothing wakes in the dense network either are not counted.
        assert re.search(r"that stay \(8[78] %\) are idle: the outputs do not", said)


def without_a_path(masks: list[Tensor]) -> int:
    """Weights of a chain of linear layers that no path of kept weights goes through."""
    entering = [torch.ones(masks[0].shape[1], dtype=torch.float64)]
    for mask in masks:
        entering.append(mask.double() @ entering[-1])
    leaving = torch.ones(len(masks[-1]), dtype=torch.float64)
    idle = 0
    for mask, before in zip(reversed(masks), reversed(entering[:-1]), strict=True):
        idle += int((mask & (torch.outer(leaving, before) == 0)).sum())
        leaving = mask.double().T @ leaving
    return idle


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("microbatch", [None, 4])
def test_more_idle_weights_than_others_are_said_aloud(
    seed: int, microbatch: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = (5, 20, 20, 20, 6)
    torch.manual_seed(seed)
    layers = [nn.Linear(*pair, bias=False) for pair in pairwise(widths)]
    masks = {
        f"{2 * place}.weight": torch.rand(
            layer.weight.shape, generator=generator, dtype=torch.float64
        )
        < 0.02 + 0.01 * seed
        for place, layer in enumerate(layers)
    }
    for place, mask in enumerate(masks.values()):
        mask[0, 0] = True  # one path, at least
        mask[1:, 0] &= place == 0
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    kept = sum(int(mask.sum()) for mask in masks.values())
    idle = without_a_path([*masks.values()])
    inputs = torch.randn(16, 5, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_it(
            model,
            loader=[(inputs, torch.arange(16) % 6)],
            sparsity=1 - kept / sum(mask.numel() for mask in masks.values()),
            method=keeping(masks),
            microbatch=microbatch,
        )
    said = [line for line in report.warnings if "idle" in line]
    if idle > kept / 2:
        (line,) = said
        share = f"{100 * idle / kept:.0f}"
        start = f"{idle:,} of the {kept:,} weights that stay ({share} %) are idle: "
        assert line.startswith(start)
        assert f"T{ONCE}" in line
    else:
        assert not said


def test_weights_that_few_samples_do_not_wake_are_not_idle() -> None:
    # Each of the units is woken by a sample of its own.
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(32) + 0.01)
    inputs = 2 * torch.eye(32) - 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_it(
            model,
            loader=[(inputs, torch.arange(32) % 4)],
            sparsity=0.1,
            method="snip",
        )
    assert not any("idle" in line for line in report.warnings)


class Experts(nn.Module):
    """Each sample goes through one of several experts."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(16, count)
        self.experts = nn.ModuleList(nn.Linear(16, 32) for _ in range(count))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(1)
        best = weights.argmax(1)
        rows = [
            weights[place, chosen] * self.experts[chosen](x[place])
            for place, chosen in enumerate(best.tolist())
        ]
        return self.head(torch.stack(rows))


def test_weights_that_a_batch_does_not_use_in_the_dense_network_are_not_idle() -> None:
    torch.manual_seed(0)
    loader = [(torch.randn(2, 16), torch.tensor([0, 1])) for _ in range(64)]
    report = prune_it(Experts(), loader=loader, sparsity=0.5, method="snip", batches=64)
    assert not any("idle" in line for line in report.warnings)


def test_the_last_look_fails_no_pruning() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for width in (6, 8):
            layers += [nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(8, 4))

    # A normalisation over a batch of one fails; these methods are in evaluation mode.
    one = [(torch.rand(1, 6), torch.zeros(1).long())]
    for method in ("synflow", "snip_it"):
        assert prune_it(network(), loader=one, method=method).sparsity == 0.5
    masks = all_kept(network())
    first, second, _ = masks.values()
    first[1:] = False
    second[:, 0] = False

    kept = sum(int(mask.sum()) for mask in masks.values())
    share = 1 - kept / sum(mask.numel() for mask in masks.values())
    chosen = keeping(masks, "synflow_gradients")
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        prune_it(network(), loader=one, sparsity=share, method=chosen)

    class ByNumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.from_numpy(np.log1p(np.abs(x.numpy()))))

    loader = [(torch.randn(8, 6), torch.arange(8) % 4)]
    assert prune_it(ByNumpy(), loader=loader).sparsity == 0.5


def test_a_training_step_that_calls_a_part_of_the_model_is_looked_at() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vgg(norm=False, bias=False)

        def training_step(self, batch: Batch) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

    model = Module()
    masks = all_kept(model)
    first, second, *_ = masks.values()
    first[1:] = False
    second[:, 0] = False
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        as_chosen(model, masks, forward=lambda m, found: m.training_step(found))


def test_a_network_that_looks_integers_up_beside_numbers_is_connected() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.numbers = nn.Embedding(20, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            rows = self.rows(inputs[0] + torch.tensor([0, 10])).sum(1)
            return self.head(rows + self.numbers(inputs[1]))

    torch.manual_seed(0)
    inputs = torch.randint(10, (8, 2)), torch.randn(8, 6)
    model = Table()
    masks = all_kept(model)
    masks["numbers.weight"][:] = False
    method = keeping(masks)
    options = {"sparsity": 36 / 60, "method": method}
    prune_it(model, loader=[(inputs, torch.arange(8) % 4)], **options)
    model = Table()
    nn.init.zeros_(model.rows.weight)
    with pytest.raises(RuntimeError, match=r"^the pruned network is disconnected"):
        prune_it(model, loader=[(inputs, torch.arange(8) % 4)], **options)


# Networks whose batches are no pairs of images and targets


@pytest.mark.parametrize("layer", ["0.weight", "3.weight", "5.weight"])
@pytest.mark.parametrize("kind", ["forward", "dictionary"])
def test_a_disconnected_chain_is_an_error_whatever_the_batches_look_like(
    kind: str, layer: str
) -> None:
    inputs, targets = images()

    class Keyed(nn.Sequential):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x["image"])

    torch.manual_seed(0)
    chain: Any = vgg(norm=False, bias=True)
    model = Keyed(*[*chain])
    options: dict[str, Any] = {"loader": [({"image": inputs}, targets)]}
    if kind == "forward":
        options = {
            "loader": [{"image": inputs, "target": targets}],
            "forward": lambda model, one: cross_entropy(model(one), one["target"]),
        }
    sparsity = share_of(layer, model)
    message = rf"^the pruned network is disconnected: .* layers \({layer}\) lost every"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, sparsity=sparsity, method=emptying(layer), **options)


def test_a_disconnected_network_for_words_is_an_error() -> None:
    model = words()
    message = r"^the pruned network is disconnected: .* layers \(2\.weight\) lost every"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(
            model,
            loader=[sentences()],
            sparsity=share_of("2.weight", model),
            method=emptying("2.weight"),
        )
