"""How activations lie in memory: a row of numbers for each channel, with a halo.

A row has the images of the batch one after the other, and of each image the lines. A
halo of zeros follows each line, and lines of zeros follow each image. So the neighbour
of a pixel is at a fixed distance in every image, and a pixel outside of an image is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # numbers: a line of the cache, in float32


class Need(NamedTuple):
    """What a convolution needs of a geometry.

    Attributes:
        lines: The smallest number of lines of an image, halo included.
        pixels: The smallest number of pixels of a line, halo included.
        up: How many lines it reads above or below a pixel, at most.
        aside: How many pixels it reads beside a pixel, at most.
    """

    lines: int
    pixels: int
    up: int
    aside: int


class Geometry(NamedTuple):
    """Sizes of a row.

    Attributes:
        batch: Number of images.
        height: Number of lines of an image.
        width: Number of pixels of a line.
        pitch: Distance from line to line, at least the width.
        image: Distance from image to image, at least ``height * pitch``.
        margin: Number of zeros before the first image, and after the last image.
    """

    batch: int
    height: int
    width: int
    pitch: int
    image: int
    margin: int

    @classmethod
    def room(
        cls, batch: int, size: tuple[int, int], needs: Iterable[Need] = ()
    ) -> Geometry:
        """Return a geometry that several convolutions share.

        Args:
            batch: Number of images.
            size: Height and width.
            needs: What each convolution needs.
        """
        all_needs = [Need(*size, 0, 0), *needs]
        lines, pitch, up, aside = (max(n) for n in zip(*all_needs, strict=True))
        return cls(batch, *size, pitch, lines * pitch, _up(up * pitch + aside))

    @property
    def positions(self) -> int:
        """Number of positions that a kernel computes, halos included."""
        return _up(self.batch * self.image)

    @property
    def step(self) -> int:
        """Distance from row to row."""
        distance = 2 * self.margin + self.positions
        # Rows at a distance of 4096 bytes would share the lines of the cache.
        return distance + _ALIGNED * (distance % 1024 == 0)

    def zeros(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Return planes of zeros, ``[channels, step]``."""
        return torch.zeros(channels, self.step, dtype=dtype)

    def view(self, planes: Tensor, shape: Sequence[int], axis: int) -> Tensor:
        """Return a value as a view of planes.

        Args:
            planes: The planes.
            shape: Shape of the value.
            axis: Dimension of its channels. The others are the positions.
        """
        axis %= len(shape)
        strides, distances = [], [self.image, self.pitch, 1]
        others = [size for n, size in enumerate(shape) if n != axis]
        for n in reversed(range(len(others))):
            if distances:
                strides.append(distances.pop())
            else:
                strides.append(strides[-1] * others[n + 1])
        strides.reverse()
        strides.insert(axis, self.step)
        start = planes.storage_offset() + self.margin
        return planes.as_strided(tuple(shape), strides, start)

    def images(self, planes: Tensor) -> Tensor:
        """Return a view ``[batch, channels, height, width]`` of planes."""
        shape = self.batch, len(planes), self.height, self.width
        return self.view(planes, shape, 1)

    @property
    def has_halo(self) -> bool:
        """Whether there are positions that are no pixels, between those that are."""
        return self.pitch > self.width or self.image > self.height * self.pitch

    def first(self, planes: Tensor) -> int:
        """Return the address of the first pixel of the first channel."""
        return planes.data_ptr() + self.margin * planes.itemsize

    def inside(self) -> np.ndarray[Any, Any]:
        """Return a byte for each position: 1 if it is a pixel of an image, else 0."""
        found = np.zeros(self.positions, np.uint8)
        rows = found[: self.batch * self.image].reshape(self.batch, self.image)
        lines = rows[:, : self.height * self.pitch]
        lines.reshape(self.batch, self.height, self.pitch)[..., : self.width] = 1
        return found


def _up(number: int) -> int:
    return -(-number // _ALIGNED) * _ALIGNED
