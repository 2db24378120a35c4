"""Masks in files, with one bit for each weight, and with metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from force_plugin.errors import FileFormatError
from force_plugin.files import read_safetensors, write_whole
from force_plugin.masks.apply import checked_masks

_FORMAT = "force_plugin masks"


def save_masks(
    masks: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write masks to a safetensors file, with one bit for each weight, and metadata.

    Args:
        masks: Masks by parameter name, as :func:`get_masks` returns them.
        path: File to write; its folder must exist. An existing file is replaced in a
            single step, so that the file is never half-written.
        metadata: A mapping for :func:`load_metadata`, e.g.
            ``{"method": "force", "sparsity": 0.99, "seed": 0}``, of types that
            :func:`json.dumps` takes. Unless the mapping has them, ``created`` (date and
            time, UTC) and ``versions`` (of force_plugin, torch and timm) are added.
            Default: only these two.

    Raises:
        TypeError: ``masks`` is no mapping of names to tensors, or ``metadata`` is no
            mapping of names to types that JSON holds.
        ValueError: ``masks`` is empty, or a mask has the name ``__metadata__``, is
            sparse, has no values, or has values other than 0 and 1.
        OSError: The file cannot be written, for example because the folder does not
            exist. An existing file is unchanged.
    """
    checked = checked_masks(masks)
    if "__metadata__" in checked:
        raise ValueError(
            "masks: expected parameter names, got '__metadata__', which is reserved "
            "in safetensors files; give the mask another name"
        )
    bits = {
        name: torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))
        for name, mask in checked.items()
    }
    header = {
        "format": _FORMAT,
        "shapes": json.dumps(
            {name: list(mask.shape) for name, mask in checked.items()}
        ),
        "metadata": _as_json(metadata or {}),
    }
    header["sha256"] = _checksum(header, bits)
    write_whole(path, save(bits, header))


def _as_json(metadata: Mapping[str, Any]) -> str:
    # The package is not complete yet while this module is imported.
    from force_plugin import __version__

    versions = {"force_plugin": __version__, "torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):
        versions["timm"] = version("timm")
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        return json.dumps({"created": created, "versions": versions, **metadata})
    except (TypeError, ValueError) as error:
        raise TypeError(
            "metadata: expected a mapping of names to what JSON holds (text, numbers, "
            f"lists, dictionaries, None): {error}"
        ) from error


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Return the masks in a file that :func:`save_masks` wrote.

    Args:
        path: The file.

    Returns:
        Bool tensors by parameter name, on the CPU, True = kept.

    Raises:
        FileNotFoundError: The file does not exist.
        FileFormatError: The file is no masks file, or it is cut short.
    """
    return _read(path)[0]


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata in a file that :func:`save_masks` wrote.

    Args:
        path: The file.

    Returns:
        ``created`` (date and time, UTC, in ISO 8601), ``versions`` (by package) and the
        caller's own ``metadata``. JSON turns tuples into lists. The result is empty for
        a masks file without metadata.

    Raises:
        FileNotFoundError: The file does not exist.
        FileFormatError: The file is no masks file, or it is cut short.
    """
    return _read(path)[1]


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; pass the path of one that save_masks wrote"
        )
    try:
        header, tensors = read_safetensors(path)
        ours = header.get("format") == _FORMAT
        shapes = dict(json.loads(header["shapes"])) if ours else {}
        bits = {name: tensors[name] for name in shapes}
        if ours and header["sha256"] != _checksum(header, bits):
            raise ValueError("its checksum is another one")
        metadata = dict(json.loads(header.get("metadata", "{}")))
        masks = {
            name: _unpack(bits[name], torch.Size(shape))
            for name, shape in shapes.items()
        }
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: not a masks file, or one that is cut short ({error})"
        ) from error
    if not ours:
        raise FileFormatError(
            f"{path}: a safetensors file, but not one that save_masks wrote"
        )
    return masks, metadata


def _checksum(header: Mapping[str, str], bits: Mapping[str, Tensor]) -> str:
    """Return a checksum of everything that is read from a masks file.

    The first masks files had no metadata.
    """
    digest = hashlib.sha256((header["shapes"] + header.get("metadata", "")).encode())
    for tensor in bits.values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    if min(shape, default=0) < 0 or len(bits) != -(-shape.numel() // 8):
        raise ValueError(f"{len(bits)} bytes for a mask of shape {tuple(shape)}")
    flat = np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool)
    return torch.from_numpy(flat).reshape(shape)
