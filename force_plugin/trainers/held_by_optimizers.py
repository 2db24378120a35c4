"""Keep the zeros of any optimizer's weights, from the optimizer's first step on."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from force_plugin.masks.apply import apply_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.module_names import name_some
from force_plugin.trainers.initial_weights import say, weights_of

# A holder lives as long as its optimizer, and keeps zeros as long as it lives.
_holders: WeakKeyDictionary[Optimizer, nn.Module] = WeakKeyDictionary()


@torch.no_grad()
def hold_from_first_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Keep the zeros of an optimizer's weights from its first step on.

    The function is a pre-hook for the step of any optimizer.

    Raises:
        RuntimeError: The optimizer has weights, and none of them is partly 0.
    """
    if optimizer in _holders:
        return
    holder = _holders[optimizer] = nn.Module()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = weights_of((f"weight{i}", p) for i, p in enumerate(parameters))
    if not weights:
        return
    for name, weight in weights.items():
        holder.register_parameter(name, weight)
    masks = {name: weight != 0 for name, weight in weights.items()}
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    total = sum(weight.numel() for weight in weights.values())
    held = total - sum(kept.values())
    # A tensor that is all 0 may start at 0 without pruning.
    if not any(0 < kept[name] < weight.numel() for name, weight in weights.items()):
        raise RuntimeError(
            "force_plugin.hold: expected pruned weights at the first step of "
            f"{type(optimizer).__name__}, got {len(weights)} tensors of which none has "
            "zeros among its weights; start from pruned weights, by --initial-weights "
            "FILE before the script or an option of its own, as timm's "
            "--initial-checkpoint FILE"
        )
    apply_masks(holder, {n: m for n, m in masks.items() if kept[n] < m.numel()})
    make_permanent(holder)
    for name, weight in weights.items():
        # The gradients of this step were computed before the zeros were noted.
        if weight.grad is not None:
            weight.grad.masked_fill_(~masks[name], 0)
    empty = [tuple(w.shape) for name, w in weights.items() if not kept[name]]
    say(
        f"{held:,} of {total:,} weights are 0 ({held / total:.2%}) and stay 0; "
        f"{len(empty)} of {len(kept)} tensors hold nothing else"
    )
    if empty:
        say(
            f"warning: tensors of shapes {name_some([*map(str, empty)])} are all 0. "
            "They lost every weight, or start at 0 and will not train: then write the "
            "file from the model that the script makes"
        )
