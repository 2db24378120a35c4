"""Tensors that stand in for a network's weights and buffers while it is measured.

The network's own tensors are never written to. So they are unchanged afterwards, bit
for bit, also if the loader or the loss raises an error half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.model.registered import own_buffers
from force_plugin.model.reparametrisation import show_all
from force_plugin.model.restoring import random_states, snapshot
from force_plugin.model.torch_internals import put_buffer, put_parameter, read_through
from force_plugin.model.weights import Weight, is_scripted
from force_plugin.parallel.shards import Reader, Shards


class StandIns:
    """The stand-ins of a network's parameters and buffers.

    Args:
        model: The network.
        parameters: All parameters of the network, by name.
        weights: Values of the scored weights, by name. They are read again whenever
            masks change, so a new value in this mapping reaches the stand-in.
        shards: The division of parameters among the ranks. In a sharded network, a
            stand-in holds this rank's shard.

    Attributes:
        weights: The ``weights`` argument.
        leaves: Stand-ins of all parameters by name, once they are in place.
        scored: Stand-ins of the scored weights by name, in the order of the weights.
        reader: Puts the shards of a parameter together when a pass reads it.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        parameters: Mapping[str, Weight],
        weights: dict[str, Tensor],
        shards: Shards,
    ) -> None:
        self.weights = weights
        self.leaves: dict[str, nn.Parameter] = {}
        self.scored: dict[str, nn.Parameter] = {}
        self.reader = Reader(shards)
        self._model = model
        self._parameters = parameters
        self._shards = shards

    def put(self, values: Mapping[str, Tensor], undo: ExitStack) -> None:
        """Put stand-ins in the place of weights and buffers.

        The caller has to restore the attributes of the modules.

        Args:
            values: Values of stand-ins that differ from the parameters' own, by name.
            undo: Collects callbacks that undo everything else.
        """
        copies: dict[int, Tensor] = {}
        for module in self._model.modules():
            for key, buffer in own_buffers(module).items():
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                put_buffer(module, key, copies[id(buffer)])
                if is_scripted(module):  # TorchScript keeps its buffers in C++
                    undo.callback(put_buffer, module, key, buffer)
        for name, parameter in self._parameters.items():
            leaf = nn.Parameter(
                values.get(name, parameter.local).clone(),
                name in self.weights or parameter.dense.requires_grad,
            )
            for module, key in parameter.slots():
                put_parameter(module, key, leaf)
                if self._shards.sharded:
                    read_through(module, key, partial(self.reader.read, name))
            self.leaves[name] = leaf
        show_all(self._model)
        self.scored = {name: self.leaves[name] for name in self.weights}

    def mask(self, masks: Mapping[str, Tensor] | None) -> None:
        """Set scored stand-ins to their weights, with 0 where a mask is False."""
        for name, stand_in in self.scored.items():
            if masks is None:
                stand_in.data.copy_(self.weights[name])
            else:
                # On a CPU, bytes convert to floats several times as fast as bools.
                # Multiplying by floats is faster than multiplying by bytes.
                kept = masks[name].view(torch.uint8)
                stand_in.data.copy_(kept).mul_(self.weights[name])
        # Autocast caches a copy of each weight that it has cast.
        torch.clear_autocast_cache()

    def fill(self, opened: Mapping[str, Any]) -> None:
        """Set stand-ins to the model's values, but no scored weight or opened gate."""
        for name, leaf in self.leaves.items():
            if name not in self.weights and name not in opened:
                leaf.data.copy_(self._parameters[name].local)

    def remember(self, opened: Mapping[str, Any]) -> Callable[[], None]:
        """Return a function that undoes what a forward pass may change."""
        restore = snapshot(self._model.modules())
        randomness = random_states(self._model)
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]

        def rewind() -> None:
            restore()
            randomness()
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)
            self.fill(opened)

        return rewind
