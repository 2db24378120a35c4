"""From a model to steps that leave its zeros out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from force_plugin.data.containers import tensors
from force_plugin.model.restoring import random_states
from force_plugin.model.torch_internals import tree_unflatten
from force_plugin.sparse.convolution import Product, needs
from force_plugin.sparse.geometry import Geometry, Need
from force_plugin.sparse.graph import (
    Graph,
    Layer,
    arguments,
    layers_of,
    operation,
    shape_of,
)
from force_plugin.sparse.report import ExecutionReport, LayerExecution
from force_plugin.sparse.steps import (
    Alias,
    Attention,
    Call,
    Dense,
    Gate,
    Join,
    LayerNorm,
    Multiply,
    Place,
    Values,
    Whole,
    as_images,
)
from force_plugin.sparse.timing import in_turns
from force_plugin.structure.example_inputs import distance

aten = torch.ops.aten
# Functions of each number by itself, with the value 0 at 0.
OF_ZERO = (
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.tanh.default,
)
PAIRS = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
# The result is the argument: nothing is written in place.
_SAME = (aten.clone.default, aten.alias.default, aten.contiguous.default)
Key = tuple[int, int, int]
Step = Callable[[Values], None]


# Sparse layers have to save this share of the time, as times vary.
_MARGIN = 0.03
# Largest error of outputs, as a share of the largest: only a mistake exceeds it.
_LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-9}


class Choice:
    """What the user wants: the faster way, or a fixed way for all or some layers.

    Args:
        plan: See :func:`force_plugin.sparsify`.

    Raises:
        ValueError: There is another word.
    """

    def __init__(self, plan: str | Mapping[str, str]) -> None:  # noqa: D107
        words = [plan] if isinstance(plan, str) else [*plan.values()]
        allowed = {"sparse", "dense"} | (
            {"measure"} if isinstance(plan, str) else set()
        )
        for word in words:
            if word not in allowed:
                raise ValueError(
                    f"plan: expected {' or '.join(sorted(allowed))}, got {word!r}"
                )
        self.fixed = {} if isinstance(plan, str) else dict(plan)
        self.otherwise = plan if isinstance(plan, str) else "measure"
        self.measured: dict[Any, tuple[float, float]] = {}
        self.progress = False  # whether to show a bar

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"measured": {}}  # another machine has other times

    def of(
        self, layer: Layer, times: Callable[[Layer], tuple[float, float]]
    ) -> LayerExecution:
        """Return how a layer runs.

        Args:
            layer: The layer.
            times: Measures the seconds of both ways.
        """
        kept, total = layer.kept, layer.weight.numel()
        word = self.fixed.get(layer.name, self.otherwise)
        if word != "measure":
            return LayerExecution(layer.name, kept, total, word, "plan= says so")
        if kept == total:
            return LayerExecution(layer.name, kept, total, "dense", "it has no zeros")
        key = times, layer.name, shape_of(layer.source), kept, layer.weight.dtype
        if key not in self.measured:
            self.measured[key] = times(layer)
        sparse, dense = self.measured[key]
        faster = sparse < (1 - _MARGIN) * dense
        runs, why = ("sparse", "faster") if faster else ("dense", "sparse is slower")
        taken = 1e3 * sparse, 1e3 * dense
        return LayerExecution(layer.name, kept, total, runs, why, *taken)


class Unsupported(NamedTuple):
    """Why a model runs its dense forward pass."""

    why: str
    layers: tuple[LayerExecution, ...] = ()
    sparse_ms: float | None = None
    dense_ms: float | None = None

    @property
    def report(self) -> ExecutionReport:
        """The report of a model without a plan."""
        layers = (replace(one, runs="dense", why=self.why) for one in self.layers)
        return ExecutionReport(tuple(layers), self.why, self.sparse_ms, self.dense_ms)


def planned(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], choice: Choice
) -> Plan | Unsupported:
    """Return a plan that computes what a model computes, and no slower.

    Args:
        model: A model in evaluation mode, without masks.
        args: Positional inputs.
        kwargs: Inputs by name.
        choice: What the user wants.

    Returns:
        The plan, or the reason why the model is better run as it is.
    """
    with ExitStack() as stack:
        stack.callback(random_states(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        try:
            graph = Graph(model, args, kwargs)
        except Exception as error:
            return Unsupported(not_followed(error))
        if graph.obstacle:
            return Unsupported(graph.obstacle)
        layers = layers_of(graph)
        bar = tqdm(layers, "sparsify", leave=False, disable=not choice.progress)
        runs = {layer.name: choice.of(layer, _times) for layer in bar}
        known = tuple(runs.values())
        if not any(one.runs == "sparse" for one in known):
            return Unsupported("no layer is faster by its non-zeros", known)
        plan = Plan(graph, layers, runs)
        expected = [*tensors(model(*args, **kwargs))]
        for _ in range(2):  # the second call finds the memory of the first
            found = [*tensors(plan(*args, **kwargs))]
            if (off := difference(found, expected)) is not None:
                return Unsupported(f"its plan has other outputs: {off}", known)
        if choice.otherwise != "measure":
            return plan
        sparse, dense = in_turns(
            [lambda: plan(*args, **kwargs), lambda: model(*args, **kwargs)]
        )
        plan.sparse_ms, plan.dense_ms = 1e3 * sparse, 1e3 * dense
        if sparse > dense:
            why = "as a whole it is faster"
            return Unsupported(why, known, plan.sparse_ms, plan.dense_ms)
        return plan


def not_followed(error: Exception) -> str:
    """Return in words why a model has no graph."""
    first = str(error).strip().partition("\n")[0]
    return f"torch.export cannot follow it ({type(error).__name__}: {first})"


def difference(found: list[Tensor], expected: list[Tensor]) -> str | None:
    """Return in words how outputs differ from those of the model, ``None`` if not."""
    if [(o.shape, o.dtype) for o in found] != [(o.shape, o.dtype) for o in expected]:
        return "their shapes or types differ"
    for one, other in zip(found, expected, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return "integers differ"
        elif not torch.equal(one.isnan(), other.isnan()):
            return "NaN is elsewhere"
        else:
            off = distance(one.nan_to_num(), other.nan_to_num())
            if off > _LARGEST_ERROR.get(one.dtype, 1e-2):
                return f"the largest difference is {off:.3g} of the largest output"
    return None


class Plan:
    """The steps of a model for inputs of one shape.

    Args:
        graph: The graph of the model.
        layers: Its convolutions and linear layers.
        runs: How each runs, by name.

    Attributes:
        steps: Each step, and the values that are not needed after it.
        sparse_ms: Milliseconds of a call, if measured.
        dense_ms: Milliseconds of the model, if measured.
    """

    def __init__(  # noqa: D107
        self, graph: Graph, layers: list[Layer], runs: dict[str, LayerExecution]
    ) -> None:
        self._graph, self._runs = graph, runs
        self.sparse_ms: float | None = None
        self.dense_ms: float | None = None
        sparse = [one for one in layers if runs[one.name].runs == "sparse"]
        self._rooms = rooms_of(sparse)
        self._places: dict[fx.Node, Place] = {}
        self._owned: dict[fx.Node, Place] = {}  # without those that views share
        self._free: dict[tuple[Geometry, int, torch.dtype], list[Tensor]] = {}
        self._packs: dict[Any, Tensor] = {}
        units = _units(graph, layers, {one.chain[0] for one in sparse})
        self.steps = [*self._build(units)]

    @property
    def report(self) -> ExecutionReport:
        """How the layers run."""
        runs = tuple(self._runs.values())
        return ExecutionReport(runs, "", self.sparse_ms, self.dense_ms)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs for inputs of the planned shapes."""
        values = self._graph.given(args, kwargs)
        for step, gone in self.steps:
            step(values)
            for node in gone:
                del values[node]
        constants = self._graph.constants
        outputs = [
            (values[one] if one in values else constants[one]).clone()
            if isinstance(one, fx.Node)
            else one
            for one in self._graph.outputs
        ]
        return tree_unflatten(outputs, self._graph.structure)

    def _build(self, units: list[Unit]) -> Iterator[tuple[Step, list[fx.Node]]]:
        """Yield the steps. Planes go to later values once they are not needed."""
        values, memory = _ends(self._graph, units)
        for number, unit in enumerate(units):
            if unit.layer is None:
                step = self._operation(unit.result)
            elif unit.sparse:
                step = self._multiply(unit.layer)
            else:
                step = Dense(unit.layer)
            yield step, values[number]
            for node in memory[number]:
                if place := self._owned.pop(node, None):
                    planes = place.planes
                    key = place.geometry, len(planes), planes.dtype
                    self._free.setdefault(key, []).append(planes)

    # Where values lie.

    def _place(
        self, node: fx.Node, axis: int, geometry: Geometry, clean: bool
    ) -> Place:
        """Return a place for a value, in memory that may have served another value."""
        shape, dtype = shape_of(node), node.meta["val"].dtype
        free = self._free.get((geometry, shape[axis], dtype))
        planes = free.pop() if free else geometry.zeros(shape[axis], dtype)
        place = Place(geometry, planes, shape, axis, clean)
        self._places[node] = self._owned[node] = place
        return place

    def _like(self, node: fx.Node, place: Place, clean: bool | None = None) -> Place:
        """Return a place for a value of the shape of another, and in its geometry."""
        clean = place.clean if clean is None else clean
        return self._place(node, place.axis, place.geometry, clean)

    def _pack(self, geometry: Geometry, channels: int, *key: Any) -> Tensor:
        """Return planes into which values are copied. Their halo stays 0."""
        key = (geometry, channels, *key)
        if key not in self._packs:
            self._packs[key] = geometry.zeros(channels, key[-1])
        return self._packs[key]

    def _of(self, value: Any) -> Place | None:
        return self._places.get(value) if isinstance(value, fx.Node) else None

    # The steps.

    def _multiply(self, layer: Layer) -> Multiply:
        shape, dtype = shape_of(layer.source), layer.weight.dtype
        geometry = self._rooms[key_of(shape_of(layer.last), layer.axis)]
        product = _product(layer, geometry, adds=layer.added is not None)
        source = self._of(layer.source)
        packs: Tensor | Literal["phases"] | None = None
        if (
            source is not None
            and source.geometry == geometry
            and source.axis == layer.axis % len(shape)
            and layer.window.stride == (1, 1)
            and (source.clean or not product.reaches)
        ):
            x = source.planes
        elif layer.window.stride == (1, 1):
            x = self._pack(geometry, product.inputs, shape, dtype)
            packs = geometry.view(x, shape, layer.axis)
        else:
            channels = len(product.phases) * product.inputs
            x = self._pack(geometry, channels, shape, layer.window.stride, dtype)
            packs = "phases"
        z, copies = self._of(layer.added), False
        y = self._place(layer.last, layer.axis, geometry, True)
        if layer.added is not None and not y.fits(z):
            planes = self._pack(geometry, product.outputs, "added", dtype)
            z, copies = Place(geometry, planes, y.view.shape, layer.axis), True
        return Multiply(
            layer.source, layer.added, layer.last, product, x, packs, y, z, copies
        )

    def _operation(self, node: fx.Node) -> Step:
        first = self._of(arguments(node)[0]) if arguments(node) else None
        step: Step | None = None
        if node.target == aten.scaled_dot_product_attention.default:
            step = _attention(node)
        elif node.target == aten.cat.default:
            step = self._join(node)
        elif first is not None:
            step = (
                self._alias(node, first)
                or self._whole(node, first)
                or self._gate(node, first)
                or self._layer_norm(node, first)
            )
        return step or Call(node, self._graph.constants)

    def _alias(self, node: fx.Node, x: Place) -> Alias | None:
        dims = len(x.view.shape)
        place: Place | None = x
        if node.target == aten.permute.default:
            order = [n % dims for n in arguments(node)[1]]
            place = x.permuted(order)
        elif node.target == aten.transpose.int:
            order = [*range(dims)]
            a, b = arguments(node)[1] % dims, arguments(node)[2] % dims
            order[a], order[b] = b, a
            place = x.permuted(order)
        elif node.target not in _SAME:
            return None
        if place is None:
            return None
        self._places[node] = place
        return Alias(node, place)

    def _whole(self, node: fx.Node, x: Place) -> Whole | None:
        if node.target in OF_ZERO:
            return Whole(node, (x.planes, *arguments(node)[1:]), self._like(node, x))
        if node.target not in PAIRS or len(arguments(node)) < 2:
            return None
        second = self._of(arguments(node)[1])
        if second is not None and x.fits(second):
            clean = x.clean and second.clean
            return Whole(node, (x.planes, second.planes), self._like(node, x, clean))
        return None

    def _gate(self, node: fx.Node, x: Place) -> Gate | None:
        if node.target != aten.mul.Tensor or x.axis != 1 or len(x.view.shape) != 4:
            return None
        factor = arguments(node)[1]
        if (
            isinstance(factor, fx.Node)
            and factor not in self._graph.constants
            and shape_of(factor) == (*x.view.shape[:2], 1, 1)
        ):
            return Gate(node, x, factor, self._like(node, x))
        return None

    def _layer_norm(self, node: fx.Node, x: Place) -> LayerNorm | None:
        if node.target != aten.layer_norm.default or x.axis != len(x.view.shape) - 1:
            return None
        _, over, w, b, epsilon = (*arguments(node), None, None, 1e-5)[:5]
        if list(over) != [x.view.shape[-1]]:
            return None
        constants = self._graph.constants
        weight, bias = (n if n is None else constants.get(n) for n in (w, b))
        if (weight is None) != (w is None) or (bias is None) != (b is None):
            return None
        return LayerNorm(node, x, weight, bias, epsilon, self._like(node, x, False))

    def _join(self, node: fx.Node) -> Join | None:
        parts = [self._of(part) for part in arguments(node)[0]]
        places = [place for place in parts if place is not None]
        axis = arguments(node)[1] if len(arguments(node)) > 1 else 0
        if len(places) < len(parts):
            return None
        first = places[0]
        if any(
            place.geometry != first.geometry
            or place.axis != axis % len(first.view.shape)
            for place in places
        ):
            return None
        clean = all(place.clean for place in places)
        return Join(node, [p.planes for p in places], self._like(node, first, clean))


