"""Rows on optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.optim
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import Optimizer

from works_with_rows.cases import (
    OPTIMIZERS,
    Case,
    Training,
    dense,
    row,
)


@row("training with SGD with momentum, AdamW, Lion and Muon")
def trains(case: Case) -> None:
    for name in OPTIMIZERS:
        Training(case, case.build(), name).go_on()


@row("pruned in the middle of training with each of these four")
def prunes_midway(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, dense(), name, masks={}).go_on()
        case.prune(training.model)
        training.by_hand.masks = case.masks
        training.go_on()


@row("every optimizer of `torch.optim`, new or with momentum from before")
def steps_of_torch(case: Case) -> None:
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        # SparseAdam needs gradients that are sparse tensors.
        if isinstance(kind, type) and name not in ("Optimizer", "SparseAdam"):
            stays_zero(case, partial(make_of_torch, kind))


def make_of_torch(kind: Any, model: nn.Module) -> Optimizer:
    matrices_only = kind.__name__ == "Muon"
    some = [p for p in model.parameters() if p.ndim == 2 or not matrices_only]
    optimizer: Optimizer = kind(some, lr=0.01)
    return optimizer


@row("every optimizer of timm's factory, new or with momentum from before")
def steps_of_timm(case: Case) -> None:
    make = timm.optim.create_optimizer_v2
    for name in timm.optim.list_optimizers():
        # Other optimizers need a package for GPUs; Kron compiles for minutes.
        info = timm.optim.get_optimizer_info(name)
        if not isinstance(info.opt_class, str) and "kron" not in name:
            stays_zero(case, partial(make, opt=name, lr=0.01, weight_decay=0.05))


def stays_zero(case: Case, make: Callable[..., Optimizer]) -> None:
    model = case.build()
    optimizer = make(model)
    for _ in range(2):
        step_by_closure(case, model, optimizer)
    case.check(model)

    model = dense()
    optimizer = make(model)
    step_by_closure(case, model, optimizer)
    case.prune(model)
    for _ in range(2):
        step_by_closure(case, model, optimizer)
    case.check(model)


def step_by_closure(case: Case, model: nn.Module, optimizer: Optimizer) -> None:
    twice = getattr(optimizer, "is_second_order", False)

    def closure() -> Any:  # a tensor, where PyTorch says float
        optimizer.zero_grad()
        loss = cross_entropy(model(case.inputs), case.batch[1])
        loss.backward(create_graph=twice)
        return loss

    optimizer.step(closure)


@row("parameters in the dense model's order (what optimizer checkpoints go by)")
def keeps_order(case: Case) -> None:
    names = [name.removesuffix("_orig") for name, _ in case.build().named_parameters()]
    if names != [name for name, _ in dense().named_parameters()]:
        raise AssertionError("another order")
