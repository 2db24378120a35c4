"""Sets of channels that go together, and how they are taken out of a model.

Which channels these are, through residual sums, concatenations, groups and
normalisations, is what the dependency graph of torch-pruning finds out (Fang et al.
2023, arXiv 2301.12900), and it cuts them, too: from a copy, in float64.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from force_plugin.copies import deep_copy, number_values, places, slots_in
from force_plugin.errors import CompactionError
from force_plugin.layers import LAYERS, channel_axis, channels_of, layers_of
from force_plugin.modes import Behaviour, Mode
from force_plugin.parameters import named_parameters
from force_plugin.snapshot import restored
from force_plugin.tracing import Patience, layers_next_to, sizes_after, sizes_of, trace

# What a model gives out has the shape that its users count on.
_FIXED = {
    tp.ops.OPTYPE.OUTPUT: "an output of the model",
    tp.ops.OPTYPE.GN: "a group normalisation",
    tp.ops.OPTYPE.MHA: "a MultiheadAttention",
    tp.ops.OPTYPE.LSTM: "an LSTM",
}


@dataclass(eq=False)
class Use:
    """A layer that reads or writes some channels of a set.

    Attributes:
        layer: Name of a convolution or linear layer.
        positions: Channels of its input (or output), int64 of shape ``[n]``.
        channels: Which of the set's channels each of them is, of the same shape.
    """

    layer: str
    positions: Tensor
    channels: Tensor


@dataclass(eq=False)
class Channels:
    """Channels of one or several layers that can only go together.

    Attributes:
        name: The layer whose output channels the others are numbered by.
        size: Their number.
        writers: Layers whose output channels they are.
        readers: Layers whose input channels they are.
        fixed: Why none can go, or ``""``.
        normalised: Whether a layer normalisation runs over them, so that the others
            become others where one of them goes.
        units: Channels that can only go together, one row for each: the same one of
            the halves of a gated layer, a whole head of an attention.
        blocks: Tensors of the set's channels, one row for each of the parts of which
            the same number must stay: the groups of a convolution.
        heads: Name of the module that counts these units as its heads, or ``""``.
    """

    name: str
    size: int
    writers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
    fixed: str = ""
    normalised: bool = False
    units: Tensor = field(default_factory=lambda: torch.empty(0, 1))
    blocks: list[Tensor] = field(default_factory=list)
    heads: str = ""

    @property
    def choices(self) -> Tensor:
        """Channels of which any row may go: units, or one of each block, int64."""
        return max(self.blocks, key=len).T if self.blocks else self.units

    def without(
        self, gone: Tensor, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Channels:
        """What is left of the set once channels have gone, numbered anew.

        Args:
            gone: Bool tensor of shape ``[size]``, True = taken out.
            outputs: Of each writer which of its output channels stay, bool.
            inputs: Of each reader which of its input channels stay, bool.
        """
        left = ~gone
        number = left.cumsum(0) - 1

        def renumbered(uses: list[Use], stay: Mapping[str, Tensor]) -> list[Use]:
            result = []
            for use in uses:
                here = left[use.channels]
                positions = (stay[use.layer].cumsum(0) - 1)[use.positions[here]]
                result.append(Use(use.layer, positions, number[use.channels[here]]))
            return result

        return Channels(
            self.name,
            int(left.sum()),
            renumbered(self.writers, outputs),
            renumbered(self.readers, inputs),
            units=number[self.choices[left[self.choices].all(1)]],
        )

    def removable(self, free: Tensor, round_to: int = 1) -> Tensor:
        """Which channels may go if no reader needs the free ones.

        Args:
            free: Bool tensor of shape ``[size]``.
            round_to: Let a multiple of so many stay, where no parts are to be equal.

        Returns:
            A bool tensor of this shape: whole units, as many in each block, not all.
        """
        if self.fixed or self.normalised:
            return torch.zeros_like(free)
        read = torch.zeros_like(free)
        for use in self.readers:
            read[use.channels] = True
        whole = (free | ~read)[self.units].all(1) & read[self.units].any(1)
        result = torch.zeros_like(free)
        result[self.units[whole].flatten()] = True
        finest = max(self.blocks, key=len, default=None)
        if finest is None:
            for use in (*self.writers, *self.readers):  # something is left of each
                if result[use.channels].all():
                    whole &= (self.units != use.channels[0]).all(1)
                    result[self.units[~whole].flatten()] = False
            left = max(1, int((~whole).sum()))
            if self.units.shape[1] == 1:
                left = -(-left // round_to) * round_to
            chosen = whole.nonzero().flatten()
            back = chosen[: max(0, left - len(whole) + len(chosen))]
            result[self.units[back].flatten()] = False
            return result
        number = min(int(result[finest].sum(1).min()), finest.shape[1] - 1)
        gone = [row[result[row]][:number] for row in finest]
        result = torch.zeros_like(result)
        result[torch.cat(gone)] = True
        counts = [result[block].sum(1) for block in self.blocks]
        return result & all(bool((count == count[0]).all()) for count in counts)


class Graph:
    """Which channels of a model go together.

    Args:
        model: A model that may be changed, as :func:`plain_copy` makes it.
        inputs: What it is called with.
        modes: In which modes.
        sets: The sets of another copy, which it takes a while to find. Default: they
            are looked for.

    Attributes:
        model: As given; :meth:`cut` takes channels out of it.
        sets: Its sets of channels by name.

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
            if isinstance(module, nn.RNNBase):  # it may never come back
                raise CompactionError(
                    f"torch-pruning cannot trace {type(model).__name__}, as {name} is "
                    f"a {type(module).__name__}. The model is as it was"
                )
        try:
            # Some modules keep what they have computed for the next time.
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
        """Take channels out of the model.

        Args:
            removed: By set, bool tensors of shape ``[size]``, True = taken out.

        Raises:
            RuntimeError: Others would go with them, or torch-pruning fails. The model
                may then be half-cut.
        """
        for name in self._in_turn(removed):
            module = self.model.get_submodule(name)
            indices = removed[name].nonzero().flatten().tolist()
            if not indices:
                continue
            group = self._group(module, indices)
            if sorted(group[0].idxs) != indices:
                raise RuntimeError(f"{name}: other channels go with these")
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
        """Sets that a convolution with groups reads before those that it writes.

        torch-pruning takes one with an output a group for a depthwise one, whose
        input channels are its output channels.
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
        """Let go of the model and of what autograd has saved of it, now.

        The graph is full of cycles, and gigabytes would wait for the collector.
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
        # timm's attentions: all heads side by side, of which there are q, k and v.
        if getattr(attention, "attn_dim", 0) * 3 == one.size:
            attention.attn_dim = attention.num_heads * channels // 3

    def _reads(self, item: Any) -> bool:
        """Whether it is about what a layer reads; depthwise ones only pass it."""
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
        """Splits whose sizes a module keeps, this module, and under which name."""
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
        """Channels that go together: the same ones of some equal parts of a layer."""

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


