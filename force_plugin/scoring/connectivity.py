"""What still leads from a network's inputs to its outputs, and which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from force_plugin.data.containers import mapped, tensors
from force_plugin.model.weights import is_scripted


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
    the same for all. Where only modules within the model are called, as by a
    ``training_step``, the inputs are those of the outermost ones, and the outputs
    those of the last.

    Args:
        model: Any module.
        run: Calls the model, once or several times, in any way. Tensors that it returns
            (a loss) are outputs, too.
        weights: Leaves of its graph.
    """
    watched = _Calls()
    outputs = watched.of([model], run)
    if not watched.entries:
        outputs = watched.of([*model.modules()], run)
    if not outputs or not watched.entries:
        return Flow(None, [None] * len(weights))
    # A plain sum would have no gradient behind a softmax or a normalisation.
    weighted = [
        (o * torch.arange(o.numel(), device=o.device).cos().view_as(o)).sum()
        for o in outputs
    ]
    found = torch.autograd.grad(
        weighted, [*weights, *watched.entries], allow_unused=True
    )
    of_weights, gradients = found[: len(weights)], found[len(weights) :]
    count = len(watched.leaves)
    reached = [g is not None and bool(g.any()) for g in gradients[:count]]
    for place, gradient in zip(watched.looked_up, gradients[count:], strict=True):
        if gradient is not None:
            rows = place.flatten(0, -2)
            differing = (rows != rows[0]).any(0)
            reached.append(bool(gradient.flatten(0, -2)[:, differing].any()))
    return Flow(any(reached), of_weights)


class _Calls:
    """What enters and leaves modules while something runs.

    Attributes:
        leaves: Zeros that were added to what entered, so that gradients end there, too.
        zeros: Zeros that were added to what was looked up by integers.
        looked_up: What these were added to.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.looked_up: list[Tensor] = []
        self._integers: set[int] = set()  # where those lie that entered

    @property
    def entries(self) -> list[Tensor]:
        return self.leaves + self.zeros

    def of(
        self, modules: Sequence[nn.Module], run: Callable[[], object]
    ) -> list[Tensor]:
        """Run, and return the outputs of the last of these that no other one called."""
        outputs: list[Tensor] = []
        modules = [module for module in modules if not is_scripted(module)]
        depth = 0

        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            # What takes targets has none: a loss is no entrance.
            entrance = module is modules[0] or any(True for _ in module.parameters())
            if depth > 1 or not entrance:
                return None
            first = not self.leaves
            enter = partial(self._enter, first=first)
            return mapped(enter, args), mapped(enter, kwargs)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0 and len(modules) > 1:
                outputs.clear()
            if depth == 0:
                outputs.extend(_differentiable(output))

        leaves = [
            module
            for module in {m for top in modules for m in top.modules()}
            if next(module.children(), None) is None and not is_scripted(module)
        ]
        handles = []
        for module in modules:
            handle = module.register_forward_pre_hook(begin, with_kwargs=True)
            handles.append(handle)
        for module in leaves:
            handle = module.register_forward_hook(self._look_up, with_kwargs=True)
            handles.append(handle)
        for module in modules:
            handle = module.register_forward_hook(end, always_call=True)
            handles.append(handle)
        try:
            returned = run()
        finally:
            for handle in handles:
                handle.remove()
        return [*outputs, *_differentiable(returned)]

    def _enter(self, tensor: Tensor, first: bool) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            self._integers.add(tensor.untyped_storage().data_ptr())
            return tensor
        if tensor.grad_fn is not None and not first:
            return tensor  # the output of another one
        return _joined_by_zeros(tensor, self.leaves)

    def _look_up(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        taken = list(tensors((args, kwargs)))
        outside = {t.untyped_storage().data_ptr() for t in taken} & self._integers
        if not outside or any(tensor.is_floating_point() for tensor in taken):
            return output
        # The rows of a frozen embedding need no gradients; a mask has no rows.
        learnt = next(module.parameters(), None) is not None
        if not isinstance(output, Tensor) or not (learnt or output.requires_grad):
            return output
        if not output.is_floating_point():
            return output
        self.looked_up.append(output.detach())
        return _joined_by_zeros(output, self.zeros)


def responds(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether a model has other outputs where samples have changed their places.

    For inputs that no gradient tells of: integers that the model makes others of, or
    that a frozen embedding looks up beside floating-point inputs.

    Args:
        model: Any module, in evaluation mode.
        run: Calls the model with several samples, in the first dimension.
    """
    seen: list[list[Tensor]] = []

    def begin(shift: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def move(tensor: Tensor) -> Tensor:
            if not tensor.dim():
                return tensor
            return torch.empty_like(tensor).copy_(tensor.roll(shift, 0))  # its strides

        return mapped(move, args), mapped(move, kwargs)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seen[-1].extend(tensors(output))

    for shift in (0, 1):
        seen.append([])
        enter = model.register_forward_pre_hook(partial(begin, shift), with_kwargs=True)
        leave = model.register_forward_hook(end)
        try:
            with torch.no_grad():
                run()
        finally:
            enter.remove()
            leave.remove()
    return any(_differ(*pair) for pair in zip(*seen, strict=False))


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than the rounding of sums in another order."""
    if one.shape != other.shape or not one.is_floating_point() or not one.numel():
        return False
    rounding = min(1000 * torch.finfo(one.dtype).eps, 0.05)  # of bfloat16: 6 steps
    return bool(((one - other).abs() > rounding * one.abs().max()).any())


def _joined_by_zeros(tensor: Tensor, kind: list[Tensor]) -> Tensor:
    """The same values, also as a function of zeros; a network may write to them."""
    kind.append(torch.zeros_like(tensor).requires_grad_())
    return tensor.clone().add_(kind[-1])  # a sum would choose strides of its own


def _differentiable(value: Any) -> Iterator[Tensor]:
    for tensor in tensors(value):
        if tensor.requires_grad:
            yield torch.view_as_real(tensor) if tensor.is_complex() else tensor
