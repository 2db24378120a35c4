"""Gates that an initialisation has closed, and their opening while scoring.

Many networks start with branches multiplied by 0 or nearly 0: timm's ``zero_init_last``
(the last normalisation of a block has weight 0), LayerScale at 1e-6, the gains of
normaliser-free networks, ReZero. The factor is called a closed gate. Behind a closed
gate every gradient is (nearly) 0. A method that ranks by gradients would prune the
whole branch without having seen it. Therefore the network is scored with these gates
open. If no gate is closed, nothing changes.

Gates are found in the graph that autograd records, not by the names of modules. In the
graph a gate is an operand of a product, and is made of parameters alone. The other
operand leads to weights that no other path leads to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from force_plugin.model.autograd_nodes import products
from force_plugin.parallel.shards import WHOLE, Shards

CLOSED = 1e-2
"""A gate is closed if no value exceeds this share of the value of an open gate. A gate
that multiplies activations is open at 1. The weights of a layer are open at
1 / √fan-in, the bound of PyTorch's usual initialisation."""

NORMALISATION = "normalisation weights"
SCALE = "branch scales"
WEIGHT = "prunable weights"


@dataclass(frozen=True)
class Gate:
    """A parameter that an initialisation has closed.

    Attributes:
        name: Name of the parameter.
        kind: ``NORMALISATION``, ``SCALE`` (another factor of activations: LayerScale,
            the gain of a branch) or ``WEIGHT``.
        largest: The largest magnitude among the parameter's values.
    """

    name: str
    kind: str
    largest: float


def closed_weights(
    weights: Mapping[str, torch.Size], small: Mapping[str, float]
) -> dict[str, Gate]:
    """Return the closed weights of more than one dimension, judged by values alone.

    Args:
        weights: Shapes of the weights of layers, with the output channels first, by
            parameter name.
        small: The result of :func:`small`.

    Returns:
        Gates by parameter name.
    """
    return {
        name: Gate(name, WEIGHT, small[name])
        for name, shape in weights.items()
        if name in small and len(shape) > 1
        if small[name] * shape[1:].numel() ** 0.5 <= CLOSED
    }


def small(parameters: Mapping[str, Tensor], shards: Shards = WHOLE) -> dict[str, float]:
    """Return the parameters that could be gates: no magnitude is above 0.01.

    Most of them are no gates: biases, the tables of position embeddings.

    Args:
        parameters: Parameters by name; of a sharded parameter, this rank's shard.
        shards: The division of parameters among the processes.

    Returns:
        The largest magnitude in each of these parameters, by name.
    """
    largest = {
        name: _largest(values) if values.numel() else -1.0
        for name, values in parameters.items()
        if values.is_floating_point()
        and values.layout == torch.strided
        and values.itemsize > 1  # there is no arithmetic in 8 bits
    }
    found = zip(largest, shards.totals.largest(*largest.values()), strict=True)
    return {name: value for name, value in found if 0 <= value <= CLOSED}


def closed_gates(
    output: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    candidates: Mapping[str, float],
    scored: Collection[str],
) -> tuple[dict[str, Gate], bool]:
    """Return the closed gates that hide weights from a gradient.

    A weight is hidden if every path from the output to the weight crosses a closed
    gate. For each hidden weight, the path with the fewest closed gates is found, and
    all gates on this path are returned. A closed gate that hides no weight is not
    returned. An example is the weight of a ConvNeXt V2 response normalisation, as the
    activations also take a path beside it.

    Args:
        output: A tensor with its autograd graph, as the loss.
        parameters: The tensors that are the leaves of this graph, by parameter name.
        candidates: The parameters that may be gates, as :func:`small` returns them.
            They must require gradients.
        scored: Names of the weights that must not be hidden.

    Returns:
        Gates by parameter name; and whether values were read that autograd had saved.
        Reading them runs a checkpointed part of the network again.
    """
    names = {id(tensor): name for name, tensor in parameters.items()}
    graph = _Graph(output, names, hidden=set(scored) - set(candidates))
    gates: dict[str, Gate] = {}
    for crossed in graph.crossings(set(scored), set(candidates)):
        for kind, leaves in crossed:
            for name in leaves:
                gates.setdefault(name, Gate(name, kind, candidates[name]))
    # Sort by the order of the network; the search began at its end.
    ordered = {name: gates[name] for name in parameters if name in gates}
    return ordered, graph.looked


