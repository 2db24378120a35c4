"""Protocol of the measurements that a method can ask for.

:class:`force_plugin.scoring.Probe` implements the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from force_plugin.parallel.shards import Shards


class Causes(Protocol):
    """Finds the causes of values that are not finite."""

    @property
    def precision(self) -> str:
        """The narrowest floating-point type of the passes."""

    def broken(self) -> list[str]:
        """Return names of parameters that are not finite, and of buffers with NaN."""

    def wider(self) -> str:
        """Return advice against an overflow, as the end of a sentence."""


class Measurements(Protocol):
    """Measures a network with the masks of the last step.

    Attributes:
        shards: The division of parameters among the processes that measure together.
        weights: The dense weights θ by parameter name, without gradient.
        masks: The mask c by parameter name, or ``None`` as long as nothing is pruned.
        step: Number of the present step, from 1.
        kept: Number of weights that the mask keeps, in the whole network.
        memory: What a method keeps from step to step, by names of its own. It is empty
            at the first step.
    """

    shards: Shards
    weights: dict[str, Tensor]
    masks: Mapping[str, Tensor] | None
    step: int
    kept: int
    memory: dict[str, Any]

    @property
    def causes(self) -> Causes:
        """Finds the causes of values that are not finite."""

    @property
    def loss(self) -> float:
        """Mean loss of the last measurement that used a loss; NaN before."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the mean of ∂L/∂θ at θ ⊙ c over the step's batches.

        Pruned weights have a gradient too.
        """

    def hessian_gradients(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Return Hg at θ ⊙ c; g and Hg are summed over the step's batches."""

    def synflow_gradients(self) -> dict[str, Tensor]:
        """Return ``|∂R/∂θ|`` at ``|θ ⊙ c|``, in float64, without data."""

    def scale_free(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Return the weights of layers whose output channels can be scaled.

        The loss does not change with the scale, as a normalisation follows.

        Args:
            gradients: The result of :meth:`gradients` for the dense network.
        """

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Return a context in which every module is in evaluation mode."""

    def protected(self, by: str) -> AbstractContextManager[None]:
        """Return a context that undoes a method's writes to the model.

        Its error names the method.
        """
