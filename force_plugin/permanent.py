"""Make a pruning permanent: plain parameters again, whose zeros stay 0 in training."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from force_plugin.parameters import mask_of, named_parameters
from force_plugin.reparametrisation import forget_readers
from force_plugin.snapshot import snapshot


def make_permanent(model: nn.Module, hold_zeros: bool = True) -> None:
    """Turn a pruned model into a plain one with the pruned weights at 0, in place.

    Mirrors :func:`torch.nn.utils.prune.remove` for every pruned tensor of a model.
    Afterwards it has the dense model's own parameters, where they were in memory, and
    its state-dict keys, nothing is left to do in its forward pass, and an optimizer
    that was made before goes on with the same parameters. A weight that several modules
    share loses what any of them has pruned. If anything fails, Ctrl-C included, the
    model is bit for bit what it was; for that, the pruned parameters are held twice
    meanwhile.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`.
        hold_zeros: Set the pruned weights back to 0 after every step of any
            :class:`torch.optim.Optimizer`, at the cost of one byte a weight. Their
            gradients are computed all the same, and count where norms are taken
            (clipping, LAMB). A copy or an unpickled model holds its own; parameters
            that take the place of others (``load_state_dict(assign=True)``) are not
            held. A wrapper that writes parameters after the step of the optimizer
            inside, as timm's Lookahead does, is to be made afterwards. ``False``: they
            are trained as all others, but for those that an earlier call holds.

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
    with ExitStack() as undo:
        undo.callback(snapshot(model.modules()))
        undo.callback(_held.update, dict(_held))
        undo.callback(_held.clear)
        for weight in weights:
            # Written where they are: prune.remove lets go of memory that others may
            # share, and of channels_last.
            values = weight.dense.data
            undo.callback(values.copy_, values.clone())
            undo.callback(setattr, weight.dense, "data", values)
            pruned = torch.zeros_like(values, dtype=torch.bool)
            for module, name in weight.owners:
                mask = mask_of(module, name)
                if mask is not None:
                    pruned |= mask == 0
                    prune.remove(module, name)  # type: ignore[no-untyped-call]
            # Its products are -0 where a weight was negative, NaN where it was inf.
            weight.dense.data = values.copy_(weight.dense.data).masked_fill_(pruned, 0)
            if hold_zeros:
                earlier = _held.get(id(weight.dense))
                if earlier is not None:
                    pruned |= earlier.pruned.to(pruned.device)
                zeros = _Zeros(weight.dense, pruned)
                for module, name in weight.owners:
                    vars(module).setdefault("_held_zeros", {})[name] = zeros
        forget_readers(model)
        undo.pop_all()


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
