"""The graph of a model: what it computes from inputs of one shape."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind

from force_plugin.model.restoring import restored
from force_plugin.model.torch_internals import TreeSpec, tree_leaves
from force_plugin.sparse.activations import APPROXIMATE
from force_plugin.sparse.convolution import Window

aten = torch.ops.aten
_NORM = aten._native_batch_norm_legit_no_training.default


class Graph:
    """The operations of a model, in their order.

    Args:
        model: The model.
        args: Positional inputs of the model.
        kwargs: Inputs by name.
        trains: Whether parameters and buffers change from call to call. Otherwise they
            count as constants.

    Attributes:
        inputs: What is given: each tensor, number and other value.
        nodes: The operations.
        tensors: Parameters and buffers.
        constants: Values of all that does not change.
        names: Names of parameters and buffers.
        outputs: The results, flat.
        written: What is written to buffers, by their names.
        structure: How the results are put together.
        obstacle: Why the graph alone is not the model, ``""`` if it is.
    """

    def __init__(  # noqa: D107
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trains: bool = False,
    ) -> None:
        # A forward pass may keep what it computes, here stand-ins for tensors.
        with restored(model.modules()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
            program = program.run_decompositions({})  # no writes in place
        signature = program.graph_signature
        state = {**program.state_dict, **program.constants}
        fixed: dict[str, str] = signature.inputs_to_lifted_tensor_constants
        own: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }
        self.tensors: dict[fx.Node, Tensor] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.inputs: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        for node in program.graph.nodes:
            if node.op == "call_function" and self._is_constant(node):
                self.constants[node] = self._value(node)
            elif node.op == "call_function":
                self.nodes.append(node)
            elif node.op == "placeholder" and node.name in fixed:
                self.constants[node] = state[fixed[node.name]].detach()
            elif node.op == "placeholder" and node.name in own:
                self.names[node] = own[node.name]
                self.tensors[node] = state[own[node.name]].detach()
                if not trains:
                    self.constants[node] = self.tensors[node]
            elif node.op == "placeholder":
                self.inputs.append(node)
            elif node.op == "output":
                results: list[Any] = list(arguments(node)[0])
            else:
                raise NotImplementedError(f"it has a graph of its own: {node.name}")
        kinds = zip(signature.output_specs, results, strict=True)
        self.written: dict[str, fx.Node] = {}
        self.outputs: list[Any] = []
        for spec, node in kinds:
            if spec.kind is OutputKind.BUFFER_MUTATION:
                self.written[spec.target] = node
            else:
                self.outputs.append(node)
        _, named = program.call_spec.in_spec.unflatten(
            range(program.call_spec.in_spec.num_leaves)
        )
        self._names = [*named]
        self.structure: TreeSpec = program.call_spec.out_spec
        self.obstacle = _obstacle(signature, trains)
        self.order = {node: n for n, node in enumerate(program.graph.nodes)}

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[fx.Node, Any]:
        """Return the inputs of a call by node."""
        ordered = {name: kwargs[name] for name in self._names}
        leaves = tree_leaves((args, ordered))
        return dict(zip(self.inputs, leaves, strict=True))

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an operation computes a tensor of constants, and draws no numbers."""
        target = node.target
        known = node.all_input_nodes and all(
            n in self.constants for n in node.all_input_nodes
        )
        return bool(
            known
            and isinstance(node.meta.get("val"), Tensor)
            and torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())
        )

    def _value(self, node: fx.Node) -> Tensor:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), self.constants.__getitem__
        )
        found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return found

    def follower(self, node: fx.Node) -> fx.Node | None:
        """Return the operation that alone reads a value, if it is one."""
        (user,) = node.users if len(node.users) == 1 else (None,)
        return user if user is not None and user.op == "call_function" else None


