"""What a report says about layers that lost every weight: small weights, dead channels.

What it says about collapse and disconnection is in files of these names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as by_hand

from force_plugin import FORCE, IterSNIP, SparsityReport, force_prune
from force_plugin.zoo import digits, load_data, load_model

DEAD = "channels without any weight had"
SMALL = "small initial weights"


class Branches(nn.Module):
    """Two branches around which the signal goes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 16)
        self.first = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.second = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(x + self.second(x))


def vectors() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 6, generator=generator), torch.arange(32) % 4)]


def prune(model: nn.Module, loader: Any, sparsity: float, **more: Any) -> list[str]:
    options: dict[str, Any] = {"on_collapse": "warn", "progress": False}
    options |= {"guard": False} | more  # as published
    report: SparsityReport = force_prune(model, loader, sparsity, **options)
    return list(report.warnings)


def said(words: str, warnings: Iterable[str]) -> list[str]:
    return [warning for warning in warnings if words in warning]


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_emptied_layers_whose_weights_start_small_are_counted_with_their_size(
    scale: float,
) -> None:
    model: Any = Branches()
    sizes = []
    with torch.no_grad():
        for layer in (model.second[0], model.second[2]):
            layer.weight *= scale
            # PyTorch draws them from a uniform distribution in ±1/√16.
            usual = 1 / math.sqrt(16) / math.sqrt(3)
            sizes.append(float(layer.weight.square().mean().sqrt()) / usual)
    warnings = prune(model, vectors(), 0.6, method="snip")
    if scale == 1.0:
        assert not said("lost every weight", warnings)
        assert not said(SMALL, warnings)
        return
    (emptied,) = said("2 of 6 layers (second.0.weight, second.2.weight)", warnings)
    assert "lost every weight" in emptied
    assert said(SMALL, warnings) == [
        f"small initial weights in 2 of them: {min(sizes):.2g} to {max(sizes):.2g} "
        "times the size of PyTorch's own initialisation"
    ]


@pytest.mark.parametrize("name", ["mobilevit_xxs", "test_mambaout"])
def test_layers_of_timm_that_start_small_are_kept_once_they_are_of_usual_size(
    name: str,
) -> None:
    # It is the reason, then: nothing else is changed.
    lost = []
    for usual in (False, True):
        torch.manual_seed(0)
        model = load_model(name, num_classes=10)
        batches = load_data(model, digits()[0], image_size=64, batch_size=8)
        for layer in model.modules():
            if usual and isinstance(layer, nn.Linear | nn.Conv2d):
                size = layer.weight.detach().square().mean().sqrt()
                wanted = 1 / math.sqrt(3 * layer.weight[0].numel())
                if 0 < size < wanted / 2:
                    layer.weight.data *= wanted / size
        torch.manual_seed(1)
        warnings = prune(model, batches, 0.9, method="snip")
        lost.append(bool(said("lost every weight", warnings)))
        assert bool(said(SMALL, warnings)) is not usual
    assert lost == [True, False]


def scripted(base: type[FORCE] | type[IterSNIP], *script: list[list[float]]) -> Any:
    """A method that gives scores by step: for each of two layers, one for each row."""

    class Scripted(base):  # type: ignore[valid-type,misc]
        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            super().scores(probe)
            rows = dict(zip(probe.weights, script[probe.step - 1], strict=True))
            return {
                name: torch.tensor(values)[:, None].expand_as(probe.weights[name]) + 0.0
                for name, values in rows.items()
            }

    return Scripted


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 4, bias=False))


