"""Reasons why a layer has no saliency: where the gradient ends before the layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from force_plugin.model.autograd_nodes import (
    has_weight,
    is_layer,
    layer_inputs,
    operation,
)
from force_plugin.model.module_names import name_layers, name_some
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards

PRUNED = "it was pruned entirely before"


def find_ends(output: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, str]:
    """Return where the gradient of a scalar ends, for leaves that it does not reach.

    The gradient reaches an operation if the operation gets a gradient other than 0. It
    ends at the last operations that it reaches on the paths to a leaf.

    Args:
        output: A scalar with its graph.
        leaves: Leaves whose gradient is exactly 0, by parameter name.

    Returns:
        A cause by parameter name, e.g. ``"the gradient ends at softmax"``, or ``""``
        if a gradient reaches the leaf after all.
    """
    users = _users(output.grad_fn)
    reached: set[Node] = set()

    def note(node: Node, gradients: Iterable[Tensor | None]) -> None:
        if any(map(_alive, gradients)):
            reached.add(node)

    handles = [node.register_prehook(partial(note, node)) for node in users]
    gradients = torch.autograd.grad(
        output,
        list(leaves.values()),
        allow_unused=True,
        retain_graph=True,  # _multiplies_zeros reads values that the graph has saved
    )
    for handle in handles:
        handle.remove()
    nodes = {id(node.variable): node for node in users if hasattr(node, "variable")}
    return {
        name: "" if _alive(gradient) else _cause(nodes.get(id(leaf)), users, reached)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.to_dense().any())


def _users(root: Node | None) -> dict[Node, list[Node]]:
    """Return, by operation or leaf, the operations that take its result."""
    users: dict[Node, list[Node]] = {} if root is None else {root: []}
    stack = list(users)
    while stack:
        node = stack.pop()
        for operand in _operands(node):
            if operand not in users:
                users[operand] = []
                stack.append(operand)
            users[operand].append(node)
    return users


def _operands(node: Node) -> list[Node]:
    return [operand for operand, _ in node.next_functions if operand is not None]


def _cause(
    leaf: Node | None, users: Mapping[Node, list[Node]], reached: set[Node]
) -> str:
    if leaf is None:
        return "no gradient reaches it"
    # The last operations that get a gradient, each with its operand that gets none.
    ends: list[tuple[Node, Node]] = []
    seen, stack = {leaf}, [leaf]
    while stack:
        operand = stack.pop()
        for node in users[operand]:
            if node in reached:
                ends.append((node, operand))
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    if all(_multiplies_zeros(node, operand) for node, operand in ends):
        return "what it multiplies is 0"
    return f"the gradient ends at {name_some(sorted({_word(n) for n, _ in ends}))}"


def _multiplies_zeros(node: Node, operand: Node) -> bool:
    """Whether an operation is a layer, the operand its weight, and its inputs are 0."""
    if not has_weight(node, operand):
        return False
    # Between a layer and its weight there may be operations on the weight alone, such
    # as a mask. A result of several operands, or of another layer, is no weight.
    while operands := _operands(operand):
        if len(operands) > 1 or is_layer(operand):
            return False
        (operand,) = operands
    return not _alive(layer_inputs(node))


def _word(node: Node) -> str:
    """Return an operation in words: "log softmax" for LogSoftmaxBackward0."""
    name = re.sub(r"Backward\d*$", "", operation(node).rpartition("::")[2])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


Graph = AbstractContextManager[tuple[Tensor, Mapping[str, Tensor]] | None]
"""A context with a result and the leaves of its graph, by parameter name."""


def explain(
    asked: Mapping[str, Weight],
    values: Mapping[str, Tensor],
    shards: Shards,
    last_graph: Callable[[], Graph],
) -> dict[str, str]:
    """Return the cause why each weight has a saliency of exactly 0, by parameter name.

    Args:
        asked: The weights.
        values: The values with which the weights were scored, by name.
        shards: The division of parameters among the processes.
        last_graph: Makes the last measurement again.
    """
    masks = {
        name: shards.local(name, weight.mask)
        for name, weight in asked.items()
        if weight.mask is not None
    }
    pruned = shards.totals.empty(masks)
    alive = shards.totals.count({name: values[name] for name in asked})
    causes = {
        name: "the method gives it none" if count else "its weights are 0"
        for name, count in alive.items()
    }
    rest = [name for name in asked if name not in pruned]
    if rest:
        with last_graph() as graph:
            if graph is not None:
                output, leaves = graph
                found = find_ends(output, {name: leaves[name] for name in rest})
                causes |= {name: cause for name, cause in found.items() if cause}
    return causes | dict.fromkeys(pruned, PRUNED)


def sentences(causes: Mapping[str, str], total: int) -> list[str]:
    """Return a sentence for each cause.

    Args:
        causes: The cause why a layer has no saliency, by parameter name.
        total: Number of all layers.
    """
    kept = "; what is kept of them is not a choice of the method"
    return [
        f"{name_layers([n for n, c in causes.items() if c == cause], total)} had a "
        f"saliency of exactly 0 everywhere at the first step: {cause}"
        + (kept if cause != PRUNED else "")
        for cause in dict.fromkeys(causes.values())
    ]
