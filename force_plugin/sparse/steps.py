"""The steps of a plan: each computes a value from values before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from force_plugin.sparse import team
from force_plugin.sparse.code import lanes, normalise
from force_plugin.sparse.convolution import Product
from force_plugin.sparse.geometry import Geometry
from force_plugin.sparse.graph import Layer, arguments, operation

Values = dict[fx.Node, Any]


class Place:
    """Planes that hold a value, and the value as a view of them.

    Args:
        geometry: How the planes lie.
        planes: ``[channels, step]``.
        shape: Shape of the value.
        axis: Dimension of its channels.
        clean: Whether the positions outside of the images are 0.
    """

    def __init__(  # noqa: D107
        self,
        geometry: Geometry,
        planes: Tensor,
        shape: Sequence[int],
        axis: int,
        clean: bool = True,
    ) -> None:
        self.geometry, self.planes = geometry, planes
        self.axis = axis % len(shape)
        self.clean = clean or not geometry.has_halo
        self.view = geometry.view(planes, shape, axis)

    def fits(self, other: Place | None) -> bool:
        """Whether another value lies in the same way."""
        return (
            other is not None
            and self.geometry == other.geometry
            and self.axis == other.axis
            and self.view.shape == other.view.shape
        )

    def permuted(self, order: Sequence[int]) -> Place | None:
        """Return a value whose dimensions are in another order, where it lies.

        ``None``: the positions would be in another order.
        """
        axis = order.index(self.axis)
        others = [n for n in order if n != self.axis]
        if others != sorted(others):
            return None
        shape = [self.view.shape[n] for n in order]
        return Place(self.geometry, self.planes, shape, axis, self.clean)


def as_images(value: Tensor) -> Tensor:
    """Return images; the lines of a batch, for ``Conv1d``, are those of one image."""
    return value if value.dim() == 4 else value.transpose(0, 1)[None]


@dataclass
class Multiply:
    """Computes a layer by its non-zeros.

    It does not keep the layer, whose weight has its zeros.

    Attributes:
        source: The value that the layer reads.
        added: The value that is added, or ``None``.
        result: The value that it computes.
        product: Its non-zeros.
        x: The planes that the kernel reads.
        packs: A view of these planes into which the source is copied first, or
            ``None``. ``"phases"``: into the phases of a stride.
        y: Where the result lies.
        z: Where the value lies that is added.
        copies: Whether this value has to be copied there first.
    """

    source: fx.Node
    added: fx.Node | None
    result: fx.Node
    product: Product
    x: Tensor
    packs: Tensor | Literal["phases"] | None
    y: Place
    z: Place | None
    copies: bool

    def __call__(self, values: Values) -> None:  # noqa: D102
        if self.packs == "phases":
            self.product.pack(as_images(values[self.source]), self.x)
        elif isinstance(self.packs, Tensor):
            self.packs.copy_(values[self.source])
        added = None
        if self.z is not None and self.added is not None:
            added = self.z.planes
            if self.copies:
                self.z.view.copy_(values[self.added])
        self.product(self.x, self.y.planes, added)
        values[self.result] = self.y.view


@dataclass
class Alias:
    """A value that lies where another lies.

    Attributes:
        node: The operation.
        y: Where both lie.
    """

    node: fx.Node
    y: Place

    def __call__(self, values: Values) -> None:  # noqa: D102
        values[self.node] = self.y.view


@dataclass
class Join:
    """Concatenates channels.

    Attributes:
        node: The operation.
        parts: The planes of its parts.
        y: Where the result lies.
    """

    node: fx.Node
    parts: list[Tensor]
    y: Place

    def __call__(self, values: Values) -> None:  # noqa: D102
        torch.cat(self.parts, out=self.y.planes)
        values[self.node] = self.y.view


@dataclass
class Whole:
    """Computes a function of each number, on whole planes: 0 stays 0.

    Attributes:
        node: The operation.
        args: Its arguments, planes in the place of values.
        y: Where the result lies.
    """

    node: fx.Node
    args: tuple[Any, ...]
    y: Place

    def __post_init__(self) -> None:
        self.function = operation(self.node).overloadpacket.out

    def __call__(self, values: Values) -> None:  # noqa: D102
        self.function(*self.args, **self.node.kwargs, out=self.y.planes)
        values[self.node] = self.y.view


@dataclass
class Gate:
    """Multiplies each channel of each image by a number.

    Attributes:
        node: The product.
        x: Where the images lie.
        factor: The value ``[batch, channels, 1, 1]``.
        y: Where the result lies.
    """

    node: fx.Node
    x: Place
    factor: fx.Node
    y: Place

    def __call__(self, values: Values) -> None:  # noqa: D102
        factor = values[self.factor].flatten(1).t()[:, :, None]
        torch.mul(_by_images(self.x), factor, out=_by_images(self.y))
        values[self.node] = self.y.view


def _by_images(place: Place) -> Tensor:
    geometry, planes = place.geometry, place.planes
    shape = len(planes), geometry.batch, geometry.image
    start = planes.storage_offset() + geometry.margin
    return planes.as_strided(shape, (geometry.step, geometry.image, 1), start)


class LayerNorm:
    """Normalises over the channels of planes.

    Args:
        node: The operation.
        x: Where its input lies.
        weight: A number for each channel, or ``None``.
        bias: A number for each channel, or ``None``.
        epsilon: Is added to the variance.
        y: Where the result lies.
    """

    def __init__(  # noqa: D107
        self,
        node: fx.Node,
        x: Place,
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
        y: Place,
    ) -> None:
        self.node, self.x, self.y = node, x, y
        like = x.planes[:, 0]
        self.weight = torch.ones_like(like) if weight is None else weight.contiguous()
        self.bias = torch.zeros_like(like) if bias is None else bias.contiguous()
        self.epsilon = torch.tensor(epsilon, dtype=like.dtype)
        self.kernel = normalise(like.dtype)
        self.vectors = x.geometry.positions // lanes(like.dtype)

    def __call__(self, values: Values) -> None:  # noqa: D102
        geometry = self.x.geometry
        x, y = geometry.first(self.x.planes), geometry.first(self.y.planes)
        channels = len(self.x.planes)
        # A channel costs about as much as ten products.
        number = team.members(10 * channels * geometry.positions)
        size = self.weight.itemsize * lanes(self.weight.dtype)
        shares = [
            (
                x + start * size,
                y + start * size,
                geometry.step,
                self.weight.data_ptr(),
                self.bias.data_ptr(),
                channels,
                self.epsilon.data_ptr(),
                end - start,
            )
            for start, end in team.parts(self.vectors, number)
            if start < end
        ]
        team.run(self.kernel, shares)
        values[self.node] = self.y.view


@dataclass
class Dense:
    """Computes a layer as PyTorch does, with the scales that follow.

    Attributes:
        layer: The layer.
    """

    layer: Layer

    def __call__(self, values: Values) -> None:  # noqa: D102
        layer = self.layer
        source = values[layer.source]
        if layer.axis == -1:
            found = torch.nn.functional.linear(
                source, layer.weight[:, :, 0, 0], layer.bias
            )
        else:
            flat, window = source.dim() == 3, layer.window
            images = source[:, :, None] if flat else source
            padding = window.padding
            if window.after != padding:
                (top, left), (bottom, right) = padding, window.after
                sides = left, right, top, bottom
                images, padding = torch.nn.functional.pad(images, sides), (0, 0)
            found = torch.conv2d(
                images,
                layer.weight,
                layer.bias,
                window.stride,
                padding,
                window.dilation,
                layer.groups,
            )
            found = found[:, :, 0] if flat else found
        values[layer.scaled] = found


@dataclass
class Attention:
    """Computes scaled dot-product attention, whose channels may lie in rows.

    Attributes:
        node: The operation, without a mask.
        scale: Factor of the products.
    """

    node: fx.Node
    scale: float

    def __call__(self, values: Values) -> None:  # noqa: D102
        q, k, v = (values[one] for one in arguments(self.node)[:3])
        if q.stride(-1) == 1:
            found = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, scale=self.scale
            )
        else:
            # [batch, heads, channels, tokens] is what lies in memory, and what comes.
            found = torch.empty_like(v.mT, memory_format=torch.contiguous_format).mT
            for n in range(len(q)):  # a product of matrices takes one batch dimension
                weights = torch.bmm(q[n] * self.scale, k[n].mT).softmax(-1)
                torch.bmm(v[n].mT, weights.mT, out=found[n].mT)
        values[self.node] = found


@dataclass
class Call:
    """Computes an operation as PyTorch does.

    Attributes:
        node: The operation.
        constants: Values of parameters and buffers.
    """

    node: fx.Node
    constants: Values

    def __call__(self, values: Values) -> None:  # noqa: D102
        def value(node: fx.Node) -> Any:
            return values[node] if node in values else self.constants[node]

        args, kwargs = fx.node.map_arg((arguments(self.node), self.node.kwargs), value)
        if self.node.target == torch.ops.aten.max_pool2d.default:
            # Several times as fast as in the usual memory format.
            first = args[0].contiguous(memory_format=torch.channels_last)
            args = (first, *args[1:])
        function = operation(self.node)
        if function == torch.ops.aten.view.default:  # values may have other strides
            function = torch.ops.aten.reshape.default
        values[self.node] = function(*args, **kwargs)
