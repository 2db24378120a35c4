"""Whether the masks of a step disconnect the network, seen from its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from force_plugin.parallel.shards import Shards
from force_plugin.scoring.last_look import EvaluationMode, LastLook

# The first rows of a tensor with about this many values are looked at first.
_FEW = 2**14


class Disconnected(BaseException):
    """The network is disconnected: its outputs do not depend on its inputs.

    It takes the pruning back to the step before, and is no error. So a method that
    catches every error of its measurement does not catch it.

    Args:
        layers: Names of the weights of the layers that have lost their last live weight
            since the network was connected.
    """

    def __init__(self, layers: Sequence[str]) -> None:  # noqa: D107
        super().__init__("the step before has disconnected the network")
        self.layers = layers


class Watch:
    """Raises :class:`Disconnected` if a network is disconnected.

    A disconnected network has a layer without any live weight: a kept weight whose
    gradient is not 0. The layer that reads the inputs is one. So the outputs are looked
    at only if a layer has no live weight that had one at the step before, which costs
    nearly nothing.

    Args:
        last_look: Tells whether the outputs of the network depend on its inputs.
        remember: Returns a function that undoes what a pass may change.
        shards: The division of the network among the processes.

    Attributes:
        on: Whether :meth:`look` looks. Default: False.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        last_look: LastLook,
        remember: Callable[[], Callable[[], None]],
        shards: Shards,
    ) -> None:
        self.on = False
        self._last_look = last_look
        self._remember = remember
        self._totals = shards.totals
        # The layers without a live weight at the last step, which was connected.
        self._idle: set[str] = set()

    def look(
        self,
        gradients: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        evaluation: EvaluationMode,
    ) -> None:
        """Look at the gradients of a step.

        Args:
            gradients: Gradients of all weights, by parameter name.
            masks: The masks of the network; ``None``: the network is dense.
            evaluation: A context with all modules in evaluation mode.

        Raises:
            Disconnected: The outputs do not depend on the inputs.
        """
        if not self.on:
            return
        masks = masks or {}
        found = self._totals.sum(
            *(_is_live(g, masks.get(name)) for name, g in gradients.items())
        )
        idle = {name for name, live in zip(gradients, found, strict=True) if not live}
        if masks and not idle <= self._idle:
            rewind = self._remember()
            connected = self._last_look.connected(masks, evaluation)
            rewind()
            if not connected:
                raise self.cut([n for n in gradients if n in idle])
        self._idle = idle

    def cut(self, idle: Sequence[str]) -> Disconnected:
        """Return the exception for a disconnected network.

        Args:
            idle: Names of the weights of the layers without a live weight.
        """
        return Disconnected([name for name in idle if name not in self._idle])


def _is_live(gradient: Tensor, mask: Tensor | None) -> bool:
    if not gradient.dim():
        return bool(gradient) and (mask is None or bool(mask))
    rows = max(1, _FEW // max(1, gradient[:1].numel()))
    for some in (slice(rows), slice(rows, None)):
        kept = gradient[some] if mask is None else gradient[some] * mask[some]
        if kept.any():
            return True
    return False
