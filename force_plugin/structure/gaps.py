"""The positions of kept weights, a byte for each: how many weights are left out before.

A byte of 0 to 254 is a number of weights that are left out, and a kept weight follows
them. A byte of 255 is 255 weights that are left out, and the next byte goes on. Weights
after the last kept weight have no byte.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MOST = 255


def encode(kept: Tensor) -> Tensor:
    """Return the gaps between kept weights.

    Args:
        kept: Bool tensor of any shape, on the CPU, True = kept. Weights are counted in
            row-major order.

    Returns:
        One row of ``torch.uint8``: a byte for each kept weight, and a byte for each 255
        weights that are left out in a row.
    """
    positions = np.flatnonzero(kept.numpy())
    full, rest = np.divmod(np.diff(positions, prepend=-1) - 1, _MOST)
    gaps = np.full(len(positions) + full.sum(), _MOST, np.uint8)
    gaps[np.cumsum(full + 1) - 1] = rest
    return torch.from_numpy(gaps)


def decode(gaps: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool tensor that :func:`encode` was given.

    Args:
        gaps: One row of ``torch.uint8``, on the CPU.
        shape: Shape of the result.

    Raises:
        ValueError: The gaps do not fit the shape, or end with weights left out.
    """
    steps = gaps.numpy()
    ends = steps != _MOST
    positions = np.cumsum(steps + ends.astype(np.int64))[ends] - 1
    kept = np.zeros(shape.numel(), bool)
    if len(steps) and (not ends[-1] or positions[-1] >= len(kept)):
        raise ValueError(f"{len(steps)} gaps for a weight of shape {tuple(shape)}")
    kept[positions] = True
    return torch.from_numpy(kept).view(shape)
