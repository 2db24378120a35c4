"""The probe, which measures a partly pruned network and leaves no trace in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.errors import NotFiniteError
from force_plugin.model.restoring import in_evaluation_mode, without_trace
from force_plugin.model.weights import Weight
from force_plugin.parallel.shards import Shards
from force_plugin.scoring import dead_gradients
from force_plugin.scoring.compiled import Compiled
from force_plugin.scoring.disconnection import Watch
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.gates import Gate
from force_plugin.scoring.gradients import Gradients, refuse_recomputation
from force_plugin.scoring.last_look import LastLook, Look
from force_plugin.scoring.loss import Loss
from force_plugin.scoring.malloc import freed_memory_kept
from force_plugin.scoring.nonfinite import Causes
from force_plugin.scoring.open_gates import Opening
from force_plugin.scoring.passes import Loader, Passes
from force_plugin.scoring.scale_free import scale_free
from force_plugin.scoring.stand_ins import StandIns
from force_plugin.scoring.synflow import SynapticFlow
from force_plugin.scoring.undone_writes import protected


class Probe:
    """Measures a network with the masks of the last step.

    The probe is a context manager. While it is open, other tensors stand in for the
    network's weights and buffers. They are removed when the context exits. Before the
    first measurement the network is not touched, and no batch is read.

    Args:
        model: The network.
        weights: The prunable weights of the network.
        loader: Iterable of batches. After the last batch it starts again.
        passes: Options of the passes of batches through the network.
        on_batch: Called after each batch with the number of the batch within the step,
            from 1.
        kept: Number of weights that earlier prunings have left. Default: all.
        shards: The division of parameters among the processes that measure together.
            Gradients are averaged over their batches, and all of them open the same
            gates. If the network is sharded, each tensor of a weight's shape is this
            process's shard.

    Attributes:
        shards: The ``shards`` argument.
        weights: The dense weights θ by parameter name, without gradient.
        masks: The mask c by parameter name, or ``None`` as long as nothing is pruned.
        parameters: Every parameter of the model, by name.
        step: Number of the present step, from 1.
        kept: Number of weights that the mask keeps, in the whole network.
        memory: What a method keeps from step to step, by names of its own.
        causes: Finds the causes of values that are not finite.
        watch: Raises :class:`Disconnected` from a measurement, if it is on.

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
        kept: int | None = None,
    ) -> None:
        shards = Shards(model) if shards is None else shards
        self.model = model
        self.shards = shards
        self.parameters = shards.parameters
        self.masks: Mapping[str, Tensor] | None = None
        self.step = 1
        every = sum(weight.dense.numel() for weight in weights)
        self.kept = every if kept is None else kept
        self.memory: dict[str, Any] = {}
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
        self.causes = Causes(model, self.parameters, passes.autocast, self._device)
        self._loss = Loss(model, passes, self._feed, self.causes, self._remember)
        self._gradients = Gradients(self._stand_ins, self._feed, self._loss_of, shards)
        self._synflow = SynapticFlow(
            model, self._stand_ins, self._opening, self._feed, shards
        )
        self._layers = {w.name: w for w in weights if w.dense.dim() > 1}
        self._last_look = LastLook(
            model, self._stand_ins, passes, self._feed, self._loss_of, shards
        )
        self.watch = Watch(self._last_look, self._remember, shards)
        # The model's own buffers. A pass writes to their stand-ins only.
        self._buffers = dict(model.named_buffers())
        self._exit = ExitStack()

    @property
    def loss(self) -> float:
        """Mean loss of the last measurement that used a loss; NaN before."""
        return self._gradients.loss

    @property
    def gates(self) -> dict[str, Gate]:
        """The closed gates that were opened so far, by parameter name."""
        return self._opening.gates

    @property
    def problems(self) -> list[str]:
        """Sentences about options that a measurement could not follow."""
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

    def prune(self, masks: Mapping[str, Tensor], kept: int, step: int) -> None:
        """Begin a step, in which the network is measured with these masks.

        Args:
            masks: Bool tensors by parameter name, True = kept; empty: a dense network.
            kept: Number of weights that the masks keep, in the whole network.
            step: Number of the step, from 1.
        """
        self.masks = masks or None
        self.kept = kept
        # A step that is taken again needs more batches than the caller has counted.
        self._feed.repeats |= step <= self.step
        self.step = step
        self._stand_ins.mask(self.masks)

    def gradients(self) -> dict[str, Tensor]:
        """Return the mean of ∂L/∂θ at θ ⊙ c over the step's batches.

        Pruned weights have a gradient too.

        Returns:
            Gradients by parameter name, which the caller may overwrite. The gradients
            of 16-bit weights are float32.

        Raises:
            NoGradientError: A weight got no gradient from any batch.
        """
        self._open()
        try:
            gradients = self._gradients.mean(self.step)
        except NotFiniteError:
            # A loss may be NaN because the outputs are constant. The ranks of several
            # processes could not look together.
            if self.watch.on and self.masks and self.shards.ranks.size == 1:
                self.flow()
            raise
        self.watch.look(gradients, self.masks, self.evaluation_mode)
        return gradients

    def hessian_gradients(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Return Hg at θ ⊙ c, with g held constant; both are summed over the batches.

        Args:
            temperature: Divides the outputs before the loss, as the attribute of
                :class:`force_plugin.GraSP` does. If it cannot be used, :attr:`problems`
                says so.

        Returns:
            Hg by parameter name, which the caller may overwrite.

        Raises:
            TypeError, ValueError: The temperature is no positive number, or the passes
                are to be compiled.
            NoGradientError: A weight got no gradient from any batch.
        """
        self._passes.refuse_compile("second derivatives, which torch.compile lacks")
        self._open()
        products = self._gradients.hessian_products(self.step, temperature)
        self.watch.look(products, self.masks, self.evaluation_mode)
        return products

    def synflow_gradients(self) -> dict[str, Tensor]:
        """Return ``|∂R/∂θ|`` at ``|θ ⊙ c|``, in float64, without data.

        R is the sum of the outputs for a single input of ones, whose shape comes from
        the loader. All parameters and buffers are replaced by their absolute values,
        and the network is in evaluation mode.

        Returns:
            Gradients by parameter name, float64 (float32 on MPS, which has no float64).
            The caller may overwrite them.

        Raises:
            BatchError: The inputs are no floating-point tensor, the outputs hold no
                floating-point tensor, or the model fails on the input of ones.
            ValueError: The passes are to be compiled, or a part of the model is
                TorchScript.
            NoGradientError: A weight, or every weight, got no gradient.
        """
        self._passes.refuse_compile("the network anew at each step")
        self._open()
        gradients = self._synflow.gradients(self.step, self._device)
        self.watch.look(gradients, self.masks, self.evaluation_mode)
        return gradients

    def scale_free(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Return weights whose scale does not matter, as :func:`scale_free` does.

        Args:
            gradients: Gradients of the dense network.
        """
        return scale_free(self._layers, self.weights, gradients, self.shards)

    def explain_zero_saliency(self, names: Sequence[str]) -> dict[str, str]:
        """Return why each weight has a saliency of 0; may make the last pass again."""
        return dead_gradients.explain(
            {name: self.parameters[name] for name in names},
            self.weights,
            self.shards,
            lambda: self._opening.last_graph(self._stand_ins),
        )

    def flow(self) -> Look:
        """Return what the outputs depend on, as :meth:`LastLook.flow` does.

        Raises:
            Disconnected: They do not depend on the inputs, and the watch is on.
        """
        masks, guarded = self.masks or {}, self.watch.on and self.masks
        rewind = self._remember() if guarded else None
        look = self._last_look.flow(masks, self.evaluation_mode, self.loss)
        if rewind:
            rewind()
            if look.connected is False:
                raise self.watch.cut(look.silent)
        return look

    def protected(self, by: str) -> AbstractContextManager[None]:
        """Return a context that undoes a method's writes to the model or the masks.

        At its end, a write raises a :class:`MethodError`.

        Args:
            by: Name of the method's function, for the message.
        """
        self._open()
        known, own, stand_ins = self.parameters, self._buffers, self._stand_ins
        return protected(by, known, own, stand_ins, self.gates, self.masks)

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Return a context in which every module is in evaluation mode."""
        self._open()
        return in_evaluation_mode(self.model)

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
            # A compiled model is measured without its compiled code. Compiling it again
            # for the stand-ins would cost more, and gives no second derivatives.
            self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        self._stand_ins.put(self._opening.values(), self._exit)
        self._stand_ins.mask(self.masks)

    def _remember(self) -> Callable[[], None]:
        """Return a function that undoes what a pass may change."""
        return self._stand_ins.remember(self.gates)

    def _loss_of(self, batch: Any, temperature: float) -> Tensor:
        """Return the loss of a batch, with gates open."""

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
