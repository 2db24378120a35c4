"""The methods, a class each: what it measures, and its score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from force_plugin.methods.base import SaliencyMethod, elementwise
from force_plugin.methods.measurements import Measurements


class SNIP(SaliencyMethod):
    """``|θ ⊙ g(θ)|``, once, on the dense network; SNIP-MB with several batches.

    Source: Lee et al. 2019 (arXiv 1810.02340), equation 6; the gradient is averaged
    over the batches before the absolute value, as in de Jorge et al. 2021.
    """

    steps: ClassVar[int | None] = 1

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.mul_(weight).abs_()


class IterSNIP(SNIP):
    """``|θ ⊙ g(θ ⊙ c)|`` over the weights still kept, in T steps.

    Source: de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.
    """

    steps = None


class FORCE(IterSNIP):
    """``|θ ⊙ g(θ ⊙ c)|`` over all weights, in T steps: pruned weights may come back.

    θ is the dense weight, and the gradient of the pruned network is not masked.
    Source: de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.
    """

    regrows = True


class GraSP(SaliencyMethod):
    """``θ ⊙ Hg``, once, on the dense network; GraSP-MB with several batches.

    The paper scores S = −θ ⊙ Hg and removes the highest. Its re-initialisation of
    linear layers is left out: what is scored is what is trained. Source: Wang et al.
    2020 (arXiv 2002.07376), equation 8.

    Attributes:
        temperature: Divides the outputs before the loss. Default: 200. Where the loss
            comes from ``forward=``, they are divided where they leave the model, each
            time that it is called, or the one module of it that is. A loss that is
            computed within the model, from several modules, or from outputs that enter
            it again, is taken as it is, with a warning.
    """

    steps = 1
    temperature: ClassVar[float] = 200.0

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        return probe.hessian_gradients(cls.temperature)

    @staticmethod
    @elementwise
    def score(weight: Tensor, hessian_gradient: Tensor) -> Tensor:  # noqa: D102
        return hessian_gradient.mul_(weight)


class GraSPIt(SaliencyMethod):
    """``g(θ ⊙ c)²`` over the weights still kept, in T steps.

    Source: the public code of de Jorge et al. 2021 ("GRASP-It").
    """

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.square_()


class SynFlow(SaliencyMethod):
    """``|θ ⊙ ∂R/∂θ|`` over the weights still kept, without data, in T steps.

    R is the sum of the outputs for an input of ones, with every parameter and buffer
    replaced by its absolute value, in evaluation mode and in float64 (products over
    many layers overflow float32). The paper takes 100 steps. Source: Tanaka et al. 2020
    (arXiv 2006.05467), Algorithm 1.
    """

    overflow = (
        "its gradient is NaN or inf, as a product over many layers without signs "
        "overflows float64, or a narrower type that the forward casts to",
        "take another method",
    )

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        return probe.synflow_gradients()

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.mul_(weight.to(gradient.dtype)).abs_()


class SNIPIt(SNIP):
    """``|θ ⊙ g| / L`` over the weights still kept, in evaluation mode, in 7 steps.

    L is one number, so the ranking within a step is SNIP's. Source: Verdenius et al.
    2020 (arXiv 2006.00896), with its own schedule of sparsities.
    """

    steps = 7
    schedule = "snip_it"

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        with probe.evaluation_mode():
            gradients = probe.gradients()
        # A loss of 0 has no elasticity; the ranking does not depend on it.
        return {name: g.div_(probe.loss or 1.0) for name, g in gradients.items()}


class Magnitude(SaliencyMethod):
    """``|θ|``, without data: the baseline of every comparison."""

    steps = 1
    looks = False

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, None]:  # noqa: D102
        return dict.fromkeys(probe.weights)

    @staticmethod
    @elementwise
    def score(weight: Tensor, signal: None) -> Tensor:  # noqa: D102
        return weight.abs()

    def ranking(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.abs()


class Random(SaliencyMethod):
    """Uniform noise, without data.

    The scores come from PyTorch's global generator on the CPU: ``torch.manual_seed``
    decides, the device does not, and this is the one method that advances it.
    """

    steps = 1
    looks = False

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, None]:  # noqa: D102
        return dict.fromkeys(probe.weights)

    @staticmethod
    def score(weight: Tensor, signal: None) -> Tensor:  # noqa: D102
        return torch.rand(weight.shape).to(weight.device)

    def ranking(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.rand(t.shape).to(t.device) if t.requires_grad else t
