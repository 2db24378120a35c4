"""Loading the state dict of a pruned model into a new model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from force_plugin.errors import NotPrunedError
from force_plugin.masks.apply import checked_masks
from force_plugin.methods.base import SaliencyMethod
from force_plugin.model.module_names import CHECKPOINTED, fitted, name_some
from force_plugin.model.reparametrisation import reparametrise, show
from force_plugin.model.restoring import snapshot, tensor_as_it_is
from force_plugin.model.torch_internals import (
    metadata,
    parameter_order,
    reorder_parameters,
    set_metadata,
)
from force_plugin.model.weights import (
    mask_of,
    named_parameters,
)


@torch.inference_mode(False)
def load_pruned_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the state dict of a pruned model into a fresh, unpruned model, in place.

    Mirrors :meth:`torch.nn.Module.load_state_dict` with ``strict=True``, after pruning
    each parameter ``X`` that ``state_dict`` has as ``X_orig`` and ``X_mask``.
    Afterwards the model has the values and masks of the pruned model, and trains like
    the pruned model. Parameters stay the same objects, so that an existing optimizer
    goes on with them. If anything fails, Ctrl-C included, the model is unchanged, bit
    for bit. For this, memory holds the parameters and buffers twice during the call.

    Args:
        model: Any module with the pruned model's parameters. If the model is pruned
            itself, the new masks replace its own masks, and weights may come back.
        state_dict: State dict of a model that was pruned with
            :mod:`torch.nn.utils.prune`, by any method. Masks are bool (True = kept), or
            of another dtype with values 0 and 1. Values are converted to the model's
            dtypes and devices. Names may have or lack the prefixes of wrappers, such as
            ``module.`` of ``DistributedDataParallel`` or ``_orig_mod.`` of
            ``torch.compile``.

    Raises:
        TypeError: ``model`` is no module, ``state_dict`` no mapping of names, or a mask
            no tensor.
        ValueError: Nothing is pruned in ``state_dict``; load it with
            ``model.load_state_dict``. Or a mask has no values, or has values other than
            0 and 1. Or the model has no values yet (a lazy module, the meta device).
        RuntimeError: Names or shapes differ. This is PyTorch's own error. It lists
            every missing or unexpected name, and both shapes if they differ.
    """
    weights = named_parameters(model)
    for weight in weights.values():
        if is_lazy(weight.dense) or weight.dense.is_meta:
            raise ValueError(
                f"model: {weight.name} has no values yet (a lazy module, or the meta "
                "device); run one batch through the model, or materialise it, and load "
                "then"
            )
    state = _unwrapped(state_dict, model)
    pruned = {
        key.removesuffix("_orig")
        for key in state
        if key.endswith("_orig") and key.removesuffix("_orig") + "_mask" in state
    }
    if not pruned:
        raise NotPrunedError(
            "state_dict: expected that of a pruned model, with X_orig and X_mask for "
            f"each pruned parameter X, got {name_some(list(state)) or 'an empty one'}",
            "a model without masks is loaded with model.load_state_dict",
        )
    masks = {f"{name}_mask": state[f"{name}_mask"] for name in sorted(pruned)}
    masks = checked_masks(masks, "state_dict")
    paths = {m: f"{path}." if path else "" for path, m in _paths(model)}
    slots = [
        (weight, module, name)
        for weight in weights.values()
        for module, name in weight.owners
        if paths[module] + name in pruned
    ]
    with ExitStack() as undo:
        undo.callback(snapshot(model.modules()))
        for tensor in (*model.parameters(), *model.buffers()):
            undo.callback(tensor_as_it_is(tensor))
        # Prune with masks that keep everything, of the model's own shapes. Then
        # load_state_dict reports everything that does not fit in a single error.
        for weight, module, name in slots:
            earlier = mask_of(module, name)
            if earlier is None:
                removed = ~masks[f"{paths[module]}{name}_mask"]
                method = SaliencyMethod(int(removed.count_nonzero()))
                mask = torch.ones_like(weight.dense, dtype=torch.bool)
                reparametrise(module, name, mask, method)
            else:
                # Replace the mask instead of writing to it, as the owners of a shared
                # weight may share a mask too.
                module.register_buffer(f"{name}_mask", torch.ones_like(earlier))
        model.load_state_dict(state)
        for _, module, name in slots:
            show(module, name)
        # PyTorch's pruning puts a pruned parameter behind the module's others, and
        # optimizers number their state in this order. A state dict without metadata
        # comes from another kind of file (safetensors), which sorts by name.
        if metadata(state) is not None:
            places = {key: place for place, key in enumerate(state)}
            for _, module, _ in slots:
                path = paths[module]
                order = parameter_order(module)
                order.sort(key=lambda key: places.get(path + key, -1))
                reorder_parameters(module, order)
        undo.pop_all()


def _unwrapped(
    state_dict: Mapping[str, Any], model: nn.Module
) -> OrderedDict[str, Any]:
    """Return a copy of a state dict with the names of the model.

    The names may differ by the prefixes of wrappers.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict: expected a mapping as model.state_dict() returns it, got "
            f"{type(state_dict).__name__}"
        )
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names, got a {type(key).__name__}")
    values = model.state_dict(keep_vars=True)
    own = {_dense(key, values) for key in values}
    dense = {key: _dense(key, state_dict) for key in state_dict}
    names = fitted(dict.fromkeys(dense.values()), own)
    state = OrderedDict(
        (names[dense[key]] + key.removeprefix(dense[key]), value)
        for key, value in state_dict.items()
    )
    versions = metadata(state_dict)
    if versions is not None:
        # load_state_dict finds the version of each module's state in the metadata.
        paths = fitted(versions, [path for path, _ in _paths(model)])
        set_metadata(
            state, OrderedDict((paths[path], v) for path, v in versions.items())
        )
    return state


def _paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model, with their names in a state dict."""
    for path, module in model.named_modules():
        # The wrapper of activation checkpointing leaves itself out of state dicts.
        parts = (p for p in path.split(".") if p != CHECKPOINTED)
        yield ".".join(parts), module


def _dense(key: str, keys: Collection[str]) -> str:
    """Return the name that a value of a state dict has in an unpruned model."""
    for suffix, other in (("_orig", "_mask"), ("_mask", "_orig")):
        name = key.removesuffix(suffix)
        if name != key and f"{name}{other}" in keys:
            return name
    return key
