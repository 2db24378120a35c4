"""Rows on several processes."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from works_with_rows.cases import (
    OPTIMIZERS,
    Case,
    Training,
    on_two_ranks,
    row,
)


@row("`nn.DataParallel`")
def runs_data_parallel(case: Case) -> None:
    model = case.build()
    case.train(model, nn.DataParallel(model))


@row("`DistributedDataParallel`, two processes")
@on_two_ranks
def runs_distributed(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name)
        training.go_on(DistributedDataParallel(training.model))


@row("FSDP2, `fully_shard`, two processes")
@on_two_ranks
def is_sharded(case: Case) -> None:
    for name in OPTIMIZERS:
        model = case.build()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        Training(case, model, name).go_on()