class _Graph:
    """The graph that autograd recorded, searched for closed gates.

    Nodes are autograd's own. An edge leads from a result to an operand.
    """

    def __init__(
        self, output: Tensor, names: Mapping[int, str], hidden: Collection[str]
    ) -> None:
        self.looked = False
        self._names = names
        self._root = output.grad_fn
        # Nodes in an order that has operands before results.
        order: list[Node] = []
        seen: set[Node] = set()
        stack = [(self._root, False)]
        while stack:
            node, done = stack.pop()
            if node is None:
                continue
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(operand, False) for operand, _ in node.next_functions]
        # Whether a result depends on no weight in ``hidden``. It then depends on other
        # parameters alone, or on data, which the graph does not show.
        self._pure: dict[Node | None, bool] = {None: True}
        for node in order:
            leaf = self._leaf(node)
            self._pure[node] = leaf not in hidden and all(
                self._pure[operand] for operand, _ in node.next_functions
            )

    def _leaf(self, node: Node) -> str | None:
        """Return the name of the parameter whose gradient a node accumulates."""
        variable = getattr(node, "variable", None)
        return self._names.get(id(variable)) if variable is not None else None

    def crossings(
        self, targets: set[str], candidates: set[str]
    ) -> Iterator[list[tuple[str, list[str]]]]:
        """Yield the closed gates on the path to each target that has the fewest gates.

        This is a breadth-first search. An edge costs 1 if a closed gate is on it, and 0
        otherwise.
        """
        if self._root is None:
            return
        cost = {self._root: 0}
        # The node from which a node was reached, and the gate between them.
        origin: dict[Node, tuple[Node, tuple[str, list[str]] | None]] = {}
        queue = deque([(0, self._root)])
        done = set()
        while queue:
            distance, node = queue.popleft()
            if node in done:
                continue
            done.add(node)
            if distance and self._leaf(node) in targets:
                yield list(_gates_on_the_way(node, origin))
            gates = self._gates_of(node, candidates)
            # A gate may be a scored weight itself, without saliency as long as it is 0.
            yield from ([gate] for gate in gates.values() if targets & set(gate[1]))
            for index, (operand, _) in enumerate(node.next_functions):
                gate = gates.get(index)
                further = distance + (gate is not None)
                if operand is None or further >= cost.get(operand, further + 1):
                    continue
                cost[operand] = further
                origin[operand] = (node, gate)
                if gate is None:
                    queue.appendleft((further, operand))
                else:
                    queue.append((further, operand))

    def _gates_of(
        self, node: Node, candidates: set[str]
    ) -> dict[int, tuple[str, list[str]]]:
        """Return the closed gate that multiplies an operand, by the operand's index."""
        found = {}
        for product in products(node):
            if product.factor >= len(node.next_functions):
                continue
            source = node.next_functions[product.factor][0]
            if source is None or not self._pure[source]:
                continue
            leaves = [name for name in self._leaves(source) if name in candidates]
            if not leaves:
                continue
            self.looked = True
            values = product.values
            if values is None or not values.numel() or _largest(values) > CLOSED:
                continue
            kind = NORMALISATION if product.normalises else SCALE
            found[product.behind] = (kind, leaves)
        return found

    def _leaves(self, node: Node) -> list[str]:
        seen, stack, leaves = {node}, [node], []
        while stack:
            current = stack.pop()
            leaf = self._leaf(current)
            if leaf is not None:
                leaves.append(leaf)
            for operand, _ in current.next_functions:
                if operand is not None and operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return leaves


def _gates_on_the_way(
    node: Node, origin: Mapping[Node, tuple[Node, tuple[str, list[str]] | None]]
) -> Iterator[tuple[str, list[str]]]:
    while node in origin:
        node, gate = origin[node]
        if gate is not None:
            yield gate


def open_values(
    gates: Mapping[str, Gate],
    parameters: Mapping[str, Tensor],
    shards: Shards = WHOLE,
    transposed: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return the values of open gates: 1, or for weights a random initialisation.

    Weights are drawn as PyTorch initialises its layers
    (:func:`torch.nn.init.kaiming_uniform_` with a = √5), from a separate generator with
    seed 0.

    Args:
        gates: The gates by parameter name.
        parameters: The closed values by parameter name; of a sharded parameter, this
            rank's shard.
        shards: The division of parameters among the processes.
        transposed: Names of the matrices whose columns are the output channels.

    Returns:
        New tensors by parameter name, with the shapes, dtypes and devices of the closed
        values.
    """
    generator = torch.Generator().manual_seed(0)
    opened = {}
    for name, gate in gates.items():
        values = parameters[name].detach()
        if gate.kind == WEIGHT:
            fresh = torch.empty(shards.shape(name, values), dtype=torch.float32)
            rows = fresh.t() if name in transposed else fresh
            nn.init.kaiming_uniform_(rows, a=5**0.5, generator=generator)
            opened[name] = shards.local(name, fresh.to(values))
        else:
            opened[name] = torch.ones_like(values)
    return opened


def _largest(values: Tensor) -> float:
    values = values.detach()
    low, high = torch.aminmax(values.abs() if values.is_complex() else values)
    return max(-low.item(), high.item())


def remarks_on(gates: Mapping[str, Gate]) -> list[str]:
    """Return a sentence for each kind of gate that was opened, for the report."""
    sentences = []
    for kind in (NORMALISATION, SCALE, WEIGHT):
        chosen = [gate for gate in gates.values() if gate.kind == kind]
        if not chosen:
            continue
        largest = max(gate.largest for gate in chosen)
        values = f"of at most {largest:.2g}" if largest else "of 0"
        to = "a random initialisation" if kind == WEIGHT else "1"
        sentences.append(
            f"gates opened while scoring: {len(chosen)} {kind} {values}, set to {to} "
            f"({', '.join(gate.name for gate in chosen)})"
        )
    return sentences
