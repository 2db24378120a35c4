"""Make a pruning permanent: plain parameters again, whose zeros stay 0 in training.

What is held is a parameter: its zeros are 0 after every step of an optimizer, whichever
modules own it by then. Modules note the zeros of their parameters too, so that copies
and pickles hold them, and what a state dict puts in the place of a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from force_plugin.errors import NotPrunedError
from force_plugin.masks.held_zeros import hold, zeros_of
from force_plugin.model.module_names import name_some
from force_plugin.model.reparametrisation import remove
from force_plugin.model.restoring import snapshot
from force_plugin.model.weights import (
    Weight,
    is_sharded,
    mask_of,
)
from force_plugin.parallel.ranks import Ranks
from force_plugin.parallel.shards import Shards


def make_permanent(model: nn.Module, hold_zeros: bool = True) -> None:
    """Turn a pruned model into a plain one with the pruned weights at 0, in place.

    Mirrors :func:`torch.nn.utils.prune.remove` for every pruned tensor of a model.
    Afterwards it has the dense model's own parameters, where they were in memory, and
    its state-dict keys, nothing is left to do in its forward pass, and an optimizer
    that was made before goes on with the same parameters. A weight that several modules
    share loses what any of them has pruned. If anything fails, Ctrl-C included, the
    model is bit for bit what it was; for that, the pruned parameters are held twice
    meanwhile.

    Training goes on from a checkpoint of such a model in a dense one, with this call
    once more: where no mask is found, the zeros of the weights are the masks. So a
    weight that is 0 and was not pruned, as in a head that starts at 0, gets the
    smallest number that there is (1.4e-45 in float32). That goes for all matrices and
    kernels, but not for the row of an embedding's ``padding_idx``.

        model.load_state_dict(checkpoint)
        make_permanent(model)

    On a model that ``fully_shard`` has sharded every rank must call it.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`; or, with
            ``hold_zeros``, one without masks that has matrices or kernels in which some
            weights are 0. Then these are held, and so is a convolution or linear layer
            whose weights are all 0.
        hold_zeros: Keep the pruned weights at 0, at the cost of one byte a weight:
            their gradients are 0, as under a mask, and whatever an optimizer makes of
            them (momentum from before, Muon) is undone after every step of any
            :class:`torch.optim.Optimizer`. What is held is the parameter, also in the
            modules of ``prepare_qat`` or others that take it over. A copy or an
            unpickled model holds its own. ``False``: they are trained as all others,
            but for those that an earlier call holds.

    Raises:
        TypeError: ``model`` is no module.
        NotPrunedError, ValueError: Nothing is pruned in it, or it was pruned and then
            sharded; it is unchanged.

    Warns:
        UserWarning: There is no mask, and some layers hold nothing but zeros: they are
            held at 0, as layers that lost every weight. Or tensors are held that are
            pruned only when they are named: an embedding, say, or an LSTM's.
    """
    shards = Shards(model, Ranks(model))
    parameters = list(shards.parameters.values())
    weights = [weight for weight in parameters if weight.mask is not None]
    if not hold_zeros:
        # Others with a mask are held by an earlier call.
        weights = [
            w for w in weights if any(mask_of(*owner) is not None for owner in w.owners)
        ]
    elif not weights:
        weights = _with_pruned_zeros(parameters, shards)
    if not weights:
        raise NotPrunedError(
            "make_permanent: expected a model pruned with torch.nn.utils.prune, or one "
            "whose matrices and kernels hold zeros among their weights, got one "
            "without any mask or zero"
        )
    with ExitStack() as undo:
        undo.callback(snapshot(model.modules()))
        for weight in weights:
            values = weight.local
            undo.callback(values.copy_, values.clone())
            pruned = torch.zeros_like(values, dtype=torch.bool)
            if weight.mask is None:
                pruned = _zeros_among(weight)
            for module, name in weight.owners:
                mask = mask_of(module, name)
                if mask is not None:
                    pruned |= mask == 0
                    # Written where they are: prune.remove lets go of memory that others
                    # may share, and of channels_last.
                    undo.callback(setattr, weight.dense, "data", values)
                    remove(module, name)
                    weight.dense.data = values.copy_(weight.dense.data)
            for zeros in zeros_of(weight):
                kept = shards.local(weight.name, zeros.kept)
                pruned |= kept.to(pruned.device) == 0
            values.masked_fill_(
                _zeros_among(weight) & ~pruned, _smallest_number(values)
            )
            # The products are -0 where a weight was negative, NaN where it was inf.
            values.masked_fill_(pruned, 0)
            if hold_zeros:
                hold(weight, ~pruned, shards, undo)
        for weight in parameters:
            if _is_weight(weight) and weight not in weights:
                values, zero = weight.local, _zeros_among(weight)
                if zero.any():
                    undo.callback(values.masked_fill_, zero, 0)
                    values.masked_fill_(zero, _smallest_number(values))
        undo.pop_all()


def _is_weight(weight: Weight) -> bool:
    """Whether its zeros are pruned weights, where no mask says otherwise."""
    dense = weight.dense
    return not is_lazy(dense) and dense.is_floating_point() and weight.weighs


def _zeros_among(weight: Weight) -> Tensor:
    """Where it is 0, but for the row of an embedding that stands for padding."""
    zero = weight.local == 0
    for module, _ in weight.owners:
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and not is_sharded(weight.dense):
            zero[padding] = False
    return zero


def _smallest_number(values: Tensor) -> float:
    """What stands for the 0 of a weight that was not pruned."""
    kind = torch.finfo(values.dtype)
    return kind.smallest_normal * kind.eps


@torch.no_grad()
def prune_in_place(masks: Iterable[tuple[Weight, Tensor]], shards: Shards) -> None:
    """Set weights to 0 and hold them there, all of them or, after an error, none.

    For sharded models: FSDP2 sets a module's parameters by their names, under which a
    reparametrisation keeps something else.

    Args:
        masks: Weights, and this rank's shards of their bool masks.
        shards: How they are divided.
    """
    with ExitStack() as undo:
        for weight, mask in masks:
            values = weight.local
            undo.callback(snapshot(module for module, _ in weight.owners))
            undo.callback(values.copy_, values.clone())
            values.masked_fill_(~mask, 0)
            hold(weight, mask, shards, undo)
        undo.pop_all()


def _with_pruned_zeros(parameters: Iterable[Weight], shards: Shards) -> list[Weight]:
    """The weights that hold zeros, if they seem to come from a pruning.

    Layers start with nothing but zeros too. So do matrices that are no layers' own, and
    these are left alone.
    """
    weights = [weight for weight in parameters if _is_weight(weight)]
    zeros = shards.totals.count(
        {weight.name: _zeros_among(weight) for weight in weights}
    )
    whole = {w.name for w in weights if zeros[w.name] == w.dense.numel()}
    found = [w for w in weights if zeros[w.name]]
    if all(weight.name in whole for weight in found):
        return []
    found = [w for w in found if w.prunable or w.name not in whole]
    before = "apply_masks(model, masks) before says what was pruned"
    if empty := [w.name for w in found if w.name in whole]:
        _warn(
            f"{name_some(empty)} hold nothing but zeros, and there is no mask: they "
            "are held at 0, as layers that lost every weight. A layer that starts at 0 "
            f"would not train; {before}"
        )
    if named := [w.name for w in found if not w.prunable]:
        _warn(
            f"{name_some(named)} hold zeros, and there is no mask: they are held at 0, "
            "as tensors that were pruned by their names (parameters=). Where they were "
            f"not, {before}"
        )
    return found


def _warn(said: str) -> None:
    warnings.warn(f"make_permanent: {said}", stacklevel=5)
