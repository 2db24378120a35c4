"""Networks to diagnose, and their diagnoses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin import Diagnosis, StageDiagnosis

Batch = tuple[Tensor, Tensor]
ONE_SHOT: dict[str, Any] = {"steps": 1, "progress": False, "on_collapse": "warn"}


class Block(nn.Module):
    """Two layers around a skip connection, which a norm of weight 0 closes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.second(torch.relu(self.first(x))))
        return x + y


class Crooked(nn.Module):
    """A network with one of each: closed gates, a dead layer, one that is not used.

    Args:
        dead: Whether the units of ``dead`` never fire.
        unused: Whether the outputs depend on ``aux``.
    """

    def __init__(self, *, dead: bool = True, unused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.body = nn.Sequential(Block(), nn.Dropout(0.1), Block())
        self.dead = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.aux = nn.Linear(6, 4)
        self.unused = unused
        if dead:
            nn.init.constant_(self.dead.bias, -100.0)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.body(self.stem(x))
        outputs: Tensor = self.head(x + torch.relu(self.dead(x)))
        return outputs if self.unused else outputs + self.aux(x)


def straight(*widths: int) -> nn.Sequential:
    """A network in whose way nothing stands, in float64."""
    torch.manual_seed(0)
    widths = widths or (5, 12, 8, 4)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def emptied(scores: Mapping[str, Tensor], sparsity: float) -> int:
    """Layers without a weight among the best, by a sort of all (score, position)."""
    flat = [
        (-float(value), layer, index)
        for layer, tensor in enumerate(scores.values())
        for index, value in enumerate(tensor.flatten())
    ]
    kept = int((1 - sparsity) * len(flat) + 1e-9)
    return len(scores) - len({layer for _, layer, _ in sorted(flat)[:kept]})


def made_up(
    names: Sequence[str] = ("stem", "body"),
    *,
    layers: int = 3,
    weights: int = 1000,
    method: str = "force",
    **found: Any,
) -> Diagnosis:
    """A diagnosis of a network that does not exist."""
    stages = tuple(
        StageDiagnosis(name, layers, weights, 1 / len(names), 0.0) for name in names
    )
    return Diagnosis(
        **{
            "parameters": weights * len(names) + 7,
            "prunable": weights * len(names),
            "method": method,
            "stages": stages,
            "gates": (),
            "silent": {},
            "hidden": (),
            "unused": (),
            "emptied": {0.9: (0, 0)},
            "small": {},
            **found,
        }
    )


def widest(diagnosis: Diagnosis) -> int:
    return max(map(len, str(diagnosis).splitlines()))
