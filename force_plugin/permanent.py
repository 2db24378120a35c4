"""Make a pruning permanent: plain parameters again, whose zeros stay 0 in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from force_plugin.distributed import Ranks
from force_plugin.parameters import (
    HELD,
    Weight,
    is_sharded,
    mask_of,
    named_parameters,
    parameter_key,
    part_of,
)
from force_plugin.reparametrisation import remove
from force_plugin.sharding import Parts, shard_like
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

    Training goes on from a checkpoint of such a model in a dense one, with this call
    once more: where no mask is found, the zeros of the weights are the masks.

        model.load_state_dict(checkpoint)
        make_permanent(model)

    On a model that ``fully_shard`` has sharded every rank must call it.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`; or, with
            ``hold_zeros``, one without masks that has weights of 0 in a convolution or
            linear layer that has others too. Then those of all these layers are held.
        hold_zeros: Keep the pruned weights at 0, at the cost of one byte a weight:
            their gradients are 0, as under a mask, and whatever an optimizer makes of
            them (momentum from before, Muon) is undone after every step of any
            :class:`torch.optim.Optimizer`. A copy or an unpickled model holds its own,
            of its gradients from the first step on. ``False``: they are trained as all
            others, but for those that an earlier call holds.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is pruned in it, or it was pruned and then sharded; it is
            unchanged.
    """
    parts = Parts(model, Ranks(model))
    parameters = named_parameters(model).values()
    weights = [weight for weight in parameters if weight.mask is not None]
    if not hold_zeros:
        # Others with a mask are held by an earlier call.
        weights = [
            w for w in weights if any(mask_of(*owner) is not None for owner in w.owners)
        ]
    elif not weights:
        weights = _with_zeros(parameters, parts)
    if not weights:
        raise ValueError(
            "make_permanent: expected a model pruned with torch.nn.utils.prune, or one "
            "whose convolutions and linear layers hold zeros among their weights, got "
            "one without any mask or zero"
        )
    with ExitStack() as undo:
        undo.callback(snapshot(model.modules()))
        for weight in weights:
            values = weight.part
            undo.callback(values.copy_, values.clone())
            pruned = torch.zeros_like(values, dtype=torch.bool)
            if weight.mask is None:
                pruned = values == 0
            for module, name in weight.owners:
                mask = mask_of(module, name)
                if mask is not None:
                    pruned |= mask == 0
                    # Written where they are: prune.remove lets go of memory that others
                    # may share, and of channels_last.
                    undo.callback(setattr, weight.dense, "data", values)
                    remove(module, name)
                    weight.dense.data = values.copy_(weight.dense.data)
                held = vars(module).get(HELD, {}).get(name)
                if held is not None and held.kept.shape == weight.dense.shape:
                    kept = parts.part(weight.name, held.kept)
                    pruned |= kept.to(pruned.device) == 0
            # The products are -0 where a weight was negative, NaN where it was inf.
            values.masked_fill_(pruned, 0)
            if hold_zeros:
                _hold(weight, ~pruned, parts, undo)
        undo.pop_all()


@torch.no_grad()
def prune_in_place(masks: Iterable[tuple[Weight, Tensor]], parts: Parts) -> None:
    """Set weights to 0 and hold them there, all of them or, after an error, none.

    For sharded models: FSDP2 sets a module's parameters by their names, under which a
    reparametrisation keeps something else.

    Args:
        masks: Weights, and this rank's parts of their bool masks.
        parts: How they are divided.
    """
    with ExitStack() as undo:
        for weight, mask in masks:
            values = weight.part
            undo.callback(snapshot(module for module, _ in weight.owners))
            undo.callback(values.copy_, values.clone())
            values.masked_fill_(~mask, 0)
            _hold(weight, mask, parts, undo)
        undo.pop_all()


def _with_zeros(parameters: Iterable[Weight], parts: Parts) -> list[Weight]:
    """The prunable weights that hold zeros, if they seem to come from a pruning.

    Layers start with nothing but zeros too, and other parameters with some.
    """
    prunable = [weight for weight in parameters if weight.prunable]
    zeros = parts.count({weight.name: weight.part == 0 for weight in prunable})
    if not any(0 < zeros[w.name] < w.dense.numel() for w in prunable):
        return []
    return [weight for weight in prunable if zeros[weight.name]]


