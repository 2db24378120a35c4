"""Zeros that stay 0 in training: of a parameter, whichever modules own it by then.

They are 0 again after every step of an optimizer. Modules note the zeros of their
parameters too, so that copies and pickles hold them, and what a state dict puts in the
place of a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from force_plugin.model.registered import own_parameters
from force_plugin.model.torch_internals import tell_of_hooks
from force_plugin.model.weights import (
    HELD,
    Weight,
    is_sharded,
    local_values,
    parameter_key,
)
from force_plugin.parallel.shards import Shards, shard_like


class _Zeros:
    """Which entries of a parameter were pruned; they are 0 after any optimizer's step.

    Args:
        kept: Tensor of 0 and 1 of its shape, in bytes; 0 = pruned. It is whole, or
            sharded as the parameter is. It is not written to.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        # Of a sharded parameter, this rank's shard of the mask.
        self._local: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Zeros:
        return _Zeros(self.kept)

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
        """Write zeros where the parameter is pruned, over a NaN too."""
        values, kept = self._beside(values.detach())
        torch.where(kept.view(torch.bool), values, values.new_zeros(()), out=values)

    def _beside(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their mask; of sharded ones, this rank's shard of both."""
        if not is_sharded(values):
            self.kept = self.kept.to(values.device)
            return values, self.kept
        local = local_values(values)
        if self._local is None or self._local.shape != local.shape:
            self._local = shard_like(values, self.kept.to(values.device))
        return local, self._local


class _Hold:
    """What is held of a parameter, as the hook that masks its gradients.

    So it lives as long as the parameter. A weak reference to the parameter itself would
    keep :func:`torch.utils.swap_tensors` from it.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.zeros: dict[_Zeros, None] = {}
        # Whether it has run since the last step.
        self.ran = False
        frozen = not parameter.requires_grad
        if frozen:  # it may be trained later, and takes no hook as it is
            parameter.requires_grad_()
        try:
            # Not register_hook: this one runs for gradients that other ranks send too,
            # as in FSDP2, and needs no copy.
            register = parameter.register_post_accumulate_grad_hook
            self._handle: RemovableHandle = register(self)  # type: ignore[no-untyped-call]
        finally:
            if frozen:
                parameter.requires_grad_(False)
        _held[id(parameter)] = self

    def __call__(self, parameter: nn.Parameter) -> None:
        self.ran = True
        for zeros in self.zeros:
            zeros.clear_gradient(parameter)

    def before_step(self, parameter: nn.Parameter) -> None:
        """Mask a gradient that came without the hook, as after a swap of tensors."""
        if not self.ran and parameter.grad is not None:
            self(parameter)
            # PyTorch left the hooks behind: they are told of again.
            tell_of_hooks(parameter)
        self.ran = False

    def remove(self, parameter: nn.Parameter) -> None:
        """Hold nothing of it any more."""
        self._handle.remove()
        del _held[id(parameter)]


_held: WeakValueDictionary[int, _Hold] = WeakValueDictionary()
"""By the identity of a parameter, as long as it lives."""


def held_of(parameter: nn.Parameter) -> list[_Zeros]:
    """The zeros that are held of a parameter."""
    own = _held.get(id(parameter))
    return [] if own is None else [*own.zeros]


class _Note:
    """What a module notes of the zeros of one of its parameters.

    It lives, is copied and pickled with the module. Others may take the parameter's
    place (``load_state_dict(assign=True)``), and are held then.

    Args:
        module: Owner of the parameter. It is not kept alive.
        name: Name of the pruned tensor in the module.
        zeros: As the parameter has them.
    """

    def __init__(self, module: nn.Module, name: str, zeros: _Zeros) -> None:
        self._module = ref(module)  # a cycle would keep both till the next collection
        self._name = name
        self.zeros = zeros
        _notes.add(self)

    @property
    def kept(self) -> Tensor:
        return self.zeros.kept

    @property
    def owner(self) -> nn.Module | None:
        """The module, if it is still there."""
        return self._module()

    def find_parameter(self) -> nn.Parameter | None:
        """The parameter, if the module has this note, and one that the mask fits."""
        module = self.owner
        found = None
        if module is not None and vars(module).get(HELD, {}).get(self._name) is self:
            # Another pruning may have been put on it.
            found = own_parameters(module).get(parameter_key(module, self._name))
        return found if found is None or found.shape == self.kept.shape else None

    def follow(self) -> None:
        """Hold the parameter, whichever it is now."""
        parameter = self.find_parameter()
        if parameter is not None and _hold_parameter(parameter, self.zeros):
            self.zeros.clear_gradient(parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        module, parameter = memo.get(id(self.owner)), self.find_parameter()
        if not isinstance(module, nn.Module):  # copied without the module
            return self
        zeros = copy.deepcopy(self.zeros, memo)
        if parameter is not None:
            # The module may lose it before the first step, as in prepare_qat.
            _hold_parameter(copy.deepcopy(parameter, memo), zeros)
        return _Note(module, self._name, zeros)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parameter = self.find_parameter()
        return _note, (self.owner, self._name, self.zeros.kept, parameter)


def _note(
    module: nn.Module, name: str, kept: Tensor, parameter: nn.Parameter | None
) -> _Note:
    """A note from a pickle."""
    shared = [] if parameter is None else held_of(parameter)
    note = _Note(module, name, shared[0] if shared else _Zeros(kept))
    if parameter is not None:
        _hold_parameter(parameter, note.zeros)
    return note


_notes: WeakSet[_Note] = WeakSet()


def zeros_of(weight: Weight) -> set[_Zeros]:
    """What is held of a parameter, and will be where it has taken another's place."""
    found = set(held_of(weight.dense))
    for module, name in weight.owners:
        note = vars(module).get(HELD, {}).get(name)
        if note is not None and note.find_parameter() is weight.dense:
            found.add(note.zeros)
    return found


def hold(weight: Weight, mask: Tensor, shards: Shards, undo: ExitStack) -> None:
    """Hold what a mask prunes of a weight from now on, and nothing else."""
    zeros = _Zeros(shards.joined(weight.name, mask.view(torch.uint8)))
    earlier = held_of(weight.dense)
    undo.callback(hold_instead, weight.dense, earlier)
    hold_instead(weight.dense, [zeros])
    for module, name in weight.owners:
        vars(module).setdefault(HELD, {})[name] = _Note(module, name, zeros)


def hold_instead(parameter: nn.Parameter, several: Iterable[_Zeros]) -> None:
    """Hold these zeros of a parameter, and no others."""
    own = _held.get(id(parameter))
    if own is not None:
        own.remove(parameter)
    for zeros in several:
        _hold_parameter(parameter, zeros)


def _hold_parameter(parameter: nn.Parameter, zeros: _Zeros) -> bool:
    """Hold zeros of a parameter, besides those that are held already.

    Returns:
        Whether they were not held before.
    """
    _listen()
    own = _held.get(id(parameter)) or _Hold(parameter)
    new = zeros not in own.zeros
    own.zeros[zeros] = None
    return new


def _held_by(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, _Hold]]:
    for group in optimizer.param_groups if _held else ():
        for parameter in group["params"]:
            if own := _held.get(id(parameter)):
                yield parameter, own


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for note in _notes:
        note.follow()
    for parameter, own in _held_by(optimizer):
        own.before_step(parameter)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, own in _held_by(optimizer):
        for zeros in own.zeros:
            zeros.restore(parameter, optimizer.state.get(parameter, {}))


