"""Make a pruning permanent: plain parameters again, whose zeros stay 0 in training."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from force_plugin.masks import forget_readers
from force_plugin.parameters import named_parameters
from force_plugin.snapshot import restored


def make_permanent(model: nn.Module, hold_zeros: bool = True) -> None:
    """Turn a pruned model into a plain one with the pruned weights at 0, in place.

    Mirrors :func:`torch.nn.utils.prune.remove` for every pruned tensor of a model.
    Afterwards it has the dense model's own parameters and state-dict keys, nothing is
    left to do in its forward pass, and an optimizer that was made before goes on with
    the same parameters.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`.
        hold_zeros: Set the pruned weights back to 0 after every step of any
            :class:`torch.optim.Optimizer`, at the cost of one byte a weight. A copy or
            an unpickled model holds its own. ``False``: they are trained as all others.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is pruned in it; it is unchanged.
    """
    weights = [w for w in named_parameters(model).values() if w.mask is not None]
    if not weights:
        raise ValueError(
            "make_permanent: expected a model pruned with torch.nn.utils.prune, got "
            "one without any mask"
        )
    owners = [(module, name) for weight in weights for module, name in weight.owners]
    with restored(model.modules(), only_on_error=True):
        for module, name in owners:
            if prune.is_pruned(module) and f"{name}_mask" in module._buffers:
                prune.remove(module, name)  # type: ignore[no-untyped-call]
        forget_readers(model)
        if hold_zeros:
            for weight in weights:
                assert weight.mask is not None
                module, name = weight.owners[0]
                held = vars(module).setdefault("_held_zeros", {})
                held[name] = _Zeros(weight.dense, ~weight.mask)


class _Zeros:
    """Pruned entries of a parameter; they are 0 after any optimizer's step.

    A module keeps it among its attributes, so that it lives, is copied and pickled with
    the module.

    Args:
        parameter: The parameter.
        pruned: Bool tensor of its shape, True = pruned.
    """

    def __init__(self, parameter: nn.Parameter, pruned: Tensor) -> None:
        self.parameter = parameter
        self.pruned = pruned
        _held[id(parameter)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Zeros:
        # The copied module's own parameter is in the memo, or will be.
        return _Zeros(deepcopy(self.parameter, memo), self.pruned.clone())

    def __reduce__(self) -> tuple[type[_Zeros], tuple[nn.Parameter, Tensor]]:
        return _Zeros, (self.parameter, self.pruned)

    def restore(self) -> None:
        self.pruned = self.pruned.to(self.parameter.device)
        self.parameter.masked_fill_(self.pruned, 0)


# An entry goes when its module goes; till then it keeps the parameter, and its id.
_held: WeakValueDictionary[int, _Zeros] = WeakValueDictionary()


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups if _held else ():
        for parameter in group["params"]:
            zeros = _held.get(id(parameter))
            if zeros is not None:
                zeros.restore()


register_optimizer_step_post_hook(_after_step)
