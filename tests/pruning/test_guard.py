"""A step that would disconnect the network is taken again, in smaller steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from faults import images, vgg
from state import same, unchanged
from torch import Tensor, nn

from force_plugin import FORCE, CollapseError, IterSNIP, force_prune, get_masks
from force_plugin.pruning.descent import Descent

NONE: dict[str, Tensor] = {}


def prune(model: nn.Module, method: Any, sparsity: float, **options: Any) -> list[str]:
    usual = {"steps": 2, "progress": False} | options
    report = force_prune(model, [images()], sparsity, method=method, **usual)
    return [text for text in report.warnings if "would have disconnected" in text]


def test_a_descent_goes_half_of_the_way_when_it_has_to_go_back() -> None:
    descent = Descent([100, 10], 1000, guard=True)
    first, second = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    assert (descent.step, descent.next, descent.masks) == (1, 100, {})
    descent.go(first)
    assert (descent.step, descent.next, descent.kept) == (2, 10, 100)
    descent.go(second)
    assert descent.done
    assert descent.back()
    assert (descent.masks, descent.kept) == (first, 100)
    assert (descent.step, descent.next, descent.holding) == (2, 32, False)
    descent.go(second)
    assert (descent.step, descent.next) == (2, 10)
    assert descent.back()
    assert (descent.next, descent.holding) == (57, True)
    for expected in (57, 32, 10):
        assert descent.next == expected
        descent.go(second)
    assert descent.done
    assert descent.said(2) == [
        "step 2 of 2 would have disconnected the network, and was taken in 3 smaller "
        "steps, in which no pruned weight returned"
    ]


def test_a_descent_gives_up_in_the_end() -> None:
    descent = Descent([1000], 10**9, guard=True)
    times = 0
    descent.go(NONE)
    while descent.back():
        times += 1
        descent.go(NONE)
    assert times == 10
    assert not descent.guarded
    assert not descent.back()


def test_a_descent_does_not_divide_what_cannot_be_divided() -> None:
    descent = Descent([9], 10, guard=True)
    descent.go(NONE)
    assert descent.back()
    assert descent.next == 9
    descent.go(NONE)
    assert descent.done


def test_where_a_step_removes_nothing_no_weight_returns_the_second_time() -> None:
    descent = Descent([5, 5], 10, guard=True)
    descent.go({"w": torch.ones(5)})
    descent.go({"w": torch.ones(5)})
    assert descent.back()
    assert (descent.next, descent.holding) == (5, True)
    descent.go({"w": torch.ones(5)})
    assert descent.done


@pytest.fixture
def chain() -> nn.Module:
    """A chain that FORCE disconnects at 98 % in four steps."""
    return vgg(norm=True, bias=False)


def first_cut(method: Any) -> tuple[float, int]:
    """A sparsity and a number of steps at which a method disconnects the chain."""
    for sparsity in (0.9, 0.95, 0.97, 0.98, 0.985, 0.99):
        for steps in (2, 3, 5, 8):
            model = vgg(norm=True, bias=False)
            try:
                prune(model, method, sparsity, steps=steps, guard=False)
            except CollapseError:
                again = vgg(norm=True, bias=False)
                try:
                    if prune(again, method, sparsity, steps=steps):
                        return sparsity, steps
                except CollapseError:
                    continue
    raise AssertionError("expected a network that the guard saves")


@pytest.mark.parametrize("method", [FORCE, IterSNIP])
def test_the_guard_keeps_the_network_connected(method: Any, chain: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sparsity, steps = first_cut(method)
        said = prune(chain, method, sparsity, steps=steps)
    total = sum(mask.numel() for mask in get_masks(chain).values())
    kept = sum(int(mask.count_nonzero()) for mask in get_masks(chain).values())
    assert kept == int((1 - sparsity) * total + 1e-9)
    assert said[0].startswith("step ")
    x = images()[0][:4].requires_grad_()
    chain(x).cos().sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_where_the_guard_has_nothing_to_do_the_masks_are_the_same() -> None:
    found = []
    for guard in (True, False):
        model = vgg(norm=True, bias=False)
        assert not prune(model, FORCE, 0.5, steps=4, guard=guard)
        found.append(get_masks(model))
    assert same(found[0], found[1])


class Emptying(IterSNIP):
    """Ranks all weights of one layer last."""

    @classmethod
    def scores(cls, probe: Any) -> dict[str, Tensor]:
        scores = super().scores(probe)
        return {n: s - 1e9 if n == "3.weight" else s for n, s in scores.items()}


def test_a_layer_that_the_method_would_empty_is_spared() -> None:
    model = vgg(norm=False, bias=False)
    with pytest.raises(CollapseError, match="disconnected"):
        prune(model, Emptying, 0.9, steps=4, guard=False)
    report = force_prune(
        model, [images()], 0.9, method=Emptying, steps=4, progress=False
    )
    assert report.kept == int(0.1 * report.total + 1e-9)
    assert any("3.weight lost no weight, as the" in text for text in report.warnings)
    x = images()[0][:4].requires_grad_()
    model(x).cos().sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_what_the_guard_cannot_help_is_an_error_and_the_model_as_it_was() -> None:
    model = vgg(norm=False, bias=False)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    with unchanged(model), pytest.raises(CollapseError, match="disconnected"):
        prune(model, IterSNIP, 1 - 2 / total, steps=3)  # fewer weights than layers
