"""Gates that an initialisation has closed, and what opens them while scoring.

Many networks start with residual branches multiplied by 0 (timm's ``zero_init_last``:
the last normalisation of a block has weight 0) or with a classifier of zeros. Behind
such a gate every gradient is 0, and a method that ranks by gradients prunes the whole
branch without having seen it. Scored is therefore the network with these gates open;
where none is closed, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from force_plugin.parameters import Weight, named_parameters


def open_gates(model: nn.Module, weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Values to score with, for the parameters that are closed gates.

    A closed gate is a parameter whose values are all exactly 0 and that multiplies what
    passes: a one-dimensional ``weight`` (of any normalisation), opened to 1, and a
    prunable weight, opened to the values that PyTorch initialises it with
    (:func:`torch.nn.init.kaiming_uniform_` with a = √5), drawn from a generator of its
    own with seed 0.

    Args:
        model: The network; it is not changed.
        weights: Its prunable weights.

    Returns:
        New tensors by parameter name, empty where no gate is closed.
    """
    prunable = {weight.name for weight in weights}
    generator = torch.Generator().manual_seed(0)
    opened = {}
    for name, weight in named_parameters(model).items():
        values = weight.dense.detach()
        gate = values.dim() == 1 and any(t == "weight" for _, t in weight.owners)
        if not (gate or name in prunable) or values.any():
            continue
        if name in prunable and values.dim() > 1:
            fresh = torch.empty(values.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            opened[name] = fresh.to(values)
        else:
            opened[name] = torch.ones_like(values)
    return opened


def describe(opened: dict[str, Tensor], weights: Sequence[Weight]) -> list[str]:
    """One sentence for each kind of gate that was opened, for the report."""
    prunable = {weight.name for weight in weights}
    kinds = {
        "normalisation weights of 0, set to 1": [
            n for n in opened if n not in prunable
        ],
        "prunable weights of 0, set to a random initialisation": [
            n for n in opened if n in prunable
        ],
    }
    return [
        f"gates opened while scoring: {len(names)} {kind} ({', '.join(names[:3])}"
        + (", ...)" if len(names) > 3 else ")")
        for kind, names in kinds.items()
        if names
    ]
