"""Rows on copies, averages and files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from works_with_rows.cases import (
    OPTIMIZERS,
    Case,
    Training,
    dense,
    owner,
    row,
    through_a_file,
)


@row("`copy.deepcopy`")
def copies(case: Case) -> None:
    case.train(copy.deepcopy(case.build()))


@row("`copy.deepcopy` in the middle of training, the copy trains on")
def copies_midway(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        training.go_on_with(copy.deepcopy(training.model))


@row("pickle")
def pickles(case: Case) -> None:
    case.train(pickle.loads(pickle.dumps(case.build())))


@row("`torch.save` and `torch.load` of the module, then `copy.deepcopy`")
def saves_module(case: Case) -> None:
    model = through_a_file(case.build(), weights_only=False)
    case.train(copy.deepcopy(model))


@row("`torch.save` and `torch.load(weights_only=True)` of the state dict")
def saves_state(case: Case) -> None:
    model = doubled(case.build())
    model.load_state_dict(through_a_file(case.build().state_dict()))
    case.train(model)


@row("restart: the state dicts into a fresh model (ours: `load_pruned_state_dict`)")
def restarts(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        fresh = doubled(dense())
        case.load(fresh, through_a_file(training.model.state_dict()))
        training.go_on_with(fresh)


@row("restart from a plain state dict, by `prune.remove` (ours: `make_permanent`)")
def restarts_plain(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        remove(case, training.model)
        fresh = doubled(dense())
        fresh.load_state_dict(through_a_file(training.model.state_dict()))
        case.hold(fresh)
        Training(case, fresh, name, start=training.by_hand.model).go_on()


def doubled(model: nn.Module) -> nn.Module:
    """Double a model's values, which a state dict then replaces."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def remove(case: Case, model: nn.Module) -> None:
    for name in case.masks:
        module, tensor = owner(model, name)
        if hasattr(module, f"{tensor}_orig"):
            prune.remove(module, tensor)


@row("timm's `ModelEmaV3`")
def averages_ema(case: Case) -> None:
    is_averaged(case, partial(ModelEmaV3, decay=0.5), ModelEmaV3.update)


@row("`swa_utils.AveragedModel`")
def averages_swa(case: Case) -> None:
    is_averaged(case, AveragedModel, AveragedModel.update_parameters)


@row("`swa_utils.AveragedModel(use_buffers=True)`")
def averages_buffers(case: Case) -> None:
    make = partial(AveragedModel, use_buffers=True)
    is_averaged(case, make, AveragedModel.update_parameters)


def is_averaged(
    case: Case, make: Callable[..., Any], update: Callable[[Any, Any], object]
) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name)
        models = (training.model, training.by_hand)
        averages = [make(model) for model in models]
        for _ in range(2):
            training.go_on()
            for average, model in zip(averages, models, strict=True):
                update(average, model)
        case.check(averages[0].module)
        outputs = [average.module.eval()(case.inputs) for average in averages]
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
