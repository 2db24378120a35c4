"""Example inputs of a model, random variations of them, and the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from force_plugin.data.containers import count_samples, describe, mapped, tensors
from force_plugin.model.restoring import restored

TOLERANCE = 1e-10
"""The largest allowed error of outputs in float64, as a share of the largest output."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Return a model's outputs for a tensor, a tuple of arguments or a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    several = isinstance(inputs, tuple | list) and not isinstance(
        inputs, PackedSequence
    )
    return model(*inputs) if several else model(inputs)


def checked_inputs(model: nn.Module, inputs: Any, argument: str) -> Any:
    """Return inputs on the model's device, floating-point tensors in the model's type.

    Raises:
        TypeError: There is no tensor among the inputs.
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
    """Return a tensor in double precision if it is floating-point, else unchanged."""
    return tensor.double() if tensor.is_floating_point() else tensor


def many_samples(inputs: Any, most: int = 32) -> Any:
    """Repeat the samples of inputs, so that each unit is non-zero for a sample.

    Returns:
        At least two samples and at most ``most``, fewer for large samples.
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


_VALUES = 2**15  # large samples: the positions of an image count like samples


def jittered(tensor: Tensor) -> Tensor:
    """Return a tensor with added noise, or with shuffled integers.

    The noise makes all samples different.
    """
    if tensor.is_floating_point():
        return tensor + torch.randn_like(tensor)
    return shuffled(tensor)


def shuffled(tensor: Tensor) -> Tensor:
    """Return integers drawn from the tensor's own values, as others may be invalid."""
    if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
        return tensor
    places = torch.randint(tensor.numel(), tensor.shape, device=tensor.device)
    return tensor.flatten()[places]


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the floating-point outputs of a model, which runs on a copy of inputs."""
    with torch.no_grad(), restored(model.modules()):
        found = tensors(call(model, mapped(torch.clone, inputs)))
        return [o.clone() for o in found if o.is_floating_point()]


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two outputs, as a share of ``other``'s largest.

    A share is needed: in evaluation mode, a network at its initialisation may have
    outputs of 1e-20.
    """
    if not one.numel():
        return 0.0
    off = (one - other).abs().masked_fill(one == other, 0)  # equal infinities
    finite = other.masked_fill(~other.isfinite(), 0)
    return float(off.max()) / max(float(finite.abs().max()), _SMALLEST)


_SMALLEST = 1e-290  # float64 has too few digits below this value for TOLERANCE
