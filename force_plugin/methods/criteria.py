"""The pruning methods, a class for each, with its measurement and its score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from force_plugin.methods.base import SaliencyMethod, elementwise
from force_plugin.methods.measurements import Measurements


class SNIP(SaliencyMethod):
    """``|θ ⊙ g(θ)|``, once, on the dense network; SNIP-MB with several batches.

    The gradient is averaged over the batches before the absolute value is taken, as in
    de Jorge et al. 2021. Source: Lee et al. 2019 (arXiv 1810.02340), equation 6.
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

    The paper scores S = −θ ⊙ Hg and removes the highest scores. The authors' code also
    gives new initial values to linear layers. This class does not, so that the scored
    weights are the trained weights. Source: Wang et al. 2020 (arXiv 2002.07376),
    equation 8.

    Attributes:
        temperature: Divides the outputs before the loss. Default: 200. If the loss
            comes from ``forward=``, the outputs are divided each time that they leave
            the model. If ``forward`` calls a single module inside the model instead,
            the outputs of this module are divided. The temperature is not used, with a
            warning, if the loss is computed inside the model, from several modules, or
            from outputs that enter the model again.
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

    R is the sum of the outputs for an input of ones. Every parameter and buffer is
    replaced by its absolute value. The network runs in evaluation mode and in float64,
    as products over many layers overflow float32. The paper takes 100 steps. Source:
    Tanaka et al. 2020 (arXiv 2006.05467), Algorithm 1.
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

    L is a single number, so it does not change the ranking within a step. The method
    has its own schedule of sparsities. Source: Verdenius et al. 2020 (arXiv
    2006.00896).
    """

    steps = 7
    schedule: ClassVar[str | None] = "snip_it"

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor]:  # noqa: D102
        with probe.evaluation_mode():
            gradients = probe.gradients()
        # Do not divide by a loss of 0; the ranking does not depend on the loss.
        return {name: g.div_(probe.loss or 1.0) for name, g in gradients.items()}


class Magnitude(SaliencyMethod):
    """``|θ|``, without data; the baseline of every comparison."""

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

    The scores come from PyTorch's global generator on the CPU. So they depend on
    ``torch.manual_seed``, and not on the device. No other method advances this
    generator.
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
