"""Reading the masks of a model, and applying masks to a model. True = kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from force_plugin.errors import MaskMismatchError
from force_plugin.methods.base import SaliencyMethod
from force_plugin.model.module_names import fitted, name_some
from force_plugin.model.reparametrisation import reparametrise
from force_plugin.model.restoring import restored
from force_plugin.model.weights import (
    Weight,
    is_sharded,
    named_parameters,
    pruned_so_far,
    whole_of,
)
from force_plugin.model.weights_to_prune import check_names


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model that was pruned with :mod:`torch.nn.utils.prune`.

    The model may be pruned by any method of that module, also by methods outside this
    package.

    Args:
        model: Any module.

    Returns:
        Bool tensors by parameter name, True = kept, each with the shape and device of
        its parameter. Names are as in ``"layer1.0.conv1.weight"``, also if the model or
        a part of it is wrapped. Parameters that are not pruned are left out. A
        parameter that several modules share has a single mask. If the model was sharded
        when it was pruned, the masks are put together, and every rank must call this
        function.

    Raises:
        TypeError: ``model`` is no module.
    """
    return {
        name: whole_of(weight.mask).clone()
        for name, weight in named_parameters(model).items()
        if weight.mask is not None
    }


@torch.inference_mode(False)
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune a model in place with given masks.

    If a parameter is pruned already, a weight stays only if both masks keep it.

    Args:
        model: Any module.
        masks: By parameter name, tensors of the parameter's shape on any device: bool
            (True = kept), or another dtype with values 0 and 1. A parameter without a
            mask is not changed. Names may have or lack the prefixes of wrappers, such
            as ``_orig_mod.`` of ``torch.compile`` or ``module.`` of ``DataParallel``.

    Raises:
        TypeError: ``masks`` is no mapping of tensors.
        MaskMismatchError: Names or shapes do not fit the model (the message says
            which), or a mask is sparse, has no values, or has values other than 0 and
            1. The model is unchanged.
        ValueError: The model is sharded. The model is unchanged.
    """
    parameters = named_parameters(model)
    checked = checked_masks(masks)
    own = fitted(checked, parameters)
    checked = {own[name]: mask for name, mask in checked.items()}
    misfits = []
    unknown = [name for name in checked if name not in parameters]
    if unknown:
        shown = [_with_closest(name, parameters) for name in unknown[:3]]
        misfits.append(
            f"{len(unknown)} of {len(checked)} names are no parameters of the model: "
            f"{name_some([*shown, *unknown[3:]])}; the model's own begin with "
            f"{', '.join(list(parameters)[:3])}"
        )
    others = [
        f"{name} {tuple(mask.shape)} instead of {tuple(parameters[name].dense.shape)}"
        for name, mask in checked.items()
        if name in parameters and mask.shape != parameters[name].dense.shape
    ]
    if others:
        misfits.append(
            f"{len(others)} of {len(checked)} masks have another shape than in the "
            f"model: {name_some(others)}"
        )
    if misfits:
        raise MaskMismatchError(f"masks: {'; '.join(misfits)}")
    sharded = [name for name in checked if is_sharded(parameters[name].dense)]
    if sharded:
        raise ValueError(
            f"model: expected one that is not sharded, but {name_some(sharded)} is; "
            "apply the masks before fully_shard is called"
        )
    prune_with((parameters[name], mask) for name, mask in checked.items())


def _with_closest(name: str, known: Iterable[str]) -> str:
    """Return a name for a message, with the known name that has another prefix."""
    plain = name.removesuffix("_orig").removesuffix("_mask")
    close = [
        own
        for own in known
        if f".{plain}".endswith(f".{own}") or f".{own}".endswith(f".{plain}")
    ]
    if not close:
        return repr(name)
    # For 'module.10.weight', '10.weight' is closer than 'weight'.
    best = min(close, key=lambda own: abs(len(own) - len(plain)))
    return f"{name!r} (did you mean {best!r}?)"


def prune_with(
    masks: Iterable[tuple[Weight, Tensor]],
    method: type[SaliencyMethod] = SaliencyMethod,
) -> None:
    """Prune weights with bool masks. After an error, no weight is pruned.

    Args:
        masks: Pairs of a weight and a mask of its shape.
        method: Class of the hook for PyTorch's reparametrisation.
    """
    pairs = list(masks)
    for weight, _ in pairs:
        check_names(weight)
    touched = [module for weight, _ in pairs for module, _ in weight.owners]
    with restored(touched, only_on_error=True):
        for weight, mask in pairs:
            # All owners share a copy, so that the caller's mask stays the caller's.
            mask = mask.to(weight.dense.device, copy=True)
            for module, name in weight.owners:
                # The owners of a shared weight may have different masks from before.
                earlier = pruned_so_far(module, name)
                removed = ~mask if earlier is None else earlier & ~mask
                hook = method(int(removed.count_nonzero()))
                left = mask if earlier is None else mask & earlier
                reparametrise(module, name, left, hook)


def checked_masks(
    masks: Mapping[str, Tensor], argument: str = "masks"
) -> dict[str, Tensor]:
    """Return masks as bool tensors, or raise a clear error.

    Args:
        masks: Masks by name.
        argument: Name of the argument that holds the masks, for the message.

    Raises:
        TypeError: ``masks`` is no mapping of names to tensors.
        MaskMismatchError: ``masks`` is empty, or a mask is sparse, has no values, or
            has values other than 0 and 1.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"{argument}: expected a mapping of parameter names to tensors, got "
            f"{type(masks).__name__}"
        )
    if not masks:
        raise MaskMismatchError(
            f"{argument}: expected at least one mask, got an empty mapping"
        )
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(
                f"{argument}: expected parameter names, got a {type(name).__name__}"
            )
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"{argument}: expected a tensor for {name!r}, got {type(mask).__name__}"
            )
        if mask.layout != torch.strided or mask.is_meta:
            raise MaskMismatchError(
                f"{argument}: {name} has layout {mask.layout} on device {mask.device}; "
                "expected a dense tensor with values",
                "as .to_dense() makes of a sparse one",
            )
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise MaskMismatchError(
                f"{argument}: {name} holds other values than 0 and 1"
            )
    return {name: mask.bool() for name, mask in masks.items()}
