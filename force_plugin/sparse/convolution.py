"""A convolution, or a linear layer, by its non-zeros alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from force_plugin.sparse import team
from force_plugin.sparse.code import (
    MOST,
    Kind,
    correlate,
    lanes,
    most_correlated,
    multiply,
)
from force_plugin.sparse.geometry import Geometry, Need


@dataclass(frozen=True)
class Window:
    """Where a convolution looks, along height and width.

    Attributes:
        kernel: Size of the kernel.
        stride: Distance between outputs, in pixels of the input.
        padding: Number of zeros before the first pixel.
        after: Number of zeros after the last pixel.
        dilation: Distance between the taps of the kernel.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def outputs(self, size: Sequence[int]) -> tuple[int, int]:
        """Return height and width of the output for those of the input."""
        found = [
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, d, k, s in zip(
                size,
                self.padding,
                self.after,
                self.dilation,
                self.kernel,
                self.stride,
                strict=True,
            )
        ]
        return found[0], found[1]

    def reach(self, axis: int) -> tuple[int, int]:
        """Return how far taps lie before and after an output, in steps of the stride.

        They are distances in a phase of the input.
        """
        steps = [self.place(axis, tap)[1] for tap in range(self.kernel[axis])]
        return max(0, -min(steps)), max(0, max(steps))

    def place(self, axis: int, tap: int) -> tuple[int, int]:
        """Return the phase of a tap, and its distance in the phase."""
        at = tap * self.dilation[axis] - self.padding[axis]
        steps, phase = divmod(at, self.stride[axis])
        return phase, steps


