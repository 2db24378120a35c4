"""Build torch-pruning's dependency graph, with corrections and a limit on its search.

torch-pruning guesses some sizes. With a wrong guess, ever more channels seem to go
together: the search takes minutes, until the memory is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from force_plugin.data.containers import mapped, tensors
from force_plugin.model.autograd_nodes import (
    SplitNode,
    dimension,
    shapes_of_results,
    sizes_before,
)
from force_plugin.structure.both_modes import Mode, in_mode
from force_plugin.structure.channel_layers import LAYERS, channels_of
from force_plugin.structure.example_inputs import call


def _forward(model: nn.Module, inputs: Any, modes: Iterable[Mode]) -> list[Tensor]:
    """Return the outputs in all modes, times 1: a layer's own output might be cut."""
    found = []
    for mode in modes:
        with in_mode(model, mode):
            outputs = call(model, mapped(torch.clone, inputs))  # may be written to
            found += [output * 1 for output in tensors(outputs)]
    return found


def trace(model: nn.Module, inputs: Any, modes: Iterable[Mode]) -> Any:
    """Return the :class:`torch_pruning.DependencyGraph` of a model, for all modes."""
    return _Traced().build_dependency(
        model, inputs, forward_fn=partial(_forward, modes=modes), verbose=False
    )


class _Traced(tp.DependencyGraph):  # type: ignore[misc]
    """A graph of torch-pruning that reads sizes from autograd.

    torch-pruning would guess these sizes from the layers around. With a wrong guess,
    ever more channels seem to go together, until the memory is full.
    """

    def _build_dependency(self, module2node: Mapping[nn.Module, Any]) -> None:
        splits = []
        for node in module2node.values():
            if node.type == tp.ops.OPTYPE.RESHAPE and not _flattens(node):
                node.type = tp.ops.OPTYPE.ELEMENTWISE
            elif node.type == tp.ops.OPTYPE.EXPAND and not _repeats(node):
                node.enable_index_mapping = False
            elif node.type == tp.ops.OPTYPE.CONCAT:
                node.module.concat_sizes, node.module.of_channels = _parts(node)
            elif node.type == tp.ops.OPTYPE.SPLIT:
                splits.append((node, _follow_split(node)))
        for node, found in splits:
            if found is None:
                node.enable_index_mapping = False
            else:
                node.outputs, node.grad_fn = found
        super()._build_dependency(module2node)

    def get_in_channels(self, module_or_node: Any) -> int | None:
        """Return the number of input channels of a module.

        For a concatenation, it is the sum of the parts that autograd knows.
        torch-pruning would return the input features of the concatenation's last
        reader, but a reader may flatten the channels.
        """
        module = getattr(module_or_node, "module", module_or_node)
        if getattr(module, "of_channels", False):
            return int(sum(module.concat_sizes))
        found: int | None = super().get_in_channels(module_or_node)
        return found


def _flattens(node: Any) -> bool:
    """Return whether a reshape turns each channel into one or several features."""
    sizes = sizes_before(node.grad_fn) or (0, 0)
    if len(sizes) <= 2:  # a parameter of one axis is a factor
        return len(sizes) == 2
    width = math.prod(sizes[1:])
    return sizes[1] < width and width in _widths_after(node)


def _repeats(node: Any) -> bool:
    """Return whether an ``expand`` of five axes repeats heads of keys along the third.

    torch-pruning assumes a repetition in every ``expand`` of five axes, and divides by
    0. A matrix product contains an ``expand`` that changes nothing. With other numbers
    of axes, the result is True.
    """
    before, after = sizes_before(node.grad_fn) or (), shapes_of_results(node.grad_fn)
    if len(before) != 5 or after is None:
        return True
    return after[0][2] != before[2]


