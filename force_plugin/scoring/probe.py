"""A network, as it is pruned so far, that can be measured and shows no trace of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.model.restoring import in_evaluation_mode, without_trace
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards
from force_plugin.scoring import dead_gradients
from force_plugin.scoring.compiled import Compiled
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.gates import Gate
from force_plugin.scoring.gradients import Gradients, refuse_recomputation
from force_plugin.scoring.last_look import LastLook
from force_plugin.scoring.loss import Loss
from force_plugin.scoring.malloc import freed_memory_kept
from force_plugin.scoring.nonfinite import Causes
from force_plugin.scoring.open_gates import Opening
from force_plugin.scoring.passes import Loader, Passes
from force_plugin.scoring.stand_ins import StandIns
from force_plugin.scoring.synflow import SynapticFlow
from force_plugin.scoring.undone_writes import protected


class Probe:
    """Measures a network, as it is pruned so far.

    A context manager: what it has put in the place of the network's weights and
    buffers is gone when it exits. Nothing is touched, and no batch is read, before the
    first measurement.

    Args:
        model: The network.
        weights: Its prunable weights.
        loader: Iterable of batches; it is cycled.
        passes: How they are passed through the network.
        on_batch: Called after each batch with its number within the step, from 1.
        shards: The processes that measure together: what is measured is the mean over
            their batches, and they open the same gates. If the network is sharded, each
            has its part of whatever is said here to have a weight's shape.

    Attributes:
        shards: As given.
        weights: The dense weights θ by parameter name, without gradient.
        masks: The mask c by parameter name, or ``None`` as long as nothing is pruned.
        parameters: Every parameter of the model, by name.
        step: The step being measured, from 1.

    Raises:
        ValueError: The passes are to be compiled, and the network is sharded.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        loader: Loader,
        passes: Passes,
        *,
        on_batch: Callable[[int], object] = lambda number: None,
        shards: Shards | None = None,
    ) -> None:
        shards = Shards(model) if shards is None else shards
        self.model = model
        self.shards = shards
        self.parameters = shards.parameters
        self.masks: Mapping[str, Tensor] | None = None
        self.step = 1
        self._passes = passes
        self._loader = loader
        self._opening = Opening(
            model, self.parameters, weights, shards, passes.open_gates
        )
        opened = self._opening.values()
        self.weights = {w.name: opened.get(w.name, w.local) for w in weights}
        self._device = next(iter(self.weights.values())).device
        self._stand_ins = StandIns(model, self.parameters, self.weights, shards)
        self._compiled = Compiled(model, passes.compile, self._device, shards)
        self._feed = Feed(loader, passes, self._device, shards, on_batch)
        self._causes = Causes(model, self.parameters, passes.autocast, self._device)
        self._loss = Loss(model, passes, self._feed, self._causes, self._remember)
        self._gradients = Gradients(self._stand_ins, self._feed, self._loss_of, shards)
        self._synflow = SynapticFlow(
            model, self._stand_ins, self._opening, self._feed, shards
        )
        self._last_look = LastLook(
            model, self._stand_ins, passes, self._feed, self._loss_of, shards
        )
        # The model's own; the stand-ins take on what a pass writes.
        self._buffers = dict(model.named_buffers())
        self._exit = ExitStack()

    @property
    def loss(self) -> float:
        """Mean loss of the last measurement that needed one, else NaN."""
        return self._gradients.loss

    @property
    def gates(self) -> dict[str, Gate]:
        """The closed gates that were opened so far, by parameter name."""
        return self._opening.gates

    @property
    def problems(self) -> list[str]:
        """What could not be measured as it was asked for, a sentence each."""
        return self._loss.problems

    def __enter__(self) -> Probe:
        self._exit.enter_context(torch.enable_grad())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._feed.close()
        self._opening.measure = None
        self._synflow.close()
        self._exit.close()

    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Measure the network with these masks from now on, as the next step.

        Args:
            masks: Bool tensors by parameter name, True = kept.
        """
        self.masks = masks
        self.step += 1
        self._stand_ins.mask(masks)

    def gradients(self) -> dict[str, Tensor]:
        """Mean over the step's batches of ∂L/∂θ at θ ⊙ c, pruned weights included.

        Returns:
            By parameter name; the caller's to overwrite. 16-bit weights give float32.

        Raises:
            NoGradientError: A weight got no gradient from any batch.
        """
        self._open()
        return self._gradients.mean(self.step)

    def hessian_gradients(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Hg at θ ⊙ c, with g held constant; g and Hg are summed over the batches.

        Args:
            temperature: Divides the model's outputs before the loss. Where the loss
                comes from ``forward``, they are divided where they leave the model, or
                the one module that ``forward`` calls of it. A loss that is computed
                within the model, or of several modules, is taken as it is, which
                :attr:`problems` says.

        Returns:
            By parameter name; the caller's to overwrite.

        Raises:
            TypeError, ValueError: The temperature is no positive number, or the passes
                are to be compiled.
            NoGradientError: A weight got no gradient from any batch.
        """
        self._passes.refuse_compile("second derivatives, which torch.compile lacks")
        self._open()
        return self._gradients.hessian_products(self.step, temperature)

    def synflow_gradients(self) -> dict[str, Tensor]:
        """``|∂R/∂θ|`` at ``|θ ⊙ c|``, in float64 (float32 where there is none).

        R is the sum of the outputs for one input of ones of the shape that the loader
        gives, with all parameters and buffers replaced by their absolute values, in
        evaluation mode.

        Returns:
            By parameter name, float64; the caller's to overwrite.

        Raises:
            BatchError: The inputs are no floating-point tensor, or no output is one, or
                the model fails on such an input.
            ValueError: The passes are to be compiled, or a part of the model is
                TorchScript.
            NoGradientError: A weight, or all of them, got no gradient.
        """
        self._passes.refuse_compile("the network anew at each step")
        self._open()
        return self._synflow.gradients(self.step, self._device)

    def explain_zero_saliency(self, names: Sequence[str]) -> dict[str, str]:
        """Why weights have a saliency of exactly 0, by name, at the cost of a pass."""
        return dead_gradients.explain(
            {name: self.parameters[name] for name in names},
            self.weights,
            self.shards,
            lambda: self._opening.last_graph(self._stand_ins),
        )

    def flow(self) -> tuple[bool | None, int, list[str]]:
        """What the outputs depend on now, as :meth:`LastLook.flow` says."""
        masks = self.masks or {}
        return self._last_look.flow(masks, self.evaluation_mode, self.loss)

    def protected(self, by: str) -> AbstractContextManager[None]:
        """Take back what someone else writes to the model's own values, or to masks.

        Args:
            by: Who may do so, for the message of the :class:`MethodError`.
        """
        self._open()
        return protected(
            by,
            self.parameters,
            self._buffers,
            self._stand_ins,
            self.gates,
            self.masks,
        )

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Every module in evaluation mode for a while, then as it was."""
        self._open()
        return in_evaluation_mode(self.model)

    def broken(self) -> list[str]:
        """Parameters that are not finite, and buffers that hold a NaN."""
        return self._causes.broken()

    @property
    def precision(self) -> str:
        """The narrowest floating-point type of the passes."""
        return self._causes.precision

    def wider(self) -> str:
        """What else to try against an overflow: a wider type, if there is one."""
        return self._causes.wider()

    def _open(self) -> None:
        """Put stand-ins in the place of weights and buffers."""
        if self._stand_ins.leaves:
            return
        self._exit.enter_context(without_trace(self.model, self._loader))
        if self._device.type == "cpu":
            self._exit.enter_context(freed_memory_kept())
        self._exit.callback(torch.clear_autocast_cache)
        self._exit.enter_context(self._stand_ins.reader.reading())
        self.shards.detach(self.model)
        self._compiled.begin(self._exit)
        if "torch._dynamo" in sys.modules:
            # A model that was compiled is measured as it is written: compiling it anew
            # for stand-ins would cost more, and has no second derivatives.
            self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        self._stand_ins.put(self._opening.values(), self._exit)
        self._stand_ins.mask(self.masks)

    def _remember(self) -> Callable[[], None]:
        """What a pass may change, and the way back."""
        return self._stand_ins.remember(self.gates)

    def _loss_of(self, batch: Any, temperature: float) -> Tensor:
        """The loss of one batch, with gates open."""

        def measure() -> tuple[Tensor, Mapping[str, Tensor]]:
            masks = {} if self.shards.sharded else self.masks or {}
            with self._passes.autocasting(self._device):
                loss = self._loss.of(batch, self.step, masks, temperature)
            return loss, self._stand_ins.leaves

        first = self._opening.measure is None
        with self._compiled.passing(first, self._stand_ins.scored):
            loss, _ = self._opening.revealed(measure, self._stand_ins)
        if first:
            refuse_recomputation(loss)
        return loss
