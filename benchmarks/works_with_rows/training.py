"""Rows on training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from works_with_rows.cases import (
    STEPS,
    Case,
    Losses,
    Training,
    dense,
    make_optimizer,
    row,
)


@row("frozen but for its head, `train()` and `eval()` in turns")
def is_frozen(case: Case) -> None:
    model, start = case.build(), dense()
    for one in (model, start):
        one.requires_grad_(False)
        one.get_classifier().requires_grad_(True)
    training = Training(case, model, start=start)
    for _ in range(2):
        training.go_on()


@row("`reset_classifier`, then pruned")
def resets_classifier(case: Case) -> None:
    model, start = dense(), dense()
    for one in (model, start):
        torch.manual_seed(1)
        one.reset_classifier(10)
    case.prune(model)
    Training(case, model, start=start).go_on()


@row("gradient accumulation")
def accumulates(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, losses = make_optimizer(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                inputs, targets = (tensor[half] for tensor in case.batch)
                loss = cross_entropy(model(inputs), targets) / 2
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        return losses

    case.alike(loop)


@row("gradients clipped by their norm")
def clips(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, norms = make_optimizer(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(case.inputs), case.batch[1]).backward()
            norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
        return norms

    case.alike(loop, atol=1e-4)