class _Zeros:
    """Pruned entries of a module's parameter; they are 0 after any optimizer's step.

    A module keeps it among its attributes, so that it lives, is copied and pickled with
    the module. The parameter is whichever the module has: others may take its place
    (``load_state_dict(assign=True)``).

    Args:
        module: Owner of the parameter.
        name: Its name in the module.
        kept: Tensor of 0 and 1 of its shape, in bytes; 0 = pruned. It is whole, or
            sharded as the parameter is.
    """

    def __init__(self, module: nn.Module, name: str, kept: Tensor) -> None:
        self._module = ref(module)  # a cycle would keep both till the next collection
        self._name = name
        self.kept = kept
        # The parameter whose gradient is masked.
        self._attached: Callable[[], nn.Parameter | None] = lambda: None
        # Of a sharded parameter, this rank's part of the mask.
        self._part: Tensor | None = None

    def __getstate__(self) -> tuple[nn.Module | None, str, Tensor]:
        return self._module(), self._name, self.kept

    def __setstate__(self, state: tuple[nn.Module, str, Tensor]) -> None:
        self.__init__(*state)  # type: ignore[misc]
        _holding.add(self)

    def find_parameter(self) -> nn.Parameter | None:
        """The parameter, if the module has one that the mask fits."""
        module = self._module()
        found = None
        if module is not None:  # another pruning may have been put on it
            found = module._parameters.get(parameter_key(module, self._name))
        return found if found is None or found.shape == self.kept.shape else None

    def attached_to(self, parameter: nn.Parameter) -> bool:
        return self._attached() is parameter

    def attach(self, parameter: nn.Parameter) -> Callable[[], None]:
        """Mask the gradients of a parameter from now on; returns what undoes it."""
        itself = ref(self)

        def clear(parameter: nn.Parameter) -> None:
            zeros = itself()
            if zeros is not None:
                zeros.clear_gradient(parameter)

        self._attached, self._part = ref(parameter), None
        # Not register_hook: this one runs for gradients that other ranks send too, as
        # in FSDP2, and needs no copy.
        handle: RemovableHandle
        handle = parameter.register_post_accumulate_grad_hook(clear)  # type: ignore[no-untyped-call]
        return handle.remove

    def clear_gradient(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        if gradient.requires_grad:  # someone is about to differentiate it
            parameter.grad = gradient.masked_fill(self.kept.to(gradient.device) == 0, 0)
        else:
            self.clear(gradient)

    def restore(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Undo what a step has made of the pruned entries."""
        self.clear(parameter)
        # timm's Lookahead keeps other values there, and writes them after this step.
        slow = state.get("lookahead_slow_buff")
        if slow is not None:
            self.clear(slow)

    def clear(self, values: Tensor) -> None:
        """Write zeros where the parameter is pruned."""
        values, kept = self._beside(values.detach())
        integer = _INTEGERS.get(values.dtype)
        if integer is None:
            values.masked_fill_(kept == 0, 0)
        else:
            values.view(integer).mul_(kept)

    def _beside(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their mask; of sharded ones, this rank's part of both."""
        if not is_sharded(values):
            self.kept = self.kept.to(values.device)
            return values, self.kept
        if self._part is None:
            self._part = shard_like(values, self.kept.to(values.device))
        return part_of(values), self._part


# A NaN or a negative number, taken for an integer, is 0 too if it is multiplied by 0,
# and on a CPU that takes an eighth of the time of masked_fill_.
_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


_holding: WeakSet[_Zeros] = WeakSet()


def _hold(weight: Weight, mask: Tensor, parts: Parts, undo: ExitStack) -> None:
    """Hold what a mask prunes of a weight from now on."""
    kept = parts.joined(weight.name, mask.view(torch.uint8))
    for module, name in weight.owners:
        zeros = _Zeros(module, name, kept)
        undo.callback(_holding.discard, zeros)
        _holding.add(zeros)
        vars(module).setdefault(HELD, {})[name] = zeros
        if weight.dense.requires_grad:
            undo.callback(zeros.attach(weight.dense))


def _held_by(optimizer: Optimizer) -> Iterator[tuple[_Zeros, nn.Parameter]]:
    if _holding:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for zeros in _holding:
            parameter = zeros.find_parameter()
            if parameter is not None and id(parameter) in own:
                yield zeros, parameter


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for zeros, parameter in _held_by(optimizer):
        # A copy's, one that has taken another's place, one that was frozen.
        if not zeros.attached_to(parameter) and parameter.requires_grad:
            zeros.attach(parameter)
            zeros.clear_gradient(parameter)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for zeros, parameter in _held_by(optimizer):
        zeros.restore(parameter, optimizer.state.get(parameter, {}))


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
