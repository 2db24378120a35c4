"""The spread of the outputs of scored layers, a number for each output channel."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.model.torch_internals import ConvNd, channel_statistics
from force_plugin.model.weights import Weight, is_scripted
from force_plugin.parallel.shards import Shards

# PyTorch's normalisations add this to the variance before they take its root.
_EPSILON = 1e-5


class Spreads:
    """Measures the standard deviation of each output channel of the scored layers.

    A layer is measured if its module is called and returns its output channels where a
    convolution or a linear layer has them.

    Args:
        weights: The weights of layers with output channels, by parameter name.
        device: The device of the network.
        shards: The division of parameters among the processes that measure together.
    """

    def __init__(  # noqa: D107 (the class has it)
        self, weights: Mapping[str, Weight], device: torch.device, shards: Shards
    ) -> None:
        self._weights = weights
        self._device = device
        self._shards = shards
        # Number of values, their sum and the sum of their squares, for each channel.
        self._sums: dict[str, Tensor] = {}
        self._among: Container[str] = ()

    @contextmanager
    def measured(
        self, undo: ExitStack, among: Container[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Measure the passes within the context.

        Args:
            undo: Collects callbacks that remove the hooks. The hooks stay in place
                between measurements, as a compiled network would be compiled again
                for new hooks.
            among: Names of the weights whose layers are measured; default: all.

        Yields:
            A dictionary. At the end of the context it gets the spreads by parameter
            name, √(σ² + 10⁻⁵), over the batches of all ranks. Each tensor has as many
            dimensions as the weight, and broadcasts with it.
        """
        if not self._sums:
            self._watch(undo)
        self._among = self._weights if among is None else among
        for sums in self._sums.values():
            sums.zero_()
        spreads: dict[str, Tensor] = {}
        yield spreads
        measured = {n: sums for n, sums in self._sums.items() if n in self._among}
        self._shards.ranks.average(measured)
        for name, (count, total, squares) in measured.items():
            if not count.all():
                continue  # the module was not called, or returns something else
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            spreads[name] = _beside(self._weights[name], (variance + _EPSILON).sqrt())

    def _watch(self, undo: ExitStack) -> None:
        # MPS has no float64.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        for name, weight in self._weights.items():
            modules = {m for m, _ in weight.owners if not is_scripted(m)}
            channels = _channels(weight)
            self._sums[name] = torch.zeros(
                3, channels, dtype=dtype, device=self._device
            )
            for module in modules:
                # [samples, channels, ...] for a convolution, [..., channels] for others
                axis = 1 - weight.dense.dim() if isinstance(module, ConvNd) else -1
                note = partial(self._note, name, axis)
                undo.callback(module.register_forward_hook(note).remove)

    def _note(
        self, name: str, axis: int, module: nn.Module, args: Any, output: Any
    ) -> None:
        """Add the outputs of a call of a layer; a forward hook."""
        if name not in self._among:
            return
        sums = self._sums[name]
        channels = sums.shape[1]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.dim() < -axis or output.shape[axis] != channels:
            return
        if not output.numel():
            return
        values = output.detach()
        if axis == -1:
            values = values.reshape(-1, channels)
        elif values.dim() == -axis:  # a convolution of a single sample
            values = values.unsqueeze(0)
        mean, variance = (s.to(sums.dtype) for s in channel_statistics(values))
        count = values.numel() // channels
        moments = torch.ones_like(mean), mean, variance + mean.square()
        sums.add_(torch.stack(moments), alpha=count)


def _channels(weight: Weight) -> int:
    """Return the number of output channels of a weight's layer."""
    convolution = _transposed_convolution(weight)
    return weight.shape[0] if convolution is None else convolution.out_channels


def _beside(weight: Weight, channels: Tensor) -> Tensor:
    """Return a number for each output channel in a shape that fits the weight."""
    convolution = _transposed_convolution(weight)
    rest = [1] * (weight.dense.dim() - 2)
    if weight.transposed:
        return channels.view(1, -1)
    if convolution is None:
        return channels.view(-1, 1, *rest)
    # A weight [inputs, outputs of a group, ...].
    rows = channels.view(convolution.groups, -1)
    inputs = convolution.in_channels // convolution.groups
    return rows.repeat_interleave(inputs, 0).view(*weight.dense.shape[:2], *rest)


def _transposed_convolution(weight: Weight) -> ConvNd | None:
    return next(
        (m for m, _ in weight.owners if isinstance(m, ConvNd) and m.transposed), None
    )
