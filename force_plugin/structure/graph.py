"""Find the channels that go together with torch-pruning's graph, and remove them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from force_plugin.errors import CompactionError
from force_plugin.model.registered import own_parameters
from force_plugin.model.restoring import restored
from force_plugin.model.torch_internals import ConvNd
from force_plugin.structure.both_modes import Mode
from force_plugin.structure.channel_layers import LAYERS, channels_of, layers_of
from force_plugin.structure.channels import (
    Channels,
    Use,
)
from force_plugin.structure.dependencies import (
    Patience,
    layers_next_to,
    sizes_after,
    sizes_of,
    trace,
)

# Why the channels of a node stay; users rely on the shapes of a model's outputs.
_FIXED = {
    tp.ops.OPTYPE.OUTPUT: "an output of the model",
    tp.ops.OPTYPE.GN: "a group normalisation",
    tp.ops.OPTYPE.MHA: "a MultiheadAttention",
    tp.ops.OPTYPE.LSTM: "an LSTM",
}


class Graph:
    """The sets of channels of a model that can only be removed together.

    Args:
        model: A model that may be changed, as :func:`plain_copy` makes it.
        inputs: The inputs that the model is called with.
        modes: The modes to trace the model in.
        sets: The sets of another copy of the model, to save the search. Default: the
            sets are searched for.

    Attributes:
        model: The model as given; :meth:`cut` removes channels from it.
        sets: The model's sets of channels by name.

    Raises:
        CompactionError: torch-pruning cannot trace the model.
    """

    def __init__(  # noqa: D107
        self,
        model: nn.Module,
        inputs: Any,
        modes: Iterable[Mode],
        sets: Mapping[str, Channels] | None = None,
    ) -> None:
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        for module, name in self._names.items():
            if isinstance(module, nn.RNNBase):  # tracing may never end
                raise CompactionError(
                    f"torch-pruning cannot trace {type(model).__name__}, as {name} is "
                    f"a {type(module).__name__}. The model is as it was"
                )
        try:
            # Some modules store computed values for their next call.
            with warnings.catch_warnings(), restored(model.modules()):
                warnings.simplefilter("ignore")
                self._graph = trace(model, inputs, modes)
                self._patience = Patience(self._graph)
                groups = self._graph.get_all_groups() if sets is None else ()
                groups = list(map(self._patience.renew, groups))
        except Exception as error:
            raise CompactionError(
                f"torch-pruning cannot trace {type(model).__name__}: "
                f"{type(error).__name__}: {error}. The model is as it was"
            ) from error
        self.sets = sets or {one.name: one for one in map(self._describe, groups)}
        self._splits = list(self._find_splits())

    def cut(self, removed: Mapping[str, Tensor]) -> None:
        """Remove channels from the model.

        Args:
            removed: A bool tensor of shape ``[size]`` for each set by name, True =
                removed.

        Raises:
            CompactionError: Other channels would be removed too.

        After this error, or one of torch-pruning's own, some channels of the model may
        be removed already.
        """
        for name in self._in_turn(removed):
            module = self.model.get_submodule(name)
            indices = removed[name].nonzero().flatten().tolist()
            if not indices:
                continue
            group = self._group(module, indices)
            if sorted(group[0].idxs) != indices:
                raise CompactionError(
                    f"{name}: other channels would be taken out with these"
                )
            grouped = [
                (item.dep.target.module, item.idxs)
                for item in group
                if self._reads(item)
                and getattr(item.dep.target.module, "groups", 1) > 1
            ]
            before = [(conv, conv.weight) for conv, _ in grouped]
            parts = sizes_after(group)
            group.prune(record_history=False)
            for part, sizes in parts:
                setattr(part, sizes_of(part), sizes)
                vars(part)["offsets"] = list(accumulate(sizes, initial=0))
            if self.sets[name].heads:
                self._count_heads(self.sets[name], len(indices))
            for (conv, weight), (_, gone) in zip(before, grouped, strict=True):
                _cut_in_groups(conv, weight, gone)
        for split, module, key in self._splits:
            setattr(module, key, type(getattr(module, key))(split.split_sizes))

    def _in_turn(self, names: Iterable[str]) -> list[str]:
        """Return the names, ordered for convolutions with groups.

        A set that a convolution with groups reads comes before the set that it writes.
        torch-pruning takes a grouped convolution with one output in each group for a
        depthwise convolution, whose input channels are its output channels.
        """
        grouped = {
            name for name, one in layers_of(self.model) if getattr(one, "groups", 1) > 1
        }
        before = {
            use.layer: name
            for name, one in self.sets.items()
            for use in one.readers
            if use.layer in grouped
        }
        turns = {
            name: {before.get(use.layer, name) for use in self.sets[name].writers}
            - {name}
            for name in names
        }
        try:
            return [
                name
                for name in TopologicalSorter(turns).static_order()
                if name in turns
            ]
        except CycleError:
            return list(turns)

    def close(self) -> None:
        """Free the model and the tensors that autograd saved, now.

        The graph is full of reference cycles: gigabytes would wait for the garbage
        collector.
        """
        for node in self._graph.module2node.values():
            vars(node).clear()
        vars(self._graph).clear()
        self._names.clear()
        self._splits.clear()

    def _group(self, module: nn.Module, indices: Sequence[int]) -> Any:
        pruner = self._graph.get_pruner_of_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = self._graph.get_pruning_group(
                module, pruner.prune_out_channels, list(indices)
            )
        return self._patience.renew(group)

    def _count_heads(self, one: Channels, gone: int) -> None:
        attention: Any = self.model.get_submodule(one.heads)
        channels = one.units.shape[1]
        attention.num_heads -= gone // channels
        # timm's attentions hold q, k and v, each with all heads side by side.
        if getattr(attention, "attn_dim", 0) * 3 == one.size:
            attention.attn_dim = attention.num_heads * channels // 3

    def _reads(self, item: Any) -> bool:
        """Return whether an item is a layer's input; depthwise layers have none."""
        module, handler = item.dep.target.module, item.dep.handler
        if not isinstance(module, LAYERS):
            return False
        pruner = self._graph.get_pruner_of_module(module)
        one = pruner.prune_in_channels == pruner.prune_out_channels
        return not one and handler == pruner.prune_in_channels

    def _writes(self, item: Any) -> bool:
        module, handler = item.dep.target.module, item.dep.handler
        if not isinstance(module, LAYERS):
            return False
        pruner = self._graph.get_pruner_of_module(module)
        return handler == pruner.prune_out_channels  # type: ignore[no-any-return]

    def _describe(self, group: Any) -> Channels:
        first = group[0]
        found = Channels(self._names[first.dep.target.module], len(first.idxs))
        for item in group:
            target = item.dep.target
            fixed = _FIXED.get(target.type) or _own_parameters(target.module)
            found.fixed = found.fixed or fixed or ""
            found.normalised |= target.type == tp.ops.OPTYPE.LN
            reads, writes = self._reads(item), self._writes(item)
            if not (reads or writes):
                continue
            use = Use(
                self._names[target.module],
                torch.tensor(item.idxs),
                torch.tensor(item.root_idxs),
            )
            size = channels_of(target.module)[0 if reads else 1]
            if int(use.positions.max()) >= size:
                found.fixed = (
                    found.fixed or "a reshape that torch-pruning cannot follow"
                )
                continue
            (found.readers if reads else found.writers).append(use)
            parts = getattr(target.module, "groups", 1)
            depthwise = target.type == tp.ops.OPTYPE.DEPTHWISE_CONV
            if parts > 1 and not depthwise:
                whole = len(set(item.root_idxs)) == len(item.idxs) == size
                if not whole or size % parts:
                    found.fixed = found.fixed or "a part of a convolution with groups"
                    continue
                order = use.channels[use.positions.argsort()]
                found.blocks.append(order.view(parts, -1))
        self._find_units(found, first.dep.target.module)
        return found

    def _find_splits(self) -> Iterator[tuple[Any, nn.Module, str]]:
        """Yield splits, the module that stores a split's sizes, and the attribute."""
        for node in self._graph.module2node.values():
            sizes = getattr(node.module, "split_sizes", None)
            if node.type != tp.ops.OPTYPE.SPLIT or not sizes:
                continue
            around = layers_next_to(node, "inputs") | layers_next_to(node, "outputs")
            found = [
                (name, key)
                for layer in around
                for name in _ancestors(self._names[layer])
                for key, value in vars(self.model.get_submodule(name)).items()
                if isinstance(value, tuple | list) and list(value) == list(sizes)
            ]
            if found:  # the innermost
                name, key = max(found, key=lambda one: (len(one[0]), one))
                yield node.module, self.model.get_submodule(name), key

    def _find_units(self, found: Channels, module: nn.Module) -> None:
        """Set the units of a set: the channels at equal places in equal layer parts."""

        def tied(channel: int) -> list[int]:
            return sorted(self._group(module, [channel])[0].idxs)

        number = len(tied(0))
        if found.size % number == 0:
            parts = torch.arange(found.size).view(number, -1)
            width = parts.shape[1]
            probes = {0, width // 2, width - 1}
            if all(tied(one) == parts[:, one].tolist() for one in probes):
                found.units = parts.T
                if number > 1:
                    self._find_heads(found)
                return
        found.fixed = found.fixed or "channels that are tied to each other"

    def _find_heads(self, found: Channels) -> None:
        around = found.name.rpartition(".")[0]
        heads = getattr(self.model.get_submodule(around), "num_heads", 0)
        if found.blocks:
            found.fixed = found.fixed or "a convolution with groups behind a split"
        elif isinstance(heads, int) and heads and len(found.units) % heads == 0:
            found.units = found.units.reshape(heads, -1)
            found.heads = around


def _ancestors(name: str) -> list[str]:
    """Return the names of all modules that contain a module, outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _cut_in_groups(conv: ConvNd, before: nn.Parameter, gone: Sequence[int]) -> None:
    """Remove input channels from a grouped convolution, other places in each group.

    torch-pruning removes equal places from every group.
    """
    inputs = conv.in_channels + len(gone)
    stay = torch.ones(inputs, dtype=torch.bool)
    stay[list(gone)] = False
    columns = stay.view(conv.groups, -1)
    kept = torch.stack([row.nonzero().flatten() for row in columns]).to(before.device)

    def pick(values: Tensor) -> Tensor:
        if conv.transposed:
            return values[stay.to(values.device)]
        rows = values.chunk(conv.groups)
        parts = [part[:, own] for part, own in zip(rows, kept, strict=True)]
        return torch.cat(parts)

    conv.weight = nn.Parameter(pick(before.detach()))
    assert before.grad is not None
    conv.weight.grad = pick(before.grad)


def _own_parameters(module: nn.Module) -> str | None:
    """Return why torch-pruning cannot cut all parameters of a layer, or ``None``."""
    if not isinstance(module, LAYERS):
        return None
    if is_parametrized(module):
        return f"a {type(module).__name__} with a parametrisation"
    if set(own_parameters(module)) <= {"weight", "bias"}:
        return None
    return f"a {type(module).__name__}, which has parameters of its own"
