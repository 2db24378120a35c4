"""What a model is called with as an example, other values of it, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from force_plugin.data.containers import count_samples, describe, mapped, tensors
from force_plugin.model.restoring import restored

TOLERANCE = 1e-10
"""How far outputs may be off, in float64, as a share of the largest of them."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Outputs of a model for a tensor, a tuple of arguments or a mapping of them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    several = isinstance(inputs, tuple | list) and not isinstance(
        inputs, PackedSequence
    )
    return model(*inputs) if several else model(inputs)


def checked_inputs(model: nn.Module, inputs: Any, argument: str) -> Any:
    """Inputs where the model is, floating-point ones in its own type.

    Raises:
        TypeError: There is no tensor among them.
    """
    own = next(model.parameters(), torch.empty(0))
    if not any(True for _ in tensors(inputs)):
        raise TypeError(
            f"{argument}: expected what the model is called with, a tensor, a tuple of "
            f"arguments or a mapping of them, got {describe(inputs)}"
        )
    return mapped(
        lambda t: (
            t.to(own.device, own.dtype) if t.is_floating_point() else t.to(own.device)
        ),
        inputs,
    )


def in_float64(tensor: Tensor) -> Tensor:
    """A floating-point tensor in double precision, another as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


def many_samples(inputs: Any, most: int = 32) -> Any:
    """The same inputs again and again, so that each unit is awake in one of them.

    Returns:
        As many samples as are not too large, two at least.
    """
    samples = count_samples(inputs)
    if not samples:
        return inputs
    largest = max(tensor.numel() for tensor in tensors(inputs)) // samples
    wanted = max(2, min(most, _VALUES // max(largest, 1)))
    places = torch.arange(max(wanted, min(samples, 2))) % samples
    return mapped(
        lambda t: t[places.to(t.device)] if t.shape[:1] == (samples,) else t, inputs
    )


_VALUES = 2**15  # an image has many positions, which are as good as samples


def jittered(tensor: Tensor) -> Tensor:
    """Other values, so that no two samples are the same: noise, or other integers."""
    if tensor.is_floating_point():
        return tensor + torch.randn_like(tensor)
    return shuffled(tensor)


def shuffled(tensor: Tensor) -> Tensor:
    """Integers drawn from those of a tensor: others may not be allowed."""
    if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
        return tensor
    places = torch.randint(tensor.numel(), tensor.shape, device=tensor.device)
    return tensor.flatten()[places]


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Floating-point outputs of a model for inputs that it may write to."""
    with torch.no_grad(), restored(model.modules()):
        found = tensors(call(model, mapped(torch.clone, inputs)))
        return [o.clone() for o in found if o.is_floating_point()]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two outputs, as a share of the largest of the other.

    A network at its initialisation may well have outputs of 1e-20 in evaluation mode.
    """
    if not one.numel():
        return 0.0
    off = (one - other).abs().masked_fill(one == other, 0)  # infinities may be meant
    finite = other.masked_fill(~other.isfinite(), 0)
    return float(off.max()) / max(float(finite.abs().max()), _SMALLEST)


_SMALLEST = 1e-290  # below, even float64 has fewer digits than TOLERANCE asks for
