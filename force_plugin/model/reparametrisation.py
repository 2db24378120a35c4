"""Masks on weights by PyTorch's reparametrisation, in a form that can be copied.

A pruned module has ``weight_orig`` (the parameter), ``weight_mask`` (a buffer) and a
forward pre-hook that computes ``weight`` from the two, as in
:mod:`torch.nn.utils.prune`. In PyTorch, ``weight`` keeps the values and the autograd
graph of the last forward. :func:`copy.deepcopy` refuses such a tensor, and code that
reads it without calling its module trains nothing. In this package, ``weight`` is a
:class:`PrunedTensor` outside of the forward, which is computed whenever it is read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin.model.torch_internals import (
    DisableTorchFunctionSubclass,
    forward_hooks,
    forward_pre_hooks,
    parameter_order,
    rename_parameter,
    reorder_parameters,
    replace_forward_pre_hook,
    set_tensor_name,
    tensor_name,
    tree_map_only,
)


class PrunedTensor(Tensor):
    """The product mask ⊙ parameter of a module that is not running.

    Every function of PyTorch that gets this tensor is called with the present product
    instead, which has its graph. So any reader (a hook, another module, a loss) gets
    the present values, whether the owner is called or not. The tensor itself has a
    single number in memory, and a graph that leads to the parameter. A
    :class:`torch.autograd.Function`, which gets the tensor itself, sends its gradients
    along this graph.

    Args:
        module: Owner of the tensor. The tensor does not keep it alive.
        name: Name of the tensor within the module, e.g. ``"weight"``.
        original: The parameter, or a parameter that the module is about to get.
    """

    _owner: ref[nn.Module]
    _name: str
    # Identity of the parameter to which the tensor's own graph leads.
    _original: int
    _pointed_to: Tensor
    _kept: nn.Module | None

    @staticmethod
    def __new__(cls, module: nn.Module, name: str, original: Tensor) -> PrunedTensor:
        """Return a new tensor that refers to its module."""
        owner = ref(module)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = original
            if not original.requires_grad:  # a frozen parameter may be trained later
                leaf = torch.zeros((), requires_grad=True)
            made: PrunedTensor
            made = _Masked.apply(leaf, original, owner, name).as_subclass(cls)
        made._owner, made._name, made._original = owner, name, id(original)
        made._kept = None
        return made

    def fits(self, original: nn.Parameter) -> bool:
        """Whether the graph leads to a parameter of the present dtype and device."""
        with DisableTorchFunctionSubclass():
            return (
                self._original == id(original)
                and self.dtype == original.dtype
                and self.device == original.device
            )

    def read(self, whole: bool = True) -> Tensor:
        """Return the present product, or the parameter alone unless ``whole``.

        After the pruning was removed, return the parameter with the tensor's name.

        Raises:
            RuntimeError: The module is gone, or has no such parameter any more.
        """
        module = self._owner()
        original: Tensor | None = getattr(module, f"{self._name}_orig", None)
        if module is not None and original is not None:
            return masked(module, self._name) if whole else original
        permanent = getattr(module, self._name, None)
        if isinstance(permanent, Tensor) and not isinstance(permanent, PrunedTensor):
            return permanent
        raise RuntimeError(
            f"the pruned tensor {self._name!r} belongs to a module that is gone, or "
            f"has no such parameter any more; read module.{self._name} anew"
        )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function with the present products in place of pruned tensors."""
        if function in _OF_ITSELF:
            with DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        for written in _written(function, args, kwargs or {}):
            raise RuntimeError(
                f"the pruned tensor {written._name!r} is computed whenever it is read, "
                f"and what is written into it would be lost: write into "
                f"{written._name}_orig, or take reinitialise(model, fresh) for new "
                "initial values"
            )
        if function is Tensor.data_ptr:
            # The memory lives as long as the tensor, or till the next call.
            tensor: PrunedTensor = args[0]
            tensor._pointed_to = tensor.read().detach().contiguous()
            return tensor._pointed_to.data_ptr()
        whole = function not in _OF_THE_PARAMETER
        args, kwargs = tree_map_only(
            PrunedTensor, lambda tensor: tensor.read(whole), (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return the copied module's tensor, or the values if no module is copied."""
        copied = memo.get(id(self._owner()))
        if isinstance(copied, nn.Module):
            original = copy.deepcopy(self.read(whole=False), memo)
            return PrunedTensor(copied, self._name, original)
        return self.read().detach()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the tensor together with its module."""
        original = self.read(whole=False)
        return _from_pickle, (self._owner(), self._name, original)


def _written(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[PrunedTensor]:
    """Return the pruned tensors that a function of PyTorch would write into."""
    name = getattr(function, "__name__", "")
    targets = [kwargs.get("out")]
    if name == "__setitem__" or (_IN_PLACE.fullmatch(name) and name not in _NO_WRITES):
        targets += args[:1]
    found = []
    for target in targets:
        # No union, which the torch.compile of torch 2.7 does not know.
        several = target if isinstance(target, (tuple, list)) else [target]
        found += [one for one in several if isinstance(one, PrunedTensor)]
    return found


_IN_PLACE = re.compile(r"__i(add|sub|mul|truediv|pow|and|or|xor)__|\w*[a-z0-9]_")
_NO_WRITES = {"requires_grad_", "share_memory_"}


def _from_pickle(module: nn.Module, name: str, original: Tensor) -> PrunedTensor:
    made = PrunedTensor(module, name, original)
    made._kept = module  # the pickle may have no other reference to the module
    return made


class _Masked(torch.autograd.Function):
    """The graph of a pruned tensor. It saves no values, so it never becomes invalid."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, original: Tensor, owner: ref[nn.Module], name: str
    ) -> Tensor:
        ctx.leaf, ctx.owner, ctx.name = id(leaf), owner, name
        # Code that reads the tensor without __torch_function__ gets NaN.
        number = torch.full((), math.nan, dtype=original.dtype, device=original.device)
        return number.expand(original.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        module = ctx.owner()
        original = getattr(module, f"{ctx.name}_orig", None)
        if original is not None:
            gradient = gradient.masked_fill(getattr(module, f"{ctx.name}_mask") == 0, 0)
        else:
            original = getattr(module, ctx.name, None)
        if original is None or isinstance(original, PrunedTensor):
            return None, None, None, None
        if not original.requires_grad:
            return None, None, None, None
        if id(original) == ctx.leaf and original.dtype == gradient.dtype:
            return gradient, None, None, None
        # The parameter was frozen when the graph was made, or has replaced another
        # parameter since, or has another dtype now.
        torch.autograd.backward(original, gradient.to(original))
        return None, None, None, None


def _getters(*names: str) -> list[Callable[..., Any]]:
    return [getattr(Tensor, name).__get__ for name in names]


# Dictionaries, as torch.compile of torch 2.7 cannot look into a set.
_OF_ITSELF = dict.fromkeys([*_getters("is_leaf", "grad_fn", "grad"), Tensor.stride])
"""Functions that read the tensor itself: its graph, and strides for torch.compile."""

_OF_THE_PARAMETER = dict.fromkeys(
    [
        *_getters("shape", "dtype", "device", "ndim", "requires_grad"),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
    ]
)
"""Functions that need only the parameter, and no product."""


def masked(module: nn.Module, name: str) -> Tensor:
    """Return the parameter of a pruned tensor with zeros where its mask prunes."""
    original: Tensor = getattr(module, f"{name}_orig")
    mask: Tensor = getattr(module, f"{name}_mask")
    if mask.dtype == torch.bool:
        # This gives 0 also for NaN and inf, and autograd saves no mask of floats.
        return torch.where(mask, original, 0.0)
    return mask.to(original.dtype) * original


class Reparametrisation(prune.BasePruningMethod):
    """The hook that computes a pruned tensor for a forward."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Compute the tensor from parameter and mask, before a forward."""
        setattr(module, tensor_name(self), self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """Return the tensor with zeros where it is pruned.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.apply_mask`.
        """
        return masked(module, tensor_name(self))

    def remove(self, module: nn.Module) -> None:
        """Undo the reparametrisation, and set the parameter's pruned entries to 0."""
        with _as_it_was(module, tensor_name(self)):
            super().remove(module)


class Container(Reparametrisation, prune.PruningContainer):
    """Several prunings of one tensor."""


class _AtRest:
    """Puts the pruned tensor back when a forward is over."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.tensor = PrunedTensor(module, name, getattr(module, f"{name}_orig"))
        # The handle is pickled with the module. In another process, unpickling it makes
        # later hooks get higher numbers than this hook.
        self.handle = module.register_forward_hook(self, always_call=True)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if find_hook(module, self.name) is None:
            # PyTorch's prune.remove and its own prunings leave this hook behind.
            self.handle.remove()
        else:
            self.show(module)

    def show(self, module: nn.Module) -> None:
        """Set the tensor on the module, with a graph that leads to its parameter."""
        tensor = self.tensor
        original = getattr(module, f"{self.name}_orig", None)
        # A call may lend the module a tensor that is no parameter.
        if (
            isinstance(original, nn.Parameter)
            and not torch.compiler.is_compiling()
            and not tensor.fits(original)
        ):
            tensor = PrunedTensor(module, self.name, original)
            # The parameter has changed its dtype or device.
            if tensor._original == self.tensor._original:
                self.tensor = tensor
        if tensor._kept is not None:  # the module keeps the tensor, so it lives
            tensor._kept = None
        setattr(module, self.name, tensor)


def _at_rest(module: nn.Module, name: str) -> _AtRest | None:
    for hook in forward_hooks(module):
        if isinstance(hook, _AtRest) and hook.name == name:
            return hook
    return None


def find_hook(module: nn.Module, name: str) -> prune.BasePruningMethod | None:
    """Return the hook that prunes a tensor of a module, or ``None``."""
    for hook in _pruning_hooks(module):
        if tensor_name(hook) == name:
            return hook
    return None


def _pruning_hooks(module: nn.Module) -> Iterator[prune.BasePruningMethod]:
    for hook in forward_pre_hooks(module):
        if isinstance(hook, prune.BasePruningMethod):
            yield hook


def reparametrise(
    module: nn.Module, name: str, mask: Tensor, method: Reparametrisation
) -> Reparametrisation:
    """Put a mask on a tensor, and replace an earlier mask.

    Args:
        module: Module that holds the tensor.
        name: Name of the tensor within the module, e.g. ``"weight"``.
        mask: Bool tensor with the tensor's shape and device, True = kept. It is not
            copied.
        method: The hook. It joins the hooks of earlier prunings in a
            :class:`Container`.

    Returns:
        The hook that the module has afterwards.

    Raises:
        ValueError: The module has its own attribute under the name of the parameter or
            of the mask.
    """
    set_tensor_name(method, name)
    earlier = find_hook(module, name)
    hook = method
    if earlier is None:
        require_free(module, name, name)
        rename_parameter(module, name, f"{name}_orig")
        module.register_forward_pre_hook(hook)
    else:
        hook = Container()
        set_tensor_name(hook, name)
        several = isinstance(earlier, prune.PruningContainer)
        for one in (*(earlier if several else [earlier]), method):  # type: ignore[misc]
            hook.add_pruning_method(one)
        replace_forward_pre_hook(module, earlier, hook)
    module.register_buffer(f"{name}_mask", mask)
    if _at_rest(module, name) is None:
        _AtRest(module, name)
    show(module, name)
    return hook


def require_free(module: nn.Module, name: str, shown: str) -> None:
    """Raise ValueError if a pruning would take a name that a module already uses.

    Args:
        module: Owner of a tensor.
        name: Name of the tensor within the module.
        shown: Name of the tensor for the message.
    """
    for key in (f"{name}_orig", f"{name}_mask"):
        if find_hook(module, name) is None and hasattr(module, key):
            raise ValueError(
                f"{shown} cannot be pruned: its module has a {key} of its own, and "
                "torch.nn.utils.prune keeps something else under this name; give it "
                "another one, or leave the layer out with parameters="
            )


def show(module: nn.Module, name: str) -> None:
    """Set a pruned tensor of a module to its present values.

    If PyTorch's own hook prunes the tensor, it gets a graph.
    """
    if (rest := _at_rest(module, name)) is not None:
        rest.show(module)
        return
    hook = find_hook(module, name)
    assert hook is not None
    with torch.enable_grad():
        setattr(module, name, hook.apply_mask(module))


def show_all(model: nn.Module) -> None:
    """Set all pruned tensors of a model to their present values.

    Tensors that PyTorch's own methods have pruned are left out.
    """
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for hook in forward_hooks(module):
                if isinstance(hook, _AtRest):
                    hook.show(module)


def remove(module: nn.Module, name: str) -> None:
    """Undo the reparametrisation of a tensor, also that of PyTorch's own methods.

    Mirrors :func:`torch.nn.utils.prune.remove`. That function leaves a hook of this
    package behind, if one of PyTorch's prunings has followed.
    """
    with _as_it_was(module, name):
        prune.remove(module, name)


@contextmanager
def _as_it_was(module: nn.Module, name: str) -> Iterator[None]:
    """Return a context that keeps the parameter's place and removes the last hook."""
    pruned = f"{name}_orig"
    order = [name if key == pruned else key for key in parameter_order(module)]
    yield
    reorder_parameters(module, order)
    if (rest := _at_rest(module, name)) is not None:
        rest.handle.remove()
