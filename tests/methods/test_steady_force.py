"""SteadyFORCE is what its formulas say, on every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from state import same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from force_plugin import FORCE, SteadyFORCE, force_prune, get_masks, saliency
from force_plugin.selection.schedules import kept_per_step

Batch = tuple[Tensor, Tensor]


class Mixed(nn.Module):
    """A layer of each kind behind a batch normalisation, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.grouped_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(12)
        self.wide = nn.Linear(12, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.turned = Conv1D(14, 16)
        nn.init.normal_(self.turned.weight)  # so that epsilon is small beside it
        self.turned_norm = nn.BatchNorm1d(14)
        self.head = nn.Linear(14, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped_norm(self.grouped(x)))
        x = torch.relu(self.up_norm(self.up(x)))
        x = torch.relu(self.layer_norm(self.wide(x.flatten(2).mean(2))))
        found: Tensor = self.head(torch.relu(self.turned_norm(self.turned(x))))
        return found


BEHIND = {"stem.weight", "grouped.weight", "up.weight", "turned.weight"}


def batches(count: int = 3, size: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def naive(
    loader: list[Batch], sparsity: float, steps: int, schedule: str = "exponential"
) -> dict[str, Tensor]:
    """The masks by the formulas of the class, in a plain loop."""
    model = Mixed()
    modules = {f"{n}.weight": m for n, m in model.named_children() if "norm" not in n}
    dense = {n: m.weight.detach().clone() for n, m in modules.items()}
    total = sum(w.numel() for w in dense.values())
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in dense.items()}
    average: dict[str, Tensor] = {}
    counts = [total, *kept_per_step(schedule, steps, sparsity, total, refining=2)]
    before = total
    for (now, kept), batch in zip(pairwise(counts), cycle(loader), strict=False):
        for name, module in modules.items():
            module.weight.data = dense[name] * masks[name]
        model.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        rate = 1 - min(0.7, (now / before) ** 3)
        for name, module in modules.items():
            score = (dense[name] * module.weight.grad).abs()
            counted = torch.where(masks[name], 1, 0 if name in BEHIND else 0.5) * score
            layer = score[masks[name]].sum()
            levelled = torch.where(
                counted > layer, counted.sqrt(), counted / layer.sqrt()
            ).nan_to_num(0)
            old = average.get(name, levelled)
            average[name] = ((1 - rate) * old + rate * levelled) * (score != 0)
        before = now
        everything = torch.cat([s.flatten() for s in average.values()])
        threshold = everything.topk(kept).values[-1]
        masks = {name: s >= threshold for name, s in average.items()}
    return masks


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize(
    ("sparsity", "steps"), [(0.5, 4), (0.8, 6), (0.85, 3), (0.7, 1)]
)
def test_the_masks_are_those_of_a_naive_loop(
    sparsity: float, steps: int, schedule: str
) -> None:
    model, loader = Mixed(), batches()
    options: dict[str, Any] = {"steps": steps, "schedule": schedule, "progress": False}
    options |= {"guard": False, "on_collapse": "warn"}
    force_prune(model, loader, sparsity, method="steady_force", **options)
    assert same(get_masks(model), naive(loader, sparsity, steps, schedule))


def test_the_first_step_is_that_of_force_with_layers_levelled() -> None:
    scores = saliency(Mixed(), batches(), "steady_force", batches=2)
    for name, own in saliency(Mixed(), batches(), "force", batches=2).items():
        torch.testing.assert_close(scores[name], own / own.sum().sqrt())


def times(factor: float, out: Tensor, targets: Tensor) -> Tensor:
    return factor * cross_entropy(out, targets)


def large_gradient(factor: float, out: Tensor, targets: Tensor) -> Tensor:
    """A loss of 0."""
    return factor * (out[:, 0] - out[:, 0].detach()).sum()


def pruned(model: nn.Module, loader: list[Batch], steps: int, loss_fn: Any) -> Any:
    options: dict[str, Any] = {"method": "steady_force", "progress": False}
    force_prune(model, loader, 0.8, steps=steps, loss_fn=loss_fn, **options)
    return get_masks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-60])
def test_the_scale_of_the_loss_does_not_matter(
    dtype: torch.dtype, scale: float
) -> None:
    loader = [(x.to(dtype), y) for x, y in batches()]
    one, other = (
        pruned(Mixed().to(dtype), loader, 5, partial(times, factor))
        for factor in (1.0, scale)
    )
    assert same(one, other)


def test_a_sum_that_overflows_makes_no_other_mask() -> None:
    found = []
    for factor in (1.0, 2.0**124):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 3))
        batch = torch.ones(9, 6), torch.arange(9) % 3
        found.append(pruned(model, [batch], 3, partial(large_gradient, factor)))
    for name, mask in found[0].items():
        assert (mask == found[1][name]).float().mean() > 0.9


