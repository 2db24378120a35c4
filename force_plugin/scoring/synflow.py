"""SynFlow's measurement of a network of absolute values with an input of ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from force_plugin.data.containers import describe, is_pair, tensors
from force_plugin.errors import BatchError, NoGradientError
from force_plugin.model.registered import own_buffers, own_parameters
from force_plugin.model.reparametrisation import show_all
from force_plugin.model.restoring import restored
from force_plugin.model.torch_internals import put_buffer, put_parameter
from force_plugin.model.weights import is_scripted
from force_plugin.parallel.shards import Shards
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.gradients import Sums
from force_plugin.scoring.loss import OF_A_CALL, PASSED_ON
from force_plugin.scoring.open_gates import Opening
from force_plugin.scoring.stand_ins import StandIns


class SynapticFlow:
    """Gradients of the synaptic flow of a network.

    Args:
        model: The network.
        stand_ins: The stand-ins of its parameters. Twins replace them for a pass.
        opening: Opens the gates of the network.
        feed: Reads a batch, for the shape of an input.
        shards: The division of parameters among the processes.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        stand_ins: StandIns,
        opening: Opening,
        feed: Feed,
        shards: Shards,
    ) -> None:
        self._model = model
        self._stand_ins = stand_ins
        self._opening = opening
        self._feed = feed
        self._shards = shards
        self._input_shape: tuple[int, ...] | None = None
        # Parameters with the absolute values of stand-ins, by the stand-in's identity.
        self._twins: dict[int, nn.Parameter] = {}

    def close(self) -> None:
        """Free the twins."""
        self._twins.clear()

    def gradients(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """Return ``|∂R/∂θ|`` at ``|θ ⊙ c|``, where R is the sum of the outputs.

        Args:
            step: Number of the step, for a message.
            device: The device of the network.

        Raises:
            BatchError: The inputs are no floating-point tensor, the outputs hold no
                floating-point tensor, or the model fails on the input of ones.
            ValueError: A part of the model is TorchScript.
            NoGradientError: A weight, or every weight, got no gradient.
        """
        modules = self._model.named_modules()
        if scripted := [name for name, module in modules if is_scripted(module)]:
            raise ValueError(
                "SynFlow: expected a model whose values can all be replaced by their "
                f"magnitudes, got one with a part in TorchScript ({scripted[0]}); take "
                "another method"
            )
        if self._input_shape is None:
            self._input_shape = self._read_shape(step)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        ones = torch.ones(self._input_shape, dtype=dtype, device=device)

        def measure() -> tuple[Tensor, Mapping[str, Tensor]]:
            twins = self._make_positive(dtype)
            return self._flow(ones), twins

        with restored(self._model.modules()):
            flow, twins = self._opening.revealed(measure, self._stand_ins)
            totals = Sums({name: twins[name] for name in self._stand_ins.weights})
            totals.add_gradients(flow)
        return totals.complete(
            self._shards,
            step,
            "the outputs do not depend on it",
            "leave it out with parameters=, or take another method",
        )

    def _read_shape(self, step: int) -> tuple[int, ...]:
        """Return the shape of a batch with a single sample."""
        batch = next(self._feed.batches(step, count=1))
        inputs = batch[0] if is_pair(batch) else batch
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise BatchError(
                "SynFlow: expected batches (inputs, targets) or inputs, one "
                "floating-point tensor that ones can take the place of, got "
                f"{describe(inputs)}",
                "take another method for other inputs",
            )
        return (1, *inputs.shape[1:])

    def _flow(self, ones: Tensor) -> Tensor:
        """Return the sum of the outputs for an input of ones."""
        with torch.autocast(ones.device.type, enabled=False):
            try:
                outputs = self._model(ones.clone())
            except PASSED_ON:
                raise
            except OF_A_CALL as error:
                raise BatchError(
                    f"SynFlow: the model fails on {describe(ones)}, one input of ones: "
                    f"{str(error).rstrip('.')}",
                    "SynFlow calls model(inputs) with one tensor, in float64, and has "
                    "no use for forward=: leave casts such as .float() out of the "
                    "model's forward, or take another method",
                ) from error
        flow = [
            output.sum()
            for output in tensors(outputs)
            if output.is_floating_point() or output.is_complex()
        ]
        if not flow:
            raise BatchError(
                "SynFlow: expected a model whose outputs are tensors, got "
                f"{describe(outputs)}",
                "take another method for other outputs",
            )
        total = reduce(torch.add, flow)
        if not total.requires_grad:
            raise NoGradientError(
                "SynFlow: expected outputs that depend on the weights through "
                f"autograd, got {describe(outputs)} without a gradient",
                "return them without detach or no_grad",
            )
        return total

    def _make_positive(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Put absolute values in all parameters and buffers; return the parameters."""
        buffers: dict[int, Tensor] = {}
        for module in self._model.modules():
            module.training = False
            for key, buffer in own_buffers(module).items():
                if id(buffer) not in buffers:
                    buffers[id(buffer)] = _positive(buffer, dtype)
                put_buffer(module, key, buffers[id(buffer)])
            for key, parameter in own_parameters(module).items():
                put_parameter(module, key, self._twin(parameter, dtype))
        show_all(self._model)
        leaves = self._stand_ins.leaves
        return {name: self._twins[id(leaf)] for name, leaf in leaves.items()}

    def _twin(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if id(parameter) not in self._twins:
            values = _positive(parameter, dtype)
            made = nn.Parameter(values, parameter.requires_grad)
            self._twins[id(parameter)] = made
            return made
        # Twins are reused. Making them at each step would be most of the step's cost.
        kept = self._twins[id(parameter)]
        kept.requires_grad_(parameter.requires_grad)
        kept.data.copy_(parameter)
        if kept.is_floating_point():
            kept.data.abs_()
        return kept


def _positive(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    return tensor.detach().to(dtype, copy=True).abs_()
