"""Undoing of a method's writes to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from force_plugin.errors import MethodError
from force_plugin.model.module_names import name_some
from force_plugin.model.restoring import Kept
from force_plugin.model.weights import Weight, local_values
from force_plugin.scoring.stand_ins import StandIns


@contextmanager
def protected(
    by: str,
    parameters: Mapping[str, Weight],
    buffers: Mapping[str, Tensor],
    stand_ins: StandIns,
    opened: Mapping[str, object],
    masks: Mapping[str, Tensor] | None,
) -> Iterator[None]:
    """Undo a method's writes to a model's own values, or to masks.

    A method may write to stand-ins. They get their values back without an error.

    Args:
        by: Name of the method's function, for the message.
        parameters: All parameters of the model, by name.
        buffers: The model's own buffers, by name.
        stand_ins: The stand-ins of parameters and buffers, and the values of scored
            weights.
        opened: Names of the opened gates.
        masks: The masks of the present measurement, if any.

    Raises:
        MethodError: The method has written to a value or to a mask.
    """
    kept = _kept(parameters, buffers, stand_ins, opened, masks)
    flags = {
        name: (weight.dense.requires_grad, weight.dense.grad)
        for name, weight in parameters.items()
    }
    weights, written = stand_ins.weights, []
    try:
        yield
    finally:
        written += [name for name, one in kept.items() if one.put_back()]
        for name, (trained, gradient) in flags.items():
            dense = parameters[name].dense
            if dense.requires_grad != trained or dense.grad is not gradient:
                dense.requires_grad_(trained).grad = gradient
                written.append(name)
        for name in weights.keys() - opened.keys():
            own, now = parameters[name].local, weights[name]
            if (now.data_ptr(), now.shape) != (own.data_ptr(), own.shape):
                weights[name] = own
                written.append(name)
        stand_ins.fill(opened)
        stand_ins.mask(masks)
    if written:
        raise MethodError(
            f"{by} has written into {name_some(written)}, which are there to read",
            "work out of place, or on a .clone(); only what it returns is used",
        )


def _kept(
    parameters: Mapping[str, Weight],
    buffers: Mapping[str, Tensor],
    stand_ins: StandIns,
    opened: Mapping[str, object],
    masks: Mapping[str, Tensor] | None,
) -> dict[str, Kept]:
    """Return copies of all tensors that a method may reach, by names for a message."""
    found: dict[str, Tensor | None] = {
        name: local_values(weight.dense) for name, weight in parameters.items()
    }
    found |= buffers
    found |= {n: w for n, w in stand_ins.weights.items() if n in opened}
    found |= {f"the mask of {n}": mask for n, mask in (masks or {}).items()}
    found |= {f"the gradient of {n}": w.dense.grad for n, w in parameters.items()}
    return {
        name: Kept(tensor)
        for name, tensor in found.items()
        if isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter)
        if tensor.layout == torch.strided and not tensor.is_meta
    }
