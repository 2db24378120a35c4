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

# Of the sums over channels, relative to what they would be with random signs. Behind a
# normalisation they are 0 but for its epsilon, elsewhere about 1.
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
        ratios.append(float(ratio))
    # A ratio is NaN if every product is 0.
    return {
        name for name, ratio in zip(weights, ratios, strict=True) if ratio < _LIMIT**2
    }


def _axis(weight: Weight) -> int | None:
    """Return the axis of the output channels, or of their numbers within a group."""
    if any(isinstance(m, ConvNd) and m.transposed for m, _ in weight.owners):
        return 1
    return weight.channel_axis
