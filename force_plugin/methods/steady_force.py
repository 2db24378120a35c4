"""FORCE with a bound on returning weights, and with a memory of earlier steps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from force_plugin.methods.criteria import FORCE
from force_plugin.methods.measurements import Measurements

_MEMORY = "steady_force"
# A chunk of this many weights stays in the cache.
_CHUNK = 2**17


class SteadyFORCE(FORCE):
    r"""FORCE that holds with few steps and at high sparsity. T steps.

    FORCE overrates pruned weights behind a normalisation. A normalisation divides each
    channel by its standard deviation σ, so that the gradient of each weight is
    multiplied by 1/σ. A channel that has lost most of its weights has a small σ, and
    the gradients of its pruned weights are as large as if they had this channel for
    themselves. As soon as they return, σ grows and the gradients shrink.

    The saliency at step t is the one of FORCE, and c is the mask of the last step:

    .. math::

        s_i = |\theta_i \, g_i(\theta \odot c_{t-1})|

    A pruned weight counts as if its channel had all of its weights again, and it has to
    be better than a kept weight by a factor of 4. Here k is the output channel of
    weight i, and σ is measured at the output of its layer, on the batches of the step:

    .. math::

        r_i = 1 \text{ if } c_{t-1,i} = 1, \qquad
        r_i = \tfrac14 \min(1, \sigma_k / \sigma_k^{\text{dense}}) \text{ if not}

    The ranking is by a running average. The older its saliencies are, the less they
    count, by the cube of the share of weights that has stayed since. A weight that has
    no saliency any more is forgotten:

    .. math::

        S_1 = s, \qquad S_t = \rho_t S_{t-1} + (1 - \rho_t) \, r \odot s
        \text{ where } s > 0, \qquad S_t = 0 \text{ elsewhere}

    .. math::

        \rho_t = \min\bigl(0.7, (\lVert c_{t-1} \rVert_0 / \lVert c_{t-2}
        \rVert_0)^3\bigr)

    The last two steps stay at the final density: kept weights without any saliency make
    room for others. This is left out if the way down is too steep, as on a linear
    schedule with few steps: if the other steps would end with the removal of more than
    seven eighths of what is left.

    If a layer's module does not return its output channels as a convolution or a linear
    layer does, the minimum in r counts as 1.

    Source: this project; ``docs/steady-force.md`` has the study. The saliency is that
    of de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.

    Attributes:
        returning: Factor of the saliency of a pruned weight. Default: 0.25.
        forgetting: Exponent of the share of weights that has stayed. Default: 3.
        longest: The largest share of the old average. Default: 0.7.
    """

    refining: ClassVar[int] = 2
    returning: ClassVar[float] = 0.25
    forgetting: ClassVar[float] = 3.0
    longest: ClassVar[float] = 0.7

    @classmethod
    def scores(cls, probe: Measurements) -> dict[str, Tensor]:  # noqa: D102
        with probe.spreads() as spreads:
            scores = super().scores(probe)
        masks = probe.masks
        if masks is None:
            probe.memory[_MEMORY] = (scores, spreads, probe.kept)
            return scores
        average: dict[str, Tensor]
        average, dense, kept = probe.memory[_MEMORY]
        share = min(cls.longest, (probe.kept / kept) ** cls.forgetting)
        for name, score in scores.items():
            factor = torch.full_like(score[:1], cls.returning)
            if name in spreads and name in dense:
                shrunk = cls.returning * (spreads[name] / dense[name]).clamp_max(1)
                whole = shrunk.to(score.dtype).expand(probe.shards.shape(name, score))
                factor = probe.shards.local(name, whole)
            _update(average[name], score, masks[name], factor, 1 - share)
        probe.memory[_MEMORY] = (average, dense, probe.kept)
        return average


def _update(
    average: Tensor, score: Tensor, mask: Tensor, factor: Tensor, new: float
) -> None:
    """Move an average towards a score, which counts less where a mask is False.

    The average becomes 0 where the score is 0.

    Args:
        average: Running average; it is overwritten.
        score: Scores of the step.
        mask: Mask of the network while the scores were measured.
        factor: Factor of the scores where the mask is False; broadcasts with them.
        new: Share of the new scores in the average, in [0, 1].
    """
    tensors = (average, score, mask, factor.expand_as(score))
    rows = max(1, _CHUNK // max(1, score[:1].numel()))
    for old, own, kept, less in zip(*(t.split(rows) for t in tensors), strict=True):
        old.lerp_(torch.where(kept, own, own * less), new).mul_(own != 0)
