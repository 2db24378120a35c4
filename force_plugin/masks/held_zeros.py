"""Zeros of parameters that stay 0 in training.

The zeros are 0 again after every step of an optimizer, whichever modules own the
parameter by then. Modules also note the zeros of their parameters. So copies, pickles,
and parameters that a state dict puts in place hold these zeros too.
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
    """The pruned entries of a parameter, which are 0 after any optimizer's step.

    Args:
        kept: Byte tensor of 0 and 1 of the parameter's shape; 0 = pruned. It is whole,
            or sharded like the parameter. It is not written to.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        # This rank's shard of the mask, if the parameter is sharded.
        self._local: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Zeros:
        return _Zeros(self.kept)

    def clear_gradient(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        if gradient.requires_grad:  # the caller may differentiate the gradient
            parameter.grad = gradient.masked_fill(self.kept.to(gradient.device) == 0, 0)
        else:
            self.clear(gradient)

    def restore(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Set the pruned entries to 0 after a step of an optimizer."""
        self.clear(parameter)
        # timm's Lookahead keeps its own values, and writes them after this step.
        slow = state.get("lookahead_slow_buff")
        if slow is not None:
            self.clear(slow)

    def clear(self, values: Tensor) -> None:
        """Write zeros where the parameter is pruned, also over NaN."""
        values, kept = self._beside(values.detach())
        torch.where(kept.view(torch.bool), values, values.new_zeros(()), out=values)

    def _beside(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and their mask; if sharded, this rank's shard of both."""
        if not is_sharded(values):
            self.kept = self.kept.to(values.device)
            return values, self.kept
        local = local_values(values)
        if self._local is None or self._local.shape != local.shape:
            self._local = shard_like(values, self.kept.to(values.device))
        return local, self._local


class _Hold:
    """The held zeros of a parameter, and the hook that masks its gradients.

    As a hook, this object lives as long as the parameter. A weak reference to the
    parameter would keep :func:`torch.utils.swap_tensors` from swapping the parameter.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.zeros: dict[_Zeros, None] = {}
        # Whether the hook has run since the last step.
        self.ran = False
        frozen = not parameter.requires_grad
        if frozen:  # a frozen parameter takes no hook, but may be trained later
            parameter.requires_grad_()
        try:
            # Unlike register_hook, this hook also runs for gradients that other ranks
            # send, as in FSDP2, and it needs no copy.
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
        """Mask a gradient if the hook did not run, as after a swap of tensors."""
        if not self.ran and parameter.grad is not None:
            self(parameter)
            tell_of_hooks(parameter)
        self.ran = False

    def remove(self, parameter: nn.Parameter) -> None:
        """Hold no zeros of the parameter any more."""
        self._handle.remove()
        del _held[id(parameter)]


_held: WeakValueDictionary[int, _Hold] = WeakValueDictionary()
"""The held zeros, by the identity of a parameter, as long as the parameter lives."""


def held_of(parameter: nn.Parameter) -> list[_Zeros]:
    """Return the held zeros of a parameter."""
    own = _held.get(id(parameter))
    return [] if own is None else [*own.zeros]


class _Note:
    """A module's note of the zeros of one of its parameters.

    The note lives with the module, and is copied and pickled with the module. If
    another parameter takes the place (``load_state_dict(assign=True)``), its zeros are
    held then.

    Args:
        module: Owner of the parameter. The note does not keep the module alive.
        name: Name of the pruned tensor in the module.
        zeros: The zeros of the parameter.
    """

    def __init__(self, module: nn.Module, name: str, zeros: _Zeros) -> None:
        # A cycle of references would keep both alive till the next collection.
        self._module = ref(module)
        self._name = name
        self.zeros = zeros
        _notes.add(self)

    @property
    def kept(self) -> Tensor:
        return self.zeros.kept

    @property
    def owner(self) -> nn.Module | None:
        """The module; ``None`` if it is gone."""
        return self._module()

    def find_parameter(self) -> nn.Parameter | None:
        """Return the parameter that the module has now, or ``None``.

        It is ``None`` if the module is gone or has another note, or if the mask does
        not fit the parameter.
        """
        module = self.owner
        found = None
        if module is not None and vars(module).get(HELD, {}).get(self._name) is self:
            # Another pruning may have renamed the parameter.
            found = own_parameters(module).get(parameter_key(module, self._name))
        return found if found is None or found.shape == self.kept.shape else None

    def follow(self) -> None:
        """Hold the zeros of the parameter that the module has now."""
        parameter = self.find_parameter()
        if parameter is not None and _hold_parameter(parameter, self.zeros):
            self.zeros.clear_gradient(parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        module, parameter = memo.get(id(self.owner)), self.find_parameter()
        if not isinstance(module, nn.Module):  # the note is copied without the module
            return self
        zeros = copy.deepcopy(self.zeros, memo)
        if parameter is not None:
            # The module may lose the copy before the first step, as in prepare_qat.
            _hold_parameter(copy.deepcopy(parameter, memo), zeros)
        return _Note(module, self._name, zeros)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parameter = self.find_parameter()
        return _note, (self.owner, self._name, self.zeros.kept, parameter)


def _note(
    module: nn.Module, name: str, kept: Tensor, parameter: nn.Parameter | None
) -> _Note:
    """Return a note from a pickle."""
    shared = [] if parameter is None else held_of(parameter)
    note = _Note(module, name, shared[0] if shared else _Zeros(kept))
    if parameter is not None:
        _hold_parameter(parameter, note.zeros)
    return note


_notes: WeakSet[_Note] = WeakSet()


def zeros_of(weight: Weight) -> set[_Zeros]:
    """Return the zeros of a parameter that are held, or that its owners have noted.

    A parameter that has just taken the place of another parameter has notes only.
    """
    found = set(held_of(weight.dense))
    for module, name in weight.owners:
        note = vars(module).get(HELD, {}).get(name)
        if note is not None and note.find_parameter() is weight.dense:
            found.add(note.zeros)
    return found


def hold(weight: Weight, mask: Tensor, shards: Shards, undo: ExitStack) -> None:
    """Hold the entries that a mask prunes, in place of zeros that were held before."""
    zeros = _Zeros(shards.joined(weight.name, mask.view(torch.uint8)))
    earlier = held_of(weight.dense)
    undo.callback(hold_instead, weight.dense, earlier)
    hold_instead(weight.dense, [zeros])
    for module, name in weight.owners:
        vars(module).setdefault(HELD, {})[name] = _Note(module, name, zeros)


def hold_instead(parameter: nn.Parameter, several: Iterable[_Zeros]) -> None:
    """Hold the given zeros of a parameter, in place of zeros that were held before."""
    own = _held.get(id(parameter))
    if own is not None:
        own.remove(parameter)
    for zeros in several:
        _hold_parameter(parameter, zeros)


def _hold_parameter(parameter: nn.Parameter, zeros: _Zeros) -> bool:
    """Hold zeros of a parameter, besides zeros that are held already.

    Returns:
        Whether these zeros are new, that is, were not held before.
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
    """Note in a module the held zeros of a parameter that the module gets."""
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
    """Return the held zeros of an earlier parameter from which a new one was made.

    Either the two parameters share their memory, as in ``torch.nn.utils.weight_norm``.
    Or the new parameter was computed from a parameter that its module has lost, and has
    the zeros of the lost parameter, as in ``remove_weight_norm`` and
    ``remove_parametrizations``.

    Args:
        module: The module that gets the new parameter.
        parameter: The new parameter.
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
    """Return the mask of a parameter that is a view into another parameter's memory.

    It is ``None`` if the parameter is no view of the other parameter, or if the view
    has no pruned entry.

    Args:
        parameter: A parameter that may be a reshaped, transposed or partial view of the
            other parameter.
        other: The other parameter.
        kept: Mask of the other parameter, with its shape; 0 = pruned.
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
    """Whether a parameter is 0 where a mask prunes, and mostly not 0 elsewhere.

    Args:
        parameter: The parameter.
        kept: Mask with as many values as the parameter; 0 = pruned.
        also_alone: Whether half of the kept entries or more may be 0 too.
    """
    values = parameter.detach().flatten()
    mask = kept.to(values.device).flatten() != 0
    number, left = int(mask.count_nonzero()), int(values.count_nonzero())
    if number == mask.numel() or not (also_alone or number < 2 * left):
        return False
    return left <= number and not bool(values.masked_fill(mask, 0).any())


def _listen() -> None:
    """Register hooks for optimizers and modules, when zeros are first held."""
    if not _handles:
        # A training step that is compiled as a whole must not trace these hooks.
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
