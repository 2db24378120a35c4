"""What each rank does to train non-zeros with DDP, beside the masked model."""

from __future__ import annotations

from typing import Any

import timm
import torch
from processes import take_part
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from force_plugin import densify, execution_report, make_permanent, sparsify


def run(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(8, 12, 16, 20)
    ).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.random_unstructured(module, "weight", 0.8)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)[3 * rank :][:3]
    fast = sparsify(model, x, train=True, plan="sparse", progress=False)
    for one in (model, fast):
        parallel = DistributedDataParallel(one)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.05, momentum=0.9)
        for number in range(4):
            loss = cross_entropy(parallel(x + number), torch.arange(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    make_permanent(model, hold_zeros=False)
    return {
        "why_dense": execution_report(fast).why_dense,
        "found": densify(fast).state_dict(),
        "expected": model.state_dict(),
    }


if __name__ == "__main__":
    take_part(run)
