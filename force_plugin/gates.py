"""Gates that an initialisation has closed, and what opens them while scoring.

Many networks start with residual branches multiplied by 0 (timm's ``zero_init_last``:
the last normalisation of a block has weight 0) or with a classifier of zeros. Behind
such a gate every gradient is 0, and a method that ranks by gradients prunes the whole
branch without having seen it. Scored is therefore the network with these gates open;
where none is closed, nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from force_plugin.parameters import Weight, name_some, named_parameters


def open_gates(model: nn.Module, weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Values to score with, for the parameters that are closed gates.

    A closed gate is a parameter whose values are all exactly 0 and that multiplies what
    passes: a one-dimensional ``weight`` (of any normalisation; the slope of a PReLU is
    none), opened to 1, and a prunable weight of more dimensions, opened to the values
    that PyTorch initialises it with (:func:`torch.nn.init.kaiming_uniform_` with
    a = √5), drawn from a generator of its own with seed 0.

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
        if not values.numel() or values.any():
            continue
        if values.dim() == 1 and any(
            tensor == "weight" and not isinstance(module, nn.PReLU)
            for module, tensor in weight.owners
        ):
            opened[name] = torch.ones_like(values)
        elif values.dim() > 1 and name in prunable:
            fresh = torch.empty(values.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            opened[name] = fresh.to(values)
    return opened


def describe(opened: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each kind of gate that was opened, for the report."""
    norms = [name for name, values in opened.items() if values.dim() == 1]
    weights = [name for name, values in opened.items() if values.dim() > 1]
    kinds = {
        "normalisation weights of 0, set to 1": norms,
        "prunable weights of 0, set to a random initialisation": weights,
    }
    return [
        f"gates opened while scoring: {len(names)} {kind} ({name_some(names)})"
        for kind, names in kinds.items()
        if names
    ]