def needs(window: Window, size: tuple[int, int]) -> Need:
    """Return what a convolution needs of the geometry of its output.

    An output and the phases of its input lie in the same way. A neighbour before the
    first pixel is in the halo before it, and a neighbour after the last in its own.

    Args:
        window: The window.
        size: Height and width of the input.
    """
    found = []
    for axis, (n, out) in enumerate(zip(size, window.outputs(size), strict=True)):
        before, after = window.reach(axis)
        phase = -(-n // window.stride[axis])
        found.append((max(phase + before, out + after), max(before, after)))
    (lines, up), (pixels, aside) = found
    return Need(lines, pixels, up, aside)


class Sums:
    """Rows of sums of shifted rows: what a layer computes, and its gradients.

    Args:
        geometry: The geometry of the planes.
        rows: For each product, the row to which it is added. It ascends.
        offsets: For each product, the distance to the number that is read.
        values: For each product, the number by which it is multiplied.
        bias: A number for each row, or ``None``.
        count: Number of rows.
        masks: Whether the halo of the result has to be 0.
        activation: Name of the activation.
        adds: Whether another tensor is added.
    """

    def __init__(  # noqa: D107
        self,
        geometry: Geometry,
        rows: np.ndarray[Any, Any],
        offsets: np.ndarray[Any, Any],
        values: Tensor,
        bias: Tensor | None,
        count: int,
        *,
        masks: bool = True,
        activation: str = "none",
        adds: bool = False,
    ) -> None:
        self.geometry, self.count = geometry, count
        self.starts = np.searchsorted(rows, np.arange(count + 1)).astype(np.int32)
        self.offsets = offsets.astype(np.int32)
        self.values = values
        zeros = torch.zeros(count, dtype=values.dtype)
        self.bias = zeros if bias is None else bias.detach().contiguous()
        self.inside = geometry.inside()
        self.width = lanes(values.dtype)
        self.smaller, self.tiles = tiles(geometry, self.width, MOST)
        self._row_shares: dict[int, list[tuple[int, int]]] = {}
        kind = Kind(values.dtype, self.smaller, adds, masks, activation)
        self.kernel = multiply(kind)

    def __call__(self, x: Tensor, y: Tensor, z: Tensor | None = None) -> None:
        """Compute the planes of the output.

        Args:
            x: The planes of the input, or of its phases.
            y: Planes of the output; they are overwritten.
            z: Planes to add, in the geometry of the output.
        """
        geometry = self.geometry
        first = geometry.first(x), geometry.first(y)
        added = 0 if z is None else geometry.first(z)
        work = len(self.values) * geometry.positions
        team.run(
            self.kernel,
            [
                self._share(*first, added, *parts, *rows)
                for parts, rows in self._shares(team.members(work))
            ],
        )

    def row_shares(self, number: int) -> list[tuple[int, int]]:
        """Return rows for each thread, with an equal number of products."""
        if number not in self._row_shares:
            wanted = [len(self.values) * n // number for n in range(1, number)]
            cuts = np.searchsorted(self.starts, wanted).tolist()
            ends = [0, *(min(cut, self.count) for cut in cuts), self.count]
            shares = [rows for rows in pairwise(ends) if rows[0] < rows[1]]
            self._row_shares[number] = shares
        return self._row_shares[number]

    def _shares(self, number: int) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
        """Return tiles and rows for each thread."""
        count = sum(self.tiles)
        if number == 1 or count >= 4 * number:
            return [(part, (0, self.count)) for part in team.parts(count, number)]
        return [((0, count), rows) for rows in self.row_shares(number)]

    def _share(
        self, x: int, y: int, z: int, tile: int, last: int, row: int, end: int
    ) -> tuple[int, ...]:
        """Return the kernel's arguments for some tiles and rows."""
        size, step = self.values.itemsize, self.geometry.step
        larger = self.tiles[0]
        place = (tile * (self.smaller + 1) - max(0, tile - larger)) * self.width
        down = (place + row * step) * size
        return (
            x + place * size,
            y + down,
            step,
            self.starts.ctypes.data + row * self.starts.itemsize,
            self.offsets.ctypes.data,
            self.values.data_ptr(),
            self.bias.data_ptr() + row * size,
            z and z + down,
            step,
            self.inside.ctypes.data + place,
            end - row,
            max(0, min(last, larger) - tile),
            last - max(tile, min(last, larger)),
        )


def tiles(geometry: Geometry, width: int, most: int) -> tuple[int, tuple[int, int]]:
    """Return how positions are cut into tiles of nearly the same size.

    Args:
        geometry: The geometry.
        width: Number of numbers in a vector.
        most: The largest number of vectors in a tile.

    Returns:
        The number of vectors in a smaller tile, and how many tiles have a vector more
        and how many have this number.
    """
    vectors = -(-geometry.positions // width)
    count = -(-vectors // most)
    smaller, more = divmod(vectors, count)
    return smaller, (more, count - more)


class Product(Sums):
    """The non-zeros of a layer, for an output of one geometry.

    Args:
        weight: ``[outputs, inputs / groups, height, width]``, with zeros.
        bias: A number for each output, or ``None``.
        window: Where the convolution looks.
        geometry: The geometry of the output.
        groups: Number of groups.
        kept: True at the weights that count. Default: those that are not 0.
        options: Those of :class:`Sums`.
    """

    def __init__(  # noqa: D107
        self,
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        geometry: Geometry,
        *,
        groups: int = 1,
        kept: Tensor | None = None,
        **options: Any,
    ) -> None:
        outputs, each = weight.shape[:2]
        self.window = window
        self.inputs, self.outputs = groups * each, outputs
        self.phases = _phases(window)
        index = {phase: n for n, phase in enumerate(self.phases)}
        places = np.zeros(window.kernel, np.int64)
        for y in range(window.kernel[0]):
            for x in range(window.kernel[1]):
                (py, dy), (px, dx) = window.place(0, y), window.place(1, x)
                places[y, x] = index[py, px] * self.inputs * geometry.step
                places[y, x] += dy * geometry.pitch + dx
        found = (weight if kept is None else kept).nonzero(as_tuple=True)
        out, channel, line, pixel = (n.numpy() for n in found)
        first = out // (outputs // groups) * each
        offsets = (first + channel) * geometry.step + places[line, pixel]
        values = weight[found].detach().contiguous()
        super().__init__(geometry, out, offsets, values, bias, outputs, **options)

    @property
    def reaches(self) -> bool:
        """Whether any tap lies beside its output."""
        return any(any(self.window.reach(axis)) for axis in (0, 1))

    def packed(self, dtype: torch.dtype) -> Tensor:
        """Return planes of zeros for the phases of the input."""
        return self.geometry.zeros(len(self.phases) * self.inputs, dtype)

    def pack(self, images: Tensor, planes: Tensor) -> None:
        """Write images ``[batch, channels, height, width]`` into planes of phases."""
        for part, own in self._parts(images, planes):
            own.copy_(part)

    def unpack(self, planes: Tensor, images: Tensor) -> None:
        """Add planes of phases to images ``[batch, channels, height, width]``."""
        for part, own in self._parts(images, planes):
            part.add_(own)

    def _parts(self, images: Tensor, planes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pixels of each phase as views of images and of planes."""
        geometry, (sy, sx) = self.geometry, self.window.stride
        for number, (py, px) in enumerate(self.phases):
            part = images[:, :, py::sy, px::sx]
            own = planes[number * self.inputs : (number + 1) * self.inputs]
            start = own.storage_offset() + geometry.margin
            strides = geometry.image, geometry.step, geometry.pitch, 1
            yield part, own.as_strided(part.shape, strides, start)


class Transposed(Sums):
    """The gradient of a product's input: the same products, by rows of the input.

    Args:
        product: The product.
        options: Those of :class:`Sums`.

    Attributes:
        order: The order of the products.
    """

    def __init__(self, product: Product, **options: Any) -> None:  # noqa: D107
        geometry = product.geometry
        outputs = np.repeat(np.arange(product.count), np.diff(product.starts))
        offsets = product.offsets.astype(np.int64)
        rows = (offsets + geometry.margin) // geometry.step
        back = outputs * geometry.step - (offsets - rows * geometry.step)
        order = np.argsort(rows, kind="stable")
        self.order = torch.from_numpy(order)
        count = len(product.phases) * product.inputs
        values = product.values[self.order]
        super().__init__(
            geometry, rows[order], back[order], values, None, count, **options
        )


class Correlation:
    """The gradient of a product's values.

    Args:
        product: The product.
    """

    def __init__(self, product: Product) -> None:  # noqa: D107
        self._product = product
        geometry, width = product.geometry, product.width
        self._smaller, self._tiles = tiles(geometry, width, most_correlated())
        self._kernel = correlate(product.values.dtype, self._smaller)

    def __call__(self, x: Tensor, d: Tensor) -> Tensor:
        """Return the gradient, a number for each value.

        Args:
            x: The planes of the input, or of its phases.
            d: The planes of the output's gradient, with a halo of zeros.
        """
        product, geometry = self._product, self._product.geometry
        found = torch.zeros_like(product.values)
        number = team.members(len(found) * geometry.positions)
        size = found.itemsize
        shares = [
            (
                geometry.first(x),
                geometry.first(d) + row * geometry.step * size,
                geometry.step,
                product.starts.ctypes.data + row * product.starts.itemsize,
                product.offsets.ctypes.data,
                found.data_ptr(),
                end - row,
                *self._tiles,
            )
            for row, end in product.row_shares(number)
        ]
        if shares:
            team.run(self._kernel, shares)
        return found


def _phases(window: Window) -> list[tuple[int, int]]:
    """Return the phases that the taps of a kernel use."""
    found: list[list[int]] = []
    for axis in (0, 1):
        taps = range(window.kernel[axis])
        found.append(sorted({window.place(axis, tap)[0] for tap in taps}))
    return [(y, x) for y in found[0] for x in found[1]]
