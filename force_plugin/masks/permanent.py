"""Permanent prunings: plain parameters again, whose zeros stay 0 in training.

The zeros of a held parameter are 0 after every step of an optimizer, whichever modules
own the parameter by then. Modules also note the zeros of their parameters. So copies,
pickles, and parameters that a state dict puts in place hold these zeros too.
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
    """Turn a pruned model into a plain model with the pruned weights at 0, in place.

    Mirrors :func:`torch.nn.utils.prune.remove` for every pruned tensor of a model.
    Afterwards the model has plain parameters, in the memory where they were, and the
    state-dict keys of the dense model. Its forward pass does no extra work. An existing
    optimizer goes on with the same parameters. If several modules share a weight, the
    weight loses the entries that any of these modules has pruned. If anything fails,
    Ctrl-C included, the model is unchanged, bit for bit. For this, memory holds the
    pruned parameters twice during the call.

    To go on training from a checkpoint of a permanently pruned model, load the
    checkpoint into a dense model, and call this function again:

        model.load_state_dict(checkpoint)
        make_permanent(model)

    If the model has no masks, the zeros of its weights are the masks. Therefore each 0
    that was not pruned, as in a head that starts at 0, becomes the smallest number of
    its dtype (1.4e-45 in float32). This goes for all matrices and kernels, but not for
    the row of an embedding's ``padding_idx``.

    If ``fully_shard`` has sharded the model, every rank must call this function.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`. With
            ``hold_zeros``, it may also be a module without masks whose matrices or
            kernels have zeros among their weights. These zeros are then held, also in a
            convolution or linear layer whose weights are all 0.
        hold_zeros: Keep the pruned weights at 0 (default: True), at the cost of one
            byte a weight. Their gradients are 0, as under a mask. After every step of
            any :class:`torch.optim.Optimizer` they are set to 0 again, as momentum from
            before or Muon may change them. The zeros belong to the parameter, and also
            hold in modules that take the parameter over, such as the modules of
            ``prepare_qat``. Copies and unpickled models hold their own zeros.
            ``False``: pruned weights are trained like all others, except the zeros that
            an earlier call holds.

    Raises:
        TypeError: ``model`` is no module.
        NotPrunedError, ValueError: Nothing is pruned in the model, or the model was
            pruned and then sharded. The model is unchanged.

    Warns:
        UserWarning: The model has no masks, and some layers hold nothing but zeros.
            They are held at 0, as layers that lost every weight. Or zeros are held in
            tensors that are pruned only by name, such as those of an embedding or an
            LSTM.
    """
    shards = Shards(model, Ranks(model))
    parameters = list(shards.parameters.values())
    weights = [weight for weight in parameters if weight.mask is not None]
    if not hold_zeros:
        # A weight with a mask but without a hook is held by an earlier call.
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
                    # Write the values in place. prune.remove would replace memory that
                    # other tensors may share, and would lose channels_last.
                    undo.callback(setattr, weight.dense, "data", values)
                    remove(module, name)
                    weight.dense.data = values.copy_(weight.dense.data)
            for zeros in zeros_of(weight):
                kept = shards.local(weight.name, zeros.kept)
                pruned |= kept.to(pruned.device) == 0
            values.masked_fill_(
                _zeros_among(weight) & ~pruned, _smallest_number(values)
            )
            # A product with the mask is -0 for a negative weight, and NaN for an inf.
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
    """Whether zeros of a parameter count as pruned weights if there is no mask."""
    dense = weight.dense
    return not is_lazy(dense) and dense.is_floating_point() and weight.weighs


def _zeros_among(weight: Weight) -> Tensor:
    """Return where a weight is 0, except the padding row of an embedding."""
    zero = weight.local == 0
    for module, _ in weight.owners:
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and not is_sharded(weight.dense):
            zero[padding] = False
    return zero


def _smallest_number(values: Tensor) -> float:
    """Return the value that replaces a 0 in a weight that was not pruned."""
    kind = torch.finfo(values.dtype)
    return kind.smallest_normal * kind.eps


@torch.no_grad()
def prune_in_place(masks: Iterable[tuple[Weight, Tensor]], shards: Shards) -> None:
    """Set pruned weights to 0 and hold them at 0. After an error, no weight is changed.

    This serves for sharded models. FSDP2 sets a module's parameters by their names, and
    a reparametrisation would keep another tensor under the name of a parameter.

    Args:
        masks: Pairs of a weight and this rank's shard of its bool mask.
        shards: The division of parameters among the processes.
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
    """Return the weights with zeros, if the zeros seem to come from a pruning.

    A layer may also start with nothing but zeros. If no weight is partly zero, no
    weight is returned. A matrix that belongs to no layer may start with zeros too, and
    is not returned if all of its values are 0.
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
