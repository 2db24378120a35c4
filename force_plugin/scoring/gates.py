"""Gates that an initialisation has closed, and what opens them while scoring.

Many networks start with branches multiplied by 0 or nearly 0: timm's ``zero_init_last``
(the last normalisation of a block has weight 0), LayerScale at 1e-6, the gains of
normaliser-free networks, ReZero. Behind such a gate every gradient is (nearly) 0, and a
method that ranks by gradients prunes the whole branch without having seen it. Scored is
therefore the network with these gates open; where none is closed, nothing changes.

Gates are found in the graph that autograd records, not by the names of modules: there
a gate is an operand of a product that is made of parameters alone, and what it
multiplies leads to weights that no other path leads to.
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
"""A gate is closed where none of its values exceeds this share of an open one's: 1 for
what multiplies activations, the bound 1 / √fan-in of PyTorch's usual initialisation for
the weights of a layer."""

NORMALISATION = "normalisation weights"
SCALE = "branch scales"
WEIGHT = "prunable weights"


@dataclass(frozen=True)
class Gate:
    """A parameter that an initialisation has closed.

    Attributes:
        name: Name of the parameter.
        kind: ``NORMALISATION``, ``SCALE`` (anything else that multiplies what passes:
            LayerScale, the gain of a branch) or ``WEIGHT``.
        largest: The largest magnitude among its values.
    """

    name: str
    kind: str
    largest: float


def closed_weights(
    weights: Mapping[str, torch.Size], small: Mapping[str, float]
) -> dict[str, Gate]:
    """Weights of more than one dimension that are closed, whatever surrounds them.

    Args:
        weights: Shapes of the weights of layers, the output channels first, by
            parameter name.
        small: What :func:`small` found.

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
    """The parameters that could be gates: none of their values is above 0.01.

    Most of them are no gates: biases, the tables of position embeddings.

    Args:
        parameters: By name; of those that are sharded, this rank's shards.
        shards: Who has the other shards.

    Returns:
        The largest magnitude among the values of each, by name.
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
    """The closed gates that hide weights from a gradient.

    A weight is hidden if every path from the output back to it crosses a closed gate;
    on the way to each hidden weight that crosses the fewest, all gates are reported. A
    closed gate that hides nothing (the weight of a ConvNeXt V2 response normalisation,
    beside which the activations pass as they are) is none of them.

    Args:
        output: A tensor with its autograd graph, as the loss.
        parameters: The tensors that are the leaves of this graph, by parameter name.
        candidates: Those that may be gates, as :func:`small` returns them; they must
            require gradients.
        scored: Names of the weights that must not be hidden.

    Returns:
        Gates by parameter name; and whether values were read that autograd had saved,
        for which a checkpointed part of the network is run again.
    """
    names = {id(tensor): name for name, tensor in parameters.items()}
    graph = _Graph(output, names, hidden=set(scored) - set(candidates))
    gates: dict[str, Gate] = {}
    for crossed in graph.crossings(set(scored), set(candidates)):
        for kind, leaves in crossed:
            for name in leaves:
                gates.setdefault(name, Gate(name, kind, candidates[name]))
    # In the order of the network, not of the search from its end.
    ordered = {name: gates[name] for name in parameters if name in gates}
    return ordered, graph.looked


class _Graph:
    """The part of autograd's graph that matters here.

    Nodes are autograd's own; an edge leads from a result to an operand.
    """

    def __init__(
        self, output: Tensor, names: Mapping[int, str], hidden: Collection[str]
    ) -> None:
        self.looked = False
        self._names = names
        self._root = output.grad_fn
        # Nodes in an order in which operands come before results.
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
        # Whether a result depends on parameters alone, none of them a weight that is
        # scored (or on data, which the graph does not show).
        self._pure: dict[Node | None, bool] = {None: True}
        for node in order:
            leaf = self._leaf(node)
            self._pure[node] = leaf not in hidden and all(
                self._pure[operand] for operand, _ in node.next_functions
            )

    def _leaf(self, node: Node) -> str | None:
        """The name of the parameter that a node accumulates the gradient of."""
        variable = getattr(node, "variable", None)
        return self._names.get(id(variable)) if variable is not None else None

    def crossings(
        self, targets: set[str], candidates: set[str]
    ) -> Iterator[list[tuple[str, list[str]]]]:
        """The closed gates on the way to each target, where they are fewest.

        A breadth-first search in which an edge costs 1 if a closed gate is on it, and
        nothing otherwise.
        """
        if self._root is None:
            return
        cost = {self._root: 0}
        # Where a node was reached from, and through which gate.
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
            # A gate that is to be pruned itself has no saliency as long as it is 0.
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
        """The operands of a product that a closed gate multiplies, and that gate."""
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
    """What to score with instead: 1, or for weights a fresh random initialisation.

    Weights are drawn as PyTorch initialises its layers
    (:func:`torch.nn.init.kaiming_uniform_` with a = √5), from a generator of their own
    with seed 0.

    Args:
        gates: By parameter name.
        parameters: The closed values, by parameter name.
        shards: Which part of them these are.
        transposed: The matrices whose output channels are not the rows.

    Returns:
        New tensors of the same shapes, dtypes and devices, by parameter name.
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
    """One sentence for each kind of gate that was opened, for the report."""
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
