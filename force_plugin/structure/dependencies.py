"""torch-pruning's graph, told what it would only guess, and kept from endless search.

Wrong guesses are dear: ever more channels seem to go together, for minutes, until the
memory is full.
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
    """Outputs in all modes, which are no layer's own: they are not to be cut."""
    found = []
    for mode in modes:
        with in_mode(model, mode):
            outputs = call(model, mapped(torch.clone, inputs))  # it may write to them
            found += [output * 1 for output in tensors(outputs)]
    return found


def trace(model: nn.Module, inputs: Any, modes: Iterable[Mode]) -> Any:
    """The :class:`torch_pruning.DependencyGraph` of a model, in all modes at once."""
    return _Traced().build_dependency(
        model, inputs, forward_fn=partial(_forward, modes=modes), verbose=False
    )


class _Traced(tp.DependencyGraph):  # type: ignore[misc]
    """A graph of torch-pruning, told what it would only guess from the layers around.

    Guesses that are wrong let ever more channels go together, until the memory is full.
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
        """Channels of a concatenation are known: one of its readers may flatten them.

        torch-pruning would take the features that the last reader has.
        """
        module = getattr(module_or_node, "module", module_or_node)
        if getattr(module, "of_channels", False):
            return int(sum(module.concat_sizes))
        found: int | None = super().get_in_channels(module_or_node)
        return found


def _flattens(node: Any) -> bool:
    """Whether a reshape makes several features of each channel, or one of each."""
    sizes = sizes_before(node.grad_fn) or (0, 0)
    if len(sizes) <= 2:  # a parameter of one axis is only to be multiplied with
        return len(sizes) == 2
    width = math.prod(sizes[1:])
    return sizes[1] < width and width in _widths_after(node)


def _repeats(node: Any) -> bool:
    """Whether an expansion of five axes repeats the heads of keys, along the third.

    torch-pruning takes each for one, and divides by 0. A product of matrices has one
    that changes nothing.
    """
    before, after = sizes_before(node.grad_fn) or (), shapes_of_results(node.grad_fn)
    if len(before) != 5 or after is None:
        return True
    return after[0][2] != before[2]


def _parts(node: Any) -> tuple[list[int] | None, bool]:
    """What a concatenation joins, as far as autograd knows.

    Returns:
        The size of each part, or ``None``; and whether these are surely channels, as
        the second of three axes may be that of tokens.
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
    """What follows the parts of a split in their order, not in that of the way back.

    Returns:
        The nodes, and a gradient function that tells the sizes; ``None`` if not each of
        the parts is used once, which torch-pruning cannot tell.
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
    """Input features of the next layers."""
    return {channels_of(layer)[0] for layer in layers_next_to(node, "outputs")}


def layers_next_to(node: Any, side: Literal["inputs", "outputs"]) -> set[nn.Module]:
    """The first layers before or after a node."""
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
    """Ends a search for the channels of one group that would go on and on.

    Args:
        graph: A graph of torch-pruning, whose nodes are watched from now on.
    """

    LOOKS = 20  # at each node of the graph, on the average; DenseNet needs three

    def __init__(self, graph: Any) -> None:  # noqa: D107
        nodes = graph.module2node.values()
        self._most = self._left = self.LOOKS * len(nodes)
        for node in nodes:
            node.dependencies = _CountedList(node.dependencies, self)

    def look(self) -> None:
        """Count a look at a node.

        Raises:
            RuntimeError: It was one too many.
        """
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("its search for channels that go together has no end")

    def renew(self, found: Any) -> Any:
        """The group that was found, and as much patience for the next."""
        self._left = self._most
        return found


class _CountedList(list[Any]):
    """What follows from a node."""

    def __init__(self, items: Iterable[Any], patience: Patience) -> None:
        super().__init__(items)
        self._patience = patience

    def __iter__(self) -> Iterator[Any]:
        self._patience.look()
        return super().__iter__()


def sizes_after(group: Any) -> list[tuple[nn.Module, list[int]]]:
    """What is left of the parts of splits and concatenations without some channels.

    torch-pruning counts a channel twice that it comes upon from both sides, and
    keeps the offsets.
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
    """Where a split or a concatenation of torch-pruning has the sizes of its parts."""
    return "split_sizes" if hasattr(part, "split_sizes") else "concat_sizes"