def test_a_subclass_may_have_a_signal_of_its_own() -> None:
    class Curved(SteadyFORCE):
        @classmethod
        def measure(cls, probe: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = probe.hessian_gradients()
            return found

    model = Mixed()
    report = force_prune(
        model, batches(), 0.5, method=Curved, steps=3, guard=False, progress=False
    )
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@contextmanager
def attributes(**values: float) -> Iterator[type[SteadyFORCE]]:
    yield type("Changed", (SteadyFORCE,), values)


@pytest.mark.parametrize(
    "name", ["returning", "levelling", "forgetting", "longest", "refining"]
)
def test_each_attribute_matters(name: str) -> None:
    with attributes(**{name: {"refining": 0}.get(name, 0.01)}) as changed:
        found = []
        for method in (SteadyFORCE, changed):
            model = Mixed()
            force_prune(model, batches(), 0.6, method=method, steps=8, progress=False)
            found.append(get_masks(model))
    assert not same(found[0], found[1])


def test_without_its_bounds_it_is_force() -> None:
    class Unbounded(SteadyFORCE):
        returning, levelling, longest, refining = 1.0, 0.0, 0.0, 0

        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            probe.scale_free = lambda gradients: set()
            return super().scores(probe)

    found = []
    for method in (FORCE, Unbounded):
        model = Mixed()
        force_prune(model, batches(), 0.6, method=method, steps=6, progress=False)
        found.append(get_masks(model))
    assert same(found[0], found[1])


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("exponential", 1, [10]),
        ("exponential", 2, [10, 10]),
        ("exponential", 4, [100, 10, 10, 10]),
        ("exponential", 5, [215, 46, 10, 10, 10]),
        ("linear", 4, [505, 10, 10, 10]),
        ("linear", 200, [995, 990]),
    ],
)
def test_the_last_steps_stay_at_the_final_density(
    schedule: str, steps: int, expected: list[int]
) -> None:
    found = kept_per_step(schedule, steps, 0.99, 1000, refining=2)
    assert len(found) == steps
    assert found[: len(expected)] == expected
    assert found[-1] == 10


class Named(nn.Module):
    """Layers with a batch norm behind, whose weights have any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(2))
        self.name = name
        own = name == "weight"
        kinds = (nn.Linear(16, 16, bias=False) if own else nn.Module() for _ in "12")
        self.layers = nn.ModuleList(kinds)
        torch.manual_seed(1)
        for layer in self.layers:
            layer.register_parameter(name, nn.Parameter(torch.randn(16, 16) / 4))
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(nn.functional.linear(x, getattr(layer, self.name))))
        found: Tensor = self.head(x)
        return found


def test_the_name_of_a_weight_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 6, generator=generator)
    batch = x, torch.randint(3, (32,), generator=generator)
    found = []
    for name in ("weight", "kernel"):
        model = Named(name)
        named = [(layer, name) for layer in model.layers]
        named += [(model.stem, "weight"), (model.head, "weight")]
        options: dict[str, Any] = {"steps": 5, "parameters": named, "progress": False}
        options["guard"] = False
        force_prune(model, [batch], 0.8, method="steady_force", **options)
        masks = get_masks(model)
        found.append({n.replace("kernel", "weight"): m for n, m in masks.items()})
    assert same(found[0], found[1])


NUMBERS = ("returning", "levelling", "forgetting", "longest")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["x", None, True])
def test_constants_that_are_no_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^Own\.{name}: expected a number, got "):
        type("Own", (SteadyFORCE,), {name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_constants_outside_of_their_limits_are_refused(name: str, value: float) -> None:
    if name == "forgetting" and value == 1.1:
        type("Own", (SteadyFORCE,), {name: value})
        return
    with pytest.raises(ValueError, match=rf"^Own\.{name}: expected a number .*, got "):
        type("Own", (SteadyFORCE,), {name: value})


def test_scores_below_0_are_refused() -> None:
    class Signed(SteadyFORCE):
        @staticmethod
        def score(weight: Tensor, gradient: Tensor) -> Tensor:
            return weight * gradient

    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^Signed\.score: expected scores of at"):
        force_prune(model, batches(), 0.5, method=Signed, steps=3, progress=False)
    assert same(before, dict(model.named_parameters()))


def test_a_schedule_of_the_callers_own_is_taken_as_it_is() -> None:
    asked: list[tuple[int, int]] = []

    def linear(step: int, steps: int, density: float) -> float:
        asked.append((step, steps))
        return 1 - (1 - density) * step / steps

    kept = []

    class Seen(SteadyFORCE):
        @classmethod
        def measure(cls, probe: Any) -> Any:
            kept.append(probe.kept)
            return super().measure(probe)

    options: dict[str, Any] = {"steps": 6, "schedule": linear, "progress": False}
    report = force_prune(Mixed(), batches(), 0.6, method=Seen, **options)
    planned = kept_per_step("linear", 6, 0.6, report.total)
    assert {*asked} == {(step, 6) for step in range(1, 7)}
    assert kept == [report.total, *planned[:-1]]


def test_the_second_step_of_a_pruned_model_remembers_the_first() -> None:
    rates = []

    class Seen(SteadyFORCE):
        @classmethod
        def scores(cls, probe: Any) -> dict[str, Tensor]:
            past = probe.memory.get("steady_force")
            rates.append(probe.kept / past.kept if past else None)
            return super().scores(probe)

    model = Mixed()
    force_prune(model, batches(), 0.6, method="snip", progress=False)
    force_prune(model, batches(), 0.7, method=Seen, steps=4, progress=False)
    assert rates[0] is None
    assert rates[1] == 1  # the first step had weights enough
