"""Networks with closed gates, and what opens them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from state import assert_same, unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from force_plugin import SaliencyMethod, SparsityReport, force_prune, saliency
from force_plugin.methods import Measurements

NORMS = "normalisation weights"
SCALES = "branch scales"
Batch = tuple[Tensor, Tensor]
Join = Callable[..., Tensor]


def vectors() -> list[Batch]:
    inputs = torch.linspace(0, 9, 40, dtype=torch.float64).view(8, 5).sin()
    return [(inputs, torch.arange(8) % 4)]


def scored(
    model: nn.Module, method: str | type[SaliencyMethod] = "snip", **options: Any
) -> dict[str, Tensor]:
    return saliency(model, vectors(), method, **options)


def opened_by_hand(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in which these parameters are 1."""
    model = deepcopy(model)
    for name in names:
        nn.init.ones_(model.get_parameter(name))
    return model


def named_in(report: SparsityReport) -> dict[str, list[str]]:
    """The gates that a report names, by kind."""
    pattern = (
        r"gates opened while scoring: (\d+) ([a-z ]+) (?:of 0|of at most \S+), set to "
        r"(?:1|a random initialisation) \((.*)\)"
    )
    found = {}
    for text in report.warnings:
        if "gates opened" in text:
            match = re.fullmatch(pattern, text)
            assert match is not None, text
            count, kind, names = match.groups()
            assert kind not in found
            found[kind] = names.split(", ")
            assert len(found[kind]) == int(count)
    return found


def gates_of(
    model: nn.Module, batches: list[Batch] | None = None, **options: Any
) -> dict[str, list[str]]:
    """The gates that a pruning of a copy reports, by kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = force_prune(
            deepcopy(model),
            batches or vectors(),
            0.0,
            method="snip",
            progress=False,
            **options,
        )
    return named_in(report)


def assert_opens(
    model: nn.Module,
    names: Sequence[str],
    kind: str,
    *,
    method: str | type[SaliencyMethod] = "snip",
    **options: Any,
) -> None:
    """Scored is the network with exactly these gates at 1, and it stays as it is."""
    with unchanged(model):
        scores = scored(model, method, **options)
    expected = scored(opened_by_hand(model, names), method, open_gates=False, **options)
    assert_same(scores, expected)
    assert [name for name, score in scores.items() if not score.any()] == []
    assert gates_of(model, **options) == {kind: list(names)}


def assert_opens_nothing(model: nn.Module, **options: Any) -> None:
    with unchanged(model):
        scores = scored(model, **options)
    assert_same(scores, scored(model, open_gates=False, **options))
    assert gates_of(model, **options) == {}


class Block(nn.Module):
    """Two layers with a norm after each, around a skip connection."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = norm(6)
        self.second = nn.Linear(6, 6)
        self.gate: Any = norm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(self.second(torch.relu(self.norm(self.first(x)))))
        return x + y


def residual(norm: type[nn.Module] = nn.BatchNorm1d) -> Any:
    """A small network with one closed gate, in float64."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 6), Block(norm), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].gate.weight)
    return model


class Gated(nn.Module):
    """A branch and a parameter that may close it; the names do not tell.

    Args:
        gate: The parameter's values.
        join: Trunk, branch, gate and what else there is to one tensor.
        maps: Convolutions on maps of 6 channels instead of linear layers.
        more: Other modules, and values of other parameters, by name.
    """

    def __init__(
        self, gate: Tensor, join: Join, *, maps: bool = False, **more: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k1: nn.Module
        self.k3: nn.Module
        if maps:
            self.k1 = nn.Sequential(
                nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 6, 3, padding=1)
            )
            self.k2 = nn.Sequential(
                nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)
            )
            self.k3 = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
        else:
            self.k1 = nn.Linear(5, 6)
            self.k2 = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self.k3 = nn.Linear(6, 4)
        self.q7 = nn.Parameter(gate)
        self.join, self.more = join, list(more)
        for name, it in more.items():
            setattr(self, name, nn.Parameter(it) if isinstance(it, Tensor) else it)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.k1(x)
        more = [getattr(self, name) for name in self.more]
        y: Tensor = self.k3(self.join(x, self.k2(x), self.q7, *more))
        return y


def scaled(x: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return x + f * g


def gated_by(last: nn.Module, *, maps: bool = False) -> Gated:
    """A network with this module at the end of its branch."""
    ones = torch.ones(())
    return Gated(ones, lambda x, f, g, last: x + g * last(f), maps=maps, last=last)


class Dense(SaliencyMethod):
    """Scores a weight by itself: what the network was scored with."""

    steps = 1

    @staticmethod
    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight.clone()


def shuffled(
    count: int = 24, generator: torch.Generator | None = None
) -> DataLoader[Any]:
    data = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, dtype=torch.float64, generator=data)
    dataset = TensorDataset(inputs, torch.arange(count) % 4)
    return DataLoader(dataset, 8, shuffle=True, generator=generator)


class TrainThenEvaluate(SaliencyMethod):
    """The gradient in training mode, and what its batch statistics leave behind."""

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:
        first = probe.gradients()
        with probe.evaluation_mode():
            second = probe.gradients()
        return {name: first[name] + second[name] for name in first}

    @staticmethod
    def score(weight: Tensor, signal: Tensor) -> Tensor:
        return signal
