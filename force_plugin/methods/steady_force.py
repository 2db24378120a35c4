"""FORCE with layers levelled, and with a memory in place of misleading gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from force_plugin.errors import MethodError
from force_plugin.methods.criteria import FORCE
from force_plugin.methods.measurements import Measurements
from force_plugin.model.module_names import name_some

_MEMORY, _BEHIND = "steady_force", "behind a normalisation"
# A chunk of this many weights stays in the cache.
_CHUNK = 2**17


class _Past(NamedTuple):
    """What is kept from step to step.

    ``average`` is S, ``behind`` has the names of the weights behind a normalisation,
    and ``kept`` is the number of weights of the last mask.
    """

    average: dict[str, Tensor]
    behind: set[str]
    kept: int


class SteadyFORCE(FORCE):
    r"""FORCE that holds with few steps and at high sparsity. T steps.

    FORCE ranks pruned weights by the gradients that they have at 0. Behind a
    normalisation these mean nothing: they are too large by orders of magnitude, see
    ``docs/steady-force.md``. There, a pruned weight is ranked by what it was worth
    while it was kept, and this fades.

    The saliency at step t is the one of FORCE, and c is the mask of the last step:

    .. math::

        s_i = |\theta_i \, g_i(\theta \odot c_{t-1})|

    A pruned weight counts by one half, or not at all behind a normalisation:

    .. math::

        r_i = 1 \text{ if } c_{t-1,i} = 1, \qquad
        r_i = 0 \text{ behind a normalisation}, \qquad r_i = \tfrac12 \text{ elsewhere}

    A normalisation follows if the scale of the layer's channels does not matter to the
    loss of the dense network: if the sum of θ ⊙ g over each channel is 0. This is
    measured.

    Each saliency is divided by the root of the sum N over the kept weights of its layer
    ℓ. SynFlow's saliency has the same sum in each layer, and FORCE's has not. The root
    is half of the way, by the geometric mean. A pruned weight counts as a part of N
    where it is larger:

    .. math::

        u_i = \frac{r_i s_i}{\sqrt{\max(N_\ell, \, r_i s_i)}}, \qquad
        N_\ell = \sum_{j \in \ell} c_{t-1,j} \, s_j

    The ranking is by a running average. The older its saliencies are, the less they
    count, by the cube of the share of weights that has stayed since:

    .. math::

        S_1 = u, \qquad S_t = \rho_t S_{t-1} + (1 - \rho_t) \, u, \qquad
        \rho_t = \min\bigl(0.7, (\lVert c_{t-1} \rVert_0 / \lVert c_{t-2}
        \rVert_0)^3\bigr)

    A weight whose own gradient is 0 is idle, kept or pruned. It is forgotten: its S is
    0. The last two steps stay at the final density, so that other weights return in
    the place of those that the last step down has made idle.

    Source: this project; ``docs/steady-force.md`` has the study. The saliency is that
    of de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.

    Attributes:
        returning: Factor of the saliency of a pruned weight that has no normalisation
            behind it, in [0, 1]. Default: 0.5.
        levelling: Power of the layer's saliency by which is divided, in [0, 1].
            Default: 0.5.
        forgetting: Exponent of the share of weights that has stayed, at least 0.
            Default: 3.
        longest: The largest share of the old average, in [0, 1]. Default: 0.7.

    Raises:
        TypeError, ValueError: A subclass sets an attribute to something else.
    """

    refining: ClassVar[int] = 2
    returning: ClassVar[float] = 0.5
    levelling: ClassVar[float] = 0.5
    forgetting: ClassVar[float] = 3.0
    longest: ClassVar[float] = 0.7

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("returning", "levelling", "forgetting", "longest"):
            value, limit = getattr(cls, name), 1 if name != "forgetting" else inf
            label = f"{cls.__name__}.{name}: expected a number"
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{label}, got {type(value).__name__}")
            if not 0 <= value <= limit or value == inf:
                wanted = "between 0 and 1" if limit == 1 else "of at least 0"
                raise ValueError(f"{label} {wanted}, got {value}")

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        gradients = probe.gradients()
        if probe.masks is None:
            probe.memory[_BEHIND] = probe.scale_free(gradients)
        return gradients

    @classmethod
    def scores(cls, probe: Measurements) -> dict[str, Tensor]:
        """Return the running averages, as :meth:`SaliencyMethod.scores` does.

        They are the averages themselves: whoever changes them has to copy them first.

        Raises:
            MethodError: A subclass has a score below 0.
        """
        scores, masks = super().scores(probe), probe.masks
        sums = _sums(scores, masks, probe)
        if masks is None:
            below = [name for name, score in scores.items() if score.lt(0).any()]
            if below:
                raise MethodError(
                    f"{cls.__name__}.score: expected scores of at least 0, as their "
                    f"sums level the layers, got scores below 0 for {name_some(below)}",
                    "return absolute values",
                )
            for name, score in scores.items():
                for own in _split(score):
                    _level(own, sums[name], cls.levelling, False)
            # A subclass with a signal of its own may not have asked.
            behind = probe.memory.get(_BEHIND, set())
            probe.memory[_MEMORY] = _Past(scores, behind, probe.kept)
            return scores
        past: _Past = probe.memory[_MEMORY]
        new = 1 - min(cls.longest, (probe.kept / past.kept) ** cls.forgetting)
        for name, score in scores.items():
            less = 0.0 if name in past.behind else cls.returning
            tensors = past.average[name], score, masks[name]
            for mean, own, mask in zip(*map(_split, tensors), strict=True):
                live = own.sign()
                counted = _as_floats(mask, own)
                own.mul_(counted.mul_(1 - less).add_(less) if less else counted)
                _level(own, sums[name], cls.levelling, bool(less))
                mean.lerp_(own, new).mul_(live)
        probe.memory[_MEMORY] = past._replace(kept=probe.kept)
        return past.average


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
    # A network may be on several devices.
    together = torch.stack([own.to(sums[0].device) for own in sums])
    totals = probe.shards.totals.sum(*together.tolist())
    return dict(zip(scores, totals, strict=True))


def _level(score: Tensor, total: float, power: float, above: bool) -> None:
    """Divide scores by a power of their layer's sum, or of themselves if larger.

    Args:
        score: Scores of a layer, or a part of them; they are overwritten.
        total: Sum of the scores of the layer's kept weights.
        power: The power.
        above: Whether a score may be larger than the sum.
    """
    limits = torch.finfo(score.dtype)
    least = min(max(total, limits.tiny), limits.max)  # a sum may be 0, or overflow
    score.mul_(score.clamp_min(least).pow_(-power) if above else least**-power)


def _as_floats(mask: Tensor, score: Tensor) -> Tensor:
    """Return a mask as 0 and 1 in the dtype of the scores."""
    # On a CPU, bytes convert to floats several times as fast as bools.
    return mask.view(torch.uint8).to(score.dtype)


def _split(tensor: Tensor) -> Sequence[Tensor]:
    """Split a tensor into chunks of rows that stay in the cache."""
    tensor = tensor if tensor.dim() else tensor.view(1)
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    parts: Sequence[Tensor] = tensor.split(rows)
    return parts