class Unit(NamedTuple):
    """An operation, or a layer with all that is part of it.

    Attributes:
        result: The value that it computes.
        reads: The values that it reads.
        layer: The layer, or ``None``.
        sparse: Whether the layer runs sparse.
    """

    result: fx.Node
    reads: list[fx.Node]
    layer: Layer | None = None
    sparse: bool = False


def _units(graph: Graph, layers: list[Layer], sparse: set[fx.Node]) -> list[Unit]:
    """Return what a graph computes, in its order.

    Args:
        graph: The graph.
        layers: Its layers.
        sparse: The first operations of those that run sparse.
    """
    of_layers: dict[fx.Node, Unit] = {}
    hidden: set[fx.Node] = set()
    for layer in layers:
        if layer.chain[0] in sparse:
            reads = [layer.source, *([] if layer.added is None else [layer.added])]
            of_layers[layer.last] = Unit(layer.last, reads, layer, True)
            hidden.update(layer.chain[:-1])
        else:
            of_layers[layer.scaled] = Unit(layer.scaled, [layer.source], layer)
            hidden.update(layer.chain[: layer.scales - 1])
    return [
        of_layers.get(node) or Unit(node, node.all_input_nodes)
        for node in graph.nodes
        if node not in hidden
    ]


def _ends(
    graph: Graph, units: list[Unit]
) -> tuple[list[list[fx.Node]], list[list[fx.Node]]]:
    """Return by step the values that are not read after it, and whose memory is not.

    A view of a value keeps the value's memory.
    """
    last: dict[fx.Node, int] = {}
    for number, unit in enumerate(units):
        last[unit.result] = number
        last.update((node, number) for node in unit.reads)
    never = len(units)
    last.update((n, never) for n in graph.outputs if isinstance(n, fx.Node))
    memory = dict(last)
    for unit in reversed(units):
        if unit.layer is None and is_view(unit.result):
            for node in unit.reads:
                memory[node] = max(memory[node], memory[unit.result])
    found: tuple[list[list[fx.Node]], list[list[fx.Node]]] = (
        [[] for _ in units],
        [[] for _ in units],
    )
    for ends, by_step in zip((last, memory), found, strict=True):
        for node, number in ends.items():
            if number < never and node not in graph.constants:
                by_step[number].append(node)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a result may share the memory of an argument."""
    if node.target is operator.getitem or node.target in _SAME:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info for result in schema.returns)


def rooms_of(layers: Iterable[Layer]) -> dict[Key, Geometry]:
    """Return a geometry for each size of images, and of rows of tokens."""
    wanted: dict[Key, list[Need]] = {}
    for layer in layers:
        need = wanted.setdefault(key_of(shape_of(layer.last), layer.axis), [])
        if layer.axis == 1:
            need.append(needs(layer.window, size_of(layer.source)))
    return {
        key: Geometry.room(key[0], (key[1], key[2]), own) for key, own in wanted.items()
    }


def key_of(shape: Sequence[int], axis: int) -> Key:
    """Return numbers of images, lines and pixels of a line, of a value."""
    axis %= len(shape)
    *more, height, width = [1, 1, *(n for k, n in enumerate(shape) if k != axis)]
    return prod(more), height, width


def size_of(node: fx.Node) -> tuple[int, int]:
    """Return height and width of images, see :func:`as_images`."""
    shape = shape_of(node)
    return (shape[2], shape[3]) if len(shape) == 4 else (shape[0], shape[2])


def _attention(node: fx.Node) -> Attention | None:
    q, _, v = map(shape_of, arguments(node)[:3])
    plain = len(arguments(node)) == 3 and not node.kwargs.keys() - {"scale"}
    if not plain or len(q) != 4 or q[:2] != v[:2]:
        return None
    scale: Any = node.kwargs.get("scale")
    return Attention(node, float(scale) if scale else q[-1] ** -0.5)


def _product(layer: Layer, geometry: Geometry, adds: bool = False) -> Product:
    return Product(
        layer.weight,
        layer.bias,
        layer.window,
        geometry,
        groups=layer.groups,
        masks=geometry.has_halo,
        activation=layer.activation,
        adds=adds,
    )


def _times(layer: Layer) -> tuple[float, float]:
    """Return the seconds of a layer by its non-zeros, and as PyTorch computes it."""
    shape = shape_of(layer.source)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    (geometry,) = rooms_of([layer]).values()
    product = _product(layer, geometry)
    moves = layer.axis == 1 and key_of(shape, 1) != key_of(shape_of(layer.last), 1)
    planes, out = product.packed(x.dtype), geometry.zeros(product.outputs, x.dtype)
    dense, values, last = Dense(layer), {layer.source: x}, layer.last

    def by_non_zeros() -> None:
        if moves:
            product.pack(as_images(x), planes)
        product(planes, out)

    def by_pytorch() -> None:
        dense(values)
        if layer.activation != "none":
            operation(last)(values[layer.scaled], *arguments(last)[1:], **last.kwargs)

    with torch.no_grad():
        sparse, as_before = in_turns([by_non_zeros, by_pytorch])
    return sparse, as_before
