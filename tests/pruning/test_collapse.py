"""What is a collapse, what is none, and what is said of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from faults import (
    ADVICE,
    ONCE,
    TARGETS,
    Batch,
    emptying,
    images,
    prune_it,
    share_of,
    vgg,
)
from kinds_of_methods import ITERATIVE
from networks import tiny_resnet
from state import unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from force_plugin import METHODS, SaliencyMethod
from force_plugin.errors import CollapseError


def test_an_empty_layer_beside_a_skip_connection_is_no_error_but_a_warning() -> None:
    torch.manual_seed(0)
    model = tiny_resnet()
    layer = "3.conv2.weight"
    lost = f"1 of 7 layers ({layer}) lost every weight"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(
            model,
            loader=[images()],
            sparsity=share_of(layer, model),
            method=emptying(layer),
        )
    assert [str(w.message) for w in caught] == [lost]
    assert result.warnings[0] == lost
    assert [empty.name for empty in result.empty_layers] == [layer]
    model.eval()
    assert not torch.equal(model(images(1)[0]), model(images(2)[0]))


def test_magnitude_reads_no_data_and_only_names_the_layer_that_it_emptied() -> None:
    model = vgg(norm=True, bias=False)
    with torch.no_grad():
        model[4].weight.mul_(1e-9)
    sparsity = share_of("4.weight", model)
    result = prune_it(model, method="magnitude", sparsity=sparsity, loader=None)
    assert result.warnings[0] == "1 of 4 layers (4.weight) lost every weight"


@pytest.mark.parametrize(
    "options",
    [
        {"loader": [(torch.zeros(5, 6), TARGETS)]},
        {"loss_fn": lambda o, t: 0 * cross_entropy(o, t)},
    ],
    ids=["zero inputs", "zero loss"],
)
@pytest.mark.parametrize("method", ["force", "iter_snip", "snip", "grasp", "grasp_it"])
def test_where_every_saliency_is_0_there_is_nothing_to_rank_by(
    method: str, options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4))
    options = {"method": method, **options}
    message = (
        "^every saliency is exactly 0 at the first step: there is nothing to rank by; "
        r".*; look at the data, the loss and the initialisation, or on_collapse=\"warn"
        '" to prune all the same$'
    )
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        prune_it(model, **options)
    with pytest.warns(UserWarning, match="^every saliency is exactly 0 at the first"):
        result = prune_it(model, on_collapse="warn", **options)
    assert result.kept == result.total // 2
    assert any("nothing to rank by. Look at the data" in w for w in result.warnings)


@pytest.mark.parametrize("method", ["force", "snip", "grasp_it", "synflow"])
def test_a_dead_branch_is_a_warning_that_names_it(method: str) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.dead = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (self.dead(x) - 1000).relu()

    model = Dead()
    message = r"1 of 2 layers \(dead\.weight\) had a saliency of exactly 0 everywhere"
    with pytest.warns(UserWarning, match=message):
        result = prune_it(model, method=method)
    assert result.kept == result.total // 2
    assert any("(dead.weight) had a saliency" in line for line in result.warnings)


# What is no collapse, and what is


def asleep(bias: float) -> Callable[[], nn.Module]:
    """A network with units that few samples wake."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        first = nn.Linear(20, 64)
        with torch.no_grad():
            first.bias.sub_(bias)
        layers = nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
        return nn.Sequential(first, *layers)

    return build


def half_asleep() -> nn.Module:
    model = asleep(0.5)()
    prune.random_unstructured(model.get_submodule("2"), "weight", 0.5)
    return model


def on_small_maps() -> nn.Module:
    """On maps of 1x1, eight in nine taps of a kernel see only padding."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, width in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def some(*shape: int) -> list[Batch]:
    """Small batches, each of which wakes others."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, *shape, generator=generator), torch.arange(6) % 5)
        for _ in range(12)
    ]


