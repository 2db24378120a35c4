"""Networks that train as they do when they are masked by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from force_plugin.model.reparametrisation import PrunedTensor


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # Decay and momentum would revive what is pruned, if anything did.
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def assert_at_rest(model: nn.Module) -> None:
    """Nothing that a forward has made is left in a graph, or in use."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                assert type(value) is PrunedTensor, key
