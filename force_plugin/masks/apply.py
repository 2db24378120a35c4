"""Masks of a model: read, apply, save, load. True = kept."""

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
    """Masks of a model that was pruned with :mod:`torch.nn.utils.prune`.

    Any method of that module counts, not only those of this package.

    Args:
        model: Any module.

    Returns:
        Bool tensors by parameter name (``"layer1.0.conv1.weight"``, whatever the model
        or a part of it is wrapped in), each of its parameter's shape and on its device,
        True = kept. Parameters that are not
        pruned are left out; a shared one comes once. Of a model that was sharded when
        it was pruned the masks are put together, for which every rank must call it.

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

    On a parameter that is pruned already, what either mask prunes is pruned
    afterwards.

    Args:
        model: Any module.
        masks: By parameter name, tensors of the parameter's shape on any device: bool
            (True = kept), or of another type with values 0 and 1. What has none stays
            as it is. Names may have what ``torch.compile`` (``_orig_mod.``),
            ``DataParallel`` (``module.``) and other wrappers add to them, or lack it.

    Raises:
        TypeError: ``masks`` is no mapping of tensors.
        MaskMismatchError: Names or shapes do not fit the model (the message says
            which), or a mask is sparse, has no values, or others than 0 and 1; the
            model is unchanged.
        ValueError: The model is sharded; it is unchanged.
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
    """A name, and the known one that has another prefix or none, where there is one."""
    plain = name.removesuffix("_orig").removesuffix("_mask")
    close = [
        own
        for own in known
        if f".{plain}".endswith(f".{own}") or f".{own}".endswith(f".{plain}")
    ]
    if not close:
        return repr(name)
    # 'module.10.weight' is rather '10.weight' than 'weight'.
    best = min(close, key=lambda own: abs(len(own) - len(plain)))
    return f"{name!r} (did you mean {best!r}?)"


def prune_with(
    masks: Iterable[tuple[Weight, Tensor]],
    method: type[SaliencyMethod] = SaliencyMethod,
) -> None:
    """Prune weights with bool masks, all of them or, after an error, none.

    Args:
        masks: Weights and their masks, of the same shapes.
        method: Class of the hook that PyTorch's reparametrisation gets.
    """
    pairs = list(masks)
    for weight, _ in pairs:
        check_names(weight)
    touched = [module for weight, _ in pairs for module, _ in weight.owners]
    with restored(touched, only_on_error=True):
        for weight, mask in pairs:
            # One copy for all owners, none of them the caller's.
            mask = mask.to(weight.dense.device, copy=True)
            for module, name in weight.owners:
                # Owners of a shared weight may have been pruned one by one before.
                earlier = pruned_so_far(module, name)
                removed = ~mask if earlier is None else earlier & ~mask
                hook = method(int(removed.count_nonzero()))
                left = mask if earlier is None else mask & earlier
                reparametrise(module, name, left, hook)


def checked_masks(
    masks: Mapping[str, Tensor], argument: str = "masks"
) -> dict[str, Tensor]:
    """Masks as bool tensors, or one clear error.

    Args:
        masks: By name.
        argument: What the error says that they came in.

    Raises:
        TypeError: It is no mapping of names to tensors.
        MaskMismatchError: It is empty, or a mask is sparse, has no values, or others
            than 0 and 1.
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
