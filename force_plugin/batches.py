"""Batches as loaders give them: tensors, and tuples, lists and mappings of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# By number of dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_pair(batch: Any) -> bool:
    """Whether it can be ``(inputs, targets)``."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def to_device(
    batch: Any, device: torch.device, formats: Mapping[int, torch.memory_format]
) -> Any:
    """Copies of a batch's tensors on a device: a network may work on them in place."""
    if isinstance(batch, Tensor):
        known = formats if batch.is_floating_point() else {}
        memory_format = known.get(batch.dim(), torch.preserve_format)
        return batch.to(device, copy=True, memory_format=memory_format)
    if hasattr(batch, "to"):
        return batch.to(device)
    return _rebuilt(batch, lambda value: to_device(value, device, formats))


def count_samples(batch: Any) -> int:
    """The first dimension of the first tensor that has one; 0 if there is none."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.extend(value.shape[:1])
        else:
            _rebuilt(value, look)

    look(batch)
    return found[0] if found else 0


def cut(batch: Any, samples: int, part: slice) -> Any:
    """Some of a batch's samples, with all that does not belong to one of them."""
    if isinstance(batch, Tensor):
        return batch[part] if batch.shape[:1] == (samples,) else batch
    return _rebuilt(batch, lambda value: cut(value, samples, part))


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same tuples, lists and mappings with other tensors."""
    if isinstance(value, Tensor):
        return function(value)
    return _rebuilt(value, lambda item: mapped(function, item))


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, tuple or list with changed items; anything else as it is."""
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    if hasattr(batch, "to"):  # a PackedSequence is a tuple of what belongs together
        return batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(change(value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(change(value) for value in batch)
    return batch


def describe(value: Any) -> str:
    """What it is, for a message: of a tensor its type and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
