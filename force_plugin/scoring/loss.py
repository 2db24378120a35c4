"""The loss of a batch, computed by ``loss_fn`` or ``forward``, and checked."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.data.containers import describe, is_pair
from force_plugin.errors import BatchError, NoGradientError, NotFiniteError, RankError
from force_plugin.model.weights import is_scripted
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.nonfinite import Causes
from force_plugin.scoring.passes import Forward, Passes
from force_plugin.scoring.temperature import Dividing, divide

# Errors that a network may raise if it is called in a way that it does not expect.
# Other errors, such as a full disk, are passed on unchanged.
OF_A_CALL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# RuntimeErrors that are passed on unchanged, as another way to call would not help.
PASSED_ON = (torch.cuda.OutOfMemoryError, RankError)

# Errors that PyTorch's losses raise if outputs and targets do not fit.
_OF_A_MISFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_PASS_FORWARD = "pass forward=, a callable (model, batch) -> loss"


class Loss:
    """The loss of the batches of a network.

    Args:
        model: The network.
        passes: Options of the passes, with ``loss_fn`` and ``forward``.
        feed: Puts batches on the device.
        causes: Finds the cause of a loss that is not finite.
        remember: Returns a function that undoes the changes of a pass.

    Attributes:
        problems: Sentences about options that a measurement could not follow.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        passes: Passes,
        feed: Feed,
        causes: Causes,
        remember: Callable[[], Callable[[], None]],
    ) -> None:
        self.problems: list[str] = []
        self._model = model
        self._passes = passes
        self._feed = feed
        self._causes = causes
        self._remember = remember
        # Modules whose outputs a temperature divides if ``forward`` gives the loss.
        self._outlets: Sequence[nn.Module] = [model]

    def of(
        self,
        batch: Any,
        step: int,
        masks: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the loss of a batch, a tensor of one number with a graph.

        Args:
            batch: The batch.
            step: Number of the step, for a message.
            masks: Masks of the pruned network, for a message; empty: not known.
            temperature: Divides the model's outputs before the loss.

        Raises:
            BatchError: The batch, or the loss, is not as expected.
            NoGradientError: The loss depends on no weight.
            NotFiniteError: The loss is NaN or infinite.
        """
        if self._passes.forward is not None:
            source = "forward"
            loss = self._of_forward(self._passes.forward, batch, temperature)
        else:
            source = "loss_fn"
            loss = self._of_pair(batch, temperature)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise BatchError(
                f"{source}: expected a loss of one number, got {describe(loss)}"
            )
        if loss.is_complex():
            raise BatchError(f"{source}: expected a real loss, got {describe(loss)}")
        if not loss.requires_grad:
            raise NoGradientError(
                f"{source}: the loss does not depend on the weights through autograd",
                "compute it from the model's outputs, without detach or no_grad",
            )
        if not torch.isfinite(loss):
            cause, advice = self._causes.of_loss(batch, bool(loss.isnan()), masks)
            raise NotFiniteError(
                f"the loss is {loss.item()} at step {step}: {cause}", advice
            )
        return loss.reshape(())

    def _of_pair(self, batch: Any, temperature: float) -> Any:
        """Return the loss of ``(inputs, targets)``, by ``loss_fn``."""
        if not is_pair(batch):
            raise BatchError(
                f"loader: expected batches (inputs, targets), got {describe(batch)}",
                f"for other batches {_PASS_FORWARD}",
            )
        inputs, targets = self._feed.moved(batch)
        if isinstance(inputs, Tensor) and inputs.shape[:1] == (0,):
            raise BatchError(
                "loader: expected at least one sample in each batch, got inputs "
                f"{describe(inputs)}",
                "leave empty batches out",
            )
        outputs = self._call(inputs)
        if temperature != 1.0:
            outputs, divided = divide(outputs, temperature)
            if not divided:
                self._warn_of(temperature, f"the outputs are {describe(outputs)}")
        try:
            return self._passes.loss_fn(outputs, targets)
        except PASSED_ON:
            raise
        except _OF_A_MISFIT as error:
            advice = "make the targets what loss_fn expects, or pass loss_fn="
            if not isinstance(outputs, Tensor):
                advice = "pass a loss_fn= that takes such outputs,"
            raise BatchError(
                f"loss_fn failed on outputs {describe(outputs)} and targets "
                f"{describe(targets)}: {str(error).rstrip('.')}",
                f"{advice} or forward=",
            ) from error

    def _call(self, inputs: Any) -> Any:
        """Return the outputs of ``model(inputs)``.

        An error mentions ``forward=``, where another way to call the model may help.
        """
        try:
            return self._model(inputs)
        except PASSED_ON:
            raise
        except OF_A_CALL as error:
            try:
                inspect.signature(self._model.forward).bind(inputs)
                strange = isinstance(inputs, Mapping | tuple | list)
            except TypeError:
                strange = True
            if strange or isinstance(error, NotImplementedError):
                raise BatchError(
                    f"the model failed when it was called as model(inputs), on inputs "
                    f"{describe(inputs)}: {str(error).rstrip('.')}",
                    f"for a model that is called otherwise {_PASS_FORWARD}",
                ) from error
            # Raise the network's own error, with a hint below it.
            if sys.version_info >= (3, 11):
                error.add_note(
                    f"raised by model(inputs) on inputs {describe(inputs)}; for a "
                    f"model that is called otherwise {_PASS_FORWARD}"
                )
            raise

    def _of_forward(self, forward: Forward, batch: Any, temperature: float) -> Any:
        """Return the loss of a batch by ``forward``, with the outputs divided."""
        if temperature != 1.0 and self._outlets:
            rewind = self._remember()
            inside = [
                module
                for module in self._model.modules()
                if module is not self._model
                and not is_scripted(module)
                and any(True for _ in module.parameters())
            ]
            for outlets in (self._outlets, inside):
                dividing = Dividing(outlets, temperature)
                with dividing:
                    loss = forward(self._model, self._feed.moved(batch))
                reason = dividing.failure(loss)
                if not reason:
                    self._outlets = outlets
                    return loss
                rewind()
                if dividing.calls:
                    break
            self._outlets = ()
            self._warn_of(temperature, reason)
        return forward(self._model, self._feed.moved(batch))

    def _warn_of(self, temperature: float, reason: str) -> None:
        problem = (
            f"the temperature of {temperature:g} was not used: {reason}. Divide the "
            "outputs yourself before the loss, in forward=, and pass a subclass of "
            "GraSP whose temperature is 1"
        )
        if problem not in self.problems:
            self.problems.append(problem)
