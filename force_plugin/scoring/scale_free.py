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

from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards

# Of the sums over channels, relative to what they would be with random signs. Behind a
# normalisation they are 0 but for its epsilon, elsewhere about 1. A single channel has
# a smaller limit, so that chance alone meets it about once in a hundred layers.
_LIMIT = 0.1
_CHANCE = 0.01


def scale_free(
    weights: Mapping[str, Weight],
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    shards: Shards,
) -> set[str]:
    """Return the names of the weights whose output channels can be scaled.

    A layer with a single weight for each channel is never among them: the sum over a
    channel is then the product itself, which tells nothing.

    Args:
        weights: The weights. If no layer has a weight, its channels are its rows.
        values: Values of the weights, or this rank's shards of them.
        gradients: Gradients of the loss at these values. They are not written to.
        shards: The division of the weights among the ranks.
    """
    found = set()
    for name, weight in weights.items():
        products = shards.whole(name, values[name] * gradients[name])
        products /= products.abs().amax()  # the squares would underflow
        sums = weight.by_channel(products).sum(1)
        ratio = sums.square().sum() / products.square().sum()
        # The ratio is NaN if every product is 0.
        if float(ratio) < min(_LIMIT, _CHANCE ** (1 / len(sums))) ** 2:
            found.add(name)
    return found
