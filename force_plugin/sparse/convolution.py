"""A convolution, or a linear layer, by its non-zeros alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from force_plugin.sparse import team
from force_plugin.sparse.code import MOST, Kind, lanes, multiply
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


class Product:
    """The non-zeros of a layer, for an output of one geometry.

    Args:
        weight: ``[outputs, inputs / groups, height, width]``, with zeros.
        bias: A number for each output, or ``None``.
        window: Where the convolution looks.
        geometry: The geometry of the output.
        groups: Number of groups.
        masks: Whether the halo of the output has to be 0.
        activation: Name of the activation.
        adds: Whether another tensor is added.
    """

    def __init__(  # noqa: D107
        self,
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        geometry: Geometry,
        *,
        groups: int = 1,
        masks: bool = True,
        activation: str = "none",
        adds: bool = False,
    ) -> None:
        outputs, each = weight.shape[:2]
        self.geometry, self.window = geometry, window
        self.inputs, self.outputs = groups * each, outputs
        self.phases = _phases(window)
        index = {phase: n for n, phase in enumerate(self.phases)}
        places = np.zeros(window.kernel, np.int64)
        for y in range(window.kernel[0]):
            for x in range(window.kernel[1]):
                (py, dy), (px, dx) = window.place(0, y), window.place(1, x)
                places[y, x] = index[py, px] * self.inputs * geometry.step
                places[y, x] += dy * geometry.pitch + dx
        kept = weight.nonzero(as_tuple=True)
        out, channel, line, pixel = (n.numpy() for n in kept)
        first = out // (outputs // groups) * each
        offsets = (first + channel) * geometry.step + places[line, pixel]
        self.starts = np.searchsorted(out, np.arange(outputs + 1)).astype(np.int32)
        self.offsets = offsets.astype(np.int32)
        self.values = weight[kept].detach().contiguous()
        zeros = torch.zeros(outputs, dtype=weight.dtype)
        self.bias = zeros if bias is None else bias.detach().contiguous()
        self.inside = geometry.inside()
        self.width = lanes(weight.dtype)
        vectors = -(-geometry.positions // self.width)
        tiles = -(-vectors // MOST)
        self.smaller, more = divmod(vectors, tiles)
        self.tiles = more, tiles - more
        self._row_shares: dict[int, list[tuple[int, int]]] = {}
        kind = Kind(weight.dtype, self.smaller, adds, masks, activation)
        self.kernel = multiply(kind)

    @property
    def reaches(self) -> bool:
        """Whether any tap lies beside its output."""
        return any(any(self.window.reach(axis)) for axis in (0, 1))

    def packed(self, dtype: torch.dtype) -> Tensor:
        """Return planes of zeros for the phases of the input."""
        return self.geometry.zeros(len(self.phases) * self.inputs, dtype)

    def pack(self, images: Tensor, planes: Tensor) -> None:
        """Write images ``[batch, channels, height, width]`` into planes of phases."""
        geometry, (sy, sx) = self.geometry, self.window.stride
        for number, (py, px) in enumerate(self.phases):
            part = images[:, :, py::sy, px::sx]
            own = planes[number * self.inputs : (number + 1) * self.inputs]
            start = own.storage_offset() + geometry.margin
            strides = geometry.image, geometry.step, geometry.pitch, 1
            own.as_strided(part.shape, strides, start).copy_(part)

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
                self._share(*first, added, *tiles, *rows)
                for tiles, rows in self._shares(team.members(work))
            ],
        )

    def _shares(self, number: int) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
        """Return tiles and rows for each thread."""
        tiles = sum(self.tiles)
        if number == 1 or tiles >= 4 * number:
            return [(part, (0, self.outputs)) for part in team.parts(tiles, number)]
        if number not in self._row_shares:  # rows with an equal number of non-zeros
            wanted = [len(self.values) * n // number for n in range(1, number)]
            cuts = np.searchsorted(self.starts, wanted).tolist()
            ends = [0, *(min(cut, self.outputs) for cut in cuts), self.outputs]
            self._row_shares[number] = [*pairwise(ends)]
        return [
            ((0, tiles), rows) for rows in self._row_shares[number] if rows[0] < rows[1]
        ]

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


def _phases(window: Window) -> list[tuple[int, int]]:
    """Return the phases that the taps of a kernel use."""
    found: list[list[int]] = []
    for axis in (0, 1):
        taps = range(window.kernel[axis])
        found.append(sorted({window.place(axis, tap)[0] for tap in taps}))
    return [(y, x) for y in found[0] for x in found[1]]
