"""Convolutions and linear layers: the layers that write and read channels."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from force_plugin.model.torch_internals import ConvNd

LAYERS: tuple[type[nn.Module], ...] = (ConvNd, nn.Linear)
"""Layers that write and read channels; all others in torch-pruning pass them on."""


def layers_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Return the convolutions and linear layers of a model, with their names."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LAYERS))


def channels_of(module: nn.Module) -> tuple[int, int]:
    """Return the number of input channels and of output channels of a layer."""
    if isinstance(module, ConvNd):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def channel_axis(layer: nn.Module, values: Tensor) -> int:
    """Return the axis of a layer's input (or output) that counts the channels."""
    spatial = len(layer.kernel_size) if isinstance(layer, ConvNd) else 0
    return values.dim() - 1 - spatial


def channel_sums(layer: nn.Module, values: Tensor, *, inputs: bool) -> Tensor:
    """Return the sum over the weights of each channel of a layer.

    Args:
        layer: A convolution or linear layer.
        values: A tensor of the shape of the layer's weight.
        inputs: Whether to sum for each input channel, not for each output channel.

    Returns:
        A tensor of shape ``[channels]``.
    """
    groups = getattr(layer, "groups", 1)
    if inputs == getattr(layer, "transposed", False):
        return values.flatten(1).sum(1)
    parts = values.reshape(groups, -1, *values.shape[1:])
    rows = parts.sum(1).flatten(0, 1)
    return rows.reshape(len(rows), -1).sum(1)
