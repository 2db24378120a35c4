"""Why a layer has no saliency: where its gradient ends on the way from the loss."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from force_plugin.parameters import name_layers


def find_ends(output: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, str]:
    """Where the gradient of a scalar ends that never reaches some leaves of its graph.

    Looked at is the shortest path to each of them: the gradient ends at the last
    operation on it that still gets one other than 0.

    Args:
        output: A scalar with its graph.
        leaves: Leaves whose gradient is exactly 0, by parameter name.

    Returns:
        A cause by parameter name, e.g. ``"the gradient ends at softmax"``, or ``""``
        where a gradient arrives after all.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    paths = _paths(output.grad_fn, names)
    reached: set[Node] = set()

    def note(node: Node, gradients: Iterable[Tensor | None]) -> None:
        if any(g is not None and bool(g.any()) for g in gradients):
            reached.add(node)

    nodes = {node for path in paths.values() for node in path}
    handles = [node.register_prehook(partial(note, node)) for node in nodes]
    gradients = torch.autograd.grad(output, list(leaves.values()), allow_unused=True)
    for handle in handles:
        handle.remove()
    arrived = {
        name
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }
    return {
        name: "" if name in arrived else _cause(paths.get(name, []), reached)
        for name in leaves
    }


def _paths(root: Node | None, names: Mapping[int, str]) -> dict[str, list[Node]]:
    """The shortest path from a node to each leaf, which comes last."""
    origin: dict[Node, Node | None] = {} if root is None else {root: None}
    queue = deque(origin)
    paths: dict[str, list[Node]] = {}
    while queue:
        node = queue.popleft()
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            path = [node]
            while (before := origin[path[-1]]) is not None:
                path.append(before)
            paths[name] = path[::-1]
        for operand, _ in node.next_functions:
            if operand is not None and operand not in origin:
                origin[operand] = node
                queue.append(operand)
    return paths


def _cause(path: list[Node], reached: set[Node]) -> str:
    for index, operand in enumerate(path):
        if operand in reached:
            continue
        # From its own layer on, nothing else leads to the weight.
        own = all(_operands(node) <= 1 for node in path[index:])
        if own:
            return "what it multiplies is 0"
        # SoftmaxBackward0
        name = re.sub(r"Backward\d*$", "", path[index - 1].name().rpartition("::")[2])
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
        return f"the gradient ends at {words}" if index else "the loss is flat"
    return "no gradient reaches it"


def _operands(node: Node) -> int:
    return sum(operand is not None for operand, _ in node.next_functions)


def describe(causes: Mapping[str, str], total: int) -> list[str]:
    """One sentence for each cause.

    Args:
        causes: Why a layer has no saliency, by parameter name.
        total: Number of all layers.
    """
    return [
        f"{name_layers([n for n, c in causes.items() if c == cause], total)} had a "
        f"saliency of exactly 0 everywhere at the first step: {cause}; what is kept of "
        "them is not a choice of the method"
        for cause in dict.fromkeys(causes.values())
    ]
