"""Connectivity: whether a network's outputs depend on its inputs and on its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from force_plugin.data.containers import mapped, tensors
from force_plugin.model.weights import is_scripted


class Flow(NamedTuple):
    """The dependence of a model's outputs on its inputs and weights.

    Attributes:
        connected: Whether the outputs depend on the inputs; ``None`` if no input or no
            output was found that a gradient can tell of.
        gradients: Gradients of a weighted sum of the outputs with respect to each given
            weight; ``None`` for a weight that the outputs do not depend on.
    """

    connected: bool | None
    gradients: Sequence[Tensor | None]


def find_flow(
    model: nn.Module, run: Callable[[], object], weights: Sequence[Tensor] = ()
) -> Flow:
    """Run a model, and return what its outputs depend on.

    The outputs depend on the inputs if a gradient that is not exactly 0 reaches a
    floating-point tensor among the arguments of the model. Integers have no gradient.
    Instead the gradient has to reach the output of a module without children that is
    called with integers alone, such as :class:`torch.nn.Embedding`. Columns in which
    all rows of this output are equal do not count.

    If only modules inside the model are called, as by a ``training_step``, the inputs
    are the arguments of the outermost calls. The outputs are then the result of the
    last outermost call.

    Args:
        model: Any module.
        run: Calls the model, once or several times, in any way. Tensors that it returns
            (a loss) are outputs too.
        weights: Leaves of the model's graph.
    """
    watched = _Calls()
    outputs = watched.of([model], run)
    if not watched.entries:
        outputs = watched.of([*model.modules()], run)
    if not outputs or not watched.entries:
        return Flow(None, [None] * len(weights))
    # The gradient of a plain sum would vanish behind a softmax or a normalisation.
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
    """Records the inputs and outputs of modules during a run.

    Attributes:
        leaves: Zeros that were added to floating-point inputs, to get their gradients.
        zeros: Zeros that were added to outputs that were looked up by integers.
        looked_up: These outputs, without the zeros.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.looked_up: list[Tensor] = []
        self._integers: set[int] = set()  # memory addresses of integer inputs

    @property
    def entries(self) -> list[Tensor]:
        return self.leaves + self.zeros

    def of(
        self, modules: Sequence[nn.Module], run: Callable[[], object]
    ) -> list[Tensor]:
        """Run, and return the outputs of the outermost calls of some modules.

        Of several modules, only the last outermost call counts.
        """
        outputs: list[Tensor] = []
        modules = [module for module in modules if not is_scripted(module)]
        depth = 0

        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            # A loss takes targets, and has no parameters. Its arguments are no inputs.
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
            return tensor  # the output of another module
        return _joined_by_zeros(tensor, self.leaves)

    def _look_up(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        taken = list(tensors((args, kwargs)))
        outside = {t.untyped_storage().data_ptr() for t in taken} & self._integers
        if not outside or any(tensor.is_floating_point() for tensor in taken):
            return output
        # A frozen embedding counts too: it has parameters, but its output needs no
        # gradient. A mask made of integers does not count.
        learnt = next(module.parameters(), None) is not None
        if not isinstance(output, Tensor) or not (learnt or output.requires_grad):
            return output
        if not output.is_floating_point():
            return output
        self.looked_up.append(output.detach())
        return _joined_by_zeros(output, self.zeros)


def responds(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether the outputs of a model change if its samples change places.

    This serves for inputs that no gradient tells of. Such inputs are integers from
    which the model computes other integers, and integers that a frozen embedding looks
    up beside floating-point inputs.

    Args:
        model: Any module, in evaluation mode.
        run: Calls the model with several samples, in the first dimension.
    """
    seen: list[list[Tensor]] = []

    def begin(shift: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def move(tensor: Tensor) -> Tensor:
            if not tensor.dim():
                return tensor
            # empty_like keeps the strides.
            return torch.empty_like(tensor).copy_(tensor.roll(shift, 0))

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
    """Whether tensors differ by more than the rounding of sums in another order."""
    if one.shape != other.shape or not one.is_floating_point() or not one.numel():
        return False
    rounding = min(1000 * torch.finfo(one.dtype).eps, 0.05)  # 0.05: 6 eps of bfloat16
    return bool(((one - other).abs() > rounding * one.abs().max()).any())


def _joined_by_zeros(tensor: Tensor, kind: list[Tensor]) -> Tensor:
    """Return a copy of a tensor plus new zeros, which are leaves of the copy's graph.

    A network may write to the copy.
    """
    kind.append(torch.zeros_like(tensor).requires_grad_())
    return tensor.clone().add_(kind[-1])  # unlike a plain sum, this keeps the strides


def _differentiable(value: Any) -> Iterator[Tensor]:
    for tensor in tensors(value):
        if tensor.requires_grad:
            yield torch.view_as_real(tensor) if tensor.is_complex() else tensor