class Surgery:
    """Takes channels out of copies of a model.

    Args:
        plain: A model as :func:`plain_copy` makes it; it stays as it is.
        behaviour: Its modes, and with what it is called.

    Attributes:
        sets: Its sets of channels by name.

    Raises:
        CompactionError: torch-pruning cannot trace it.
    """

    def __init__(self, plain: nn.Module, behaviour: Behaviour) -> None:  # noqa: D107
        self._plain = plain
        self._inputs = behaviour.few
        self._modes = behaviour.traced
        graph = Graph(deep_copy(plain), self._inputs, self._modes)
        self.sets = graph.sets
        graph.close()

    def cut(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """A copy without these channels.

        Args:
            removed: By set, bool tensors of shape ``[size]``, True = taken out.

        Raises:
            CompactionError: Others would go with them.
        """
        graph = Graph(deep_copy(self._plain), self._inputs, self._modes, self.sets)
        number_values(graph.model)
        try:
            graph.cut(removed)
        finally:
            graph.close()
        for weight in named_parameters(self._plain).values():
            if len(weight.owners) == 1:
                continue
            slots = slots_in(graph.model, self._plain, weight)
            first, *others = [places(*slot) for slot in slots]
            if any(not torch.equal(first, places) for places in others):
                raise CompactionError(
                    f"{weight.name} belongs to several modules, of which each would "
                    "lose other channels"
                )
        return graph.model

    def possible(
        self,
        wanted: Mapping[str, Tensor],
        check: Callable[[nn.Module, Mapping[str, Tensor]], str | None],
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Find out what can be taken out.

        Args:
            wanted: By set, bool tensors of shape ``[size]``, True = to be taken out.
            check: Given a copy without some of them, and which these are, what is wrong
                with it, or ``None``.

        Returns:
            The sets that can, all at once; and what is wrong without each other one.
        """
        # The same layers of many blocks stand side by side: mostly all can, or none.
        names = [name for name in wanted if wanted[name].any()]
        names.sort(key=lambda name: re.sub(r"\d+", "", name))
        good: set[str] = set()
        problems: dict[str, str] = {}
        size = len(names)
        while names:
            some = good.union(names[:size])
            tried = {name: one for name, one in wanted.items() if name in some}
            try:
                problem = check(self.cut(tried), tried)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is not None and size > 1:
                size //= 2
                continue
            if problem is None:
                good = some
            else:
                problems[names[0]] = problem
            del names[:size]
            size = min(len(names), size if problem else 2 * size)
        return {name: one for name, one in wanted.items() if name in good}, problems


def _ancestors(name: str) -> list[str]:
    """Names of the modules that a module is in."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _own_parameters(module: nn.Module) -> str | None:
    """Why a layer's channels cannot go: torch-pruning would not cut all of it."""
    if not isinstance(module, LAYERS):
        return None
    if is_parametrized(module):
        return f"a {type(module).__name__} with a parametrisation"
    if set(module._parameters) <= {"weight", "bias"}:
        return None
    return f"a {type(module).__name__}, which has parameters of its own"


def _cut_in_groups(conv: _ConvNd, before: nn.Parameter, gone: Sequence[int]) -> None:
    """Take input channels out of a convolution with groups, in each group its own.

    torch-pruning takes the same ones out of every group.
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


@contextmanager
def without_reading(
    model: nn.Module, unread: Iterable[tuple[Use, Tensor]]
) -> Iterator[None]:
    """Have layers read 0 instead of some channels for a while.

    Args:
        model: The model.
        unread: What layers read, and for each of its channels whether it is not to be
            read.
    """
    with ExitStack() as hooks:
        for use, gone in unread:
            layer = model.get_submodule(use.layer)
            positions = use.positions[gone]

            def clear(
                layer: nn.Module, args: tuple[Any, ...], positions: Tensor = positions
            ) -> tuple[Any, ...]:
                axis = channel_axis(layer, args[0])
                return args[0].index_fill(axis, positions, 0), *args[1:]

            hooks.callback(layer.register_forward_pre_hook(clear).remove)
        yield
