"""FORCE with a bound on returning weights, and with a memory of earlier steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from force_plugin.methods.criteria import FORCE
from force_plugin.methods.measurements import Measurements

_MEMORY, _SCALE_FREE = "steady_force", "scale_free"
# A chunk of this many weights stays in the cache.
_CHUNK = 2**17


class _Past(NamedTuple):
    """What is kept from step to step.

    ``average`` is S. ``free`` has the names of the weights behind a normalisation, and
    ``dense`` the spreads of their layers in the dense network. ``kept`` is the number
    of weights of the last mask.
    """

    average: dict[str, Tensor]
    free: set[str]
    dense: Mapping[str, Tensor]
    kept: int


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

    A pruned weight has to be better than a kept weight by a factor of 4. Behind a
    normalisation it also counts as if its channel had all of its weights again. Here k
    is the output channel of weight i, and σ is measured at the output of its layer, on
    the batches of the step:

    .. math::

        r_i = 1 \text{ if } c_{t-1,i} = 1, \qquad
        r_i = \tfrac14 \min(1, \sigma_k / \sigma_k^{\text{dense}})
        \text{ behind a normalisation}, \qquad r_i = \tfrac14 \text{ elsewhere}

    A normalisation follows if the scale of the channels does not matter to the loss of
    the dense network: if the sum of θ ⊙ g over each channel is 0. This is measured.

    Each saliency is divided by the root of the saliency that its layer ℓ has. SynFlow's
    saliency has the same sum in each layer, and FORCE's has not. The root is half of
    the way, by the geometric mean:

    .. math::

        N_\ell = \sum_{j \in \ell} c_{t-1,j} \, s_j, \qquad
        u_i = \frac{r_i s_i}{\sqrt{\max(N_\ell, \, r_i s_i)}}

    The ranking is by a running average. The older its saliencies are, the less they
    count, by the cube of the share of weights that has stayed since. A weight that has
    no saliency any more is forgotten:

    .. math::

        S_1 = u, \qquad S_t = \rho_t S_{t-1} + (1 - \rho_t) \, u
        \text{ where } s > 0, \qquad S_t = 0 \text{ elsewhere}

    .. math::

        \rho_t = \min\bigl(0.7, (\lVert c_{t-1} \rVert_0 / \lVert c_{t-2}
        \rVert_0)^3\bigr)

    The last two steps stay at the final density: kept weights without any saliency make
    room for others.

    If a layer's module does not return its output channels as a convolution or a linear
    layer does, the minimum in r counts as 1.

    Source: this project; ``docs/steady-force.md`` has the study. The saliency is that
    of de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.

    Attributes:
        returning: Factor of the saliency of a pruned weight. Default: 0.25.
        levelling: Power of the layer's saliency by which is divided. Default: 0.5.
        forgetting: Exponent of the share of weights that has stayed. Default: 3.
        longest: The largest share of the old average. Default: 0.7.
    """

    refining: ClassVar[int] = 2
    returning: ClassVar[float] = 0.25
    levelling: ClassVar[float] = 0.5
    forgetting: ClassVar[float] = 3.0
    longest: ClassVar[float] = 0.7

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        gradients = probe.gradients()
        if probe.masks is None:
            probe.memory[_SCALE_FREE] = probe.scale_free(gradients)
        return gradients

    @classmethod
    def scores(cls, probe: Measurements) -> dict[str, Tensor]:  # noqa: D102
        masks = probe.masks
        past: _Past | None = None if masks is None else probe.memory[_MEMORY]
        with probe.spreads(None if past is None else past.free) as spreads:
            scores = super().scores(probe)
        sums = _sums(scores, masks, probe)
        if masks is None or past is None:
            for name, score in scores.items():
                for part in _split(score):
                    _level(part, sums[name], cls.levelling)
            free = probe.memory[_SCALE_FREE]
            probe.memory[_MEMORY] = _Past(scores, free, spreads, probe.kept)
            return scores
        new = 1 - min(cls.longest, (probe.kept / past.kept) ** cls.forgetting)
        for name, score in scores.items():
            factor = cls._factor(name, score, spreads, past.dense, probe)
            tensors = past.average[name], score, masks[name], factor
            for average, own, mask, r in zip(*map(_split, tensors), strict=True):
                live = own.sign()
                own.mul_(torch.lerp(r, r.new_ones(()), _as_floats(mask, own)))
                _level(own, sums[name], cls.levelling)
                average.lerp_(own, new).mul_(live)
        probe.memory[_MEMORY] = past._replace(kept=probe.kept)
        return past.average

    @classmethod
    def _factor(
        cls,
        name: str,
        score: Tensor,
        spreads: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        probe: Measurements,
    ) -> Tensor:
        """Return r of the weights of a layer that are pruned."""
        if name not in spreads or name not in dense:
            return score.new_tensor(cls.returning).expand_as(score)
        shrunk = (spreads[name] / dense[name]).clamp_max(1)
        whole = (cls.returning * shrunk).to(score.dtype)
        return probe.shards.local(name, whole.expand(probe.shards.shape(name, score)))


def _sums(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    probe: Measurements,
) -> dict[str, float]:
    """Return the sum of the scores of the kept weights of each layer."""
    sums = []
    for name, score in scores.items():
        parts: Iterable[Tensor] = _split(score)
        if masks is not None:
            pairs = zip(parts, _split(masks[name]), strict=True)
            parts = (_as_floats(mask, own).mul_(own) for own, mask in pairs)
        sums.append(torch.stack([part.sum() for part in parts]).sum())
    totals = probe.shards.totals.sum(*torch.stack(sums).tolist())
    return dict(zip(scores, totals, strict=True))


def _level(score: Tensor, total: float, power: float) -> None:
    """Divide scores by a power of their layer's sum, or of themselves if larger."""
    least = max(total, torch.finfo(score.dtype).tiny)
    score.mul_(score.clamp_min(least).pow_(-power))


def _as_floats(mask: Tensor, score: Tensor) -> Tensor:
    """Return a mask as 0 and 1 in the dtype of the scores."""
    # On a CPU, bytes convert to floats several times as fast as bools.
    return mask.view(torch.uint8).to(score.dtype)


def _split(tensor: Tensor) -> Sequence[Tensor]:
    """Split a tensor into chunks of rows that stay in the cache."""
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    parts: Sequence[Tensor] = tensor.split(rows)
    return parts
