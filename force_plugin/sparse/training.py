"""Training by non-zeros alone: the plan of a forward and a backward pass.

A plan is a list of units. Each computes a value from values before it, and then its
gradients. Convolutions, linear layers and batch normalisations do so in planes, see
``geometry``. All other operations are PyTorch's, each with an autograd graph of its
own. The plan as a whole is a single function for autograd.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from force_plugin.model.torch_internals import keeps_graph, tree_unflatten
from force_plugin.sparse.graph import Graph, Layer, arguments
from force_plugin.sparse.non_zeros import NonZeros
from force_plugin.sparse.passes import Gradients, Pass, Shared
from force_plugin.sparse.plan import rooms_of
from force_plugin.sparse.report import ExecutionReport, LayerExecution
from force_plugin.sparse.units import Builder, Multiply, is_statistic


class TrainingPlan:
    """A forward and a backward pass for inputs of one shape.

    Args:
        graph: The graph of the dense model in training mode.
        layers: Its convolutions and linear layers.
        runs: How each of them runs, by name.
        model: The model with parameters of non-zeros.
        wanted: For each input, whether its gradient is wanted.

    Attributes:
        sparse_ms: Milliseconds of a forward and a backward pass, if measured.
        dense_ms: Milliseconds of those of the dense model, if measured.
    """

    def __init__(  # noqa: D107
        self,
        graph: Graph,
        layers: list[Layer],
        runs: dict[str, LayerExecution],
        model: nn.Module,
        wanted: list[bool],
    ) -> None:
        self._graph, self._runs = graph, runs
        self.sparse_ms: float | None = None
        self.dense_ms: float | None = None
        self._holders = holders(graph, model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {
            node: parameters[name]
            for node, name in graph.names.items()
            if name in parameters and node.users
        }
        buffers = dict(model.named_buffers(remove_duplicate=False))
        self._buffers = {
            node: buffers[name] for node, name in graph.names.items() if name in buffers
        }
        self._written = {
            buffers[name]: node
            for name, node in graph.written.items()
            if not is_statistic(node)
        }
        sparse = {
            one.chain[0]: one for one in layers if runs[one.name].runs == "sparse"
        }
        trained = {n for n, one in self._parameters.items() if one.requires_grad}
        given = {n for n, one in zip(graph.inputs, wanted, strict=True) if one}
        self._shared = Shared(
            graph.constants,
            self._parameters,
            _with_all_after(trained | given, graph.nodes),
            rooms_of(sparse.values()),
        )
        kept = {
            node: self._holders[arguments(node)[1]].kept.view(layer.weight.shape)
            for node, layer in sparse.items()
        }
        self._units = [*Builder(graph, sparse, kept, self._shared)]
        # Weights that PyTorch's operations read.
        self._spread = {
            node
            for unit in self._units
            if not isinstance(unit, Multiply)
            for node in unit.result.all_input_nodes
            if node in self._holders
        }
        self._outputs = [one for one in graph.outputs if isinstance(one, fx.Node)]

    @property
    def report(self) -> ExecutionReport:
        """How the layers run."""
        runs = tuple(self._runs.values())
        return ExecutionReport(runs, "", self.sparse_ms, self.dense_ms)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, with a graph for autograd."""
        given = self._graph.given(args, kwargs)
        for holder in self._holders.values():
            holder.take_over()
        tensors = [one for one in given.values() if isinstance(one, Tensor)]
        flat = _Function.apply(self, given, *tensors, *self._parameters.values())
        outputs = iter(flat)
        found = [
            next(outputs) if isinstance(one, fx.Node) else one
            for one in self._graph.outputs
        ]
        return tree_unflatten(found, self._graph.structure)

    def forward(self, given: dict[fx.Node, Any]) -> tuple[Pass, list[Tensor]]:
        """Return what the backward pass needs, and the outputs."""
        values: dict[fx.Node, Any] = {
            node: one.detach() if isinstance(one, Tensor) else one
            for node, one in given.items()
        }
        values.update((node, one.detach()) for node, one in self._parameters.items())
        values.update(self._buffers)
        for node in self._spread:
            values[node] = self._holders[node].weight.detach()
        run = Pass(self._shared, values)
        for unit in self._units:
            unit.forward(run)
        for buffer, node in self._written.items():
            buffer.copy_(run.values[node])
        known = ChainMap(run.values, self._graph.constants)
        return run, [known[one].clone() for one in self._outputs]

    def backward(self, run: Pass, given: list[Tensor | None], keeps: bool) -> Gradients:
        """Return the gradients of inputs and parameters.

        Args:
            run: What the forward pass kept.
            given: The gradients of the outputs.
            keeps: Whether there may be another backward pass.
        """
        gradients, needs = Gradients(self._shared), self._shared.needs
        for node, gradient in zip(self._outputs, given, strict=True):
            if gradient is not None and node in needs:
                gradients.add(node, gradient)
        for unit in reversed(self._units):
            if unit.result in needs:
                unit.backward(run, gradients)
            if not keeps:
                run.free(unit)
        if not keeps:
            run.values.clear()
        return gradients

    def of_parameters(self, gradients: Gradients) -> Iterator[Tensor | None]:
        """Yield the gradient of each parameter."""
        for node in self._parameters:
            dense, found = gradients.take(node), gradients.of_non_zeros.get(node)
            if node not in self._holders:
                found = dense
            elif dense is not None:
                own = dense.flatten()[self._holders[node].places][:, None]
                found = own if found is None else found + own
            yield found

    def without_gradient(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs that have no gradient."""
        pairs = zip(self._outputs, outputs, strict=True)
        return [one for node, one in pairs if node not in self._shared.needs]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: TrainingPlan, given: dict[fx.Node, Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.run, outputs = plan.forward(given)
        ctx.inputs = [n for n, one in given.items() if isinstance(one, Tensor)]
        ctx.set_materialize_grads(False)
        # PyTorch says so if it is gone: a second backward pass without retain_graph.
        ctx.save_for_backward(torch.empty(0))
        ctx.mark_non_differentiable(*plan.without_gradient(outputs))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        gradients = ctx.plan.backward(ctx.run, [*given], keeps_graph())
        of_inputs = [gradients.take(node) for node in ctx.inputs]
        return None, None, *of_inputs, *ctx.plan.of_parameters(gradients)


def holders(graph: Graph, model: nn.Module) -> dict[fx.Node, NonZeros]:
    """Return the layers that hold non-zeros, by the nodes of their weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for node, name in graph.names.items():
        path, _, last = name.rpartition(".")
        holder = modules.get(path)
        if last == "weight" and isinstance(holder, NonZeros):
            found[node] = holder
    return found


def _with_all_after(first: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Return values with all that is computed from them and can have a gradient."""
    needs = set(first)
    for node in nodes:
        found = node.meta.get("val")
        parts = found if isinstance(found, tuple | list) else [found]
        real = any(isinstance(v, Tensor) and v.is_floating_point() for v in parts)
        if real and needs.intersection(node.all_input_nodes):
            needs.add(node)
    return needs
