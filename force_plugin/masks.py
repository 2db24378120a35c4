"""Masks of a model: read, apply, save, load. True = kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin.methods import SaliencyMethod
from force_plugin.parameters import Weight, named_parameters
from force_plugin.snapshot import restored

_FORMAT = "force_plugin masks"


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a model that was pruned with :mod:`torch.nn.utils.prune`.

    Any method of that module counts, not only those of this package.

    Args:
        model: Any module.

    Returns:
        Bool tensors by parameter name (``"layer1.0.conv1.weight"``), each of its
        parameter's shape and on its device, True = kept. Parameters that are not
        pruned are left out; a shared one comes once.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    pruned = {
        (id(module), hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    }
    return {
        name: weight.mask.clone()
        for name, weight in named_parameters(model).items()
        if weight.mask is not None
        and any((id(module), tensor) in pruned for module, tensor in weight.owners)
    }


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune a model in place with given masks.

    On a parameter that is pruned already, what either mask prunes is pruned
    afterwards.

    Args:
        model: Any module.
        masks: By parameter name, tensors of the parameter's shape on any device: bool
            (True = kept), or of another type with values 0 and 1.

    Raises:
        TypeError: ``masks`` is no mapping of tensors.
        ValueError: A name or a shape does not fit the model, or a mask holds other
            values than 0 and 1; the model is unchanged.
    """
    parameters = named_parameters(model)
    checked = _checked(masks)
    unknown = [name for name in checked if name not in parameters]
    if unknown:
        raise ValueError(
            f"masks: {len(unknown)} of {len(checked)} names are no parameters of the "
            f"model, the first is {unknown[0]!r}; the model's own begin with "
            f"{', '.join(list(parameters)[:3])}"
        )
    for name, mask in checked.items():
        expected = parameters[name].dense.shape
        if mask.shape != expected:
            raise ValueError(
                f"masks: {name} has shape {tuple(expected)} in the model, its mask "
                f"{tuple(mask.shape)}"
            )
    prune_with((parameters[name], mask) for name, mask in checked.items())


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
    owners = [module for weight, _ in pairs for module, _ in weight.owners]
    with restored(owners, only_on_error=True):
        for weight, mask in pairs:
            mask = mask.to(weight.dense.device)
            if weight.mask is not None:
                mask = mask & weight.mask
            left = weight.dense.numel() if weight.mask is None else weight.mask.sum()
            removed = int(left) - int(mask.count_nonzero())
            for module, name in weight.owners:
                method.apply(module, name, amount=removed, importance_scores=mask)


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks to a safetensors file, one bit a weight.

    Args:
        masks: As :func:`get_masks` returns them.
        path: File to write; its folder must exist.

    Raises:
        TypeError: ``masks`` is no mapping of tensors.
        ValueError: It is empty, or a mask holds other values than 0 and 1.
        FileNotFoundError: The folder does not exist.
    """
    checked = _checked(masks)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder does not exist; create it first")
    bits = {
        name: torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))
        for name, mask in checked.items()
    }
    shapes = {name: list(mask.shape) for name, mask in checked.items()}
    save_file(bits, path, {"format": _FORMAT, "shapes": json.dumps(shapes)})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read the masks that :func:`save_masks` wrote.

    Args:
        path: The file.

    Returns:
        Bool tensors by parameter name, on the CPU, True = kept.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no masks file, or it is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such masks file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path}: a safetensors file, but not one that save_masks wrote"
                )
            shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
            bits = {name: file.get_tensor(name).numpy() for name in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a masks file, or one that is cut short ({error})"
        ) from error
    return {
        name: torch.from_numpy(
            np.unpackbits(bits[name], count=int(np.prod(shape))).astype(bool)
        ).reshape(shape)
        for name, shape in shapes.items()
    }


def _checked(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as bool tensors, or one clear error."""
    if not isinstance(masks, Mapping):
        raise TypeError(
            "masks: expected a mapping of parameter names to tensors, got "
            f"{type(masks).__name__}"
        )
    if not masks:
        raise ValueError("masks: expected at least one mask, got an empty mapping")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"masks: expected a tensor for {name!r}, got {type(mask).__name__}"
            )
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"masks: {name} holds other values than 0 and 1")
    return {name: mask.bool() for name, mask in masks.items()}
