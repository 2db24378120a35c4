"""Copy a model, remove channels from the copy, and make the copy the smaller model.

The ``grad`` of each parameter of a copy holds the positions of the parameter's values.
torch-pruning cuts ``grad`` along with the parameter. The remaining positions give the
smaller model its values bit for bit, masked values included, in their own type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.errors import CompactionError, MaskMismatchError
from force_plugin.masks.apply import prune_with
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.registered import own_buffers, own_parameters
from force_plugin.model.reparametrisation import remove
from force_plugin.model.restoring import restored
from force_plugin.model.torch_internals import REGISTRIES, put_buffer, put_parameter
from force_plugin.model.weights import (
    HELD,
    Weight,
    is_scripted,
    is_sharded,
    mask_of,
    named_parameters,
)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy without masks: dense parameters, float64, evaluation mode.

    Raises:
        CompactionError: A part of the model is TorchScript.
        MaskMismatchError: A mask holds other values than 0 and 1.
        ValueError: The model is sharded.
    """
    for name, module in model.named_modules():
        if is_scripted(module):
            raise CompactionError(
                f"model: expected one in Python, whose channels can be followed, but "
                f"{name} is TorchScript",
                "put what it was made of in its place",
            )
    weights = named_parameters(model).values()
    for weight in weights:
        if is_sharded(weight.dense):
            raise ValueError(
                f"model: expected one that is not sharded, but {weight.name} is; take "
                "channels out before fully_shard is called"
            )
        for owner in weight.owners:
            mask = mask_of(*owner)
            if mask is not None and not ((mask == 0) | (mask == 1)).all():
                raise MaskMismatchError(
                    f"mask of {weight.name}: expected 0 and 1, got others"
                )
    result = deep_copy(model)
    with torch.no_grad():
        for weight in weights:
            for owner, (module, name) in zip(
                weight.owners, slots_in(result, model, weight), strict=True
            ):
                vars(module).pop(HELD, None)
                if mask_of(*owner) is not None:
                    remove(module, name)
                    getattr(module, name).data = weight.dense.detach().clone()
    result = result.double().eval()
    for parameter in result.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return result


def deep_copy(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy of a model, which may hold results of a forward pass, as in prune.

    :func:`copy.deepcopy` refuses a tensor that has a graph. The copy gets the values of
    the tensor without the graph. An attribute that cannot be copied is shared with the
    model, for example a settings object that refuses to be written to.

    Args:
        model: The model.
        memo: Objects that the copy shares with the model, by identity.
    """
    with restored(model.modules()), torch.no_grad():
        for module in model.modules():
            for attributes in (vars(module), *vars(module).values()):
                for key, value in _results_in(attributes):
                    dict.__setitem__(attributes, key, value.detach())
        try:
            return copy.deepcopy(model, {**(memo or {})})
        except Exception:
            shared = {**(memo or {})}
            for module in reversed([*model.modules()]):  # children first
                for key, value in vars(module).items():
                    own = key in REGISTRIES
                    if not own and not _can_be_copied(value, shared):
                        shared[id(value)] = value
            return copy.deepcopy(model, shared)


def _can_be_copied(value: Any, shared: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, {**shared})
    except Exception:
        return False
    return True


def _results_in(attributes: object) -> list[tuple[Any, Tensor]]:
    if not isinstance(attributes, dict):
        return []
    return [
        (key, value)
        for key, value in dict.items(attributes)  # a subclass may redefine items
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


def slots_in(
    other: nn.Module, model: nn.Module, weight: Weight
) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of a model's copy that own a weight, and its name in each."""
    names = {module: name for name, module in model.named_modules()}
    for module, name in weight.owners:
        yield other.get_submodule(names[module]), name


def number_values(model: nn.Module) -> None:
    """Write the position of each value of a parameter into the parameter's ``grad``."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.grad = torch.arange(
                parameter.numel(), dtype=parameter.dtype, device=parameter.device
            ).view_as(parameter)


def places(module: nn.Module, name: str) -> Tensor:
    """Return the positions that a cut parameter's values had in the whole copy."""
    parameter = own_parameters(module).get(name)
    if parameter is None or parameter.grad is None:
        return torch.empty(0, dtype=torch.int64)
    return parameter.grad.to(torch.int64)


@torch.no_grad()
def fill(cut: nn.Module, source: nn.Module) -> None:
    """Copy the values of a whole model into a cut model."""
    values = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in cut.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            at = parameter.grad.to(torch.int64)
            parameter.copy_(values[name].flatten()[at.flatten()].view_as(parameter))


def rebuilt(model: nn.Module, cut: nn.Module) -> nn.Module:
    """Return a cut copy with the values, types, masks and modes of the original.

    Args:
        model: The original, which is not changed.
        cut: The :func:`plain_copy` of the original, numbered and cut. It is changed and
            returned.
    """
    originals = dict(model.named_modules())
    masks = []
    for weight in named_parameters(model).values():
        slots = list(slots_in(cut, model, weight))
        if not weight.dense.is_floating_point():
            continue
        at = places(*slots[0])
        made = nn.Parameter(
            weight.dense.detach().flatten()[at.flatten()].view(at.shape),
            weight.dense.requires_grad,
        )
        for module, name in slots:
            put_parameter(module, name, made)
        if weight.mask is not None:
            mask = weight.mask.to(at.device).flatten()[at.flatten()].view(at.shape)
            pruned = any(mask_of(*owner) is not None for owner in weight.owners)
            masks.append((weight.name, mask, pruned))
    for name, module in cut.named_modules():
        original = originals[name]
        module.training = original.training
        own = own_buffers(original)
        for key, buffer in own_buffers(module).items():
            if key in own:
                put_buffer(module, key, buffer.to(own[key].dtype))
    found = named_parameters(cut)
    pairs = [(found[name], mask) for name, mask, _ in masks]
    prune_with(pairs)
    if masks and not any(pruned for *_, pruned in masks):
        make_permanent(cut)
    return cut


def tell_features(model: nn.Module, small: nn.Module) -> None:
    """Correct a timm model's attributes that count the inputs of its classifier."""
    classifiers = [
        getattr(one, "get_classifier", lambda: None)() for one in (model, small)
    ]
    widths = [getattr(one, "in_features", None) for one in classifiers]
    for key in ("num_features", "head_hidden_size"):
        if widths[0] is not None and getattr(small, key, None) == widths[0]:
            setattr(small, key, widths[1])
