"""What a forward pass by non-zeros leaves, and the gradients of a backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from force_plugin.sparse.convolution import Product
from force_plugin.sparse.geometry import Geometry
from force_plugin.sparse.graph import shape_of
from force_plugin.sparse.plan import Key
from force_plugin.sparse.steps import as_images


class Home(NamedTuple):
    """How a value lies in planes.

    Attributes:
        geometry: The geometry of the planes.
        shape: Shape of the value.
        axis: Dimension of its channels.
        dtype: Type of its numbers.
    """

    geometry: Geometry
    shape: torch.Size
    axis: int
    dtype: torch.dtype

    def view(self, planes: Tensor) -> Tensor:
        """Return the value that lies in planes."""
        return self.geometry.view(planes, self.shape, self.axis)


class Pool:
    """Planes that are not in use. Their halo is 0."""

    def __init__(self) -> None:  # noqa: D107
        self._free: dict[Any, list[Tensor]] = defaultdict(list)

    def take(self, geometry: Geometry, channels: int, dtype: torch.dtype) -> Tensor:
        """Return planes, with numbers of an earlier use in the images."""
        free = self._free[geometry, channels, dtype]
        return free.pop() if free else geometry.zeros(channels, dtype)

    def give(self, geometry: Geometry, planes: Tensor) -> None:
        """Take planes back that are not in use any more."""
        self._free[geometry, len(planes), planes.dtype].append(planes)


@dataclass
class Shared:
    """What the units of a plan share.

    Attributes:
        constants: Values that do not change.
        parameters: Parameters by their nodes.
        needs: The values whose gradients are wanted.
        rooms: The geometries of layers by the sizes of their results.
        homes: How values lie in planes.
        pool: Planes that are not in use.
    """

    constants: Mapping[fx.Node, Tensor]
    parameters: Mapping[fx.Node, nn.Parameter]
    needs: set[fx.Node]
    rooms: Mapping[Key, Geometry]
    homes: dict[fx.Node, Home] = field(default_factory=dict)
    pool: Pool = field(default_factory=lambda: Pool())
    _scratch: dict[Any, Tensor] = field(default_factory=dict)

    def scratch(self, planes: tuple[Geometry, int, torch.dtype], *use: Any) -> Tensor:
        """Return planes that hold a value for a moment. Their halo stays 0.

        Args:
            planes: Their geometry, number and type.
            use: Which of their numbers are written.
        """
        if (planes, use) not in self._scratch:
            geometry, count, dtype = planes
            self._scratch[planes, use] = geometry.zeros(count, dtype)
        return self._scratch[planes, use]

    def planes(self, node: fx.Node) -> Tensor:
        """Return planes for a value, with numbers of an earlier use in the images."""
        home = self.homes[node]
        return self.pool.take(home.geometry, home.shape[home.axis], home.dtype)

    def give_back(self, node: fx.Node, planes: Tensor) -> None:
        """Take planes of a value's geometry back into the pool."""
        self.pool.give(self.homes[node].geometry, planes)


class Pass:
    """The values of a forward pass, and what its backward pass needs.

    Args:
        shared: What the units of the plan share.
        values: Inputs, parameters and buffers.

    Attributes:
        values: Values by node.
        planes: The planes of those that lie in planes.
        saved: What units keep for the backward pass.
    """

    def __init__(self, shared: Shared, values: dict[fx.Node, Any]) -> None:  # noqa: D107
        self._shared, self.values = shared, values
        self.planes: dict[fx.Node, Tensor] = {}
        self.saved: dict[Unit, Any] = {}

    def put(self, node: fx.Node, planes: Tensor) -> None:
        """Keep a value that lies in planes."""
        self.planes[node] = planes
        self.values[node] = self._shared.homes[node].view(planes)

    def free(self, unit: Unit) -> None:
        """Forget a unit's value, and give back its planes."""
        self.saved.pop(unit, None)
        self.values.pop(unit.result, None)
        planes = self.planes.pop(unit.result, None)
        if planes is not None and unit.borrows:
            self._shared.give_back(unit.result, planes)


class Gradients:
    """The gradients of values, in the course of a backward pass.

    Args:
        shared: What the units of the plan share.
    """

    def __init__(self, shared: Shared) -> None:  # noqa: D107
        self._shared = shared
        self._plain: dict[fx.Node, Tensor] = {}
        self._planes: dict[fx.Node, Tensor] = {}
        self.of_non_zeros: dict[fx.Node, Tensor] = {}

    def add(self, node: fx.Node, gradient: Tensor) -> None:
        """Add a gradient of the shape of the value. It may be shared."""
        before = self._plain.get(node)
        self._plain[node] = gradient if before is None else before + gradient

    def add_planes(self, node: fx.Node, planes: Tensor) -> None:
        """Add a gradient in planes of the value's geometry, which are given away."""
        before = self._planes.get(node)
        if before is None:
            self._planes[node] = planes
        else:
            before.add_(planes)
            self._shared.give_back(node, planes)

    def pop_planes(self, node: fx.Node) -> Tensor | None:
        """Return the planes of what has been added in planes until now."""
        return self._planes.pop(node, None)

    def add_images(self, node: fx.Node, product: Product, phases: Tensor) -> None:
        """Add a gradient in planes of phases."""
        home = self._shared.homes.get(node)
        if home is None:
            shape, dtype = shape_of(node), phases.dtype
            found = torch.zeros(shape, dtype=dtype)
            product.unpack(phases, as_images(found))
            self.add(node, found)
            return
        planes = self._planes.get(node)
        if planes is None:
            planes = self._planes[node] = self._shared.planes(node).zero_()
        product.unpack(phases, as_images(home.view(planes)))

    def take_planes(self, node: fx.Node) -> Tensor | None:
        """Return the whole gradient in planes of the value's geometry, if any."""
        planes, plain = self._planes.pop(node, None), self._plain.pop(node, None)
        if plain is None:
            return planes
        if planes is None:
            planes = self._shared.planes(node)
            self._shared.homes[node].view(planes).copy_(plain)
        else:
            self._shared.homes[node].view(planes).add_(plain)
        return planes

    def take(self, node: fx.Node) -> Tensor | None:
        """Return the whole gradient, if any. Planes are given away with it."""
        if node in self._planes:
            planes = self.take_planes(node)
            assert planes is not None
            return self._shared.homes[node].view(planes)
        return self._plain.pop(node, None)


class Unit:
    """A part of a plan: an operation, or several in one.

    Attributes:
        result: The value that it computes.
        borrows: Whether the planes of the value are those of the pool.
    """

    result: fx.Node
    borrows = False

    def forward(self, run: Pass) -> None:
        """Compute the value."""
        raise NotImplementedError

    def backward(self, run: Pass, gradients: Gradients) -> None:
        """Compute the gradients of what it reads."""
        raise NotImplementedError
