"""The units of a training plan: each computes a value, and then its gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from force_plugin.sparse.convolution import Correlation, Product, Transposed
from force_plugin.sparse.geometry import Geometry
from force_plugin.sparse.graph import Graph, Layer, arguments, operation, shape_of
from force_plugin.sparse.passes import Gradients, Home, Pass, Shared, Unit
from force_plugin.sparse.plan import OF_ZERO, PAIRS, key_of
from force_plugin.sparse.rows import Norm
from force_plugin.sparse.steps import as_images

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_functional.default
_FIXED_NORM = aten._native_batch_norm_legit_no_training.default


class Multiply(Unit):
    """A convolution or a linear layer by its non-zeros.

    Args:
        shared: What the units of the plan share.
        layer: The layer.
        kept: The mask of its weight.
    """

    borrows = True

    def __init__(self, shared: Shared, layer: Layer, kept: Tensor) -> None:  # noqa: D107
        self.result, self._source = layer.last, layer.source
        self._weight, self._bias = (*arguments(layer.last), None)[1:3]
        self.axis = layer.axis % len(shape_of(self.result))
        geometry = shared.rooms[key_of(shape_of(self.result), self.axis)]
        self.product = Product(
            layer.weight, None, layer.window, geometry, groups=layer.groups, kept=kept
        )
        dtype = layer.weight.dtype
        home = shared.homes.get(self._source)
        shape = shape_of(self._source)
        # Whether the input lies as the kernel reads it.
        self._lies = layer.window.stride == (1, 1) and home == Home(
            geometry, shape, self.axis, dtype
        )
        self._alone = layer.window.stride == (1, 1)
        self._wanted = [node in shared.needs for node in (self._source, self._weight)]
        self._correlation = Correlation(self.product) if self._wanted[1] else None
        self._back: dict[bool, Transposed] = {}
        self._shared, self._shape = shared, shape
        shared.homes[self.result] = Home(
            geometry, shape_of(self.result), self.axis, dtype
        )

    def forward(self, run: Pass) -> None:  # noqa: D102
        self.product.values = self._non_zeros()
        if self._bias is not None:
            self.product.bias = run.values[self._bias].contiguous()
        y = self._shared.planes(self.result)
        self.product(self._input(run), y)
        run.put(self.result, y)

    def _non_zeros(self) -> Tensor:
        return self._shared.parameters[self._weight].detach().flatten()

    def _input(self, run: Pass) -> Tensor:
        """Return the planes that the kernel reads."""
        if self._lies:
            return run.planes[self._source]
        product, values = self.product, run.values[self._source]
        stride = product.window.stride
        x = self._shared.scratch(self._planes, self._shape, stride, self.axis)
        if self._alone:
            product.geometry.view(x, values.shape, self.axis).copy_(values)
        else:
            product.pack(as_images(values), x)
        return x

    @property
    def _planes(self) -> tuple[Geometry, int, torch.dtype]:
        count = len(self.product.phases) * self.product.inputs
        return self.product.geometry, count, self.product.values.dtype

    def backward(self, run: Pass, gradients: Gradients) -> None:  # noqa: D102
        d = gradients.take_planes(self.result)
        if d is None:
            return
        if self._bias is not None and self._bias in self._shared.needs:
            gradients.add(self._bias, d.sum(1))
        if self._correlation is not None:
            found = self._correlation(self._input(run), d)[:, None]
            before = gradients.of_non_zeros.get(self._weight)
            found = found if before is None else before + found
            gradients.of_non_zeros[self._weight] = found
        if self._wanted[0]:
            self._input_gradient(run, gradients, d)
        self._shared.give_back(self.result, d)

    def _input_gradient(self, run: Pass, gradients: Gradients, d: Tensor) -> None:
        before = gradients.pop_planes(self._source) if self._lies else None
        back = self._transposed(before is not None)
        back.values = self._non_zeros()[back.order]
        if self._lies:
            found = self._shared.planes(self._source)
            back(d, found, before)
            gradients.add_planes(self._source, found)
            if before is not None:
                self._shared.give_back(self._source, before)
            return
        found = self._shared.scratch(self._planes, "gradient")
        back(d, found)
        if self._alone:
            view = self.product.geometry.view(found, self._shape, self.axis)
            gradients.add(self._source, view.clone())
        else:
            gradients.add_images(self._source, self.product, found)

    def _transposed(self, adds: bool) -> Transposed:
        if adds not in self._back:
            masks = self._lies
            self._back[adds] = Transposed(self.product, masks=masks, adds=adds)
        return self._back[adds]


class Normalise(Unit):
    """Batch normalisation in planes, with a sum and a ReLU that may follow.

    Args:
        shared: What the units of the plan share.
        node: The normalisation.
        first: Its result.
    """

    borrows = True

    def __init__(self, shared: Shared, node: fx.Node, first: fx.Node) -> None:  # noqa: D107
        self._shared, self._node, self.result = shared, node, first
        self.x, self._w, self._b, self._mean, self._var, _, rate, self._epsilon = (
            arguments(node)
        )
        self._rate: float = rate
        self.added: fx.Node | None = None
        self.relu = False
        self._kernel: Norm | None = None

    def settle(self) -> None:
        """Give the result its home: nothing more follows."""
        home = self._shared.homes[self.x]
        self._shared.homes[self.result] = home
        adds = self.added is not None
        self._kernel = Norm(home.geometry, home.dtype, self._epsilon, adds, self.relu)

    def _weights(self, run: Pass) -> tuple[Tensor, Tensor]:
        channels = len(run.planes[self.x])
        like = run.planes[self.x]
        w = like.new_ones(channels) if self._w is None else run.values[self._w]
        b = like.new_zeros(channels) if self._b is None else run.values[self._b]
        return w.contiguous(), b.contiguous()

    def forward(self, run: Pass) -> None:  # noqa: D102
        assert self._kernel is not None
        w, b = self._weights(run)
        added = None if self.added is None else run.planes[self.added]
        x, y = run.planes[self.x], self._shared.planes(self.result)
        mean, variance = self._kernel.forward(x, w, b, added, y)
        for node, new in ((self._mean, mean), (self._var, variance)):
            if node is not None:
                before = run.values[node]
                rate = self._rate
                if node is self._var:
                    count = shape_of(self.x).numel() // len(new)
                    rate = rate * count / (count - 1)
                before.mul_(1 - self._rate).add_(new, alpha=rate)
        run.saved[self] = mean, variance
        run.put(self.result, y)

    def backward(self, run: Pass, gradients: Gradients) -> None:  # noqa: D102
        assert self._kernel is not None
        d = gradients.take_planes(self.result)
        if d is None:
            return
        x, y = run.planes[self.x], run.planes[self.result]
        w, _ = self._weights(run)
        dx = d if self.added is None else self._shared.planes(self.x)
        dz = None if self.added is None else d
        mean, variance = run.saved[self]
        dw, db = self._kernel.backward(d, x, y, w, mean, variance, dx, dz)
        for node, found in ((self._w, dw), (self._b, db)):
            if node in self._shared.needs:
                gradients.add(node, found)
        for node, planes in ((self.x, dx), (self.added, dz)):
            if node is not None and planes is not None:
                if node in self._shared.needs:
                    gradients.add_planes(node, planes)
                else:
                    self._shared.give_back(node, planes)


class Whole(Unit):
    """A function of each number, on whole planes: 0 stays 0.

    Args:
        shared: What the units of the plan share.
        node: The operation.
        planes: Its arguments that lie in planes.
    """

    def __init__(  # noqa: D107
        self, shared: Shared, node: fx.Node, planes: list[fx.Node]
    ) -> None:
        self._shared, self.result, self._read = shared, node, planes
        shared.homes[node] = shared.homes[planes[0]]

    def forward(self, run: Pass) -> None:  # noqa: D102
        needs = self._shared.needs
        leaves = {n: _leaf(run.planes[n], n in needs) for n in self._read}
        with torch.enable_grad():
            args = fx.node.map_arg(arguments(self.result), leaves.__getitem__)
            out = operation(self.result)(*args, **self.result.kwargs)
        run.saved[self] = leaves, out
        run.values[self.result] = self._shared.homes[self.result].view(out.detach())
        run.planes[self.result] = out.detach()

    def backward(self, run: Pass, gradients: Gradients) -> None:  # noqa: D102
        d = gradients.take_planes(self.result)
        if d is None:
            return
        leaves, out = run.saved[self]
        wanted = [n for n in leaves if leaves[n].requires_grad]
        found = torch.autograd.grad(
            out, [leaves[n] for n in wanted], d, retain_graph=True
        )
        for node, one in zip(wanted, found, strict=True):
            gradients.add_planes(node, self._shared.planes(node).copy_(one))
        self._shared.give_back(self.result, d)


class Call(Unit):
    """An operation as PyTorch computes it.

    Args:
        shared: What the units of the plan share.
        node: The operation.
    """

    def __init__(self, shared: Shared, node: fx.Node) -> None:  # noqa: D107
        self._shared, self.result = shared, node
        self._draws = torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        )

    def forward(self, run: Pass) -> None:  # noqa: D102
        values, needs = run.values, self._shared.needs
        leaves: dict[fx.Node, Tensor] = {}

        def value(node: fx.Node) -> Any:
            if node in self._shared.constants:
                return self._shared.constants[node]
            found = values[node]
            if not isinstance(found, Tensor):
                return found
            if self._draws:  # the order of random numbers is that in memory
                found = found.contiguous()
            if node in needs:
                leaves[node] = leaves.get(node, _leaf(found, True))
                return leaves[node]
            return found

        args, kwargs = fx.node.map_arg(
            (arguments(self.result), self.result.kwargs), value
        )
        with torch.enable_grad():
            out = self._compute(args, kwargs)
        parts = out if isinstance(out, tuple | list) else [out]
        if not any(isinstance(one, Tensor) and one.requires_grad for one in parts):
            needs.discard(self.result)  # PyTorch knows no gradient of it
        run.saved[self] = leaves, out
        values[self.result] = _detached(out)

    def _compute(self, args: Any, kwargs: Any) -> Any:
        function = operation(self.result)
        if function is NORM:
            x, w, b, mean, variance, _, rate, epsilon = args
            y = nn.functional.batch_norm(x, mean, variance, w, b, True, rate, epsilon)
            return y, None, None, None, None
        if function is _FIXED_NORM:
            x, w, b, mean, variance, rate, epsilon = args
            y = nn.functional.batch_norm(x, mean, variance, w, b, False, rate, epsilon)
            return y, None, None
        if function is aten.max_pool2d.default:
            # Several times as fast as in the usual memory format.
            args = args[0].contiguous(memory_format=torch.channels_last), *args[1:]
        if function is aten.view.default:  # values may have other strides
            function = aten.reshape.default
        return function(*args, **kwargs)

    def backward(self, run: Pass, gradients: Gradients) -> None:  # noqa: D102
        leaves, out = run.saved[self]
        if isinstance(out, Tensor):
            pairs = [(out, gradients.take(self.result))]
        else:
            pairs = [
                (out[item.args[1]], gradients.take(item))
                for item in self.result.users
                if item.target is operator.getitem
            ]
        pairs = [(o, d) for o, d in pairs if d is not None and o.requires_grad]
        if not pairs or not leaves:
            return
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [*leaves.values()],
            [d for _, d in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for node, one in zip(leaves, found, strict=True):
            if one is not None:
                gradients.add(node, one)


class Item(Unit):
    """A part of an operation's result.

    Args:
        node: The part.
    """

    def __init__(self, node: fx.Node) -> None:  # noqa: D107
        self.result = node

    def forward(self, run: Pass) -> None:  # noqa: D102
        whole, number = arguments(self.result)
        run.values[self.result] = run.values[whole][number]

    def backward(self, run: Pass, gradients: Gradients) -> None:
        """Leave the gradient to the operation."""


def _leaf(value: Tensor, needs: bool) -> Tensor:
    return value.detach().requires_grad_(needs)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return [_detached(one) for one in value]
    return value


class Builder:
    """Puts together the units of a graph, in their order.

    Args:
        graph: The graph.
        sparse: Its layers that run by their non-zeros, by their operations.
        kept: The masks of their weights.
        shared: What the units share.
    """

    def __init__(  # noqa: D107
        self,
        graph: Graph,
        sparse: Mapping[fx.Node, Layer],
        kept: Mapping[fx.Node, Tensor],
        shared: Shared,
    ) -> None:
        self._graph, self._sparse, self._kept = graph, sparse, kept
        self._shared = shared
        # Normalisations that wait for what may follow, by their results until now.
        self._waiting: dict[fx.Node, Normalise] = {}

    def __iter__(self) -> Iterator[Unit]:
        """Yield the units."""
        for node in self._graph.nodes:
            yield from self._unit(node)

    def _unit(self, node: fx.Node) -> Iterator[Unit]:
        waiting = [one for one in node.all_input_nodes if one in self._waiting]
        if node.target is NORM and self._fits(node):
            for item in node.users:
                if item.args[1] == 0:
                    self._waiting[item] = Normalise(self._shared, node, item)
        elif node in self._waiting:
            if not self._is_followed(node, aten.relu.default, aten.add.Tensor):
                yield self._settled(node)
        elif is_statistic(node) and self._fits(arguments(node)[0]):
            return  # the normalisation itself writes it
        elif node.target is aten.relu.default and waiting:
            yield self._settled(waiting[0], relu=node)
        elif node.target is aten.add.Tensor and waiting:
            yield from self._sum(node, waiting[0])
        else:
            yield self._plain(node)

    def _sum(self, node: fx.Node, mine: fx.Node) -> Iterator[Unit]:
        """Take a sum into the normalisation before it, if the other value fits."""
        one, other = (*arguments(node), None)[:2]
        added = other if one is mine else one
        if added in self._waiting and added is not mine:
            yield self._settled(added)
        unit, homes = self._waiting[mine], self._shared.homes
        fits = isinstance(added, fx.Node) and homes.get(added) == homes[unit.x]
        if not fits or added is mine or node.kwargs or unit.added is not None:
            yield self._settled(mine)
            yield self._plain(node)
            return
        del self._waiting[mine]
        unit.added, unit.result = added, node
        self._waiting[node] = unit
        if not self._is_followed(node, aten.relu.default):
            yield self._settled(node)

    def _settled(self, node: fx.Node, relu: fx.Node | None = None) -> Unit:
        """Return a normalisation, as nothing more follows."""
        unit = self._waiting.pop(node)
        if relu is not None:
            unit.relu, unit.result = True, relu
        unit.settle()
        return unit

    def _plain(self, node: fx.Node) -> Unit:
        shared, homes = self._shared, self._shared.homes
        if node in self._sparse:
            return Multiply(shared, self._sparse[node], self._kept[node])
        if node.target is operator.getitem:
            return Item(node)
        read = node.all_input_nodes
        alike = len({homes.get(one) for one in read}) == 1 and read[0] in homes
        values = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
        if alike and (node.target in OF_ZERO or (node.target in PAIRS and values)):
            return Whole(shared, node, read)
        return Call(shared, node)

    def _fits(self, norm: fx.Node) -> bool:
        """Whether a normalisation can run in planes."""
        x, *others = arguments(norm)[:5]
        home = self._shared.homes.get(x)
        if home is None or home.axis != 1:
            return False
        types = {one.meta["val"].dtype for one in others if one is not None}
        return types <= {home.dtype}

    def _is_followed(self, node: fx.Node, *operations: Any) -> bool:
        follower = self._graph.follower(node)
        return follower is not None and follower.target in operations


def is_statistic(node: fx.Node) -> bool:
    """Whether a value is a part of a normalisation's result beside the output."""
    if node.target is not operator.getitem:
        return False
    whole, number = arguments(node)
    return number != 0 and whole.target is NORM
