"""What a method can ask of a network; :class:`force_plugin.scoring.Probe` answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from force_plugin.parallel.shards import Shards


class Measurements(Protocol):
    """A network, as it is pruned so far, that can be measured.

    Attributes:
        shards: The processes that measure together.
        weights: The dense weights θ by parameter name, without gradient.
        masks: The mask c by parameter name, or ``None`` as long as nothing is pruned.
        step: The step being measured, from 1.
    """

    shards: Shards
    weights: dict[str, Tensor]
    masks: Mapping[str, Tensor] | None
    step: int

    @property
    def loss(self) -> float:
        """Mean loss of the last measurement that needed one, else NaN."""

    def gradients(self) -> dict[str, Tensor]:
        """Mean over the step's batches of ∂L/∂θ at θ ⊙ c, pruned weights included."""

    def hessian_gradients(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Hg at θ ⊙ c; g and Hg are summed over the step's batches."""

    def synflow_gradients(self) -> dict[str, Tensor]:
        """``|∂R/∂θ|`` at ``|θ ⊙ c|``, in float64, without data."""

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Every module in evaluation mode for a while."""

    def protected(self, by: str) -> AbstractContextManager[None]:
        """Take back what a method writes to the model, and name the method."""

    def broken(self) -> list[str]:
        """Parameters that are not finite, and buffers that hold a NaN."""

    @property
    def precision(self) -> str:
        """The narrowest floating-point type of the passes."""

    def wider(self) -> str:
        """What else to try against an overflow, as the end of a sentence."""
