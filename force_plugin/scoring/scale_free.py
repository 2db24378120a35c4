"""Layers whose scale does not matter, which are those behind a normalisation.

If the loss L does not change when the weights θ of an output channel are multiplied by
a number, its derivative along θ is 0: the products of weights and gradients sum to 0
over the channel (Euler's theorem on homogeneous functions). This is so behind a batch
normalisation in training mode, behind an instance normalisation, and for standardised
weights. So a normalisation need not be recognised, and it counts only if it is on.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from force_plugin.model.torch_internals import ConvNd
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards

# The sums over channels, relative to sums of as many random signs. In timm's families
# they are below 0.03 behind a normalisation, where its epsilon is all that is left, and
# above 0.25 elsewhere.
_LIMIT = 0.1


def scale_free(
    weights: Mapping[str, Weight],
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    shards: Shards,
) -> set[str]:
    """Return the names of the weights whose output channels can be scaled.

    Args:
        weights: The weights of layers.
        values: Values of the weights, or this rank's shards of them.
        gradients: Gradients of the loss at these values. They are not written to.
        shards: The division of the weights among the ranks.
    """
    ratios = []
    for name, weight in weights.items():
        products = shards.whole(name, values[name] * gradients[name])
        products /= products.abs().amax()  # the squares would underflow
        rest = [n for n in range(products.dim()) if n != _axis(weight)]
        sums = products.sum(rest)
        ratio = sums.square().sum() / products.square().sum()
        ratios.append(ratio.double().cpu())
    # A ratio is NaN if every product is 0.
    return {
        name
        for name, ratio in zip(weights, ratios, strict=True)
        if ratio.sqrt() < _LIMIT
    }


def _axis(weight: Weight) -> int | None:
    """Return the axis of the output channels, or of their numbers within a group."""
    if any(isinstance(m, ConvNd) and m.transposed for m, _ in weight.owners):
        return 1
    return weight.channel_axis
