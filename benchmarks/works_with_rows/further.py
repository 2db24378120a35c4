"""Rows on further pruning of a pruned model."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from force_plugin import (
    force_prune,
    get_masks,
)
from works_with_rows.cases import (
    OPTIMIZERS,
    Case,
    Masks,
    Training,
    row,
)
from works_with_rows.copies import remove


@row("pruned again by `force_prune`, to 90 %")
def prunes_again(case: Case) -> None:
    model = case.build()
    Training(case, model, masks=prune_more(case, model)).go_on()


@row("pruned again by `prune.global_unstructured(amount=0.5)`")
def prunes_again_by_hand(case: Case) -> None:
    model = case.build()
    prune.global_unstructured(linear_weights(model), prune.L1Unstructured, amount=0.5)
    Training(case, model, masks=only_more(case, model)).go_on()


@row("`prune.remove`, then pruned again by `force_prune`")
def prunes_removed(case: Case) -> None:
    model = case.build()
    remove(case, model)
    Training(case, model, masks=prune_more(case, model)).go_on()


@row("pruned again in the middle of training, the optimizer goes on")
def prunes_gradually(case: Case) -> None:
    for name in OPTIMIZERS:
        training = Training(case, case.build(), name).go_on()
        training.by_hand.masks = prune_more(case, training.model)
        training.go_on()


def prune_more(case: Case, model: nn.Module) -> Masks:
    force_prune(model, [case.batch], 0.9, steps=2, progress=False)
    return only_more(case, model)


def only_more(case: Case, model: nn.Module) -> Masks:
    masks = get_masks(model)
    if any((masks[name] & ~mask).any() for name, mask in case.masks.items()):
        raise AssertionError("the new masks keep what was pruned before")
    return masks


def linear_weights(model: nn.Module) -> list[tuple[nn.Linear, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