def _obstacle(signature: Any, trains: bool) -> str:
    """Return in words what a forward pass writes that it should not."""
    written = {
        **({} if trains else signature.buffers_to_mutate),
        **getattr(signature, "parameters_to_mutate", {}),
        **signature.user_inputs_to_mutate,
    }
    names = ", ".join(sorted(map(str, written.values())))
    return f"its forward pass changes {names}" if names else ""


def operation(node: fx.Node) -> Any:
    """Return what an operation calls."""
    return node.target


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of an operation."""
    return node.args


def shape_of(node: fx.Node) -> torch.Size:
    """Return the shape of a value."""
    shape: torch.Size = node.meta["val"].shape
    return shape


@dataclass
class Layer:
    """A convolution or a linear layer, and what follows it.

    Attributes:
        chain: The operation, and all operations that follow and are part of the layer.
        name: Name of its weight in the model.
        weight: The weight with the scales that follow, ``[outputs, inputs / groups,
            height, width]``.
        bias: The bias with the scales that follow, or ``None``.
        window: Where the layer looks; a single pixel for a linear layer.
        groups: Number of groups.
        axis: Dimension of the channels: -1 for a linear layer.
        added: A value that is added afterwards, or ``None``.
        activation: Name of the activation that follows.
        kept: Number of non-zeros of the weight in the model.
        scales: Number of operations in the chain up to the last of the scales.
    """

    chain: list[fx.Node]
    name: str
    weight: Tensor
    bias: Tensor | None
    window: Window
    groups: int
    axis: int
    added: fx.Node | None = None
    activation: str = "none"
    kept: int = field(init=False)
    scales: int = 1

    def __post_init__(self) -> None:
        self.kept = int(self.weight.count_nonzero())

    @property
    def last(self) -> fx.Node:
        """The last operation of all."""
        return self.chain[-1]

    @property
    def scaled(self) -> fx.Node:
        """The last of the scales that follow."""
        return self.chain[self.scales - 1]

    @property
    def source(self) -> fx.Node:
        """The value that the layer reads."""
        found: fx.Node = arguments(self.chain[0])[0]
        return found


def layers_of(graph: Graph) -> list[Layer]:
    """Return the layers of a graph whose weights are constants, in their order."""
    layers = bare_layers(graph, graph.constants)
    for layer in layers:
        _scales(graph, layer)
        _ending(graph, layer)
    return layers


def bare_layers(graph: Graph, values: Mapping[fx.Node, Tensor]) -> list[Layer]:
    """Return the layers of a graph without what follows, in their order.

    Args:
        graph: The graph.
        values: Values of weights and biases.
    """
    layers = []
    for node in graph.nodes:
        layer = None
        if node.target in (*_LINES, *_IMAGES):
            layer = _convolution(graph, node, values)
        if node.target == aten.linear.default:
            layer = _linear(graph, node, values)
        if layer is not None:
            layers.append(layer)
    return layers


def _convolution(
    graph: Graph, node: fx.Node, tensors: Mapping[fx.Node, Tensor]
) -> Layer | None:
    _, weight, bias, stride, padding, dilation, groups = (
        *arguments(node),
        *[None] * 6,
    )[:7]
    if not _constant(tensors, weight, bias):
        return None
    values = tensors[weight]
    if len(shape_of(arguments(node)[0])) != values.dim():  # an image without a batch
        return None
    sizes = [_sizes(v, d) for v, d in ((stride, 1), (padding, 0), (dilation, 1))]
    if node.target in _LINES:  # a line is an image of one line
        values = values[:, :, None]
        sizes = [(d, size[0]) for d, size in zip((1, 0, 1), sizes, strict=True)]
    kernel = values.shape[2], values.shape[3]
    before = after = sizes[1]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(sizes[2], kernel, strict=True)]
        before = total[0] // 2, total[1] // 2
        after = total[0] - before[0], total[1] - before[1]
    window = Window(kernel, sizes[0], before, after, sizes[2])
    own = None if bias is None else tensors[bias]
    name = _name(graph, node, weight)
    return Layer([node], name, values, own, window, groups or 1, 1)


def _linear(
    graph: Graph, node: fx.Node, tensors: Mapping[fx.Node, Tensor]
) -> Layer | None:
    _, weight, bias = (*arguments(node), None)[:3]
    if not _constant(tensors, weight, bias) or len(shape_of(arguments(node)[0])) < 2:
        return None
    own = None if bias is None else tensors[bias]
    values = tensors[weight][:, :, None, None]
    name = _name(graph, node, weight)
    return Layer([node], name, values, own, Window((1, 1)), 1, -1)


def _name(graph: Graph, node: fx.Node, weight: Any) -> str:
    return graph.names.get(weight, str(node)).removesuffix(".weight")


def _constant(tensors: Mapping[fx.Node, Tensor], weight: Any, bias: Any) -> bool:
    values = [tensors.get(n) for n in (weight, bias) if n is not None]
    return all(
        v is not None and v.dtype in (torch.float32, torch.float64) for v in values
    )


_LINES = (aten.conv1d.default, aten.conv1d.padding)
_IMAGES = (aten.conv2d.default, aten.conv2d.padding)


def _sizes(value: Any, default: int) -> tuple[int, int]:
    if value is None or isinstance(value, str):
        return default, default
    values = tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _scales(graph: Graph, layer: Layer) -> None:
    """Multiply what scales each channel of a layer's output into its weight."""
    while (user := graph.follower(layer.last)) is not None:
        if user.target == _NORM and layer.axis == 1:
            first = graph.follower(user)
            if first is None or first.target is not operator.getitem:
                return
            _, w, b, mean, var, _, epsilon = arguments(user)
            scale = (graph.constants[var] + epsilon).rsqrt()
            if w is not None:
                scale = scale * graph.constants[w]
            shift = -graph.constants[mean] * scale
            if b is not None:
                shift = shift + graph.constants[b]
            layer.chain += [user, first]
        elif user.target == aten.mul.Tensor:
            scales = [graph.constants.get(n) for n in arguments(user)]
            (factor,) = [s for s in scales if s is not None] or (None,)
            if factor is None or not _of_channels(factor, layer):
                return
            scale, shift = factor.flatten(), None
            layer.chain.append(user)
        else:
            return
        layer.scales = len(layer.chain)
        layer.weight = layer.weight * scale.view(-1, 1, 1, 1)
        if layer.bias is not None:
            own = layer.bias * scale
            shift = own if shift is None else shift + own
        layer.bias = shift


