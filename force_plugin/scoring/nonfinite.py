"""Causes of NaN and infinite numbers, and advice against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from force_plugin.data.containers import tensors
from force_plugin.model.module_names import name_some
from force_plugin.model.weights import Weight


class Causes:
    """Finds the cause if a loss or a score of a network is NaN or infinite.

    Args:
        model: The network.
        parameters: All parameters of the network, by name.
        autocast: The autocast type of the passes; ``None``: the caller's own.
        device: The device of the network.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        parameters: Mapping[str, Weight],
        autocast: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._parameters = parameters
        # The model's own buffers. A pass writes to their stand-ins only.
        self._buffers = dict(model.named_buffers())
        self._autocast = autocast
        self._device = device.type

    def of_loss(
        self, batch: Any, is_nan: bool, masks: Mapping[str, Tensor]
    ) -> tuple[str, str]:
        """Return the cause of a loss that is not finite, and advice.

        Args:
            batch: The batch.
            is_nan: Whether the loss is NaN, and not infinite.
            masks: Masks of the pruned network; empty: not pruned, or sharded.
        """
        if broken := self.broken():
            advice = "look at the initialisation, or where these values come from"
            return f"there is a NaN or inf in {name_some(broken)}", advice
        if without := _without_norm(masks):
            return (
                f"a channel of {name_some(without)} has lost every weight, and "
                "weight_norm divides by its norm, which is 0",
                "take fewer steps or a lower sparsity, remove the weight norm before "
                "pruning, or leave these out with parameters=",
            )
        numbers = [t for t in tensors(batch) if t.is_floating_point()]
        if any(bool(t.isnan().any()) for t in numbers):
            return "there is a NaN in the batch", "look at the data"
        cause = f"an overflow in the network or in the loss, in {self.precision}"
        if is_nan:
            kinds = "0 divided by 0, the root or logarithm of a negative number"
            cause = f"an undefined result ({kinds}) or {cause}"
        advice = f"look at the initialisation and the loss{self.wider()}"
        if any(bool(t.isinf().any()) for t in numbers):
            cause = f"there is an inf in the batch, or {cause}"
            advice = advice.replace("look at ", "look at the data, ", 1)
        return cause, advice

    def broken(self) -> list[str]:
        """Return names of parameters that are not finite, and of buffers with NaN.

        A buffer with inf is an attention mask as a rule, and is not returned. Sparse
        tensors are left out, as PyTorch cannot check them.
        """
        infinite = [
            name
            for name, value in self._model.named_parameters()
            if value.layout == torch.strided and not value.isfinite().all()
        ]
        return infinite + [
            name
            for name, value in self._buffers.items()
            if value.layout == torch.strided and value.isnan().any()
        ]

    @property
    def precision(self) -> str:
        """The narrowest floating-point type of the passes."""
        if self._autocast is not None:
            return str(self._autocast).removeprefix("torch.")
        if torch.is_autocast_enabled(self._device):
            return str(torch.get_autocast_dtype(self._device)).removeprefix("torch.")
        weights = (w.dense for w in self._parameters.values())
        types = {w.dtype for w in weights if w.is_floating_point()}
        return str(min(types, key=lambda t: t.itemsize)).removeprefix("torch.")

    def wider(self) -> str:
        """Return advice against an overflow: a wider type, if there is one."""
        if self._autocast is not None or torch.is_autocast_enabled(self._device):
            return ", or score without autocast"
        if self.precision == "float64" or self._device == "mps":
            return ""
        if self.precision == "float32":
            return ", or score in float64 (model.double(), with batches in float64)"
        return ", or score in float32 instead of 16 bits"


def _without_norm(masks: Mapping[str, Tensor]) -> list[str]:
    """Return names of weight_norm directions that have a channel without any weight."""
    return [
        name
        for name, mask in masks.items()
        if name.endswith(("_v", ".original1"))
        if mask.dim() > 1 and not mask.flatten(1).any(1).all()
    ]