def _parts(node: Any) -> tuple[list[int] | None, bool]:
    """Return the sizes of the parts that a concatenation joins, if autograd knows them.

    Returns:
        The size of each part, or ``None``, and whether the sizes surely count channels.
        The second of three axes may count tokens instead.
    """
    parts = node.grad_fn.next_functions
    dim = dimension(node.grad_fn)
    if dim is None:
        dim = 1
    results = [(shapes_of_results(function), output) for function, output in parts]
    shapes = [shape[output] for shape, output in results if shape is not None]
    if not len(shapes) == len(node.inputs) == len(parts):
        return None, False
    return [shape[dim] for shape in shapes], dim == 1 and len(shapes[0]) != 3


def _follow_split(node: Any) -> tuple[list[Any], Any] | None:
    """Return the nodes behind a split, in the order of the split's parts.

    torch-pruning has the nodes in the order of the backward pass.

    Returns:
        The nodes, and a gradient function with the sizes of the parts. ``None`` if a
        part is unused or used more than once, which torch-pruning cannot represent.
    """
    split = node.grad_fn
    shapes = shapes_of_results(split)
    if shapes is None:
        return node.outputs, split
    found = [
        (part, following)
        for following in dict.fromkeys(node.outputs)
        for function, part in following.grad_fn.next_functions
        if function is split
    ]
    found.sort(key=lambda one: one[0])
    if [part for part, _ in found] != list(range(len(shapes))):
        return None
    outputs = [following for _, following in found]
    dim = dimension(split)
    if dim not in (1, -1):
        return outputs, split
    return outputs, SplitNode([shape[dim] for shape in shapes])


def _widths_after(node: Any) -> set[int]:
    """Return the numbers of input channels of the next layers."""
    return {channels_of(layer)[0] for layer in layers_next_to(node, "outputs")}


def layers_next_to(node: Any, side: Literal["inputs", "outputs"]) -> set[nn.Module]:
    """Return the first convolutions and linear layers before or after a node."""
    found, seen, stack = set(), set(), [node]
    while stack:
        for following in getattr(stack.pop(), side):
            if following in seen:
                continue
            seen.add(following)
            if isinstance(following.module, LAYERS):
                found.add(following.module)
            else:
                stack.append(following)
    return found


class Patience:
    """Stop a search for the channels of a group that would have no end.

    Args:
        graph: A graph of torch-pruning. From now on, each look at a node is counted.
    """

    LOOKS = 20  # the most looks at a node, on average; DenseNet needs three

    def __init__(self, graph: Any) -> None:  # noqa: D107
        nodes = graph.module2node.values()
        self._most = self._left = self.LOOKS * len(nodes)
        for node in nodes:
            node.dependencies = _CountedList(node.dependencies, self)

    def look(self) -> None:
        """Count a look at a node.

        Raises:
            RuntimeError: The search has used up all looks.
        """
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("its search for channels that go together has no end")

    def renew(self, found: Any) -> Any:
        """Return the group that was found, and restore all looks for the next group."""
        self._left = self._most
        return found


class _CountedList(list[Any]):
    """The dependencies of a node, which count each iteration as a look."""

    def __init__(self, items: Iterable[Any], patience: Patience) -> None:
        super().__init__(items)
        self._patience = patience

    def __iter__(self) -> Iterator[Any]:
        self._patience.look()
        return super().__iter__()


def sizes_after(group: Any) -> list[tuple[nn.Module, list[int]]]:
    """Return the part sizes of splits and concatenations without a group's channels.

    torch-pruning counts a channel twice if it reaches the channel from both sides, and
    does not update the offsets.
    """
    gone: dict[nn.Module, set[int]] = {}
    for item in group:
        if item.dep.target.type in (tp.ops.OPTYPE.SPLIT, tp.ops.OPTYPE.CONCAT):
            gone.setdefault(item.dep.target.module, set()).update(item.idxs)
    found = []
    for part, indices in gone.items():
        if sizes := getattr(part, sizes_of(part)):
            ends = accumulate(sizes, initial=0)
            left = [
                sum(index not in indices for index in range(start, end))
                for start, end in pairwise(ends)
            ]
            found.append((part, left))
    return found


def sizes_of(part: nn.Module) -> str:
    """Return the name of the attribute that holds a module's part sizes."""
    return "split_sizes" if hasattr(part, "split_sizes") else "concat_sizes"