def _of_channels(factor: Tensor, layer: Layer) -> bool:
    channels = len(layer.weight)
    after = 0 if layer.axis == -1 else len(shape_of(layer.last)) - 2
    ends = factor.shape[factor.dim() - 1 - after :]
    return factor.numel() == channels and ends == (channels, *[1] * after)


def _ending(graph: Graph, layer: Layer) -> None:
    """Take a sum with an earlier value, and a ReLU, into a layer."""
    user = graph.follower(layer.last)
    if user is not None and user.target == aten.add.Tensor and not user.kwargs:
        one, other = arguments(user)
        added = other if one is layer.last else one
        if (
            isinstance(added, fx.Node)
            and added is not layer.last
            and graph.order[added] < graph.order[layer.chain[0]]
            and shape_of(added) == shape_of(user)
        ):
            layer.added = added
            layer.chain.append(user)
    user = graph.follower(layer.last)
    activation = None if user is None else activation_of(user)
    exact = activation not in APPROXIMATE or layer.weight.dtype == torch.float32
    if user is not None and activation is not None and exact:
        layer.activation = activation
        layer.chain.append(user)


def activation_of(node: fx.Node) -> str | None:
    """Return the name of a function of each number that kernels know."""
    if node.target == aten.hardtanh.default:
        return "relu6" if arguments(node)[1:] == (0.0, 6.0) else None
    if node.target == aten.gelu.default and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(operation(node))


_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.sigmoid.default: "sigmoid",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
}