@torch.no_grad()
def _take_over(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Note in a module what is held of a parameter that it is given."""
    if parameter is None or isinstance(module, torch.jit.ScriptModule) or not _notes:
        return
    found = held_of(parameter) or _held_before(module, parameter)
    if not found:
        return
    notes = vars(module).setdefault(HELD, {})
    for other in [key for key, note in notes.items() if note.find_parameter() is None]:
        del notes[other]
    for zeros in found:
        _hold_parameter(parameter, zeros)
        notes[name] = _Note(module, name, zeros)


def _held_before(module: nn.Module, parameter: nn.Parameter) -> list[_Zeros]:
    """What is held of a parameter that another one was made of.

    They share their memory, as in ``torch.nn.utils.weight_norm``. Or the other one was
    computed from a parameter that its module has lost, and has its zeros, as in
    ``remove_weight_norm`` and ``remove_parametrizations``.

    Args:
        module: The module that is given the parameter.
        parameter: The new one.
    """
    if is_lazy(parameter) or parameter.is_meta or is_sharded(parameter):
        return []
    for note in _notes:
        zeros, kept = note.zeros, note.zeros.kept
        if is_sharded(kept):
            continue
        owner, other = note.owner, note.find_parameter()
        if other is not None:
            own = _kept_of_view(parameter, other, kept)
            if own is not None:
                return [zeros if own is kept else _Zeros(own)]
        lost = other is None or isinstance(owner, ParametrizationList)
        fits = lost and kept.numel() == parameter.numel()
        if fits and _has_zeros(parameter, kept, also_alone=owner is module):
            same = kept.shape == parameter.shape
            return [zeros if same else _Zeros(kept.view(parameter.shape))]
    return []


def _kept_of_view(parameter: Tensor, other: Tensor, kept: Tensor) -> Tensor | None:
    """What is kept of a parameter that has its values in the memory of another one.

    Args:
        parameter: It may be reshaped, transposed, or a part of the other one.
        other: The other one.
        kept: Tensor of 0 and 1 of the other one's shape.
    """
    if parameter.dtype != other.dtype or not _same_memory(parameter, other):
        return None
    begin = parameter.storage_offset() - other.storage_offset()
    if (parameter.shape, parameter.stride()) == (other.shape, other.stride()):
        return kept if begin == 0 else None
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    end = begin + sum((size - 1) * stride for size, stride in steps)
    if not other.is_contiguous() or begin < 0 or end >= other.numel():
        return None
    own = kept.contiguous().as_strided(parameter.shape, parameter.stride(), begin)
    return None if own.all() else own.clone()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    try:
        places = [tensor.untyped_storage().data_ptr() for tensor in (one, other)]
    except (RuntimeError, ValueError):  # a fake tensor
        return False
    return places[0] == places[1] != 0 and one.numel() > 0


def _has_zeros(parameter: Tensor, kept: Tensor, also_alone: bool) -> bool:
    """Whether a parameter is 0 where another was pruned, and nearly nowhere else.

    Args:
        parameter: The parameter.
        kept: Tensor of 0 and 1 of as many values.
        also_alone: Also if it is 0 everywhere.
    """
    values = parameter.detach().flatten()
    mask = kept.to(values.device).flatten() != 0
    number, left = int(mask.count_nonzero()), int(values.count_nonzero())
    if number == mask.numel() or not (also_alone or number < 2 * left):
        return False
    return left <= number and not bool(values.masked_fill(mask, 0).any())


def _listen() -> None:
    """Have optimizers and modules say what they do, from the first zeros on."""
    if not _handles:
        # A training step that is compiled as a whole is not to trace them.
        before, after, take_over = map(
            torch.compiler.disable, (_before_step, _after_step, _take_over)
        )
        _handles.extend(
            (
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
                register_module_parameter_registration_hook(take_over),
            )
        )


_handles: list[RemovableHandle] = []