# First a row of the first layer is pruned; then it has so much that the second layer
# is emptied for it.
BEFORE = [[2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
AFTER = [[2.0, 2.0, 400.0], [1.0, 1.0, 1.0, 1.0]]


def schedule(step: int, steps: int, last: float) -> float:
    return 24 / 30 if step < steps else last


def test_the_saliency_of_dead_channels_is_weighed_against_what_was_kept() -> None:
    method = scripted(FORCE, BEFORE, AFTER)
    options = {"steps": 2, "schedule": schedule, "method": method}
    warnings = prune(chain(), vectors(), 12 / 30, **options)
    dead, kept = 6 * 400, 12 * 2 + 12 * 1
    assert said(DEAD, warnings) == [
        "at step 2 of 2, channels without any weight had "
        f"{100 * dead / (dead + kept):.0f} % of the saliency, "
        f"{(dead / 6) / (kept / 24):,.0f} times as much a weight as what was kept (as "
        "a rule because a normalisation divides by next to nothing there), and they "
        'return at the cost of others. Take fewer steps, method="steady_force", which '
        'does not overrate them, or "iter_snip", where nothing returns'
    ]
    assert "Take fewer steps, more batches" in warnings[0]


@pytest.mark.parametrize(
    ("base", "after"),
    [
        # Half of the saliency, in few weights.
        (FORCE, [[2.0, 2.0, 6.0], [1.0, 1.0, 1.0, 1.0]]),
        # Most of it, but not much more a weight than what was kept.
        (FORCE, [[2.0, 2.0, 13.0], [1.0, 1.0, 1.0, 1.0]]),
        # No layer is emptied.
        (FORCE, [[2.0, 2.0, 400.0], [1.0, 1.0, 1.0, 500.0]]),
        # What is pruned does not return.
        (IterSNIP, AFTER),
    ],
    ids=["not most", "not overrated", "not emptied", "not returning"],
)
def test_dead_channels_are_not_blamed_for_what_they_have_not_done(
    base: Any, after: list[list[float]]
) -> None:
    method = scripted(base, BEFORE, after)
    options = {"steps": 2, "schedule": schedule, "method": method}
    warnings = prune(chain(), vectors(), 12 / 30, **options)
    assert not said(DEAD, warnings)


@pytest.mark.parametrize("base", [FORCE, IterSNIP])
def test_layers_that_a_single_step_would_have_left_are_counted(base: Any) -> None:
    # Of the first scores the second layer has some of the 12 largest, of the last none.
    first = [[3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 4.0]]
    last = [[3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0]]
    for script, count in (((first, last), 1), ((last, last), 0)):
        method = scripted(base, *script)
        options = {"steps": 2, "schedule": schedule, "method": method}
        warnings = prune(chain(), vectors(), 18 / 30, **options)
        assert said("1 of 2 layers (1.weight) lost every weight", warnings)
        assert said("a single step", warnings) == count * [
            "a single step would have left weights in 1 of them"
        ]
        assert said(f"Take {'fewer' if count else 'more'} steps", warnings)


@pytest.mark.parametrize("base", [FORCE, IterSNIP])
def test_what_an_earlier_pruning_removed_has_no_say(base: Any) -> None:
    # The row that is gone for good has by far the largest saliency.
    model = chain()
    gone = torch.ones(3, 6)
    gone[2] = 0
    by_hand.custom_from_mask(model[0], "weight", gone)
    first = [[3.0, 3.0, 400.0], [0.0, 0.0, 0.0, 4.0]]
    last = [[3.0, 3.0, 400.0], [1.0, 1.0, 1.0, 1.0]]
    options = {"steps": 2, "schedule": schedule, "method": scripted(base, first, last)}
    warnings = prune(model, vectors(), 24 / 30, **options)
    assert said("1 of 2 layers (1.weight) lost every weight", warnings)
    assert not said(DEAD, warnings)
    assert said("a single step would have left weights in 1 of them", warnings)


@pytest.mark.skipif(
    not timm.is_model("lowformer_b0"), reason="lowformer is in timm from 1.0.29 on"
)
def test_iterating_empties_branches_of_lowformer_that_one_step_leaves() -> None:
    torch.manual_seed(0)
    model = load_model("lowformer_b0", num_classes=10)
    batches = load_data(model, digits()[0], image_size=64, batch_size=8)
    emptied = {}
    for method in ("snip", "iter_snip"):
        pruned = copy.deepcopy(model)
        report = force_prune(
            pruned, batches, 0.9, method=method, steps=12, progress=False
        )
        emptied[method] = {layer.name for layer in report.layers if not layer.kept}
    for_it = len(emptied["iter_snip"] - emptied["snip"])
    assert for_it > 10
    assert said("a single step", report.warnings) == [
        f"a single step would have left weights in {for_it} of them"
    ]


@pytest.mark.parametrize("method", ["force", "iter_snip", "snip"])
def test_dead_channels_empty_an_efficientnet_under_force_alone(method: str) -> None:
    torch.manual_seed(0)
    model = load_model("test_efficientnet", num_classes=10)
    batches = load_data(model, digits()[0], image_size=64, batch_size=8)
    torch.manual_seed(1)
    warnings = prune(model, batches, 0.9, method=method)
    assert bool(said(DEAD, warnings)) is (method == "force")
    assert bool(said("disconnected", warnings)) is (method == "force")


def test_dead_channels_are_not_overrated_by_running_statistics() -> None:
    # The normalisation divides by what it always did.
    torch.manual_seed(0)
    model = load_model("test_efficientnet", num_classes=10).eval()
    batches = load_data(model, digits()[0], image_size=64, batch_size=8)
    torch.manual_seed(1)
    assert not said(DEAD, prune(model, batches, 0.9))
