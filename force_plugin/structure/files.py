"""Write a model that lost channels to a file, and read it into a whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from force_plugin.errors import FileFormatError
from force_plugin.files import read_safetensors, write_whole
from force_plugin.masks.apply import apply_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.module_names import name_some, named_buffers, named_modules
from force_plugin.model.torch_internals import is_persistent, put_buffer, put_parameter
from force_plugin.model.weights import (
    Weight,
    mask_of,
    named_parameters,
)

_FORMAT = "force_plugin compact model"
_MASK = "mask of "


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a model that lost channels to a safetensors file.

    The file holds the values of parameters and buffers, masked values included. It also
    holds the masks, with one bit for each weight, and the sizes of all modules.

    Args:
        model: The model that :func:`force_plugin.compact` or
            :func:`force_plugin.snap_prune` returned, trained or not. Any other model
            works too.
        path: File to write; its folder must exist. An existing file is replaced in one
            step, so the path never holds a partial file.

    Raises:
        TypeError: ``model`` is no module.
        OSError: The file cannot be written, for example because the folder does not
            exist. An existing file is then unchanged.
    """
    weights = named_parameters(model)
    masks = {n: w.mask for n, w in weights.items() if w.mask is not None}
    values = _values(model).items()
    tensors = {name: value.cpu().contiguous() for name, value in values}
    for name, mask in masks.items():
        bits = np.packbits(mask.flatten().cpu().numpy())
        tensors[_MASK + name] = torch.from_numpy(bits)
    masked = any(map(_reparametrised, weights.values()))
    header = {
        "format": _FORMAT,
        "modules": json.dumps({name: _sizes(m) for name, m in named_modules(model)}),
        "permanent": json.dumps(bool(masks) and not masked),
    }
    header["sha256"] = _digest(header, tensors)
    write_whole(path, save(tensors, header))


def load_compact(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a file that :func:`save_compact` wrote into a whole model, in place.

    Args:
        model: The model with all its channels, newly made and not pruned, for example
            ``timm.create_model("resnet50", num_classes=10)``. Its devices, types and
            ``requires_grad`` stay.
        path: The file to read.

    Returns:
        ``model``, now smaller, with the values and masks of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        TypeError: ``model`` is no module.
        FileFormatError: :func:`save_compact` did not write the file, or the file is cut
            short. The model is unchanged.
        ValueError: The file belongs to another network, or the model is pruned. The
            model is unchanged.
    """
    header, tensors = _read(path)
    modules = json.loads(header["modules"])
    weights = named_parameters(model)
    _check(model, modules, weights, tensors, path)
    for name, module in named_modules(model):
        for key, value in modules[name][1].items():
            setattr(module, key, type(getattr(module, key))(value))
    masks = {}
    for name, weight in weights.items():
        old = weight.dense
        new = nn.Parameter(tensors[name].to(old), requires_grad=old.requires_grad)
        for module, key in weight.owners:
            put_parameter(module, key, new)
        if _MASK + name in tensors:
            bits = tensors[_MASK + name].numpy()
            flat = np.unpackbits(bits, count=new.numel()).astype(bool)
            masks[name] = torch.from_numpy(flat).view(new.shape)
    for name, (module, key) in _buffers(model).items():
        put_buffer(module, key, tensors[name].to(getattr(module, key)))
    if masks:
        apply_masks(model, masks)
        if json.loads(header["permanent"]):
            make_permanent(model)
    return model


def _sizes(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return a module's class and its attributes that are integers or rows of them."""
    sizes = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and (type(value) is int or _is_shape(value))
    }
    return type(module).__name__, sizes


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and all(type(item) is int for item in value)


def _reparametrised(weight: Weight) -> bool:
    return any(mask_of(*owner) is not None for owner in weight.owners)


def _buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and key of each buffer of the state dict, except masks."""
    return {
        name: (module, key)
        for name, (module, key) in named_buffers(model).items()
        if is_persistent(module, key)
        and not (key.endswith("_mask") and mask_of(module, key[:-5]) is not None)
    }


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Return the unmasked values of parameters, and the buffers of the state dict."""
    values = {name: w.dense.detach() for name, w in named_parameters(model).items()}
    for name, (module, key) in _buffers(model).items():
        values[name] = getattr(module, key)
    return values


def _read(path: str | Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; pass the path of one that save_compact wrote"
        )
    try:
        header, tensors = read_safetensors(path)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: no safetensors file, or one that is cut short ({error})"
        ) from error
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{path}: a safetensors file, but not one that save_compact wrote"
        )
    if header.get("sha256") != _digest(header, tensors):
        raise FileFormatError(
            f"{path}: its checksum is another one", "write it anew with save_compact"
        )
    return header, tensors


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in ("modules", "permanent"):
        digest.update(header.get(key, "").encode())
    for name in sorted(tensors):
        values = tensors[name].flatten()
        digest.update(f"{name} {values.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(
            values.view(torch.uint8).numpy().tobytes() if len(values) else b""
        )
    return digest.hexdigest()


def _check(
    model: nn.Module,
    modules: Mapping[str, Any],
    weights: Mapping[str, Weight],
    tensors: Mapping[str, Tensor],
    path: str | Path,
) -> None:
    """Raise ValueError unless the file holds this model or a smaller version of it."""
    pruned = [name for name, weight in weights.items() if weight.mask is not None]
    if pruned:
        raise ValueError(
            f"model: expected one that is not pruned, but {name_some(pruned)} is; make "
            "it anew, the masks are in the file"
        )
    own = {name: _sizes(module) for name, module in named_modules(model)}
    kinds = {name: kind for name, (kind, _) in own.items()}
    if kinds != {name: kind for name, (kind, _) in modules.items()}:
        theirs = {name: kind for name, (kind, _) in modules.items()}
        name = next(n for n in [*kinds, *theirs] if kinds.get(n) != theirs.get(n))
        raise ValueError(
            f"{path}: of another network than the model: {name or 'the model'} is "
            f"{theirs.get(name, 'missing')} in the file, and "
            f"{kinds.get(name, 'missing')} in the model"
        )
    misfits = [
        f"{name or 'the model'}'s {key} is {value} in the file, and "
        f"{own[name][1].get(key)} in the model"
        for name, (_, sizes) in modules.items()
        for key, value in sizes.items()
        if not _is_part(value, own[name][1].get(key))
    ]
    here = _values(model)
    there = {name for name in tensors if not name.startswith(_MASK)}
    misfits += [
        f"{name} is only in one of them" for name in sorted(here.keys() ^ there)
    ]
    misfits += [
        f"{name} is {tuple(tensors[name].shape)} in the file, and "
        f"{tuple(tensor.shape)} in the model"
        for name, tensor in here.items()
        if name in there and not _is_part(tensors[name].shape, tensor.shape)
    ]
    if misfits:
        raise ValueError(
            f"{path}: of another network than the model, or the model is smaller than "
            f"the one that it was made of: {misfits[0]}"
            + (f"; {len(misfits) - 1} more do not fit" if misfits[1:] else "")
        )


def _is_part(size: Any, whole: Any) -> bool:
    """Return whether a size, or each of several, is at most the whole model's size."""
    if isinstance(size, int):
        return isinstance(whole, int) and size <= whole
    return (
        whole is not None
        and not isinstance(whole, int)
        and len(size) == len(whole)
        and all(one <= other for one, other in zip(size, whole, strict=True))
    )
