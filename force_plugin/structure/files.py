"""Write a model to a file without its pruned weights, and read the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    is_sharded,
    mask_of,
    named_parameters,
)
from force_plugin.structure.gaps import decode, encode

_FORMAT = "force_plugin sparse model"
_GAPS = "gaps of "
# Files of versions before 0.2 have all values, and masks with one bit for each weight.
_OLDER = "force_plugin compact model"
_BITS = "mask of "


def save_sparse(model: nn.Module, path: str | Path) -> None:
    """Write a model to a safetensors file without the weights that were pruned.

    A pruned parameter is written as its kept values, and a byte or two for the position
    of each. So is a matrix or kernel without a mask that has so many zeros that this is
    shorter. The file also holds all other parameters, the buffers of the state dict,
    the masks, and the sizes of all modules. The documentation has the format.

    Args:
        model: Any model with masks, with a permanent pruning or without pruning. It may
            have lost channels to :func:`force_plugin.compact` or
            :func:`force_plugin.snap_prune`. The model stays as it is.
        path: File to write; its folder must exist. An existing file is replaced in one
            step, so the path never holds a partial file.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``fully_shard`` has sharded the model.
        OSError: The file cannot be written, for example because the folder does not
            exist. An existing file is then unchanged.
    """
    weights = _whole_parameters(model)
    tensors, sparse = {}, {}
    for name, values in _values(model).items():
        tensors[name] = values.cpu().contiguous()
        mask = weights[name].mask if name in weights else None
        if mask is None and (name not in weights or values.dim() < 2):
            continue
        kept = _has_bits(tensors[name]) if mask is None else mask.cpu().bool()
        short = {name: tensors[name][kept], _GAPS + name: encode(kept)}
        if mask is not None or _bytes(short) < _bytes({name: tensors[name]}):
            tensors |= short
            sparse[name] = {"shape": [*values.shape], "masked": mask is not None}
    header = {
        "format": _FORMAT,
        "modules": json.dumps({name: _sizes(m) for name, m in named_modules(model)}),
        "sparse": json.dumps(sparse),
        "permanent": json.dumps(not any(map(_reparametrised, weights.values()))),
    }
    header["sha256"] = _digest(header, tensors)
    write_whole(path, save(tensors, header))


def load_sparse(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a file that :func:`save_sparse` wrote into a whole model, in place.

    The values of pruned weights are 0 afterwards, under masks too.

    Args:
        model: The model with all its channels, newly made and not pruned, for example
            ``timm.create_model("resnet50", num_classes=10)``. Its devices, types and
            ``requires_grad`` stay.
        path: The file to read.

    Returns:
        ``model``, with the values and masks of the file. It is smaller now if the saved
        model had lost channels.

    Raises:
        FileNotFoundError: The file does not exist.
        TypeError: ``model`` is no module.
        FileFormatError: :func:`save_sparse` did not write the file, or the file is cut
            short. The model is unchanged.
        ValueError: The file belongs to another network, or the model is pruned, or
            ``fully_shard`` has sharded it. The model is unchanged.
    """
    saved = _read(path)
    weights = _whole_parameters(model)
    _check(model, weights, saved, path)
    for name, module in named_modules(model):
        for key, value in saved.modules[name][1].items():
            setattr(module, key, type(getattr(module, key))(value))
    for name, weight in weights.items():
        old = weight.dense
        values = saved.values[name].to(old)
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        for module, key in weight.owners:
            put_parameter(module, key, new)
    for name, (module, key) in _buffers(model).items():
        put_buffer(module, key, saved.values[name].to(getattr(module, key)))
    if saved.masks:
        apply_masks(model, saved.masks)
        if saved.permanent:
            make_permanent(model)
    return model


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a model that lost channels: :func:`save_sparse` by its older name."""
    save_sparse(model, path)


def load_compact(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a model that lost channels: :func:`load_sparse` by its older name."""
    return load_sparse(model, path)


class _Saved(NamedTuple):
    """The content of a file.

    Attributes:
        modules: The class and the sizes of each module, by the module's name.
        values: Values of parameters and buffers, by name.
        masks: Masks by parameter name.
        permanent: Whether the masks hold zeros of plain parameters.
    """

    modules: Mapping[str, Any]
    values: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    permanent: bool


def _whole_parameters(model: nn.Module) -> dict[str, Weight]:
    weights = named_parameters(model)
    if shards := [name for name, w in weights.items() if is_sharded(w.dense)]:
        raise ValueError(
            "model: expected a model that is not sharded, got shards of "
            f"{name_some(shards)}; gather the state dict into a whole model, and save "
            "or load that"
        )
    return weights


def _has_bits(values: Tensor) -> Tensor:
    """Return where values have a bit that is not 0: -0.0 has."""
    by_bytes = values.view(torch.uint8).view(*values.shape, values.itemsize)
    return (by_bytes != 0).any(-1)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


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


def _read(path: str | Path) -> _Saved:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; pass the path of one that save_sparse wrote"
        )
    try:
        header, tensors = read_safetensors(path)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: no safetensors file, or one that is cut short ({error})"
        ) from error
    if header.get("format") not in (_FORMAT, _OLDER):
        raise FileFormatError(
            f"{path}: a safetensors file, but not one that save_sparse wrote"
        )
    if header.get("sha256") != _digest(header, tensors):
        raise FileFormatError(
            f"{path}: its checksum is another one", "write it anew with save_sparse"
        )
    of_masks = _unpacked_bits if header["format"] == _OLDER else _expanded
    try:
        modules = json.loads(header["modules"])
        masks = of_masks(tensors, json.loads(header.get("sparse", "{}")))
        return _Saved(modules, tensors, masks, json.loads(header["permanent"]))
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: gaps and values do not belong together ({error})"
        ) from error


def _expanded(
    tensors: dict[str, Tensor], sparse: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Put the zeros among the values, in place, and return the masks."""
    masks = {}
    for name, entry in sparse.items():
        kept = decode(tensors.pop(_GAPS + name), torch.Size(entry["shape"]))
        values = tensors[name]
        tensors[name] = values.new_zeros(kept.shape)
        tensors[name][kept] = values
        if entry["masked"]:
            masks[name] = kept
    return masks


def _unpacked_bits(
    tensors: dict[str, Tensor], sparse: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Take the masks of an older file out of its tensors."""
    masks = {}
    for key in [key for key in tensors if key.startswith(_BITS)]:
        values = tensors[key.removeprefix(_BITS)]
        bits = np.unpackbits(tensors.pop(key).numpy(), count=values.numel())
        kept = torch.from_numpy(bits.astype(bool)).view(values.shape)
        masks[key.removeprefix(_BITS)] = kept
    return masks


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in ("modules", "sparse", "permanent"):
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
    weights: Mapping[str, Weight],
    saved: _Saved,
    path: str | Path,
) -> None:
    """Raise ValueError unless the file holds this model or a smaller version of it."""
    pruned = [name for name, weight in weights.items() if weight.mask is not None]
    if pruned:
        raise ValueError(
            f"model: expected one that is not pruned, but {name_some(pruned)} is; make "
            "it anew, the masks are in the file"
        )
    modules, tensors = saved.modules, saved.values
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
    misfits += [
        f"{name} is only in one of them"
        for name in sorted(here.keys() ^ tensors.keys())
    ]
    misfits += [
        f"{name} is {tuple(tensors[name].shape)} in the file, and "
        f"{tuple(tensor.shape)} in the model"
        for name, tensor in here.items()
        if name in tensors and not _is_part(tensors[name].shape, tensor.shape)
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
