"""What still leads from a network's inputs to its outputs, and which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Flow(NamedTuple):
    """What the outputs of a model depend on.

    Attributes:
        connected: Whether on its inputs; ``None`` where nothing of this kind enters the
            model, or nothing leaves it.
        gradients: Of a weighted sum of the outputs, with respect to each of the weights
            that were asked for; ``None`` where they do not depend on it.
    """

    connected: bool | None
    gradients: Sequence[Tensor | None]


def find_flow(
    model: nn.Module, run: Callable[[], object], weights: Sequence[Tensor] = ()
) -> Flow:
    """What the outputs of a model depend on, when it is called.

    On its inputs if a gradient that is not exactly 0 reaches a floating-point tensor
    among the arguments that the model is called with. Integers have no gradient: what
    counts for them is the output of modules without children that are called with
    nothing else, such as :class:`torch.nn.Embedding`, in the columns in which it is not
    the same for all.

    Args:
        model: Any module.
        run: Calls the model, once or several times, in any way.
        weights: Leaves of its graph.
    """
    leaves: list[Tensor] = []
    looked_up: list[Tensor] = []
    integers: set[int] = set()
    outputs: list[Tensor] = []

    def leaf(tensor: Tensor, kind: list[Tensor]) -> Tensor:
        kind.append(tensor.detach().clone().requires_grad_())
        return kind[-1].clone()  # a network may write to its inputs

    def enter(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return leaf(tensor, leaves)
        integers.add(tensor.untyped_storage().data_ptr())
        return tensor

    def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _map(enter, args), _map(enter, kwargs)

    def look_up(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        taken = list(tensors((args, kwargs)))
        outside = {tensor.untyped_storage().data_ptr() for tensor in taken} & integers
        if not outside or any(tensor.is_floating_point() for tensor in taken):
            return output
        if isinstance(output, Tensor) and output.requires_grad:
            return leaf(output, looked_up)
        return output

    def end(module: nn.Module, args: Any, output: Any) -> None:
        outputs.extend(
            torch.view_as_real(tensor) if tensor.is_complex() else tensor
            for tensor in tensors(output)
            if tensor.requires_grad
        )

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        *(
            module.register_forward_hook(look_up, with_kwargs=True)
            for module in model.modules()
            if next(module.children(), None) is None
        ),
        model.register_forward_hook(end),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    entries = leaves + looked_up
    if not outputs or not entries:
        return Flow(None, [None] * len(weights))
    # A plain sum would have no gradient behind a softmax or a normalisation.
    weighted = [
        (o * torch.arange(o.numel(), device=o.device).cos().view_as(o)).sum()
        for o in outputs
    ]
    found = torch.autograd.grad(weighted, [*weights, *entries], allow_unused=True)
    of_weights, gradients = found[: len(weights)], found[len(weights) :]
    reached = [g is not None and bool(g.any()) for g in gradients[: len(leaves)]]
    for place, gradient in zip(looked_up, gradients[len(leaves) :], strict=True):
        if gradient is not None:
            rows = place.flatten(0, -2)
            differing = (rows != rows[0]).any(0)
            reached.append(bool(gradient.flatten(0, -2)[:, differing].any()))
    return Flow(any(reached), of_weights)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    return value
