"""A step that would disconnect the network is taken again, in smaller steps."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from faults import images, vgg
from state import same, unchanged
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import (
    FORCE,
    CollapseError,
    IterSNIP,
    NotFiniteError,
    diagnose,
    force_prune,
    get_masks,
)
from force_plugin.pruning.descent import Descent
from force_plugin.selection.schedules import kept_per_step

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


class TwoStems(nn.Module):
    """Two branches from the inputs, which are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(2, 8, bias=False) for _ in range(2))
        self.middle, self.head = nn.Linear(8, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x) + self.b(x))
        found: Tensor = self.head(torch.tanh(self.middle(x)))
        return found


def vectors(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 32, 2, generator=generator)
    return [(one, (3 * one[:, 0]).long().clamp(-1, 1) + 1) for one in x]


@pytest.mark.parametrize("plan", [("", "", "ab", "ab"), ("a", "b", "ab", "ab")])
def test_layers_that_were_idle_at_different_steps_are_looked_at(
    plan: tuple[str, ...],
) -> None:
    class Planned(FORCE):
        """Ranks the branches of a plan last."""

        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            last = plan[probe.step - 1]
            scores = super().scores(probe)
            return {n: s - 1e6 if n[0] in last else s for n, s in scores.items()}

    model = TwoStems()
    options: dict[str, Any] = {"steps": 4, "progress": False}
    report = force_prune(model, vectors(), 0.5, method=Planned, **options)
    kept = {layer.name: layer.kept for layer in report.layers}
    assert kept["a.weight"] or kept["b.weight"]
    assert sum(kept.values()) == report.total // 2


def steps_and_counts(loader: Any, **options: Any) -> list[tuple[int, int]]:
    """The step and the number of kept weights at each measurement of a pruning."""
    seen: list[tuple[int, int]] = []

    class Seen(FORCE):
        @classmethod
        def measure(cls, probe: Any) -> Any:
            seen.append((probe.step, probe.kept))
            return super().measure(probe)

    usual: dict[str, Any] = {"method": Seen, "steps": 3, "on_collapse": "warn"}
    force_prune(deep_chain(), loader, 0.93, **usual, progress=False, **options)
    return seen


def deep_chain() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(2, 8, bias=False)]
    for _ in range(3):
        norm, linear = nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)
        layers += [norm, nn.ReLU(), linear]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3, bias=False))


def test_a_loader_that_is_read_once_serves_for_steps_that_are_taken_again() -> None:
    assert len(steps_and_counts(iter(vectors(3)), guard=False)) == 3
    seen = steps_and_counts(iter(vectors(3)))
    assert len(seen) > 3
    assert {step for step, _ in seen} <= {1, 2, 3}


def test_a_measurement_knows_the_step_that_it_is_for() -> None:
    planned = kept_per_step("exponential", 3, 0.93, 232)
    seen = steps_and_counts(vectors(3))
    assert len(seen) > 3
    for step, kept in seen:
        assert step == 1 + sum(kept <= after for after in planned)


def test_a_loss_that_is_nan_as_the_network_is_disconnected_is_a_step_back() -> None:
    def of_directions(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(10 * outputs / outputs.norm(dim=0), targets)

    def of_networks(guard: bool) -> int:
        found = 0
        for sparsity in (0.85, 0.88, 0.9, 0.93):
            for steps in (2, 3, 4):
                options: dict[str, Any] = {"loss_fn": of_directions, "guard": guard}
                with suppress(CollapseError, NotFiniteError):
                    force_prune(
                        deep_chain(), vectors(), sparsity, steps=steps, **options
                    )
                    found += 1
        return found

    assert of_networks(guard=True) > of_networks(guard=False)


def test_layers_are_spared_only_while_there_is_room() -> None:
    descent = Descent([6, 4], 12, guard=True)
    masks = {"small": torch.ones(1), "large": torch.ones(5), "other": torch.ones(6)}
    masks = {name: mask.bool() for name, mask in masks.items()}
    descent.go(masks)
    descent._spared.update(small=1, large=1)
    scores = {name: torch.zeros(mask.shape) for name, mask in masks.items()}
    found = descent.sparing(scores)
    assert descent.next == 4
    assert found["small"].isinf().all()
    assert not found["large"].any()
    assert descent.said(2) == [
        "from step 1 of 2 on, small lost no weight, as the network would have been "
        "disconnected"
    ]


def test_what_has_not_helped_is_not_said_to_have_helped() -> None:
    model = vgg(norm=False, bias=False)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    report = force_prune(
        model,
        [images()],
        1 - 2 / total,  # fewer weights than layers
        method=IterSNIP,
        steps=3,
        on_collapse="warn",
        progress=False,
    )
    said = " ".join(report.warnings)
    assert "disconnects the network, also in smaller steps" in said
    assert "lost no weight" not in said


def test_a_step_that_cannot_be_divided_was_taken_again() -> None:
    descent = Descent([5, 5], 10, guard=True)
    for _ in range(2):
        descent.go({"w": torch.ones(5)})
    descent.back()
    descent.go({"w": torch.ones(5)})
    assert descent.said(2) == [
        "step 2 of 2 would have disconnected the network, and was taken again, in "
        "which no pruned weight returned"
    ]


@pytest.mark.parametrize("guard", ["no", None, 1, []])
def test_a_guard_is_true_or_false(guard: Any) -> None:
    model = vgg(norm=True, bias=False)
    with (
        unchanged(model),
        pytest.raises(TypeError, match=r"^guard: expected True or F"),
    ):
        prune(model, FORCE, 0.5, guard=guard)


class CurvedFORCE(FORCE):
    """Ranks by Hessian-gradient products, in steps."""

    @classmethod
    def measure(cls, probe: Any) -> Any:
        return probe.hessian_gradients()


def test_methods_with_second_derivatives_have_the_guard_too() -> None:
    for sparsity in (0.85, 0.9, 0.92, 0.94, 0.95, 0.96):
        for steps in (2, 3, 4):
            with suppress(CollapseError):
                options: dict[str, Any] = {"steps": steps, "progress": False}
                options |= {"method": CurvedFORCE}
                report = force_prune(deep_chain(), vectors(), sparsity, **options)
                if any("would have disconnected" in t for t in report.warnings):
                    return
    raise AssertionError("expected a network that the guard saves")


@pytest.mark.parametrize("method", ["force", "iter_snip", "steady_force", "synflow"])
def test_a_single_number_is_a_parameter_too(method: str) -> None:
    class Scaled(TwoStems):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    named = [(model.a, "weight"), (model, "scale"), (model.head, "weight")]
    report = force_prune(
        model, vectors(), 0.5, method=method, steps=3, parameters=named, progress=False
    )
    assert report.kept == report.total // 2
    if method != "synflow":
        fresh = Scaled()
        named = [(fresh.a, "weight"), (fresh, "scale"), (fresh.head, "weight")]
        advice = diagnose(fresh, vectors(), sparsity=0.5, parameters=named).advice
        assert advice is not None
        assert advice.channels == 8 + 1 + 3