SOUND: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "all awake": (asleep(-1.0), some(20)),
    "some asleep": (asleep(0.0), some(20)),
    "half asleep": (asleep(0.5), some(20)),
    "most asleep": (asleep(1.0), some(20)),
    "pruned before": (half_asleep, some(20)),
    "small maps": (on_small_maps, some(3, 8, 8)),
    "a transformer": (
        lambda: timm.create_model("test_vit", num_classes=5),
        [(x[:2], y[:2]) for x, y in some(3, 160, 160)[:2]],
    ),
}


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("name", SOUND)
def test_what_is_pruned_a_little_has_not_collapsed(
    name: str, sparsity: float, method: str
) -> None:
    build, loader = SOUND[name]
    if name == "pruned before":
        sparsity = max(sparsity, 0.4)
    result = prune_it(build(), loader=loader, sparsity=sparsity, method=method, steps=8)
    assert not re.search("collapsed|disconnected|idle", " ".join(result.warnings))


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        # Of 100 weights, those with a saliency at first and then; 30 are to stay.
        (100, 26, True),
        (100, 27, False),  # of a batch that passes a dropout, say
        (100, 30, False),
        (100, 12, True),
        (90, 20, True),
        (90, 25, False),
        (40, 14, True),
        (40, 20, False),
        (20, 9, True),
        (20, 15, False),
        (20, 20, False),
    ],
)
def test_a_collapse_is_told_from_what_the_dense_network_had(
    first: int, second: int, said: bool, regrow: bool
) -> None:
    class Told(SaliencyMethod):
        regrows = regrow

        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            probe.gradients()
            alive = first if probe.step == 1 else second
            return {"weight": (torch.arange(100) < alive).view(10, 10).float()}

        @staticmethod
        def score(weight: Tensor, signal: Tensor) -> Tensor:
            return signal

    options = {
        "method": Told,
        "loader": [(torch.randn(8, 10), torch.arange(8))],
        "sparsity": 0.7,
        "steps": 2,
        "schedule": "linear",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(nn.Linear(10, 10), **options)
    text = f"^the network collapsed at step 2 of 2: {second} weights have a saliency "
    assert any(re.search(text, line) for line in result.warnings) is said
    assert any(re.search(text, str(w.message)) for w in caught) is said
    beside = f"({first} at the first step)"
    assert any(beside in line for line in result.warnings) is (said and first < 100)


@pytest.mark.parametrize(
    ("method", "steps", "advice"),
    [
        ("force", 3, ADVICE),
        ("force", 1, ADVICE),
        ("snip", 3, ONCE),
        ("grasp", 3, ONCE),
        ("snip_it", 3, "ake more batches, a lower sparsity or another method"),
        ("synflow", 3, "ake more steps, a lower sparsity or another method"),
    ],
)
def test_what_to_take_instead_is_what_the_method_leaves_to_the_caller(
    method: str, steps: int, advice: str
) -> None:
    class Emptying(METHODS[method]):  # type: ignore[misc, valid-type]
        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            scores = super().scores(probe)
            return {n: s - 1e9 if n == "3.weight" else s for n, s in scores.items()}

    model = vgg(norm=False, bias=False)
    sparsity = share_of("3.weight", model)
    options = {"method": Emptying, "loader": [images()], "steps": steps, "guard": False}
    with unchanged(model), pytest.raises(CollapseError, match="disconnected") as raised:
        prune_it(model, sparsity=sparsity, **options)
    assert "lost every weight" in raised.value.problem
    said = f't{advice}, or on_collapse="warn" to prune all the same'
    assert raised.value.advice == said
    with pytest.warns(UserWarning, match=rf"disconnected.*\. T{advice}$"):
        prune_it(model, sparsity=sparsity, on_collapse="warn", **options)


def test_layers_that_an_earlier_pruning_has_emptied_are_not_lost_now() -> None:
    model = tiny_resnet()
    layer: Any = model.get_submodule("3.conv2")
    prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune_it(model, loader=[images()], sparsity=0.7, method="snip")
    empty = [one.name for one in result.empty_layers]
    assert empty == ["3.conv1.weight", "3.conv2.weight"]  # the first leads nowhere
    lost = "1 of 7 layers (3.conv1.weight) lost every weight"
    assert lost in result.warnings
    assert [str(w.message) for w in caught if "lost every" in str(w.message)] == [lost]
