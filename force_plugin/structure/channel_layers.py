"""Layers that channels come from and go to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from force_plugin.model.torch_internals import ConvNd

LAYERS: tuple[type[nn.Module], ...] = (ConvNd, nn.Linear)
"""What channels come from and go to; all else that torch-pruning knows passes them."""


def layers_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Convolutions and linear layers by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LAYERS))


def channels_of(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer."""
    if isinstance(module, ConvNd):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def channel_axis(layer: nn.Module, values: Tensor) -> int:
    """The axis of a layer's input (or output) along which its channels lie."""
    spatial = len(layer.kernel_size) if isinstance(layer, ConvNd) else 0
    return values.dim() - 1 - spatial


def channel_sums(layer: nn.Module, values: Tensor, *, inputs: bool) -> Tensor:
    """Sums over the weights of each channel of a layer.

    Args:
        layer: A convolution or linear layer.
        values: A tensor of the shape of its weight.
        inputs: Of each input channel; else of each output channel.

    Returns:
        A tensor of shape ``[channels]``.
    """
    groups = getattr(layer, "groups", 1)
    if inputs == getattr(layer, "transposed", False):
        return values.flatten(1).sum(1)
    parts = values.reshape(groups, -1, *values.shape[1:])
    rows = parts.sum(1).flatten(0, 1)
    return rows.reshape(len(rows), -1).sum(1)
