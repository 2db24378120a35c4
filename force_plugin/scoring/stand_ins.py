"""Other tensors in the place of a network's weights and buffers, while it is measured.

Its own are never written to. So afterwards, also when the loader or the loss raises
half-way, they are bit for bit what they were.
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
from force_plugin.model.torch_internals import put_parameter, read_through
from force_plugin.model.weights import Weight, is_scripted
from force_plugin.parallel.shards import Reader, Shards


class StandIns:
    """The stand-ins of a network.

    Args:
        model: The network.
        parameters: All of its parameters, by name.
        weights: Values of those that are scored, by name. It is read anew whenever
            masks change, so another value there is the stand-in's.
        shards: If the network is sharded, stand-ins are of this rank's shards.

    Attributes:
        weights: As given.
        leaves: Stand-ins of all parameters, once they are in place.
        scored: Those of the scored ones, in their order.
        reader: Puts sharded ones together where a pass reads them.
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

        The attributes of the modules have to be restored by the caller.

        Args:
            values: What stands in for other values than the parameter's own.
            undo: Gets what else is to be done afterwards.
        """
        copies: dict[int, Tensor] = {}
        for module in self._model.modules():
            for key, buffer in own_buffers(module).items():
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                setattr(module, key, copies[id(buffer)])
                if is_scripted(module):  # it holds them elsewhere, in C++
                    undo.callback(setattr, module, key, buffer)
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
        """Give the scored ones the values of their weights, with zeros by masks."""
        for name, stand_in in self.scored.items():
            if masks is None:
                stand_in.data.copy_(self.weights[name])
            else:
                # On a CPU, bytes become floats several times as fast as bools do, and
                # to multiply by floats is faster than by bytes.
                kept = masks[name].view(torch.uint8)
                stand_in.data.copy_(kept).mul_(self.weights[name])
        # Autocast keeps a copy of each weight that it has cast once.
        torch.clear_autocast_cache()

    def fill(self, opened: Mapping[str, Any]) -> None:
        """Give those that are not scored the model's values, but for opened gates."""
        for name, leaf in self.leaves.items():
            if name not in self.weights and name not in opened:
                leaf.data.copy_(self._parameters[name].local)

    def remember(self, opened: Mapping[str, Any]) -> Callable[[], None]:
        """What a forward pass may change, and the way back."""
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
