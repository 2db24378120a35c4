"""What each of two ranks sees of SNAP-it and of importances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from channel_sets import (
    NETWORKS,
    Batch,
    chain,
    images,
    outputs_group,
    residual,
    snapped,
)
from processes import take_part
from state import failed
from torch.nn.parallel import DistributedDataParallel

from force_plugin import SaliencyImportance


class Broken(list[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        raise OSError("the disk is gone")


def halves(rank: int) -> list[Batch]:
    return [
        (x[rank * 3 : rank * 3 + 3], y[rank * 3 : rank * 3 + 3]) for x, y in images(2)
    ]


def run(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, (build, _) in NETWORKS.items():
        small = snapped(build(), halves(rank), 0.6, steps=2, batches=2)
        seen[name] = small.state_dict()
    wrapped = DistributedDataParallel(residual())
    seen["wrapped"] = snapped(wrapped, halves(rank), 0.6).state_dict()
    model = residual()
    torch.manual_seed(10 + rank)
    small = snapped(model, halves(rank), 0.6, method="random")
    seen["random"] = small.state_dict()
    importance = SaliencyImportance(model, halves(rank), "snip")
    seen["importance"] = {"0": importance(outputs_group(model, "0", [3, 1]))}
    loader = Broken(images()) if rank == 1 else halves(rank)
    seen["fails"] = failed(lambda: snapped(model, loader, 0.6), model)
    seen["sparsity"] = failed(
        lambda: snapped(model, halves(rank), 0.4 + 0.1 * rank, steps=0), model
    )
    other = chain(seed=rank)
    seen["weights"] = failed(lambda: snapped(other, halves(rank), 0.4, steps=0), other)
    dist.barrier()
    return seen


if __name__ == "__main__":
    take_part(run)
