"""Remove channels from copies of a model, and find the channels that can go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.errors import CompactionError
from force_plugin.model.weights import named_parameters
from force_plugin.structure.both_modes import Behaviour
from force_plugin.structure.channel_layers import channel_axis
from force_plugin.structure.channels import Use
from force_plugin.structure.cut_copies import deep_copy, number_values, places, slots_in
from force_plugin.structure.graph import Graph


class Surgery:
    """Remove channels from copies of a model.

    Args:
        plain: A model as :func:`plain_copy` makes it; it is not changed.
        behaviour: The modes and inputs for tracing the model.

    Attributes:
        sets: The model's sets of channels by name.

    Raises:
        CompactionError: torch-pruning cannot trace the model.
    """

    def __init__(self, plain: nn.Module, behaviour: Behaviour) -> None:  # noqa: D107
        self._plain = plain
        self._inputs = behaviour.few
        self._modes = behaviour.traced
        graph = Graph(deep_copy(plain), self._inputs, self._modes)
        self.sets = graph.sets
        graph.close()

    def cut(self, removed: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy without some channels.

        Args:
            removed: A bool tensor of shape ``[size]`` for each set by name, True =
                removed.

        Raises:
            CompactionError: Modules that share a parameter would lose different
                channels, or other channels would be removed too.
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
        """Return the sets whose channels can be removed, and why others cannot.

        Args:
            wanted: A bool tensor of shape ``[size]`` for each set by name, True =
                to be removed.
            check: Gets a copy without some of the channels, and the removed channels.
                Returns what is wrong with the copy, or ``None``.

        Returns:
            The part of ``wanted`` that can be removed all at once, and a message for
            each other set.
        """
        # Like layers of many blocks are sorted side by side: mostly all can, or none.
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


@contextmanager
def without_reading(
    model: nn.Module, unread: Iterable[tuple[Use, Tensor]]
) -> Iterator[None]:
    """Let layers read 0 instead of some channels inside a ``with`` block.

    Args:
        model: The model.
        unread: Pairs of the channels that a layer reads, and a bool tensor of them,
            True = read as 0.
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
